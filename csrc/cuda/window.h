// Windows: which source pixels an output pixel reads, tiles of output pixels, and the strips of source pixels they read.
//
// A tile is a box of 2^a images x 2^b rows x 2^c columns of output pixels. Its strip is the box of source pixels that it
// reads, padding and unused pixels included; with one tap a dimension has only the pixels that are read.
#pragma once
#include "values.h"

namespace fused_preact::cuda {

// n / value for n < 2^16 and value < 2^15.
struct Divisor {
  uint32_t value = 1, magic = 1;

  Divisor() = default;
  explicit Divisor(int divisor) : value(divisor), magic((1u << 31) / divisor + 1) {}
  __device__ int quotient(int n) const { return static_cast<int>((static_cast<uint64_t>(n) * magic) >> 31); }
};

// One dimension. Output pixel i, of `count`, reads the source pixels i*stride + first + j for j of [0, taps), those from 0
// to size - 1; tap j is the filter's tap0 + j*tap_step. It is pixel to0 + i*to_step of the output tensor, which has
// `total`.
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

  bool is_identity() const {
    return stride == 1 && taps == 1 && first == 0 && size == count && count == total && to0 == 0;
  }
  __host__ __device__ int source_step() const { return taps > 1 ? 1 : stride; }  // source pixels to a strip pixel
  __host__ __device__ int strip_step() const { return taps > 1 ? stride : 1; }   // strip pixels to an output pixel
  int extent(int pixels) const { return taps > 1 ? (pixels - 1) * stride + taps : pixels; }
};

struct Tile {
  int64_t n, i, j;  // its first image, row and column
};

struct Window {
  int64_t images;
  Axis h, w;
  int log_n, log_h, log_w;  // of the box
  int rows, cols;           // of the strip of one image
  Divisor by_image, by_row;
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

  // The source pixel at pixel q of the strip, or -1 outside of the source.
  __device__ int64_t source_pixel(const Tile& tile, int q) const {
    const int image = by_image.quotient(q), rest = q - image * rows * cols, row = by_row.quotient(rest);
    const int64_t n = tile.n + image;
    const int64_t i = tile.i * h.stride + h.first + row * h.source_step();
    const int64_t j = tile.j * w.stride + w.first + (rest - row * cols) * w.source_step();
    const bool inside = n < images && i >= 0 && i < h.size && j >= 0 && j < w.size;
    return inside ? (n * h.size + i) * w.size + j : -1;
  }

  // The pixel of the output tensor that is pixel p of the box, or -1.
  __device__ int64_t target_pixel(const Tile& tile, int p) const {
    const int64_t n = tile.n + (p >> (log_h + log_w)), i = tile.i + ((p >> log_w) & ((1 << log_h) - 1));
    const int64_t j = tile.j + (p & ((1 << log_w) - 1));
    const bool inside = p < box_pixels() && n < images && i < h.count && j < w.count;
    return inside ? (n * h.total + h.to0 + i * h.to_step) * w.total + w.to0 + j * w.to_step : -1;
  }

  // Sets what follows from the axes and the box.
  void measure() {
    rows = h.extent(1 << log_h), cols = w.extent(1 << log_w);
    by_image = Divisor(rows * cols), by_row = Divisor(cols);
    down = static_cast<int>(ceil_div<int64_t>(h.count, 1 << log_h));
    across = static_cast<int>(ceil_div<int64_t>(w.count, 1 << log_w));
  }
};

// A window whose boxes have at most 2^log_pixels pixels. Nothing couples the pixels of an identity, so they make one row.
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
