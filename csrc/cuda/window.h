// Windows: which source pixels an output pixel reads, tiles of output pixels, and the strips of
// source pixels they read.
//
// A tile is a box of 2^a images x 2^b rows x 2^c columns of output pixels. Its strip is the box of source pixels that
// it reads, padding and unused pixels included; with one tap a dimension has only the pixels that are read.
#pragma once
#include <stdexcept>

#include "values.h"

namespace fused_preact::cuda {

constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of a block that multiplies

// n / value for n < 2^16 and value < 2^15.
struct Divisor {
  uint32_t value = 1, magic = 1;

  Divisor() = default;
  explicit Divisor(int divisor) : value(divisor), magic((1u << 31) / divisor + 1) {}
  __device__ int quotient(int n) const { return static_cast<int>((static_cast<uint64_t>(n) * magic) >> 31); }
};

// One dimension. Output pixel i, of `count`, reads the source pixels i*stride + first + j for j of [0, taps),
// those from 0 to size - 1; tap j is the filter's tap0 + j*tap_step. It is pixel to0 + i*to_step of the output
// tensor, which has `total`.
struct Axis {
  int64_t size, count, first, total;
  int stride, taps, tap0 = 0, tap_step = 1, to0 = 0, to_step = 1;

  // Of a convolution.
  static Axis forward(int64_t size, int64_t count, int64_t filter, int64_t stride, int64_t pad) {
    return {size, count, -pad, count, static_cast<int>(stride), static_cast<int>(filter)};
  }

  // Of its transpose, for the pixels phase, phase + stride, ...: the taps that reach them, in reverse.
  static Axis transposed(int64_t size, int64_t total, int64_t filter, int64_t stride, int64_t pad, int64_t phase) {
    const int64_t tap = (phase + pad) % stride;
    const int64_t taps = tap < filter ? ceil_div(filter - tap, stride) : 0;
    return {size,
            phase < total ? ceil_div(total - phase, stride) : 0,
            (phase + pad - tap) / stride - (taps - 1),
            total,
            1,
            static_cast<int>(taps),
            static_cast<int>(tap + (taps - 1) * stride),
            static_cast<int>(-stride),
            static_cast<int>(phase),
            static_cast<int>(stride)};
  }

  // The transpose of a stride of two has one tap, too, where there is one pixel: not the first of its filter.
  bool is_identity() const {
    return stride == 1 && taps == 1 && tap0 == 0 && first == 0 && size == count && count == total && to0 == 0;
  }
  __host__ __device__ int source_step() const { return taps > 1 ? 1 : stride; }  // source pixels to a strip pixel
  __host__ __device__ int strip_step() const { return taps > 1 ? stride : 1; }   // strip pixels to an output pixel
  int extent(int pixels) const { return taps > 1 ? (pixels - 1) * stride + taps : pixels; }
};

struct Tile {
  int64_t n, i, j;  // its first image, row and column
};

// Of what is compared with numbers below 2^30.
__device__ __forceinline__ int at_most(int64_t n) {
  constexpr int64_t kMost = 1 << 30;
  return static_cast<int>(n < -kMost ? -kMost : n > kMost ? kMost : n);
}

struct Window {
  int64_t images;
  Axis h, w;
  int log_n, log_h, log_w;  // of the box
  int rows, cols;           // of the strip of one image
  Divisor by_image, by_row, by_taps;
  int down, across, first_tile;

  int64_t tiles() const { return ceil_div<int64_t>(images, 1 << log_n) * down * across; }
  __host__ __device__ int taps() const { return h.taps * w.taps; }
  __host__ __device__ int box_pixels() const { return 1 << (log_n + log_h + log_w); }
  __host__ __device__ int strip_pixels() const { return (rows * cols) << log_n; }

  __device__ Tile tile(int t) const {
    t -= first_tile;
    const int line = t / across, image = line / down;
    return {int64_t{image} << log_n, (line - image * down) << log_h, int64_t{t - line * across} << log_w};
  }

  // The strip pixel that pixel p of the box reads with its first tap.
  __device__ int strip_pixel(int p) const {
    p &= box_pixels() - 1;
    const int n = p >> (log_h + log_w), i = (p >> log_w) & ((1 << log_h) - 1), j = p & ((1 << log_w) - 1);
    return (n * rows + i * h.strip_step()) * cols + j * w.strip_step();
  }

