// One panel of a convolution over one tile: the product, and an epilogue on each register block of it.
#pragma once
#include "gemm.h"
#include "tile.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// How many pixels ahead the epilogues ask for what they will read and write: a panel is a column of cache lines, whose
// large stride the hardware does not foresee.
constexpr int64_t kAhead = 2 * kRows;

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

// `rows` rows of `length` values of each pixel, from `offset` on.
struct Run {
  int64_t offset, rows, length;
  bool is_first, is_last;
};

template <class E, int M, int V, class Sink, int... I>
FUSED_PREACT_INLINE void correlate_block(const Operand<E>& a, int64_t p, const Run& run, const E* w,
                                         Accumulate<E>* totals, Sink& sink, std::integer_sequence<int, I...> each) {
  constexpr int64_t kStep = kLanes<Accumulate<E>>;
  Accumulate<E>* total = totals + p * V * kStep;
  Vec<Accumulate<E>> acc[M * V] = {};
  multiply<E, M, V>(acc, a.pixels + p, run.offset, run.rows, a.row_stride, run.length, w);
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
// and column i % V. `totals` holds n x `columns` vectors.
template <class E, class Sink>
FUSED_PREACT_INLINE void correlate(const Operand<E>& a, int64_t n, const Window& w, const E* panel, int64_t columns,
                                   Accumulate<E>* totals, Sink& sink) {
  const int64_t length = w.R > 0 ? w.S * w.C : 0, parts = maximum<int64_t>(ceil_div(length, kRun), 1);
  const int64_t part = ceil_div(ceil_div(length, parts), kPair<E>) * kPair<E>;
  const int64_t rows = parts == 1 ? maximum<int64_t>(minimum(w.R, kRun / maximum<int64_t>(length, 1)), 1) : 1;
  with_constant<kColumns>(columns, [&](auto V) __attribute__((always_inline)) {
    int64_t r = 0, i = 0;
    do {
      const Run run{r * a.row_stride + i, minimum(rows, w.R - r), minimum(part, length - i), r == 0 && i == 0,
                    r + rows >= w.R && i + part >= length};
      const E* weights = panel + (r * length + i) * V * kLanes<Accumulate<E>>;
      for_each_block(n, [&](int64_t p, auto M) __attribute__((always_inline)) {
        correlate_block<E, M, V>(a, p, run, weights, totals, sink, std::make_integer_sequence<int, M * V>{});
      });
      i += part;
      if (i >= length) i = 0, r += rows;
    } while (r < w.R);
  });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
