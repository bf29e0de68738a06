// What the kernels without a product, over [pixels][C], have in common: how the blocks of a launch lie on the tensor.
#pragma once
#include "values.h"

namespace fused_preact::cuda {

constexpr int kThreads = 256, kBlocks = 3;  // of a block; blocks on a multiprocessor

// A block has up to 32 pieces of the channels, a thread one piece of every n-th pixel; as many blocks stand beside each
// other as have all channels.
struct PieceGrid {
  int log_pieces, columns;  // pieces of a block, as a power of two; blocks beside each other

  // Of C channels of S.
  template <class S>
  static PieceGrid of(S, int64_t C) {
    constexpr int L = kLanes<S>;
    const int log = log2_ceil(ceil_div<int64_t>(C, L), 5);
    return {log, static_cast<int>(ceil_div<int64_t>(C, L << log))};
  }

  // Blocks behind each other: as many as have room at once, or fewer where each thread has so many pixels.
  int64_t groups(int64_t pixels, int pixels_a_thread) const {
    const int64_t most = maximum(multiprocessors() * kBlocks / columns, 1);
    return minimum(ceil_div<int64_t>(pixels, (kThreads >> log_pieces) * pixels_a_thread), most);
  }
};

}  // namespace fused_preact::cuda