  // The source pixel at pixel 0 of the tile's strip, were it inside; others are counted from there.
  __device__ int64_t source_corner(const Tile& tile) const {
    const int64_t i = tile.i * h.stride + h.first, j = tile.j * w.stride + w.first;
    return (tile.n * h.size + i) * w.size + j;
  }
  // The output pixel at pixel 0 of the tile.
  __device__ int64_t target_corner(const Tile& tile) const {
    return (tile.n * h.total + h.to0 + tile.i * h.to_step) * w.total + w.to0 + tile.j * w.to_step;
  }

  // For each pixel of the strip the source pixel that belongs there, counted from the corner, or
  // -1 outside of the source.
  __device__ __forceinline__ void index_source(const Tile& tile, int* offsets) const {
    const int64_t i = tile.i * h.stride + h.first, j = tile.j * w.stride + w.first;
    const int n_end = at_most(images - tile.n), top = at_most(-i), left = at_most(-j);
    const int bottom = at_most(h.size - i), right = at_most(w.size - j);
    for (int q = threadIdx.x; q < strip_pixels(); q += kThreads) {
      const int image = by_image.quotient(q), rest = q - image * rows * cols, line = by_row.quotient(rest);
      const int row = line * h.source_step(), col = (rest - line * cols) * w.source_step();
      const bool inside = image < n_end && row >= top && row < bottom && col >= left && col < right;
      offsets[q] = inside ? (image * static_cast<int>(h.size) + row) * static_cast<int>(w.size) + col : -1;
    }
  }

  // For `count` pixels of the box the output pixel, counted from the corner, or -1 where there is none.
  __device__ __forceinline__ void index_target(const Tile& tile, int count, int* offsets) const {
    const int n_end = at_most(images - tile.n), i_end = at_most(h.count - tile.i), j_end = at_most(w.count - tile.j);
    for (int p = threadIdx.x; p < count; p += kThreads) {
      const int n = p >> (log_h + log_w), i = (p >> log_w) & ((1 << log_h) - 1), j = p & ((1 << log_w) - 1);
      const bool inside = p < box_pixels() && n < n_end && i < i_end && j < j_end;
      const int line = n * static_cast<int>(h.total) + i * h.to_step;
      offsets[p] = inside ? line * static_cast<int>(w.total) + j * w.to_step : -1;
    }
  }

  // Sets what follows from the axes and the box.
  void measure() {
    // The pixels of a strip and of a box are counted in 32 bits; those of an identity lie side by side.
    const int64_t lines = (maximum(h.total, h.size) << log_n) + h.extent(1 << log_h);
    if (!(h.is_identity() && w.is_identity()) && lines > INT32_MAX / maximum<int64_t>(maximum(w.size, w.total), 1))
      throw std::runtime_error("too many pixels in an image for the CUDA kernels");
    rows = h.extent(1 << log_h), cols = w.extent(1 << log_w);
    by_image = Divisor(rows * cols), by_row = Divisor(cols), by_taps = Divisor(maximum(w.taps, 1));
    down = static_cast<int>(ceil_div<int64_t>(h.count, 1 << log_h));
    across = static_cast<int>(ceil_div<int64_t>(w.count, 1 << log_w));
  }
};

// A window whose boxes have at most 2^log_pixels pixels. Nothing couples the pixels of an
// identity, so they make one row.
inline Window window(int64_t images, Axis h, Axis w, int log_pixels) {
  constexpr int kLogWidth = 4;  // 16 columns: a strip of 3x3 taps is then about 1.4 times its box
  const bool flat = h.is_identity() && w.is_identity();
  if (flat) {
    w = Axis::forward(images * h.size * w.size, images * h.size * w.size, 1, 1, 0);
    h = Axis::forward(1, 1, 1, 1, 0);
    images = 1;
  }
  Window result{images, h, w};
  result.log_w = log2_ceil(w.count, flat ? log_pixels : minimum(kLogWidth, log_pixels));
  result.log_h = log2_ceil(h.count, log_pixels - result.log_w);
  result.log_n = log2_ceil(images, log_pixels - result.log_w - result.log_h);
  result.measure();
  return result;
}

// Halves the box where it is more than one pixel.
inline bool shrink(Window& w) {
  int& log = w.log_n > 0 ? w.log_n : w.log_h >= w.log_w ? w.log_h : w.log_w;
  if (log == 0) return false;
  --log;
  w.measure();
  return true;
}

}  // namespace fused_preact::cuda
