// move: the running statistics of many batch norms in few launches.
//
// Layout: a buffer's values are a step apart, in a type of its own. One block is one batch norm.
// Bytes: of each batch norm mean and variance read and written once, two rows read once.
#include "product.h"

namespace fused_preact::cuda {

namespace {

constexpr int kThreads = 128, kMostNorms = 60;  // in the 4 KiB of a kernel's parameters

struct MoveParams {
  Running norms[kMostNorms];
  double momentum;
  bool average;  // then momentum is one over the count
};

// The values of one buffer, as torch moves them: what is infinite stays so, which by way of a difference it would not.
template <class T, class Buffer, class Row>
__device__ void move_values(Buffer* values, int64_t step, const Row* row, int C, double momentum) {
  const T weight = static_cast<T>(momentum), rest = 1 - weight;
  for (int c = threadIdx.x; c < C; c += kThreads) {
    T from;
    if constexpr (std::is_same_v<T, Buffer>)
      from = values[c * step];
    else
      from = widen(values[c * step]);
    const T moved = rest * from + weight * static_cast<T>(row[c]);
    if constexpr (std::is_same_v<T, Buffer>)
      values[c * step] = moved;
    else
      values[c * step] = narrow<Buffer>(moved);
  }
}

__device__ void move_buffer(void* buffer, int64_t step, Dtype type, const Running& norm, NormRow row, double momentum) {
  const auto move_to = [&](const auto* rows) {
    rows += static_cast<int64_t>(row) * norm.C;
    if (type == Dtype::f64)
      move_values<double>(static_cast<double*>(buffer), step, rows, norm.C, momentum);
    else if (type == Dtype::bf16)
      move_values<float>(static_cast<__nv_bfloat16*>(buffer), step, rows, norm.C, momentum);
    else if (type == Dtype::f16)
      move_values<float>(static_cast<__half*>(buffer), step, rows, norm.C, momentum);
    else
      move_values<float>(static_cast<float*>(buffer), step, rows, norm.C, momentum);
  };
  if (norm.rows_type == Dtype::f64)
    move_to(static_cast<const double*>(norm.rows));
  else
    move_to(static_cast<const float*>(norm.rows));
}

__global__ __launch_bounds__(kThreads) void move_kernel(const __grid_constant__ MoveParams p) {
  take_turn();
  const Running& norm = p.norms[blockIdx.x];
  if (norm.mean != nullptr) {
    double momentum = p.momentum;
    if (p.average) momentum = norm.count != nullptr ? 1.0 / static_cast<double>(*norm.count + 1) : 0.0;
    move_buffer(norm.mean, norm.mean_step, norm.mean_type, norm, kMean, momentum);
    move_buffer(norm.variance, norm.variance_step, norm.variance_type, norm, kVariance, momentum);
  }
  __syncthreads();  // the count has been read
  if (threadIdx.x == 0 && norm.count != nullptr) ++*norm.count;
}

}  // namespace

void move(const Running* norms, int64_t count, const double* momentum, Workspace& workspace) {
  for (int64_t begin = 0; begin < count; begin += kMostNorms) {
    MoveParams p{{}, momentum != nullptr ? *momentum : 0.0, momentum == nullptr};
    const int64_t n = minimum<int64_t>(count - begin, kMostNorms);
    for (int64_t i = 0; i < n; ++i) p.norms[i] = norms[begin + i];
    launch(move_kernel, static_cast<unsigned>(n), kThreads, 0, workspace.stream, p);
  }
}

}  // namespace fused_preact::cuda
