// One panel of a convolution over one tile: the product, and an epilogue on each register block of it.
#pragma once
#include "gemm.h"
#include "tile.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// How many pixels ahead the epilogues ask for what they will read and write: a panel is a column of cache lines, whose
// large stride the hardware does not foresee.
constexpr int64_t kAhead = 2 * kRows;

// How many bytes ahead they ask for what was last touched a step ago and is in no cache: further than the tiles that
// are being worked on, and no more than stays in the second level cache until it is read. Waiting for it at the start
// of each tile would take as long as the products of a 1x1 convolution.
constexpr int64_t kFar = 1 << 16;

template <class S>
FUSED_PREACT_INLINE void prefetch_far(const S* x, int64_t n) {
  prefetch(x + kFar / int64_t{sizeof(S)}, n);
}

// A sum over the depth is cut into runs of at most this many products. All pixels of the tile take one run of the
// panel before the next, so that the run's weights stay in the first level cache; and the sum of runs has the
// rounding error of a blocked product. Beside the rounding of bf16 that error is nothing, and runs of pairs are as
// long as the cache allows.
template <class E>
constexpr int64_t kRun = kPair<E> > 1 ? 432 : 144;

// Rows [top, bottom) of the filter, and values [left, right) of the S*C of each.
struct Taps {
  int64_t top, bottom, left, right;
};

// Those that are inside of the image for `count` pixels of a tile, from its pixel p on: of one position, or in one or
// two rows, for any of them. The others read padding: to leave out whole rows takes a twelfth off the products of a
// 3x3 filter on 8x8 pixels.
inline Taps taps_inside(const Window& w, const Tile& tile, uint32_t p, uint32_t count) {
  const uint32_t cols = tile.cols, rows = tile.rows;
  if (tile.by_position) {
    const uint32_t position = p / uint32_t(tile.images);
    const int64_t top = position / cols * w.stride_h + w.top, left = position % cols * w.stride_w + w.left;
    return {maximum<int64_t>(-top, 0), minimum(w.R, w.H - top), maximum<int64_t>(-left, 0) * w.C,
            minimum(w.S, w.W - left) * w.C};
  }
  const uint32_t first = p / cols, last = (p + count - 1) / cols;
  const int64_t top = (tile.i0 + first % rows) * w.stride_h + w.top, bottom = top + (last - first) * w.stride_h;
  if (tile.images > 1 && bottom > (w.P - 1) * w.stride_h + w.top) return {0, w.R, 0, w.S * w.C};  // of two images
  return {maximum<int64_t>(-bottom, 0), minimum(w.R, w.H - top), 0, w.S * w.C};
}

// Pixels [begin, end) of a tile.
struct Pixels {
  int64_t begin, end;
};

// Those for which no block clips its run: they read no padding, or their run is clipped already, or it is not worth it,
// where blocks have pixels of more than two rows.
inline Pixels pixels_inside(const Window& w, const Tile& tile) {
  if (tile.by_position || w.stays_inside() || tile.cols < kRows) return {0, tile.pixels()};
  if (tile.images > 1) return {0, 0};
  const int64_t begin = ceil_div(-w.top, w.stride_h), end = (w.H - w.R - w.top + w.stride_h) / w.stride_h;
  return {maximum<int64_t>(begin - tile.i0, 0) * tile.cols, (end - tile.i0) * tile.cols};
}

// `rows` rows of `length` values of each pixel, from row r and value i of the filter on, and their weights.
template <class E>
struct Run {
  int64_t r, i, rows, length;
  int64_t offset;
  const E* weights;
  bool is_first, is_last;

  // Without the taps that are outside of the image for `count` pixels from p on. A value has `width` weights. Out of
  // line: it is to take no registers from the products.
  __attribute__((noinline)) void clip(const Window& w, const Tile& tile, int64_t p, int64_t count, int64_t row_stride,
                                      int64_t width) {
    const Taps inside = taps_inside(w, tile, p, count);
    const int64_t above = maximum<int64_t>(inside.top - r, 0), before = maximum<int64_t>(inside.left - i, 0);
    rows = minimum(r + rows, inside.bottom) - r - above;
    length = minimum(i + length, inside.right) - i - before;
    offset += above * row_stride + before;
    weights += (above * w.S * w.C + before) * width;
  }
};

