// Convolutions of bf16 by the products of amx.h.
//
//   forward, dgrad:  sums[pixel][k] += strip[pixel][c] * filter[c][k]           rows: pixels of a line of the tile
//   wgrad:           dw[c][k] += strip'[c][position] * dy[position][k]          rows: channels; depth: positions
//
// A line is the pixels of a tile that are a step apart in its strip: one of its rows, or by position its images.
//
// wgrad sums over the positions of a grid, in which an output pixel of the tile and what its taps read are the same
// step apart whatever the tap: a row of it is as long as a row of the strip. Positions between the rows have a dy of
// zero. The strip is transposed, each of its channels a plane of the grid, or with strides one for each phase of rows
// and columns; a tap reads its plane from some position on. A value that is not finite may reach all taps of its
// channel in dw. Bytes of a tile in wgrad: strip and dy written and read in bf16, dw read and written.
#pragma once
#include "amx.h"
#include "correlate.h"
#include "outer.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// With fewer values in a row, or in wgrad fewer rows, most of a product would be of nothing; so it would in wgrad where
// a grid has more positions than this for each pixel, as on images of one row.
constexpr int64_t kLeastMatrixDepth = 8, kLeastMatrixRows = 4, kMostPositions = 3;

// How many channels and taps one product sums up: all runs of a filter's values are multiples of it; or 0 where the
// operands are no matrices of bf16.
template <class E>
int64_t matrix_depth(const Window& w, bool by_position) {
  if (!kHasMatrices || !std::is_same_v<E, BFloat16>) return 0;
  const int64_t depth = largest_divisor(by_position ? w.C : w.S * w.C, kMatrixDepth, kPair<BFloat16>);
  return depth < kLeastMatrixDepth ? 0 : depth;
}

// How many channels one product of wgrad makes, or 0.
template <class E>
int64_t matrix_rows(const Window& w) {
  if (!kHasMatrices || !std::is_same_v<E, BFloat16Pair>) return 0;
  const int64_t rows = largest_divisor(w.C, kMatrixRows, 1);
  const int64_t positions = (w.P + (w.R - 1) / w.stride_h) * (w.Q + (w.S - 1) / w.stride_w);
  return rows < kLeastMatrixRows || positions > kMostPositions * w.P * w.Q ? 0 : rows;
}

inline int64_t line_of(const Tile& tile) { return tile.by_position ? tile.images : tile.cols; }

#if defined(FUSED_PREACT_MATRICES)
// `filter_row` values of the filter, and `row_stride` of the strip, are from one row of the run to the next.
template <int Blocks, int V>
FUSED_PREACT_INLINE void multiply_run(const BFloat16* const (&a)[2], int64_t step, const Run<BFloat16>& run,
                                      int64_t row_stride, int64_t filter_row, int64_t depth, float* const (&sums)[2]) {
  using Sums = MatrixSums<Blocks, V>;
  constexpr int64_t kWidth = V * kLanes<float>;
  Sums::zero();
  for (int64_t r = 0; r < run.rows; ++r) {
    const BFloat16* const weights = run.weights + r * filter_row * kWidth;
    for (int64_t i = 0; i < run.length; i += depth)
      Sums::multiply(a, step, run.offset + r * row_stride + i,
                     reinterpret_cast<const BFloat16Pair*>(weights + i * kWidth), kWidth);
  }
  Sums::store(sums, kWidth);
}

// As correlate. `sums` holds two blocks of pixels. The last block of a line ends with it, and makes some of its sums
// again.
template <class Sink>
void correlate_matrices(const Operand<BFloat16>& a, const Window& w, const Tile& tile, int64_t depth,
                        const BFloat16* panel, int64_t columns, float* sums, Sink& sink) {
  const int64_t line = line_of(tile), rows = minimum(kMatrixRows, line);
  const int64_t step = line > 1 ? a.pixels[1] - a.pixels[0] : 0;
  with_constant<kColumns>(columns, [&](auto V) __attribute__((always_inline)) {
    constexpr int64_t kWidth = V * kLanes<float>;
    for (int64_t first = 0; first < tile.pixels(); first += line) {
      Run<BFloat16> run{0, 0, w.R, w.S * w.C, 0, panel, true, true};
      run.clip(w, tile, first, tile.by_position ? 1 : line, a.row_stride, kWidth);
      for (int64_t done = 0, end; done < line; done = end) {
        end = minimum(done + 2 * rows, line);
        const int64_t begin = minimum(done, line - rows), second = minimum(done + rows, line - rows);
        const BFloat16* const pixels[] = {a.pixels[first + begin], a.pixels[first + second]};
        float* const blocks[] = {sums, sums + (second - begin) * kWidth};
        if (end - done > rows)
          multiply_run<2, V>(pixels, step, run, a.row_stride, w.S * w.C, depth, blocks);
        else
          multiply_run<1, V>(pixels, step, run, a.row_stride, w.S * w.C, depth, blocks);
        for_each_block(
            first + end,
            [&](int64_t p, auto M) __attribute__((always_inline)) {
              finish_block<float, M, V>(sums + (p - first - begin) * kWidth, p, sink,
                                        std::make_integer_sequence<int, M * V>{});
            },
            first + done);
      }
    }
  });
}

