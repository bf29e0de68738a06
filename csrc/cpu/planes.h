// wgrad by the products of amx.h, of tensors of bf16, and of float32 in three parts (split.h).
//
//   dw[c][k] += planes[c][position] * dy[position][k]          rows: channels, summed up: positions
//
// The positions are those of a grid, in which an output pixel of the tile and what a tap reads for it are the same step
// apart all over the tile: a row of it is as long as one of the strip. Positions between the rows have a dy of zero. The
// strip is transposed: each of its channels is a plane of the grid, or with strides one for each phase of rows and
// columns; a tap reads its plane from some position on. A value that is not finite reaches all taps of its channel.
// Bytes: a tile's activation and dy formed once, each part of them written and read in bf16; dw read and written.
#pragma once
#include "amx.h"
#include "outer.h"
#include "split.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

constexpr int64_t kLeastMatrixRows = 4;

// How many channels one product makes of tensors S; or 0 where it makes none, or too few.
template <class S>
int64_t matrix_rows(const Window& w) {
  if (!kHasMatrices || std::is_same_v<S, double>) return 0;
  const int64_t rows = largest_divisor(w.C, kMatrixRows, 1);
  return rows < kLeastMatrixRows ? 0 : rows;
}

#if defined(__AMX_BF16__)
// The positions of a tile: from one row of its pixels, and one image, to the next; how many there are, of which the last
// ones fill up a product; and a plane's, with those that only taps read.
struct Grid {
  int64_t row, image, positions, plane, planes_h, planes_w;

  Grid(const Window& w, const Tile& tile)
      : row(tile.cols + (w.S - 1) / w.stride_w),
        image((tile.rows + (w.R - 1) / w.stride_h) * row),
        positions(whole((tile.images - 1) * image + (tile.rows - 1) * row + tile.cols)),
        plane(whole(positions + (w.R - 1) / w.stride_h * row + (w.S - 1) / w.stride_w)),
        planes_h(minimum(w.stride_h, w.R)),
        planes_w(minimum(w.stride_w, w.S)) {}

  // From one channel to the next: an odd number of cache lines, or its rows would share sets of the cache.
  int64_t channel() const { return (planes_h * planes_w * plane / kMatrixDepth | 1) * kMatrixDepth; }

  // Where a tap of a channel begins.
  int64_t tap(const Window& w, int64_t r, int64_t s) const {
    return (r % w.stride_h * planes_w + s % w.stride_w) * plane + r / w.stride_h * row + s / w.stride_w;
  }

 private:
  static int64_t whole(int64_t n) { return ceil_div(n, kMatrixDepth) * kMatrixDepth; }
};

// to[c][i] = from[i][c] for n pixels and C channels, whose rows are `ld` and `step` apart; of float32 each part, `part`
// values after the one before.
inline void transpose_pixels(BFloat16* to, int64_t ld, int64_t part, const float* from, int64_t step, int64_t n,
                             int64_t C) {
  constexpr int64_t kBlock = kLanes<float>;
  for (int64_t i = 0; i < n; i += kBlock)
    for (int64_t c = 0; c < C; c += kBlock) {
      const int64_t pixels = minimum(n - i, kBlock), channels = minimum(C - c, kBlock);
      Vec<float> values[kBlock] = {};
      for (int64_t p = 0; p < pixels; ++p) values[p] = load_lanes(from + (i + p) * step + c, channels);
      transpose<float>(values);
      for (int64_t d = 0; d < channels; ++d) {
        const SplitVector v = split(values[d]);
        BFloat16* const row = to + (c + d) * ld + i;
        for (int64_t k = 0; k < kSplitParts; ++k) store_first_bits(row + k * part, v.parts[k], pixels);
      }
    }
}

