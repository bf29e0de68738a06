#include "running.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <type_traits>

namespace fused_preact {

namespace {

// body(value) with a value of the type, which is one that expect_buffer lets pass.
template <class Body>
void with_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(c10::BFloat16{});
    default:
      return body(c10::Half{});
  }
}

// n values, `step` apart, in the two forms of torch.lerp, of which each is exact at its own end.
template <class Buffer, class Row>
void lerp(Buffer* values, int64_t step, const Row* batch, int64_t n, double momentum) {
  using T = std::conditional_t<std::is_same_v<Buffer, double>, double, float>;
  const T weight = static_cast<T>(momentum), rest = 1 - weight;
  const bool near = std::abs(weight) < T(0.5);
  for (int64_t i = 0; i < n; ++i) {
    Buffer& value = values[i * step];
    const T from = static_cast<T>(value), to = static_cast<T>(batch[i]), way = to - from;
    value = static_cast<Buffer>(near ? from + weight * way : to - way * rest);
  }
}

void expect_count(const Item& name, const Tensor& count) {
  expect(count.is_cpu() && count.scalar_type() == ScalarType::Long && count.numel() == 1, name,
         ": expected one int64 of the CPU, got ", torch::headeronly::toString(count.scalar_type()), " of shape ",
         text(count.sizes()));
}

void expect_rows(const Item& name, const Tensor& rows) {
  const ScalarType type = rows.scalar_type();
  expect(rows.is_cpu() && rows.dim() == 2 && rows.size(0) == kNormRows && rows.is_contiguous() &&
             (type == ScalarType::Float || type == ScalarType::Double),
         name, ": expected contiguous float32 or float64 of the CPU of shape [", kNormRows, ", C], got ",
         torch::headeronly::toString(type), " of shape ", text(rows.sizes()));
}

void expect_buffer(const Item& name, const Tensor& buffer, const Tensor& rows) {
  expect(buffer.is_cpu(), name, ": expected a tensor of the CPU, got one of another device");
  expect_parameter(name, buffer, {rows.size(1)});
}

void move(const Tensor& buffer, const Tensor& rows, NormRow row, double momentum) {
  const int64_t C = rows.size(1);
  with_type(buffer.scalar_type(), [&](auto value) {
    using Buffer = decltype(value);
    const auto move_to = [&](auto* batch) {
      lerp(static_cast<Buffer*>(buffer.mutable_data_ptr()), buffer.stride(0), batch + row * C, C, momentum);
    };
    if (rows.scalar_type() == ScalarType::Double)
      move_to(static_cast<const double*>(rows.const_data_ptr()));
    else
      move_to(static_cast<const float*>(rows.const_data_ptr()));
  });
}

}  // namespace

void update_running(const Tensors& mean, const Tensors& var, const Tensors& counts, const Tensors& rows,
                    const Sizes& units, std::optional<double> momentum) {
  expect_tensors("mean", mean, units.size());
  expect_tensors("var", var, units.size());
  for (size_t i = 0; i < counts.size(); ++i) expect_count(item("counts", i), counts[i]);
  for (size_t i = 0; i < units.size(); ++i) {
    expect(units[i] >= 0 && static_cast<size_t>(units[i]) < rows.size(), "units: expected from 0 to below ",
           rows.size(), ", got ", units[i]);
    const Tensor& batch = rows[units[i]];
    expect_rows(item("rows", units[i]), batch);
    expect_buffer(item("mean", i), mean[i], batch);
    expect_buffer(item("var", i), var[i], batch);
  }
  // What is refused leaves everything as it was: nothing is written up to here.
  for (const Tensor& count : counts) ++*static_cast<int64_t*>(count.mutable_data_ptr());
  if (!momentum) momentum = counts.empty() ? 0 : 1.0 / *static_cast<const int64_t*>(counts[0].const_data_ptr());
  for (size_t i = 0; i < units.size(); ++i) {
    move(mean[i], rows[units[i]], kMean, *momentum);
    move(var[i], rows[units[i]], kVariance, *momentum);
  }
}

}  // namespace fused_preact
