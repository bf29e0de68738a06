// Tiles of output pixels and the strips they read.
//
// A strip is a run of operand rows of one image, already normalised (or the formed dy), with its zero padding, in the
// type E of the product: [rows][cols][C]. An output pixel reads R rows of it, S*C contiguous values in each.
//
// The pixels of a tile come image by image, or position by position: the same pixel of all its images, then the next
// one. Then all pixels of a register block have the same taps inside of the image, the others are left out, and the
// strip, whole images, has no padding: a 3x3 filter on 4x4 pixels takes 100 taps an image instead of 144.
#pragma once
#include "gemm.h"
#include "jobs.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// How output pixel (i, j) of a grid [P][Q] reads an image [H][W] of C channels: the R x S pixels from row
// i*stride_h + top, column j*stride_w + left on; those outside of the image are zero.
struct Window {
  int64_t N, H, W, C, P, Q, R, S, stride_h, stride_w, top, left;

  int64_t depth() const { return R * S * C; }

  bool is_pointwise() const {
    return R == 1 && S == 1 && stride_h == 1 && stride_w == 1 && top == 0 && left == 0 && P == H && Q == W;
  }

  // Whether no pixel reads padding.
  bool stays_inside() const {
    return top >= 0 && left >= 0 && (P - 1) * stride_h + top + R <= H && (Q - 1) * stride_w + left + S <= W;
  }
};

// Nothing couples the pixels of a pointwise window, so they make one long row that tiles of any length can cut.
inline Window flattened(Window w) {
  if (!w.is_pointwise()) return w;
  w.W = w.Q = w.N * w.P * w.Q;
  w.N = w.H = w.P = 1;
  return w;
}

inline Window forward_window(const Conv& c) {
  return flattened({c.N, c.H, c.W, c.C, c.P, c.Q, c.R, c.S, c.stride_h, c.stride_w, -c.pad_h, -c.pad_w});
}

// The output pixels [i0, i0 + rows) x [j0, j0 + cols) of `images` images from n on: whole rows, or a part of a
// flattened one; of more than one image all of them, so that the pixels follow each other in an NHWC tensor.
struct Tile {
  int64_t n, images, i0, rows, j0, cols;
  bool by_position;

  int64_t pixels() const { return images * rows * cols; }
  // Pixels that make register blocks together: those of one position, or all.
  int64_t run() const { return by_position ? images : pixels(); }
  // From one pixel of an image to the next one, and from a pixel of one image to that of the next, in the tile's order.
  int64_t pixel_step() const { return by_position ? images : 1; }
  int64_t image_step() const { return by_position ? 1 : rows * cols; }
  // Pixel p of the tile in the order of the tensor, from the tile's first one on, and the step to the next of its run.
  int64_t offset(int64_t p) const {
    return by_position ? uint32_t(p) % uint32_t(images) * (rows * cols) + uint32_t(p) / uint32_t(images) : p;
  }
  int64_t offset_step() const { return by_position ? rows * cols : 1; }
};

// A filter of more bytes does not stay in the second level cache.
constexpr int64_t kCachedFilterBytes = 1 << 21;

// A run of this many pixels is made of whole register blocks, of six rows and of eight.
constexpr int64_t kTileStep = 24;

// No more pixels, and bytes of its strip, make a tile by position than stay in the second level cache.
constexpr int64_t kMostPixelsByPosition = 512, kMostBytesByPosition = 3 << 18;

// Of all taps of `outputs` output pixels along one side of an image of `size` pixels, those that are inside of it.
inline int64_t count_inside(int64_t outputs, int64_t stride, int64_t first, int64_t taps, int64_t size) {
  int64_t count = 0;
  for (int64_t i = 0; i < outputs; ++i, first += stride)
    count += maximum<int64_t>(minimum(first + taps, size) - maximum<int64_t>(first, 0), 0);
  return count;
}

// Whether a tenth of the products of a window, or more, are with padding.
inline bool reads_much_padding(const Window& w) {
  const int64_t inside =
      count_inside(w.P, w.stride_h, w.top, w.R, w.H) * count_inside(w.Q, w.stride_w, w.left, w.S, w.W);
  return 10 * inside <= 9 * (w.P * w.R * w.Q * w.S);
}