inline void transpose_pixels(BFloat16* to, int64_t ld, int64_t, const BFloat16* from, int64_t step, int64_t n,
                             int64_t C) {
  constexpr int64_t kBlock = kLanes<uint32_t>;
  for (int64_t i = 0; i < n; i += kBlock)
    for (int64_t c = 0; c < C; c += 2 * kBlock) {
      const int64_t pixels = minimum(n - i, kBlock), channels = minimum(C - c, 2 * kBlock);
      const __mmask32 lanes = channels == 2 * kBlock ? kAllLanes : first_lanes(channels);
      Vec<uint32_t> pairs[kBlock] = {};
      for (int64_t p = 0; p < pixels; ++p)
        pairs[p] = (Vec<uint32_t>)_mm512_maskz_loadu_epi16(lanes, from + (i + p) * step + c);
      transpose<uint32_t>(pairs);
      for (int64_t d = 0; d < channels; d += 2) {
        BFloat16* const row = to + (c + d) * ld + i;
        store_first_bits(row, low_halves(pairs[d / 2]), pixels);
        if (d + 1 < channels) store_first_bits(row + ld, low_halves(pairs[d / 2] >> 16), pixels);
      }
    }
}

// Rows of two positions as pairs; of float32 each part, `part` pairs after the one before.
inline void pair_rows(BFloat16Pair* to, int64_t part, const float* first, const float* second, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<float>) {
    const SplitVector a = split(load(first + k)), b = split(load(second + k));
    for (int64_t i = 0; i < kSplitParts; ++i) store_as(&to[i * part + k].bits, paired(a.parts[i], b.parts[i]));
  }
}

inline void pair_rows(BFloat16Pair* to, int64_t, const BFloat16* first, const BFloat16* second, int64_t n) {
  interleave(to, first, second, n);
}

// What one tile gives to the products of wgrad, in the scratch memory of the thread: the planes of its activations, and
// its dy as it is, [steps][ld], and as pairs of positions, [steps / 2][ld].
template <class S>
struct MatrixOperands {
  static constexpr int64_t kParts = std::is_same_v<S, float> ? kSplitParts : 1;

  Grid grid;
  int64_t steps, ld;
  int64_t plane_part, pair_part;  // from one part of float32 to the next
  BFloat16* activation;
  BFloat16Pair* pairs;
  S* dy;

  MatrixOperands(const Window& w, const Tile& tile, const ActivationSource<S>& a, const GradientSource<S>& gradient,
                 int64_t begin, int64_t width)
      : grid(w, tile),
        steps(grid.positions),
        ld(width),
        plane_part(w.C * grid.channel()),
        pair_part(steps / 2 * width) {
    const int64_t parts[] = {aligned(kParts * plane_part * sizeof(BFloat16)),
                             aligned(kParts * pair_part * sizeof(BFloat16Pair)), aligned(steps * width * sizeof(S)),
                             aligned(strip_cols(w, tile) * w.C * sizeof(S))};
    char* base = static_cast<char*>(thread_scratch(parts[0] + parts[1] + parts[2] + parts[3]));
    activation = reinterpret_cast<BFloat16*>(base);
    pairs = reinterpret_cast<BFloat16Pair*>(base += parts[0]);
    dy = reinterpret_cast<S*>(base += parts[1]);
    fill_planes(reinterpret_cast<S*>(base + parts[2]), w, tile, a);
    pair_positions(w, tile, gradient, begin);
  }

