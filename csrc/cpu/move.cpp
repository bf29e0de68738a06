// move: the running statistics of many batch norms, one after the other by the calling thread.
//
// Layout: a buffer's values are a step apart, in a type of its own, of 16 bits too: torch's types convert them, whose
// functions must not be compiled for one instruction set among several. So this is compiled once, for any processor.
// Bytes: of each batch norm mean and variance read and written once, two rows read once.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../kernels.h"

namespace fused_preact::cpu {

namespace {

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

// As torch does it, in double: what is infinite stays so, which by way of a difference it would not.
template <class Buffer, class Row>
void move_values(Buffer* values, int64_t step, const Row* batch, int64_t C, double momentum) {
  for (int64_t c = 0; c < C; ++c) {
    Buffer& value = values[c * step];
    value = static_cast<Buffer>((1 - momentum) * static_cast<double>(value) + momentum * static_cast<double>(batch[c]));
  }
}

void move_buffer(void* buffer, int64_t step, Dtype type, const Running& norm, NormRow row, double momentum) {
  with_type(type, [&](auto value) {
    const auto move_to = [&](auto* rows) {
      move_values(static_cast<decltype(value)*>(buffer), step, rows + int64_t{row} * norm.C, norm.C, momentum);
    };
    if (norm.rows_type == Dtype::f64)
      move_to(static_cast<const double*>(norm.rows));
    else
      move_to(static_cast<const float*>(norm.rows));
  });
}

void move_norm(const Running& norm, const double* momentum) {
  if (norm.count != nullptr) ++*norm.count;
  if (norm.mean == nullptr) return;
  const double average = norm.count != nullptr ? 1.0 / static_cast<double>(*norm.count) : 0.0;
  const double weight = momentum != nullptr ? *momentum : average;
  move_buffer(norm.mean, norm.mean_step, norm.mean_type, norm, kMean, weight);
  move_buffer(norm.variance, norm.variance_step, norm.variance_type, norm, kVariance, weight);
}

}  // namespace

void move(const Running* norms, int64_t count, const double* momentum, Workspace&) {
  for (int64_t i = 0; i < count; ++i) move_norm(norms[i], momentum);
}

}  // namespace fused_preact::cpu