// The positions of a tile: from one row of its pixels, and one image, to the next; how many there are, of which the
// last ones fill up a product; and a plane's, with those that only taps read.
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

// to[c][i] = from[i][c] for n pixels and C channels, whose rows are `ld` and `step` apart.
inline void transpose_pixels(BFloat16* to, int64_t ld, const BFloat16* from, int64_t step, int64_t n, int64_t C) {
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

// What one tile gives to the products of wgrad, in the scratch memory of the thread: the planes of its activations, and
// pairs of positions of dy, [steps][ld].
struct MatrixOperands {
  Grid grid;
  int64_t steps, ld;
  BFloat16* activation;
  BFloat16Pair* dy;

  MatrixOperands(const Window& w, const Tile& tile, const ActivationSource<BFloat16>& a,
                 const GradientSource<BFloat16>& gradient, int64_t begin, int64_t width)
      : grid(w, tile), steps(grid.positions / 2), ld(width) {
    const int64_t parts[] = {
        aligned(w.C * grid.channel() * sizeof(BFloat16)), aligned(steps * width * sizeof(BFloat16Pair)),
        aligned(grid.positions * width * sizeof(BFloat16)), aligned(strip_cols(w, tile) * w.C * sizeof(BFloat16))};
    char* const base = static_cast<char*>(thread_scratch(parts[0] + parts[1] + parts[2] + parts[3]));
    activation = reinterpret_cast<BFloat16*>(base);
    dy = reinterpret_cast<BFloat16Pair*>(base + parts[0]);
    fill_planes(reinterpret_cast<BFloat16*>(base + parts[0] + parts[1] + parts[2]), w, tile, a);
    pair_positions(reinterpret_cast<BFloat16*>(base + parts[0] + parts[1]), w, tile, gradient, begin);
  }

 private:
  void fill_planes(BFloat16* values, const Window& w, const Tile& tile, const ActivationSource<BFloat16>& a) {
    memset(activation, 0, w.C * grid.channel() * sizeof(BFloat16));
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
          transpose_pixels(row + phase * grid.plane + j, grid.channel(),
                           values + (j * w.stride_w + phase - first) * w.C, w.stride_w * w.C, end - j, w.C);
        }
      }
  }

  void pair_positions(BFloat16* block, const Window& w, const Tile& tile, const GradientSource<BFloat16>& gradient,
                      int64_t begin) {
    memset(block, 0, grid.positions * ld * sizeof(BFloat16));
    const int64_t end = minimum(begin + ld, gradient.C);
    for (int64_t n = 0; n < tile.images; ++n)
      for (int64_t i = 0; i < tile.rows; ++i)
        gradient.fill(block + (n * grid.image + i * grid.row) * ld, ld,
                      ((tile.n + n) * w.P + tile.i0 + i) * w.Q + tile.j0, tile.cols, begin, end);
    for (int64_t step = 0; step < steps; ++step, block += 2 * ld) interleave(dy + step * ld, block, block + ld, ld);
  }
};

// Adds to the rows of one tap and one panel of dW, or of a group's first tile stores in them.
template <int Blocks, int V>
FUSED_PREACT_INLINE void outer_matrices(float* dw, bool is_first, const MatrixOperands& x, const BFloat16* channel,
                                        int64_t rows, int64_t column) {
  using Sums = MatrixSums<Blocks, V>;
  constexpr int64_t kWidth = V * kLanes<float>;
  float* const to[] = {dw, dw + rows * kWidth};
  const BFloat16* const a[] = {channel, channel + rows * x.grid.channel()};
  if (is_first)
    Sums::zero();
  else
    Sums::load({to[0], to[1]}, kWidth);
  const BFloat16Pair* pairs = x.dy + column;
  for (int64_t q = 0; q < x.grid.positions; q += kMatrixDepth, pairs += kMatrixDepth / 2 * x.ld)
    Sums::multiply(a, x.grid.channel(), q, pairs, x.ld);
  Sums::store(to, kWidth);
}

// Adds one tile to one panel of dW.
inline void add_panel_of_matrices(float* dw, bool is_first, const MatrixOperands& x, const Window& w, int64_t rows,
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
