// What one tile gives to the outer products of wgrad: its strip of activations, and its dy as a block of columns.
//
// One step of the sum is a pixel. Where the processor multiplies pairs of bf16 it is two: pixels that follow each other
// in a row of the tile, the last one of an odd row with zeros. The strip of pairs holds, beside each value, the one
// that the next pixel reads with the same tap, `stride_w` columns further on; where rows are odd, the columns of their
// last pixel stand once more at the end, paired with zeros. By position the two are the same pixel of two images.
#pragma once
#include "gemm.h"
#include "source.h"
#include "tile.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// The type of the operands for tensors of storage type S.
template <class S>
using OuterOperand = std::conditional_t<std::is_same_v<Native<S>, BFloat16>, BFloat16Pair, Accumulate<S>>;

// The dy of one tile for the channels from `begin` on: in place, or formed into `block`, [pixels][width], its last
// vector filled up with zeros, in the order of the tile.
template <class E, class S>
const E* gather_columns(E* block, int64_t& ld, const GradientSource<S>& dy, const Window& w, const Tile& tile,
                        int64_t begin, int64_t width) {
  const int64_t pixel = (tile.n * w.P + tile.i0) * w.Q + tile.j0, end = minimum(begin + width, dy.C);
  const E* plain = dy.template plain<E>();
  if (plain != nullptr && width == end - begin && !tile.by_position) {
    ld = dy.C;
    return plain + pixel * dy.C + begin;
  }
  if (width != end - begin) memset(block, 0, tile.pixels() * width * sizeof(E));
  const int64_t in_image = tile.rows * tile.cols;
  for (int64_t n = 0; n < tile.images; ++n)
    dy.fill(block + n * tile.image_step() * width, tile.pixel_step() * width, pixel + n * in_image, in_image, begin,
            end);
  ld = width;
  return block;
}

// activation.pixels has a pointer a step, dy a row of `width` values, `ld` apart. Lives in the
// scratch memory of the thread.
template <class E>
struct OuterOperands {
  int64_t steps, ld;
  Operand<E> activation;
  const E* dy;

  // Of what is gathered already.
  OuterOperands(int64_t count, int64_t step, const Operand<E>& a, const E* columns)
      : steps(count), ld(step), activation(a), dy(columns) {}

  template <class S>
  OuterOperands(const Window& w, const Tiling& tiling, const Tile& tile, const ActivationSource<S>& a,
                const GradientSource<S>& gradient, int64_t begin, int64_t width)
      : steps(tile.pixels()) {
    TileScratch<E> scratch(tiling, tiling.most_pixels() * width);
    gather(scratch.operand, scratch.strip, w, tile, a);
    activation = scratch.operand;
    dy = gather_columns(scratch.block, ld, gradient, w, tile, begin, width);
  }
};

#if defined(__AVX512BF16__)
// to[i] = first[i] and second[i], or zero where second is null.
inline void interleave(BFloat16Pair* to, const BFloat16* first, const BFloat16* second, int64_t n) {
  const auto each = [=](const auto& vector, const auto& value) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kBf16Lanes <= n; i += kBf16Lanes) store_as(&to[i].bits, vector(i));
    for (; i < n; ++i) to[i].bits = value(i);
  };
  if (second != nullptr)
    each([=](int64_t i) { return load_bits(first + i) | load_bits(second + i) << 16; },
         [=](int64_t i) { return first[i].bits | uint32_t(second[i].bits) << 16; });
  else
    each([=](int64_t i) { return load_bits(first + i); }, [=](int64_t i) { return uint32_t(first[i].bits); });
}

template <>
struct OuterOperands<BFloat16Pair> {
  int64_t steps, ld;
  Operand<BFloat16Pair> activation;
  const BFloat16Pair* dy;

  OuterOperands(const Window& w, const Tiling&, const Tile& tile, const ActivationSource<BFloat16>& a,
                const GradientSource<BFloat16>& gradient, int64_t begin, int64_t width)
      : ld(width) {
    if (tile.by_position)
      pair_images(w, tile, a, gradient, begin);
    else
      pair_neighbours(w, tile, a, gradient, begin);
  }

 private:
  // Rows of the tile and their pixels; rows of the strip and the values in each, without and
  // with the columns at the end.
  struct Sizes {
    int64_t tile_rows, tile_cols, rows, row, pair_row;
  };

  void pair_neighbours(const Window& w, const Tile& tile, const ActivationSource<BFloat16>& a,
                       const GradientSource<BFloat16>& gradient, int64_t begin) {
    steps = tile.images * tile.rows * ceil_div(tile.cols, 2);
    const int64_t rows = tile.images * strip_rows(w, tile), cols = strip_cols(w, tile), tail = tile.cols % 2 * w.S;
    const Sizes sizes{tile.images * tile.rows, tile.cols, rows, cols * w.C, (cols + tail) * w.C};
    BFloat16Pair *strip, *columns;
    BFloat16 *values, *block;
    take(sizes, strip, columns, values, block);
    fill_strip(values, w, tile, a);
    pair_strip(strip, values, w, sizes);
    point_at_pairs(w, tile, strip, sizes.pair_row);
    int64_t step = 0;
    const BFloat16* formed = gather_columns(block, step, gradient, w, tile, begin, ld);
    pair_columns(columns, formed, step, sizes);
    dy = columns;
  }

