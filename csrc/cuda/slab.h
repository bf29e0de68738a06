// Slabs: the part of a filter that a block multiplies by, in shared memory as [tap][column][piece], a column like a
// pixel of the strip (source.h). A thread loads pieces of the depth, each in one access where they are so in
// memory, else value by value; or it copies them without waiting, where they are so and are not rounded.
#pragma once
#include <stdexcept>

#include "block.h"

namespace fused_preact::cuda {

// filter(n, d, r, s), n of N output channels, d of D summed ones.
template <class S>
struct FilterView {
  const S* data;
  int stride_n, stride_d, stride_r, stride_s;
  int N, D;
  bool along;  // pieces of the depth are pieces of the filter

  FilterView(const void* from, int64_t n, int64_t d, int64_t r, int64_t s, const Conv& conv, int outputs, int summed)
      : data(static_cast<const S*>(from)),
        stride_n(static_cast<int>(n)),
        stride_d(static_cast<int>(d)),
        stride_r(static_cast<int>(r)),
        stride_s(static_cast<int>(s)),
        N(outputs),
        D(summed) {
    constexpr int L = kLanes<S>;
    if ((N - 1) * n + (D - 1) * d + (conv.R - 1) * r + (conv.S - 1) * s > INT32_MAX)
      throw std::runtime_error("the CUDA kernels have no filters of 2^31 values");
    const auto whole = [](int64_t size, int64_t stride) { return size == 1 || stride % L == 0; };
    along = d == 1 && D % L == 0 && whole(N, n) && whole(conv.R, r) && whole(conv.S, s) && are_aligned(from);
  }
};

// Where a slab lies: columns are output channels, in whole groups of 16.
struct SlabLayout {
  int columns, log_pieces, column_bytes, tap_bytes, bytes;
  Divisor by_columns, by_tap;  // the columns, and the pieces of a tap

  SlabLayout() = default;
  SlabLayout(int of, int taps, const StripLayout& strip)
      : columns(of),
        log_pieces(strip.log_pieces),
        column_bytes(strip.pixel_bytes()),
        tap_bytes(columns * column_bytes),
        bytes(taps * tap_bytes),
        by_columns(columns),
        by_tap(columns << log_pieces) {}
};

// A piece of a slab: where it is in the filter and goes in the slab, and its first depth. It may be outside of the
// filter.
template <class S>
struct FilterPiece {
  const S* from;
  int at, d;
  bool inside;
};

// Piece i of a window's slab, of columns from n0 and depths from d0 on. Neighbours are neighbours in the filter, if
// they can be.
template <bool Along, class S>
__device__ __forceinline__ FilterPiece<S> filter_piece(const FilterView<S>& filter, const SlabLayout& slab,
                                                       const Window& w, int n0, int d0, int i) {
  constexpr int L = kLanes<S>;
  const int tap = slab.by_tap.quotient(i), rest = i - tap * (slab.columns << slab.log_pieces);
  const int r = w.by_taps.quotient(tap), s = tap - r * w.w.taps;
  const int piece = Along ? rest & ((1 << slab.log_pieces) - 1) : slab.by_columns.quotient(rest);
  const int column = Along ? rest >> slab.log_pieces : rest - piece * slab.columns;
  const int n = n0 + column, d = d0 + piece * L;
  const int at = tap * slab.tap_bytes + column * slab.column_bytes + piece * kPieceBytes;
  const int from = (w.h.tap0 + r * w.h.tap_step) * filter.stride_r + (w.w.tap0 + s * w.w.tap_step) * filter.stride_s +
                   n * filter.stride_n + d * filter.stride_d;
  return {filter.data + from, at, d, n < filter.N && d < filter.D};
}

template <bool Along, class S>
__device__ __forceinline__ uint4 load_filter(const FilterView<S>& filter, const FilterPiece<S>& piece) {
  if constexpr (Along) {
    return piece.inside ? *reinterpret_cast<const uint4*>(piece.from) : uint4{0, 0, 0, 0};
  } else {
    float v[kLanes<S>];
#pragma unroll
    for (int j = 0; j < kLanes<S>; ++j)
      v[j] = piece.inside && piece.d + j < filter.D ? widen(piece.from[j * filter.stride_d]) : 0.0f;
    return pack<S>(v);
  }
}

// Queues the copies of a slab whose pieces are pieces of the filter.
template <class S>
__device__ __forceinline__ void copy_slab(const FilterView<S>& filter, const SlabLayout& slab, const Window& w, int n0,
                                          int d0, std::byte* to) {
  const int pieces = w.taps() * slab.columns << slab.log_pieces;
#pragma unroll 1
  for (int i = threadIdx.x; i < pieces; i += kThreads) {
    const FilterPiece<S> piece = filter_piece<true>(filter, slab, w, n0, d0, i);
    cp_async(to + piece.at, piece.from, piece.inside);
  }
}

// Loads a slab, two pieces of a thread at a time.
template <class Op, bool Along>
__device__ __forceinline__ void load_slab(const FilterView<typename Op::Storage>& filter, const SlabLayout& slab,
                                          const Window& w, int n0, int d0, std::byte* to) {
  using S = typename Op::Storage;
  constexpr int kBatch = 2;
  const int pieces = w.taps() * slab.columns << slab.log_pieces;
#pragma unroll 1
  for (int first = threadIdx.x; first < pieces; first += kBatch * kThreads) {
    uint4 piece[kBatch];
    int at[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (first + b * kThreads < pieces) {
        const FilterPiece<S> of = filter_piece<Along>(filter, slab, w, n0, d0, first + b * kThreads);
        piece[b] = load_filter<Along>(filter, of), at[b] = of.at;
      }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kThreads >= pieces) continue;
      if constexpr (Op::kRounds) {
        float v[kLanes<S>];
        unpack<S>(v, piece[b]);
        piece[b] = Op::operand(v);
      }
      *reinterpret_cast<uint4*>(to + at[b]) = piece[b];
    }
  }
}

}  // namespace fused_preact::cuda
