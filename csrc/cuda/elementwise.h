// What the kernels without a product, over [pixels][C], have in common: how the blocks of a launch lie on the tensor,
// and the loop of a block over its pixels.
#pragma once
#include "values.h"

namespace fused_preact::cuda {

constexpr int kPieceThreads = 256, kBlocks = 3;  // of a block of a PieceGrid; blocks on a multiprocessor

// In place of a product, of which the sources ask the storage type.
template <class S>
struct Elementwise {
  using Storage = S;
};

// A block has a run of pixels of up to 32 pieces of the channels, a thread one piece of every n-th of them. As many
// blocks stand beside each other as have all channels; the groups behind each other are those that have room at once,
// or fewer where each thread then has `pixels_a_thread`.
struct PieceGrid {
  int log_pieces, columns, groups;  // pieces of a block, as a power of two; blocks beside, and behind each other
  int64_t pixels, run;              // of the tensor; of a block

  // Of C channels of S, with so many blocks on a multiprocessor.
  template <class S>
  static PieceGrid of(S, int64_t pixels, int64_t C, int pixels_a_thread, int blocks = kBlocks) {
    constexpr int L = kLanes<S>;
    const int log = log2_ceil(ceil_div<int64_t>(C, L), 5);
    const int64_t columns = ceil_div<int64_t>(C, L << log);
    const int64_t most = maximum<int64_t>(multiprocessors() * blocks / columns, 1);
    const int64_t groups = minimum(ceil_div<int64_t>(pixels, (kPieceThreads >> log) * pixels_a_thread), most);
    const int64_t run = ceil_div(pixels, groups);
    return {log, static_cast<int>(columns), static_cast<int>(ceil_div(pixels, run)), pixels, run};
  }

  unsigned blocks() const { return static_cast<unsigned>(groups * columns); }

  __device__ int pieces() const { return 1 << log_pieces; }
  __device__ int group() const { return static_cast<int>(blockIdx.x) / columns; }
  __device__ int column() const { return static_cast<int>(blockIdx.x) % columns; }
  // The piece of this thread, of those of all channels.
  __device__ int piece() const {
    return (column() << log_pieces) + static_cast<int>(threadIdx.x & ((1u << log_pieces) - 1));
  }
};

// use(i, pixel, valid, load(pixel)) for the pixels of this thread, `Ahead` of which are loaded at a time, of these
// number i. All threads of a block make as many calls: those of no valid pixel get what is not initialised.
template <int Ahead, class Load, class Use>
__device__ __forceinline__ void for_each_pixel(const PieceGrid& grid, const Load& load, const Use& use) {
  const int step = kPieceThreads >> grid.log_pieces;
  const int64_t begin = grid.group() * grid.run, end = minimum(begin + grid.run, grid.pixels);
  for (int64_t base = begin; base < end; base += Ahead * step) {
    decltype(load(base)) loaded[Ahead];
    int64_t pixel[Ahead];
#pragma unroll
    for (int i = 0; i < Ahead; ++i) {
      pixel[i] = base + i * step + (threadIdx.x >> grid.log_pieces);
      if (pixel[i] < end) loaded[i] = load(pixel[i]);
    }
#pragma unroll
    for (int i = 0; i < Ahead; ++i) use(i, pixel[i], pixel[i] < end, loaded[i]);
  }
}

}  // namespace fused_preact::cuda
