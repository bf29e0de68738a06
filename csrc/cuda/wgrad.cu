// wgrad: dweight[k,c,r,s] = sum over pixels of a * dy, dbias[k] = sum of dy.
//
// Layout: dy, x NHWC; dweight by its strides.
// The product of dy, transposed, with the activation at each tap, over pixels. One block is a run of tiles of output
// pixels, with `k_tile` output and `c_tile` input channels: for each tile it has dy and the strip of x in shared memory
// (copied while the tile before is multiplied; formed in place; by tables of where their pixels lie), where the strip
// serves all taps. A warp keeps units of 16 x 16 channels by tap in registers: nine taps of one pair of channel groups,
// or one tap of 2 x 4. Where there are fewer units than warps, warps share them and split the pixels of a tile; their
// sums are added in order at the end. The last block adds up the blocks (merge.h). A value of x that is not finite
// reaches all taps of its channel.
// Bytes: dy (or dz' and x') read once for each c_tile, x once for each k_tile, both once where the channels fit a
// block; dweight written once.
#include "wgrad.h"

namespace fused_preact::cuda {

namespace {

template <class Op, int Taps>
__global__ __launch_bounds__(kThreads, kWgradBlocks) void wgrad_kernel(const __grid_constant__ WgradParams<Op> p) {
  wgrad_block<Op, Taps>(p, static_cast<int>(blockIdx.x));
}

}  // namespace

void wgrad(const Conv& conv, Dtype dtype, const Gradient& dy, const Activation& x, const WeightGrad& dweight,
           void* dbias, Workspace& workspace) {
  with_product(dtype, [&](auto op) {
    using Op = decltype(op);
    const int64_t most = static_cast<int64_t>(multiprocessors()) * kWgradBlocks;
    with_wgrad<Op>(conv, dy, x, dweight, dbias, workspace, most, 0,
                   [&](const auto& p, auto taps, int blocks, size_t shared) {
                     launch(wgrad_kernel<Op, decltype(taps)::value>, blocks, kThreads, shared, workspace.stream, p);
                   });
  });
}

}  // namespace fused_preact::cuda