template <class E, int M, int V, class Sink, int... I>
FUSED_PREACT_INLINE void correlate_block(const Operand<E>& a, int64_t p, const Run<E>& run, Accumulate<E>* totals,
                                         Sink& sink, std::integer_sequence<int, I...> each) {
  constexpr int64_t kStep = kLanes<Accumulate<E>>;
  Accumulate<E>* total = totals + p * V * kStep;
  Vec<Accumulate<E>> acc[M * V] = {};
  multiply<E, M, V>(acc, a.pixels + p, run.offset, run.rows, a.row_stride, run.length, run.weights);
  if (!run.is_first) ((acc[I] += load(total + I * kStep)), ...);
  if (run.is_last)
    sink.template block<M, V>(p, acc, each);
  else
    (store(total + I * kStep, acc[I]), ...);
}

// Hands a block of totals to the epilogue.
template <class T, int M, int V, class Sink, int... I>
FUSED_PREACT_INLINE void finish_block(const T* totals, int64_t p, Sink& sink, std::integer_sequence<int, I...> each) {
  Vec<T> acc[M * V] = {load(totals + I * kLanes<T>)...};
  sink.template block<M, V>(p, acc, each);
}

// Whether the sums that an epilogue keeps over the blocks of a tile are to settle after the
// block of M pixels from p on.
template <int M>
FUSED_PREACT_INLINE bool settles_after(int64_t p) {
  return uint32_t(p) % (4 * kRows) >= 4 * kRows - M;
}

// Lanes of accumulator i of a panel of V columns whose last column has `last`.
template <class T, int V>
FUSED_PREACT_INLINE int64_t block_lanes(int i, int64_t last) {
  return i % V == V - 1 ? last : kLanes<T>;
}

// sink.block<M, V>(p, acc, each) for every block of the panel: acc[i], i in `each`, is the product for pixel p + i / V
// and column i % V. `totals` holds a vector for each pixel of the tile and each column.
template <class E, class Sink>
FUSED_PREACT_INLINE void correlate(const Operand<E>& a, const Window& w, const Tile& tile, const E* panel,
                                   int64_t columns, Accumulate<E>* totals, Sink& sink) {
  const int64_t length = w.R > 0 ? w.S * w.C : 0, parts = maximum<int64_t>(ceil_div(length, kRun<E>), 1);
  const int64_t part = ceil_div(ceil_div(length, parts), kPair<E>) * kPair<E>;
  const bool whole_rows = parts == 1 && !tile.by_position;
  const int64_t rows = whole_rows ? maximum<int64_t>(minimum(w.R, kRun<E> / maximum<int64_t>(length, 1)), 1) : 1;
  const Pixels whole = pixels_inside(w, tile);
  with_constant<kColumns>(columns, [&](auto V) __attribute__((always_inline)) {
    int64_t r = 0, i = 0;
    do {
      constexpr int64_t kWidth = V * kLanes<Accumulate<E>>;
      const Run<E> run{r,
                       i,
                       minimum(rows, w.R - r),
                       minimum(part, length - i),
                       r * a.row_stride + i,
                       panel + (r * length + i) * kWidth,
                       r == 0 && i == 0,
                       r + rows >= w.R && i + part >= length};
      for (int64_t first = 0; first < tile.pixels(); first += tile.run()) {
        Run<E> of_position = run;
        if (tile.by_position) of_position.clip(w, tile, first, 1, a.row_stride, kWidth);
        for_each_block(
            first + tile.run(),
            [&](int64_t p, auto M) __attribute__((always_inline)) {
              const Run<E>* inside = &of_position;
              Run<E> of_block;
              if (p < whole.begin || p + M > whole.end) {
                of_block = run;
                of_block.clip(w, tile, p, M, a.row_stride, kWidth);
                inside = &of_block;
              }
              correlate_block<E, M, V>(a, p, *inside, totals, sink, std::make_integer_sequence<int, M * V>{});
            },
            first);
      }
      i += part;
      if (i >= length) i = 0, r += rows;
    } while (r < w.R);
  });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
