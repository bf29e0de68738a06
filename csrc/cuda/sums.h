// Sums by channel of what a kernel without a product reads or makes: those of a block in one loop over its pixels, and
// of all in the last block (merge.h).
#pragma once
#include "elementwise.h"
#include "merge.h"

namespace fused_preact::cuda {

// Slots: those of all groups of pixels in global memory, and what comes of them (MomentSlots, GradSlots).
template <class Slots>
struct Summed {
  PieceGrid grid;
  Teams teams;
  uint32_t* counters;
  Slots slots;

  // Over tensors of S; make(groups) gives the slots.
  template <class S, class Make>
  Summed(S, const PieceGrid& of, Workspace& workspace, const Make& make)
      : grid(of),
        teams(of.groups, Slots::bytes(1, kLanes<S> << of.log_pieces)),
        counters(take_counters(workspace, teams, of.columns)),
        slots(make(teams.groups)) {}

  // For the sums of each warp, then for those that are merged.
  template <class S>
  size_t shared_bytes(S) const {
    return maximum((kPieceThreads / 32 << grid.log_pieces) * kLanes<S> * sizeof(float4),
                   3 * kPieceThreads * sizeof(double));
  }
};

// for_each_pixel, in which use(lanes, i, pixel, valid, loaded) adds to the sums of a thread, of type Lanes.
template <class S, int Ahead, class Lanes, class Slots, class Load, class Use>
__device__ __forceinline__ void sum_up(const Summed<Slots>& p, const Load& load, const Use& use) {
  constexpr int L = kLanes<S>, kWarps = kPieceThreads / 32;
  float4* const shared = reinterpret_cast<float4*>(shared_memory());
  const int group = p.grid.group(), pieces = p.grid.pieces(), warp = threadIdx.x / 32;
  const int first = p.grid.column() * pieces * L, C = static_cast<int>(p.slots.C);

  Lanes lanes;
  for_each_pixel<Ahead>(
      p.grid, load, [&](int i, int64_t pixel, bool valid, const auto& loaded) { use(lanes, i, pixel, valid, loaded); });
  lanes.store(shared + warp * pieces * L, threadIdx.x % 32, pieces);
  __syncthreads();
  for (int i = threadIdx.x; i < pieces * L && first + i < C; i += kPieceThreads) {
    typename Slots::Total total;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total.add(shared[w * pieces * L + i]);
    p.slots.write(group, first + i, total);
  }
  merge_groups(p.counters + p.grid.column() * p.teams.counters(), p.teams, group,
               [&](int from, int count, int stride, bool finish) {
                 p.slots.template merge<kPieceThreads>(reinterpret_cast<double*>(shared), first,
                                                       minimum(first + pieces * L, C), from, count, stride, finish);
               });
}

}  // namespace fused_preact::cuda
