// gradients: dgrad and wgrad of one convolution, in one launch where both leave room: its blocks are those of the two.
//
// Neither waits for the other: they read the same tensors, from the cache where they are small, and one may work while
// the other merges its sums. Each has half of the blocks that have room at once, so that none waits for a place, and
// the launch has one beginning and one end. Two launches where dgrad has 64 columns, whose accumulators leave wgrad too
// few registers, and in float32, which has more arithmetic to fill its time with. Layout and bytes: those of both.
#include "dgrad.h"
#include "kernels.h"
#include "wgrad.h"

namespace fused_preact::cuda {

namespace {

constexpr int kColumns = 16;

template <int Taps, class Op>
__global__ __launch_bounds__(kThreads, kWgradBlocks) void gradients_kernel(
    const __grid_constant__ Correlation<Op, GradientSource<Op>> d,
    const __grid_constant__ typename DgradEpilogue<Op>::Output output, const __grid_constant__ WgradParams<Op> w,
    int wgrad_blocks) {
  const int block = static_cast<int>(blockIdx.x);
  if (block < wgrad_blocks)
    wgrad_block<Op, Taps>(w, block);
  else
    correlate_block<kColumns, Op, GradientSource<Op>, DgradEpilogue<Op>>(d, output, block - wgrad_blocks);
}

// Whether there was room for both in one launch.
template <class Op>
bool launch_gradients(const Conv& conv, const Gradient& dy, const Weight& weight, const Activation& x, const void* add,
                      void* dz, const NormGrad& grad, const WeightGrad& dweight, void* dbias, Workspace& workspace) {
  auto d = dgrad_correlation<Op>(conv, dy, weight);
  if (!is_narrow(d)) return false;
  const int64_t half = static_cast<int64_t>(multiprocessors()) * kWgradBlocks / 2;
  const auto of =
      plan<kColumns, DgradEpilogue<Op>>(d, workspace, half, dgrad_output<Op>(conv, x, add, dz, grad, workspace));
  const int64_t taken = static_cast<int64_t>(d.teams.counters()) * d.columns;
  with_wgrad<Op>(conv, dy, x, dweight, dbias, workspace, half, taken,
                 [&](const auto& w, auto taps, int wgrad_blocks, size_t wgrad_shared) {
                   launch(gradients_kernel<decltype(taps)::value, Op>, of.blocks + wgrad_blocks, kThreads,
                          maximum(of.shared_bytes, wgrad_shared), workspace.stream, d, of.output, w, wgrad_blocks);
                 });
  return true;
}

}  // namespace

void gradients(const Conv& conv, Dtype dtype, const Gradient& dy, const Weight& weight, const Activation& x,
               const void* add, void* dz, const NormGrad& grad, const WeightGrad& dweight, void* dbias,
               Workspace& workspace) {
  const auto together = [&](auto op) {
    return launch_gradients<decltype(op)>(conv, dy, weight, x, add, dz, grad, dweight, dbias, workspace);
  };
  if (dtype == Dtype::bf16 && together(MmaHalf<__nv_bfloat16>())) return;
  if (dtype == Dtype::f16 && together(MmaHalf<__half>())) return;
  kernels().wgrad(conv, dtype, dy, x, dweight, dbias, workspace);
  kernels().dgrad(conv, dtype, dy, weight, x, add, dz, grad, workspace);
}

}  // namespace fused_preact::cuda
