// Batch statistics of what a kernel without a product reads or makes.
#pragma once
#include "moments.h"
#include "sums.h"

namespace fused_preact::cuda {

// The rows of `next`, which reads [pixels][C] of S.
template <class S>
Summed<MomentSlots> summed_moments(S s, const PieceGrid& grid, int64_t C, const Affine& next, void* rows,
                                   Workspace& workspace) {
  return {s, grid, workspace, [&](int groups) { return MomentSlots(workspace, groups, C, grid.pixels, next, rows); }};
}

// for_each_pixel, in which use(v, pixel, loaded) makes of a valid pixel the values of S whose statistics are to be.
template <class S, int Ahead, class Load, class Use>
__device__ __forceinline__ void sum_moments(const Summed<MomentSlots>& p, const Load& load, const Use& use) {
  constexpr int L = kLanes<S>;
  sum_up<S, Ahead, MomentSums<L>>(p, load,
                                  [&](MomentSums<L>& sums, int i, int64_t pixel, bool valid, const auto& loaded) {
                                    float v[L] = {};
                                    if (valid) use(v, pixel, loaded);
                                    if (i == 0) sums.start(v, valid, p.grid.pieces());
                                    if (valid) sums.add(v);
                                  });
}

}  // namespace fused_preact::cuda
