// Batch statistics of what a kernel without a product reads or makes: those of a block in one loop over its pixels, and
// of all in the last block (merge.h).
#pragma once
#include "elementwise.h"
#include "moments.h"

namespace fused_preact::cuda {

struct Summed {
  PieceGrid grid;
  Teams teams;
  uint32_t* counters;
  MomentSlots slots;

  // The rows of `next`, which reads [pixels][C] of S.
  template <class S>
  Summed(S, const PieceGrid& of, int64_t C, const Affine& next, void* rows, Workspace& workspace)
      : grid(of),
        teams(of.groups, MomentSlots::bytes(1, kLanes<S> << of.log_pieces)),
        counters(take_counters(workspace, teams, of.columns)),
        slots(workspace, teams.groups, C, of.pixels, next, rows) {}

  // For the sums of each warp, then for those that are merged.
  template <class S>
  size_t shared_bytes(S) const {
    return maximum((kPieceThreads / 32 << grid.log_pieces) * kLanes<S> * sizeof(float4),
                   3 * kPieceThreads * sizeof(double));
  }
};

// for_each_pixel, in which use(v, pixel, loaded) makes of a valid pixel the values of S whose statistics are to be.
template <class S, int Ahead, class Load, class Use>
__device__ __forceinline__ void sum_up(const Summed& p, const Load& load, const Use& use) {
  constexpr int L = kLanes<S>, kWarps = kPieceThreads / 32;
  float4* const shared = reinterpret_cast<float4*>(shared_memory());
  const int group = p.grid.group(), pieces = p.grid.pieces(), warp = threadIdx.x / 32;
  const int first = p.grid.column() * pieces * L, C = static_cast<int>(p.slots.C);

  MomentSums<L> sums;
  for_each_pixel<Ahead>(p.grid, load, [&](int i, int64_t pixel, bool valid, const auto& loaded) {
    float v[L] = {};
    if (valid) use(v, pixel, loaded);
    if (i == 0) sums.start(v, valid, pieces);
    if (valid) sums.add(v);
  });
  sums.store(shared + warp * pieces * L, threadIdx.x % 32, pieces);
  __syncthreads();
  for (int i = threadIdx.x; i < pieces * L && first + i < C; i += kPieceThreads) {
    Moments moments;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) moments.add(shared[w * pieces * L + i]);
    p.slots.write(group, first + i, moments);
  }
  merge_groups(p.counters + p.grid.column() * p.teams.counters(), p.teams, group,
               [&](int from, int count, int stride, bool finish) {
                 p.slots.template merge<kPieceThreads>(reinterpret_cast<double*>(shared), first,
                                                       minimum(first + pieces * L, C), from, count, stride, finish);
               });
}

}  // namespace fused_preact::cuda