// How many images make a tile by position, in whole register blocks where there are several tiles; or 0 where
// they are so few that short blocks cost what the padding does. Pairs of bf16 want whole ones: a product is
// two there, a load is not.
template <class E>
int64_t images_by_position(const Window& w) {
  constexpr int64_t kLeast = sizeof(E) == 2 ? kRows : 4;
  if (w.stays_inside()) return 0;
  const int64_t pixels = kMostPixelsByPosition / maximum<int64_t>(w.P * w.Q, 1);
  const int64_t bytes = w.H * w.W * w.C * int64_t{sizeof(E)};
  const int64_t most = minimum(pixels, kMostBytesByPosition / maximum<int64_t>(bytes, 1));
  const int64_t images = w.N <= most ? w.N : most - most % (most >= kRows ? kRows : kLeast);
  return images < kLeast || (images < kRows && !reads_much_padding(w)) ? 0 : images;
}

// From one image to the next in a strip by position. The pixels of a register block, and then those of an
// outer product, are this far apart: an odd number of cache lines, nine more than a multiple of sixteen,
// keeps them in different sets.
template <class E>
int64_t image_stride(const Window& w) {
  constexpr int64_t kLine = kCacheLine / int64_t{sizeof(E)};
  return (ceil_div(ceil_div(w.H * w.W * w.C, kLine) - 9, 16) * 16 + 9) * kLine;
}

// A row longer than so many tiles is cut: its strip would leave the second level cache. Each part reads the rows that
// the filter reaches by itself, where tiles of whole rows share them.
constexpr int64_t kTilesOfLongRow = 4;

// Cuts a window into tiles of about `pixels` output pixels, or by position into tiles of so many images. Small images
// share one anyway, since each tile reads all weights. A tile of whole rows has a multiple of `step`, but at the end of
// an image; there is room for multiples of `step` everywhere. The cut depends on the shape alone.
class Tiling {
 public:
  Tiling(const Window& w, int64_t pixels, int64_t images_by_position, int64_t step)
      : window_(w), by_position_(images_by_position > 0), step_(step) {
    if (by_position_) {
      rows_ = w.P, cols_ = w.Q, down_ = across_ = 1, images_ = images_by_position;
      return;
    }
    const bool is_flat = w.P == 1 && w.N == 1 && w.is_pointwise();
    const bool one_row = is_flat || (step == 1 && w.Q > kTilesOfLongRow * pixels);
    cols_ = one_row ? ceil_div(even_part(w.Q, pixels), kTileStep) * kTileStep : maximum<int64_t>(w.Q, 1);
    rows_ = one_row ? 1 : even_part(ceil_div(w.P, step), pixels / (cols_ * step)) * step;
    across_ = ceil_div(w.Q, cols_);
    down_ = ceil_div(w.P, rows_);
    images_ = down_ * across_ == 1 ? even_part(w.N, pixels / (rows_ * cols_)) : 1;
  }

  int64_t count() const { return ceil_div(window_.N, images_) * down_ * across_; }
  int64_t most_pixels() const { return images_ * rows_ * most_cols(); }

  template <class E>
  int64_t most_strip() const {
    if (by_position_) return images_ * image_stride<E>(window_);
    return images_ * ((rows_ - 1) * window_.stride_h + window_.R) * ((most_cols() - 1) * window_.stride_w + window_.S) *
           window_.C;
  }

  Tile operator[](int64_t t) const {
    const int64_t n = t / (down_ * across_) * images_, i0 = t / across_ % down_ * rows_, j0 = t % across_ * cols_;
    return {n,  minimum(images_, window_.N - n), i0,          minimum(rows_, window_.P - i0),
            j0, minimum(cols_, window_.Q - j0),  by_position_};
  }

 private:
  // Size of the equal parts, of at most `most`, that make up n.
  static int64_t even_part(int64_t n, int64_t most) {
    const int64_t parts = ceil_div(n, maximum<int64_t>(most, 1));
    return parts > 0 ? ceil_div(n, parts) : 1;
  }

  int64_t most_cols() const { return ceil_div(cols_, step_) * step_; }

  Window window_;
  bool by_position_;
  int64_t step_, rows_, cols_, down_, across_, images_;
};

// What multiply and outer read: one pointer an output pixel, and the step from one of its rows to the next.
template <class E>
struct Operand {
  const E** pixels;
  int64_t row_stride;
};

