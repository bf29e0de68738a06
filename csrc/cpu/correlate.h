// One panel of a convolution over one tile: the product, and an epilogue on each register block of it.
#pragma once
#include "gemm.h"
#include "tile.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// How many pixels ahead the epilogues ask for what they will read and write: a panel is a column of cache lines, whose
// large stride the hardware does not foresee.
constexpr int64_t kAhead = 2 * kRows;

// How many bytes ahead they ask for what was last touched a step ago and is in no cache: further than the tiles that are
// being worked on, and no more than stays in the second level cache until it is read. Waiting for it at the start of each
// tile would take as long as the products of a 1x1 convolution.
constexpr int64_t kFar = 1 << 16;

template <class S>
FUSED_PREACT_INLINE void prefetch_far(const S* x, int64_t n) {
  prefetch(x + kFar / int64_t{sizeof(S)}, n);
}

// A sum over the depth is cut into runs of at most this many products. All pixels of the tile take one run of the panel
// before the next, so that the run's weights stay in the first level cache; and the sum of runs has the rounding error of
// a blocked product.
constexpr int64_t kRun = 144;

// A product's tile: as many pixels as make a strip of kTileBytes, within limits. Tiles are worked on in at most kMostGroups
// groups, each with sums of its own.
constexpr int64_t kTileBytes = 1 << 15, kLeastPixels = 64, kMostPixels = 256, kMostGroups = 64;

inline int64_t tile_pixels(const Window& w, int64_t value_bytes) {
  const int64_t pixels = kTileBytes / maximum<int64_t>(w.C * value_bytes, 1);
  return minimum(maximum(pixels, kLeastPixels), kMostPixels);
}

// Rows [begin, end) of the filter.
struct RowRange {
  int64_t begin, end;
};

// Those that are inside of the image for any of `count` pixels of a tile, from its pixel p on, which are in one or two rows.
// The others read padding: to leave them out takes a twelfth off the products of a 3x3 filter on 8x8 pixels.
FUSED_PREACT_INLINE RowRange rows_inside(const Window& w, const Tile& tile, uint32_t p, uint32_t count) {
  const uint32_t cols = tile.cols, rows = tile.rows, first = p / cols, last = (p + count - 1) / cols;
  const int64_t top = (tile.i0 + first % rows) * w.stride_h + w.top, bottom = top + (last - first) * w.stride_h;
  if (tile.images > 1 && bottom > (w.P - 1) * w.stride_h + w.top) return {0, w.R};  // of two images
  return {maximum<int64_t>(-bottom, 0), minimum(w.R, w.H - top)};
}

// `rows` rows of `length` values of each pixel, from `offset` on, and their weights.
template <class E>
struct Run {
  int64_t offset, rows, length;
  const E* weights;
  bool is_first, is_last;

  // Without the rows that are not `inside`; it begins with row r of the filter, `weights_in_row` each. Out of line: it is
  // to take no registers from the products.
  __attribute__((noinline)) void clip(int64_t r, const RowRange& inside, int64_t row_stride, int64_t weights_in_row) {
    const int64_t skipped = maximum<int64_t>(inside.begin - r, 0);
    rows = minimum(r + rows, inside.end) - r - skipped;
    offset += skipped * row_stride;
    weights += skipped * weights_in_row;
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

// Whether the sums that an epilogue keeps over the blocks of a tile are to settle after its first p pixels.
FUSED_PREACT_INLINE bool is_few(int64_t p) { return p % (2 * kRows) == 0; }

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
  const int64_t length = w.R > 0 ? w.S * w.C : 0, parts = maximum<int64_t>(ceil_div(length, kRun), 1);
  const int64_t part = ceil_div(ceil_div(length, parts), kPair<E>) * kPair<E>;
  const int64_t rows = parts == 1 ? maximum<int64_t>(minimum(w.R, kRun / maximum<int64_t>(length, 1)), 1) : 1;
  const bool skips = !w.stays_inside() && tile.cols >= kRows;
  with_constant<kColumns>(columns, [&](auto V) __attribute__((always_inline)) {
    int64_t r = 0, i = 0;
    do {
      constexpr int64_t kWidth = V * kLanes<Accumulate<E>>;
      const Run<E> run{r * a.row_stride + i,      minimum(rows, w.R - r),
                       minimum(part, length - i), panel + (r * length + i) * kWidth,
                       r == 0 && i == 0,          r + rows >= w.R && i + part >= length};
      for_each_block(tile.pixels(), [&](int64_t p, auto M) __attribute__((always_inline)) {
        Run<E> inside = run;
        if (skips) inside.clip(r, rows_inside(w, tile, p, M), a.row_stride, length * kWidth);
        correlate_block<E, M, V>(a, p, inside, totals, sink, std::make_integer_sequence<int, M * V>{});
      });
      i += part;
      if (i >= length) i = 0, r += rows;
    } while (r < w.R);
  });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
