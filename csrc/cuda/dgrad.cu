// dgrad: dz = (conv_transpose(dy, weight) + add) * [z > 0], and the sums over dz that the batch norm's gradient needs.
//
// Layout: dy, x, add, dz NHWC; the filter by its strides. One block is a run of tiles of at most 128 pixels of x and 16
// or 64 of its channels (correlate.h).
// The transpose of a convolution of stride (a, b) is a*b correlations of stride 1, one for each class of input pixels
// (h mod a, w mod b), with the filter taps that reach the class, in reverse: the windows of one launch (correlate.h).
// dy is formed from dz' and x' of the unit behind while it is read. The epilogue applies the mask, writes dz, and adds
// up sum dz and sum dz*(x - mean), merged by the last block (merge.h).
// Bytes: dy (or dz' and x') read once a column of blocks, x and add read once, dz written once.
#include "dgrad.h"

namespace fused_preact::cuda {

void dgrad(const Conv& conv, Dtype dtype, const Gradient& dy, const Weight& weight, const Activation& x,
           const void* add, void* dz, const NormGrad& grad, Workspace& workspace) {
  with_product(dtype, [&](auto op) {
    using Op = decltype(op);
    auto c = dgrad_correlation<Op>(conv, dy, weight);
    launch_correlate<DgradEpilogue<Op>>(c, workspace, dgrad_output<Op>(conv, x, add, dz, grad, workspace));
  });
}

}  // namespace fused_preact::cuda