template <class E>
void point_at(Operand<E>& operand, const Window& w, const Tile& tile, const E* origin, int64_t image_stride,
              int64_t row_stride) {
  operand.row_stride = row_stride;
  for (int64_t n = 0; n < tile.images; ++n, origin += image_stride) {
    const E** pixel = operand.pixels + n * tile.image_step();
    for (int64_t i = 0; i < tile.rows; ++i)
      for (int64_t j = 0; j < tile.cols; ++j, pixel += tile.pixel_step())
        *pixel = origin + i * w.stride_h * row_stride + j * w.stride_w * w.C;
  }
}

// The rows and columns of one image that a tile reads.
inline int64_t strip_rows(const Window& w, const Tile& tile) { return (tile.rows - 1) * w.stride_h + w.R; }
inline int64_t strip_cols(const Window& w, const Tile& tile) { return (tile.cols - 1) * w.stride_w + w.S; }

// Fills the strip of a tile: [images][rows][cols][C].
template <class E, class Source>
void fill_strip(E* strip, const Window& w, const Tile& tile, const Source& source) {
  const int64_t h0 = tile.i0 * w.stride_h + w.top, w0 = tile.j0 * w.stride_w + w.left;
  const int64_t rows = strip_rows(w, tile), cols = strip_cols(w, tile);
  const int64_t first = minimum(maximum<int64_t>(-w0, 0), cols), last = maximum(minimum(w.W - w0, cols), first);
  E* row = strip;
  for (int64_t n = tile.n; n < tile.n + tile.images; ++n)
    for (int64_t h = h0; h < h0 + rows; ++h, row += cols * w.C) {
      if (h < 0 || h >= w.H) {
        memset(row, 0, cols * w.C * sizeof(E));
        continue;
      }
      memset(row, 0, first * w.C * sizeof(E));
      source.fill(row + first * w.C, w.C, (n * w.H + h) * w.W + w0 + first, last - first, 0, w.C);
      memset(row + last * w.C, 0, (cols - last) * w.C * sizeof(E));
    }
}

// Points the operand at the pixels that a tile reads: in place where the source is a plain tensor of type E and no
// padding is read, else in a strip that is filled here. By position, a pointer is to the first tap, inside or not.
template <class E, class Source>
void gather(Operand<E>& operand, E* strip, const Window& w, const Tile& tile, const Source& source) {
  const int64_t h0 = tile.i0 * w.stride_h + w.top, w0 = tile.j0 * w.stride_w + w.left;
  if (tile.by_position) {
    const int64_t pixels = w.H * w.W, step = image_stride<E>(w);
    for (int64_t n = 0; n < tile.images; ++n) source.fill(strip + n * step, w.C, (tile.n + n) * pixels, pixels, 0, w.C);
    return point_at(operand, w, tile, strip + (h0 * w.W + w0) * w.C, step, w.W * w.C);
  }
  const E* plain = source.template plain<E>();
  if (plain != nullptr && w.stays_inside())
    return point_at(operand, w, tile, plain + ((tile.n * w.H + h0) * w.W + w0) * w.C, w.H * w.W * w.C, w.W * w.C);
  fill_strip(strip, w, tile, source);
  const int64_t row = strip_cols(w, tile) * w.C;
  point_at(operand, w, tile, strip, strip_rows(w, tile) * row, row);
}

// What one thread needs for one tile, in its scratch memory: the operand and its strip, the index of each output
// pixel, and a block of values.
template <class E>
struct TileScratch {
  Operand<E> operand{nullptr, 0};
  int64_t* outputs;
  E* strip;
  Accumulate<E>* block;

  TileScratch(const Tiling& tiling, int64_t block_values) {
    const int64_t pixels = aligned(tiling.most_pixels() * sizeof(int64_t));
    const int64_t strip_bytes = aligned(tiling.most_strip<E>() * sizeof(E));
    char* base = static_cast<char*>(thread_scratch(2 * pixels + strip_bytes + block_values * sizeof(Accumulate<E>)));
    operand.pixels = reinterpret_cast<const E**>(base);
    outputs = reinterpret_cast<int64_t*>(base + pixels);
    strip = reinterpret_cast<E*>(base + 2 * pixels);
    block = reinterpret_cast<Accumulate<E>*>(base + 2 * pixels + strip_bytes);
  }
};

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