 private:
  void fill_planes(S* values, const Window& w, const Tile& tile, const ActivationSource<S>& a) {
    memset(activation, 0, kParts * plane_part * sizeof(BFloat16));
    const int64_t h0 = tile.i0 * w.stride_h + w.top, w0 = tile.j0 * w.stride_w + w.left;
    const int64_t cols = strip_cols(w, tile), first = maximum<int64_t>(-w0, 0), last = minimum(w.W - w0, cols);
    if (first >= last) return;
    for (int64_t n = 0; n < tile.images; ++n)
      for (int64_t i = 0; i < strip_rows(w, tile); ++i) {
        if (i % w.stride_h >= grid.planes_h || h0 + i < 0 || h0 + i >= w.H) continue;
        a.fill(values, w.C, ((tile.n + n) * w.H + h0 + i) * w.W + w0 + first, last - first, 0, w.C);
        BFloat16* const row =
            activation + i % w.stride_h * grid.planes_w * grid.plane + n * grid.image + i / w.stride_h * grid.row;
        for (int64_t phase = 0; phase < grid.planes_w; ++phase) {
          const int64_t j = ceil_div(first - phase, w.stride_w), end = ceil_div(last - phase, w.stride_w);
          transpose_pixels(row + phase * grid.plane + j, grid.channel(), plane_part,
                           values + (j * w.stride_w + phase - first) * w.C, w.stride_w * w.C, end - j, w.C);
        }
      }
  }

  void pair_positions(const Window& w, const Tile& tile, const GradientSource<S>& gradient, int64_t begin) {
    memset(dy, 0, steps * ld * sizeof(S));
    const int64_t end = minimum(begin + ld, gradient.C);
    for (int64_t n = 0; n < tile.images; ++n)
      for (int64_t i = 0; i < tile.rows; ++i)
        gradient.fill(dy + (n * grid.image + i * grid.row) * ld, ld, ((tile.n + n) * w.P + tile.i0 + i) * w.Q + tile.j0,
                      tile.cols, begin, end);
    for (int64_t q = 0; q < steps; q += 2) pair_rows(pairs + q / 2 * ld, pair_part, dy + q * ld, dy + (q + 1) * ld, ld);
  }
};

// Adds to the rows of one tap and one panel of dW, or of a group's first tile stores in them.
template <int Blocks, int V, class S>
FUSED_PREACT_INLINE void outer_matrices(float* dw, bool is_first, const MatrixOperands<S>& x, const BFloat16* channel,
                                        int64_t rows, int64_t column) {
  using Sums = MatrixSums<Blocks, V>;
  constexpr int64_t kWidth = V * kLanes<float>;
  float* const to[] = {dw, dw + rows * kWidth};
  const BFloat16* const a[] = {channel, channel + rows * x.grid.channel()};
  if (is_first)
    Sums::zero();
  else
    Sums::load({to[0], to[1]}, kWidth);
  const BFloat16Pair* b = x.pairs + column;
  for (int64_t q = 0; q < x.steps; q += kMatrixDepth, b += kMatrixDepth / 2 * x.ld)
    for (int64_t i = MatrixOperands<S>::kParts - 1; i >= 0; --i)
      for (int64_t j = MatrixOperands<S>::kParts - 1 - i; j >= 0; --j)
        Sums::multiply(a, x.grid.channel(), i * x.plane_part + q, b + j * x.pair_part, x.ld);
  Sums::store(to, kWidth);
}

// Adds one tile to one panel of dW.
template <class S>
void add_panel_of_matrices(float* dw, bool is_first, const MatrixOperands<S>& x, const Window& w, int64_t rows,
                           int64_t column, int64_t columns) {
  with_constant<kColumns>(columns, [&](auto V) __attribute__((always_inline)) {
    constexpr int64_t kWidth = V * kLanes<float>;
    for (int64_t r = 0; r < w.R; ++r)
      for (int64_t s = 0; s < w.S; ++s) {
        const BFloat16* const tap = x.activation + x.grid.tap(w, r, s);
        int64_t c = 0;
        for (; c + 2 * rows <= w.C; c += 2 * rows, dw += 2 * rows * kWidth)
          outer_matrices<2, V>(dw, is_first, x, tap + c * x.grid.channel(), rows, column);
        if (c == w.C) continue;
        outer_matrices<1, V>(dw, is_first, x, tap + c * x.grid.channel(), rows, column);
        dw += rows * kWidth;
      }
  });
}
#endif

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
