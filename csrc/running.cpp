#include "running.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "launch.h"

namespace fused_preact {

namespace {

void expect_count(const Item& name, const Tensor& count) {
  expect(count.scalar_type() == ScalarType::Long && count.numel() == 1, name, ": expected one int64, got ",
         torch::headeronly::toString(count.scalar_type()), " of shape ", text(count.sizes()));
}

void expect_rows(const Item& name, const Tensor& rows) {
  const ScalarType type = rows.scalar_type();
  expect(rows.dim() == 2 && rows.size(0) == kNormRows && rows.is_contiguous() &&
             (type == ScalarType::Float || type == ScalarType::Double),
         name, ": expected contiguous float32 or float64 of shape [", kNormRows, ", C], got ",
         torch::headeronly::toString(type), " of shape ", text(rows.sizes()));
}

// One for each batch norm or count, whichever are more.
std::vector<Running> parse(const Tensors& mean, const Tensors& var, const Tensors& counts, const Tensors& rows,
                           const Sizes& units) {
  std::vector<Running> norms(std::max(units.size(), counts.size()));
  for (size_t i = 0; i < counts.size(); ++i) {
    expect_count(item("counts", i), counts[i]);
    norms[i].count = static_cast<int64_t*>(counts[i].mutable_data_ptr());
  }
  for (size_t i = 0; i < units.size(); ++i) {
    expect(units[i] >= 0 && static_cast<size_t>(units[i]) < rows.size(), "units: expected from 0 to below ",
           rows.size(), ", got ", units[i]);
    const Tensor& batch = rows[units[i]];
    expect_rows(item("rows", units[i]), batch);
    const int64_t C = batch.size(1);
    expect_parameter(item("mean", i), mean[i], {C});
    expect_parameter(item("var", i), var[i], {C});
    norms[i] = {mean[i].mutable_data_ptr(),
                var[i].mutable_data_ptr(),
                mean[i].stride(0),
                var[i].stride(0),
                batch.const_data_ptr(),
                norms[i].count,
                static_cast<int32_t>(C),
                kernel_dtype(mean[i].scalar_type()),
                kernel_dtype(var[i].scalar_type()),
                kernel_dtype(batch.scalar_type())};
  }
  return norms;
}

// What Kernels::move does, on the host.

// body(value) with a value of the type.
template <class Body>
void with_type(Dtype type, const Body& body) {
  switch (type) {
    case Dtype::f64:
      return body(double{});
    case Dtype::bf16:
      return body(c10::BFloat16{});
    case Dtype::f16:
      return body(c10::Half{});
    default:
      return body(float{});
  }
}

// C values in the two forms of torch.lerp, of which each is exact at its own end.
template <class Buffer, class Row>
void lerp(Buffer* values, int64_t step, const Row* batch, int64_t C, double momentum) {
  using T = std::conditional_t<std::is_same_v<Buffer, double>, double, float>;
  const T weight = static_cast<T>(momentum), rest = 1 - weight;
  const bool near = std::abs(weight) < T(0.5);
  for (int64_t c = 0; c < C; ++c) {
    Buffer& value = values[c * step];
    const T from = static_cast<T>(value), to = static_cast<T>(batch[c]), way = to - from;
    value = static_cast<Buffer>(near ? from + weight * way : to - way * rest);
  }
}

void move_buffer(void* buffer, int64_t step, Dtype type, const Running& norm, NormRow row, double momentum) {
  with_type(type, [&](auto value) {
    const auto move_to = [&](auto* rows) {
      lerp(static_cast<decltype(value)*>(buffer), step, rows + int64_t{row} * norm.C, norm.C, momentum);
    };
    if (norm.rows_type == Dtype::f64)
      move_to(static_cast<const double*>(norm.rows));
    else
      move_to(static_cast<const float*>(norm.rows));
  });
}

void move(const Running& norm, std::optional<double> momentum) {
  if (norm.count != nullptr) ++*norm.count;
  if (norm.mean == nullptr) return;
  if (!momentum) momentum = norm.count != nullptr ? 1.0 / static_cast<double>(*norm.count) : 0.0;
  move_buffer(norm.mean, norm.mean_step, norm.mean_type, norm, kMean, *momentum);
  move_buffer(norm.variance, norm.variance_step, norm.variance_type, norm, kVariance, *momentum);
}

}  // namespace

void update_running(const Tensors& mean, const Tensors& var, const Tensors& counts, const Tensors& rows,
                    const Sizes& units, std::optional<double> momentum) {
  expect_tensors("mean", mean, units.size());
  expect_tensors("var", var, units.size());
  if (mean.empty() && counts.empty()) return;
  const Tensor& any = mean.empty() ? counts[0] : mean[0];
  SameDevice{any, mean.empty() ? "counts" : "mean"}("mean", mean)("var", var)("counts", counts)("rows", rows);
  expect(momentum || units.size() <= 1, "momentum: expected a number for ", units.size(), " batch norms, got None");
  // What is refused leaves everything as it was: nothing is written up to here.
  const std::vector<Running> norms = parse(mean, var, counts, rows, units);
  const Device device = device_of(any);
  if (device.kernels.move != nullptr)
    device.kernels.move(norms.data(), norms.size(), momentum ? &*momentum : nullptr, Scope(*device.scratch));
  else
    for (const Running& norm : norms) move(norm, momentum);
}

}  // namespace fused_preact
