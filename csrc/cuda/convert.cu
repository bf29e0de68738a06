// convert: many tensors from one storage type to another in few launches, such as the weights
// of a stage under autocast.
//
// Layout: of each tensor `count` values in a row. One block is a run of kRun values of one tensor, found by its number
// among the runs of all. Bytes: each value read once and written once.
#include <stdexcept>

#include "product.h"

namespace fused_preact::cuda {

namespace {

constexpr int kThreads = 256, kAhead = 4, kRun = kThreads * kAhead;
constexpr int kMostTensors = 120;  // in the 4 KiB of a kernel's parameters

struct ConvertParams {
  Conversion tensors[kMostTensors];
  int first_run[kMostTensors + 1];
  int count;
};

template <class From, class To>
__global__ __launch_bounds__(kThreads) void convert_kernel(const __grid_constant__ ConvertParams p) {
  take_turn();
  const int run = static_cast<int>(blockIdx.x);
  int low = 0;
  for (int high = p.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (p.first_run[middle] <= run ? low : high) = middle;
  }
  const Conversion& tensor = p.tensors[low];
  const From* const from = static_cast<const From*>(tensor.from);
  To* const to = static_cast<To*>(tensor.to);
  const int64_t first = static_cast<int64_t>(run - p.first_run[low]) * kRun + threadIdx.x;
  From values[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (first + i * kThreads < tensor.count) values[i] = from[first + i * kThreads];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (first + i * kThreads < tensor.count) to[first + i * kThreads] = narrow<To>(widen(values[i]));
}

template <class From, class To>
void launch_all(const Conversion* tensors, int64_t count, const Workspace& workspace) {
  for (int64_t begin = 0; begin < count; begin += kMostTensors) {
    ConvertParams p;
    p.count = static_cast<int>(minimum<int64_t>(count - begin, kMostTensors));
    int64_t runs = 0;
    for (int i = 0; i < p.count; ++i) {
      p.tensors[i] = tensors[begin + i];
      p.first_run[i] = static_cast<int>(runs);
      runs += ceil_div<int64_t>(p.tensors[i].count, kRun);
      if (runs > INT32_MAX) throw std::runtime_error("too many values for the CUDA kernels to convert");
    }
    p.first_run[p.count] = static_cast<int>(runs);
    launch(convert_kernel<From, To>, static_cast<unsigned>(runs), kThreads, 0, workspace.stream, p);
  }
}

template <class From, class To>
void launch_all(From, To, const Conversion* tensors, int64_t count, const Workspace& workspace) {
  if constexpr (!std::is_same_v<From, To>)
    launch_all<From, To>(tensors, count, workspace);
  else
    throw std::runtime_error("a tensor is not converted to the type that it has");
}

}  // namespace

void convert(Dtype from, Dtype to, const Conversion* tensors, int64_t count, Workspace& workspace) {
  with_storage(from, [&](auto f) { with_storage(to, [&](auto t) { launch_all(f, t, tensors, count, workspace); }); });
}

}  // namespace fused_preact::cuda