  // Rows are then positions of the tile and their images, or two images and what they hold.
  void pair_images(const Window& w, const Tile& tile, const ActivationSource<BFloat16>& a,
                   const GradientSource<BFloat16>& gradient, int64_t begin) {
    Tile pairs = tile;
    pairs.images = ceil_div(tile.images, 2);
    steps = pairs.pixels();
    const int64_t image = w.H * w.W * w.C, step = image_stride<BFloat16Pair>(w);
    const Sizes sizes{tile.rows * tile.cols, tile.images, pairs.images, 2 * image, step};
    BFloat16Pair *strip, *columns;
    BFloat16 *values, *block;
    take(sizes, strip, columns, values, block);
    a.fill(values, w.C, tile.n * w.H * w.W, tile.images * w.H * w.W, 0, w.C);
    for (int64_t n = 0; n < tile.images; n += 2, values += 2 * image)
      interleave(strip + n / 2 * step, values, n + 1 < tile.images ? values + image : nullptr, image);
    const int64_t top = tile.i0 * w.stride_h + w.top, left = tile.j0 * w.stride_w + w.left;
    point_at(activation, w, pairs, strip + (top * w.W + left) * w.C, step, w.W * w.C);
    int64_t ld_of_block = 0;
    const BFloat16* formed = gather_columns(block, ld_of_block, gradient, w, tile, begin, ld);
    pair_columns(columns, formed, ld_of_block, sizes);
    dy = columns;
  }

  void take(const Sizes& sizes, BFloat16Pair*& strip, BFloat16Pair*& columns, BFloat16*& values, BFloat16*& block) {
    const int64_t parts[] = {
        aligned(steps * sizeof(void*)), aligned(sizes.rows * sizes.pair_row * sizeof(BFloat16Pair)),
        aligned(steps * ld * sizeof(BFloat16Pair)), aligned(sizes.rows * sizes.row * sizeof(BFloat16)),
        aligned(sizes.tile_rows * sizes.tile_cols * ld * sizeof(BFloat16))};
    char* base = static_cast<char*>(thread_scratch(parts[0] + parts[1] + parts[2] + parts[3] + parts[4]));
    activation.pixels = reinterpret_cast<const BFloat16Pair**>(base);
    strip = reinterpret_cast<BFloat16Pair*>(base += parts[0]);
    columns = reinterpret_cast<BFloat16Pair*>(base += parts[1]);
    values = reinterpret_cast<BFloat16*>(base += parts[2]);
    block = reinterpret_cast<BFloat16*>(base + parts[3]);
  }

  static void pair_strip(BFloat16Pair* to, const BFloat16* from, const Window& w, const Sizes& sizes) {
    const int64_t next = w.stride_w * w.C, last = (sizes.tile_cols - 1) * next;
    for (int64_t row = 0; row < sizes.rows; ++row, from += sizes.row, to += sizes.pair_row) {
      // A filter of one column reads the first pixel of each pair alone.
      if (w.S == 1)
        for (int64_t i = 0; i < last; i += 2 * next) interleave(to + i, from + i, from + i + next, w.C);
      else if (sizes.row > next)
        interleave(to, from, from + next, sizes.row - next);
      if (sizes.pair_row > sizes.row) interleave(to + sizes.row, from + last, nullptr, w.S * w.C);
    }
  }

  void point_at_pairs(const Window& w, const Tile& tile, const BFloat16Pair* strip, int64_t row) {
    activation.row_stride = row;
    const BFloat16Pair** pixel = activation.pixels;
    for (int64_t n = 0; n < tile.images; ++n, strip += strip_rows(w, tile) * row)
      for (int64_t i = 0; i < tile.rows; ++i) {
        const BFloat16Pair* first = strip + i * w.stride_h * row;
        for (int64_t j = 0; j + 1 < tile.cols; j += 2) *pixel++ = first + j * w.stride_w * w.C;
        if (tile.cols % 2 != 0) *pixel++ = first + row - w.S * w.C;
      }
  }

  void pair_columns(BFloat16Pair* to, const BFloat16* from, int64_t step, const Sizes& sizes) const {
    for (int64_t row = 0; row < sizes.tile_rows; ++row, from += sizes.tile_cols * step)
      for (int64_t j = 0; j < sizes.tile_cols; j += 2, to += ld)
        interleave(to, from + j * step, j + 1 < sizes.tile_cols ? from + (j + 1) * step : nullptr, ld);
  }
};
#endif

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
