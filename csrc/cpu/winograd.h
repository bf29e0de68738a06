// Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, arXiv:1509.09308): 2x2 outputs of a 3x3 filter of stride 1
// from 16 products for each pair of channels, where the sum over taps takes 36.
//
//   forward, dgrad:  y  = A' [sum over c     of (G w G') * (B' d B)] A       d: the 4x4 values that the outputs read
//   wgrad:           dw = G' [sum over quads of (A dy A') * (B' d B)] G      the transpose of it
//
//        1  0 -1  0          1   0   0           1  0
//   B' = 0  1  1  0     G = .5  .5  .5      A =  1  1
//        0 -1  1  0         .5 -.5  .5           1 -1
//        0 -1  0  1          0   0   1           0  1
//
// The transforms are additions, and halves: of small integers all of this is exact. The 2x2 outputs are a quad. Its
// values are [16][channels], position by position, quad after quad: to the products of gemm.h a position is a filter of
// one tap. A value that is not finite reaches the outputs that read it and no others, and all taps of its channel in
// dw; an infinity at times as NaN.
// Bytes of a tile: its quads are four times its strip, and stay in the second level cache while all panels pass over
// them, of a large filter those of one position; the products of a panel are four times its block.
#pragma once
#include "correlate.h"
#include "outer.h"
#include "pack.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

constexpr int64_t kPositions = 16;

// From one position to the next in a filter: a row more than its channels, which keeps positions in
// different sets of a cache.
inline int64_t position_rows(int64_t C) { return C + 1; }

// With fewer channels than this the transforms cost what the products save. With fewer quads the filter's does: more
// are needed of one that is read from the cache of all cores, or from memory.
constexpr int64_t kLeastChannels = 16, kLeastQuads = 48, kLeastQuadsOfLarge = 128, kLargeFilterBytes = int64_t{8} << 20;
constexpr int64_t kMostRowBytes = int64_t{1} << 20;  // of a row of quads, which are all of a tile's at once

template <class E>
int64_t transformed_filter_bytes(const Window& w, int64_t outer) {
  return kPositions * w.C * outer * int64_t{sizeof(E)};
}

// Whether a product of operands E with a filter of so many output channels is made this way. Pairs of bf16 are
// multiplied about as fast as this multiplies float, and would be rounded once more. Of small images a sum over
// taps leaves out what reads padding, and quads do not: they are to take 1.4 times fewer products, as on 4x4 and
// 7x7 pixels but not on 5x5.
template <class E>
bool takes_winograd(const Window& w, int64_t outer) {
  if (!std::is_same_v<E, Accumulate<E>> || w.R != 3 || w.S != 3 || w.stride_h != 1 || w.stride_w != 1) return false;
  const int64_t quads = ceil_div(w.P, 2) * ceil_div(w.Q, 2), inside = (3 * w.P - 2) * (3 * w.Q - 2);
  if (minimum(w.C, outer) < kLeastChannels || 14 * kPositions * quads > 10 * inside) return false;
  if (ceil_div(w.Q, 2) * kPositions * w.C * int64_t{sizeof(E)} > kMostRowBytes) return false;
  const bool is_large = transformed_filter_bytes<E>(w, outer) > kLargeFilterBytes;
  return w.N * quads >= (is_large ? kLeastQuadsOfLarge : kLeastQuads);
}

// Whether a product is made this way of a transformed filter that leaves the second level cache. Read panel by panel it
// would come from behind that cache for every few quads. So tiles are larger and meet one position of all panels before
// the next: the filter is read once a tile, and of one position the quads stay in the cache.
template <class E>
bool filter_leaves_cache(const Window& w, int64_t outer) {
  return takes_winograd<E>(w, outer) && transformed_filter_bytes<E>(w, outer) > kCachedFilterBytes;
}

// All of the quads of a tile: an odd row or column at the end of an image is the half of its last ones.
inline Tile whole_quads(Tile tile) {
  tile.rows += tile.rows % 2, tile.cols += tile.cols % 2;
  return tile;
}

// From one quad to the next: an odd number of cache lines, for the same reason.
template <class T>
int64_t quad_stride(int64_t channels) {
  constexpr int64_t kLine = kCacheLine / int64_t{sizeof(T)};
  return (ceil_div(kPositions * channels, kLine) | 1) * kLine;
}

// B' of four values, in place.
template <class V>
FUSED_PREACT_INLINE void transform_input(V& a, V& b, V& c, V& d) {
  const V inner = b;
  a -= c, b += c, c -= inner, d -= inner;
}

// Two columns of the 4x4 values of a quad, transformed down.
template <class T>
struct TwoColumns {
  Vec<T> left[4], right[4];

  FUSED_PREACT_INLINE TwoColumns(const T* from, int64_t row, int64_t column, int64_t n) {
    for (int i = 0; i < 4; ++i) {
      left[i] = load_lanes(from + i * row, n);
      right[i] = load_lanes(from + i * row + column, n);
    }
    transform_input(left[0], left[1], left[2], left[3]);
    transform_input(right[0], right[1], right[2], right[3]);
  }
};

// B' d B of one channel vector of a quad, whose columns are transformed down, to positions `step` values apart.
template <class T>
FUSED_PREACT_INLINE void store_quad(T* to, int64_t step, const TwoColumns<T>& first, const TwoColumns<T>& second,
                                    int64_t n) {
  for (int i = 0; i < 4; ++i) {
    Vec<T> v[] = {first.left[i], first.right[i], second.left[i], second.right[i]};
    transform_input(v[0], v[1], v[2], v[3]);
    for (int s = 0; s < 4; ++s) store_lanes(to + (4 * i + s) * step, v[s], n);
  }
}

// B' d B for all quads of a tile, of a strip filled as for whole ones; the operand then points at the quads. Quads that
// follow each other share two columns.
template <class T, class Source>
void gather_quads(T* quads, Operand<T>& operand, T* strip, Window w, const Tile& of, const Source& source) {
  const Tile tile = whole_quads(of);
  w.P += w.P % 2, w.Q += w.Q % 2;  // which may not stay inside of what w does
  gather(operand, strip, w, tile, source);
  const int64_t C = w.C, row = operand.row_stride, stride = quad_stride<T>(C), across = tile.cols / 2;
  T* to = quads;
  for (int64_t i = 0; i < tile.images * tile.rows; i += 2, to += across * stride) {
    const T* const from = operand.pixels[i * tile.cols];
    for_each_vector<T>(C, [=](int64_t c, auto n) __attribute__((always_inline)) {
      TwoColumns<T> first(from + c, row, C, n);
      for (int64_t j = 0; j < across; ++j) {
        const TwoColumns<T> second(from + (2 * j + 2) * C + c, row, C, n);
        store_quad(to + j * stride + c, C, first, second, n);
        first = second;
      }
    });
  }
  for (int64_t q = 0; q < tile.pixels() / 4; ++q) operand.pixels[q] = quads + q * stride;
}

// A' of four products.
template <class V>
FUSED_PREACT_INLINE void transform_output(const V (&m)[4], V& first, V& second) {
  const V middle = m[1] - m[2];
  first = m[0] + m[1] + m[2];
  second = middle + m[3];
}

// body(pixel, below, right) for each quad of a tile: its first pixel, and whether it has a second
// row and a second column.
template <class Body>
FUSED_PREACT_INLINE void for_each_quad(const Tile& tile, const Body& body) {
  for (int64_t n = 0; n < tile.images; ++n)
    for (int64_t i = 0; i < tile.rows; i += 2)
      for (int64_t j = 0; j < tile.cols; j += 2)
        body((n * tile.rows + i) * tile.cols + j, i + 1 < tile.rows, j + 1 < tile.cols);
}

// A' m A for all quads of a tile: `products` becomes `block`, a vector for each pixel and column.
template <int V, class T>
void transform_products(T* block, const T* products, const Tile& tile) {
  constexpr int64_t kWidth = V * kLanes<T>;
  const int64_t stride = quad_stride<T>(kWidth), row = tile.cols * kWidth;
  for_each_quad(tile, [&](int64_t pixel, bool below, bool right) __attribute__((always_inline)) {
    for (int v = 0; v < V; ++v) {
      Vec<T> down[2][4];
      for (int s = 0; s < 4; ++s) {
        const T* const m = products + s * kWidth + v * kLanes<T>;
        const Vec<T> column[] = {load(m), load(m + 4 * kWidth), load(m + 8 * kWidth), load(m + 12 * kWidth)};
        transform_output(column, down[0][s], down[1][s]);
      }
      for (int r = 0; r < 1 + below; ++r) {
        Vec<T> first, second;
        transform_output(down[r], first, second);
        T* const y = block + r * row + pixel * kWidth + v * kLanes<T>;
        store(y, first);
        if (right) store(y + kWidth, second);
      }
    }
    products += stride;
  });
}

// A dy A' for all quads of a tile, from [pixels][width], `ld` apart.
template <class T>
void transform_columns(T* quads, const T* dy, int64_t ld, const Tile& tile, int64_t width) {
  const int64_t stride = quad_stride<T>(width), row = tile.cols * ld;
  const auto two = [](const Vec<T>& first, const Vec<T>& second, Vec<T>(&to)[4]) __attribute__((always_inline)) {
    to[0] = first, to[1] = first + second, to[2] = first - second, to[3] = second;
  };
  for_each_quad(tile, [&](int64_t pixel, bool below, bool right) __attribute__((always_inline)) {
    for (int64_t k = 0; k < width; k += kLanes<T>) {
      const T* const from = dy + pixel * ld + k;
      const Vec<T> none = {};
      Vec<T> first[4], second[4];
      two(load(from), below ? load(from + row) : none, first);
      two(right ? load(from + ld) : none, below && right ? load(from + row + ld) : none, second);
      for (int r = 0; r < 4; ++r) {
        Vec<T> across[4];
        two(first[r], second[r], across);
        for (int s = 0; s < 4; ++s) store(quads + (4 * r + s) * width + k, across[s]);
      }
    }
    quads += stride;
  });
}

// What a tile gives to the outer products of wgrad where they are made this way: a step is a quad.
template <class T, class S>
OuterOperands<T> outer_quads(const Window& w, const Tiling& tiling, const Tile& tile, const ActivationSource<S>& a,
                             const GradientSource<S>& gradient, int64_t begin, int64_t width) {
  const int64_t pixels = tiling.most_pixels(), most = pixels / 4, block = pixels * width;
  const int64_t stride = quad_stride<T>(width);
  TileScratch<T> scratch(tiling, block + most * (stride + quad_stride<T>(w.C)));
  T* const dy = scratch.block + block;
  gather_quads(dy + most * stride, scratch.operand, scratch.strip, w, tile, a);
  int64_t ld = 0;
  const T* const columns = gather_columns(scratch.block, ld, gradient, w, tile, begin, width);
  transform_columns(dy, columns, ld, tile, width);
  return {whole_quads(tile).pixels() / 4, stride, scratch.operand, dy};
}

// G w G' of one panel: positions (s, c) in place of taps (r, s, c). Of a row of all channels there are `taps` values,
// and `positions` to the next position.
template <class T>
void transform_filter(T* u, int64_t positions, const T* w, int64_t taps) {
  const auto three = [](const Vec<T>& a, const Vec<T>& b, const Vec<T>& c, Vec<T>(&to)[4])
                         __attribute__((always_inline)) {
                           const Vec<T> outer = (a + c) * splat(T(0.5)), inner = b * splat(T(0.5));
                           to[0] = a, to[1] = outer + inner, to[2] = outer - inner, to[3] = c;
                         };
  for (int64_t i = 0; i < taps; i += kLanes<T>) {
    Vec<T> down[3][4];
    for (int s = 0; s < 3; ++s)
      three(load(w + s * taps + i), load(w + (3 + s) * taps + i), load(w + (6 + s) * taps + i), down[s]);
    for (int r = 0; r < 4; ++r) {
      Vec<T> across[4];
      three(down[0][r], down[1][r], down[2][r], across);
      for (int s = 0; s < 4; ++s) store(u + (4 * r + s) * positions + i, across[s]);
    }
  }
}

// Its transpose, G' u G: the taps of one panel of dW, `step` values each; positions(s, i) is the
// vector at i of one of those.
template <class T, class Positions>
void transform_filter_gradient(T* taps, int64_t step, const Positions& positions) {
  const auto four = [](const Vec<T>& a, const Vec<T>& b, const Vec<T>& c, const Vec<T>& d, Vec<T>(&to)[3])
                        __attribute__((always_inline)) {
                          const Vec<T> sum = (b + c) * splat(T(0.5));
                          to[0] = a + sum, to[1] = (b - c) * splat(T(0.5)), to[2] = sum + d;
                        };
  for (int64_t i = 0; i < step; i += kLanes<T>) {
    const auto at = [=](int64_t r, int64_t s) __attribute__((always_inline)) { return positions(4 * r + s, i); };
    Vec<T> down[4][3];
    for (int s = 0; s < 4; ++s) four(at(0, s), at(1, s), at(2, s), at(3, s), down[s]);
    for (int r = 0; r < 3; ++r) {
      Vec<T> across[3];
      four(down[0][r], down[1][r], down[2][r], down[3][r], across);
      for (int s = 0; s < 3; ++s) store(taps + (3 * r + s) * step + i, across[s]);
    }
  }
}

// As pack, of the transformed filter. A panel's taps stay in the cache of its thread.
template <class S, class T = Accumulate<S>>
const T* pack_positions(const FilterView<const S*>& f, Workspace& workspace) {
  const Panels<T> taps{f.outer, f.depth()}, positions{f.outer, kPositions * position_rows(f.inner)};
  T* const to = static_cast<T*>(workspace.take(positions.size() * sizeof(T)));
  const PackedRow* const order = order_of_rows(f, workspace);
  for_each_panel(taps, [&](int64_t panel) {
    const int64_t width = taps.width(panel);
    T* const packed = static_cast<T*>(thread_scratch(taps.depth * width * sizeof(T)));
    pack_panel(packed - taps.offset(panel), panel, f, order);
    transform_filter(to + positions.offset(panel), position_rows(f.inner) * width, packed, f.inner * width);
  });
  return to;
}

// A sum over channels is cut into runs as in correlate. They are shorter, for the outputs are differences of
// these sums: with runs of 64 their error is about that of the sum over taps, with runs of 32 it is smaller, but
// wide layers take longer.
constexpr int64_t kQuadRun = 64;

template <class T, int M, int V, int... I>
FUSED_PREACT_INLINE void multiply_quads(T* products, int64_t stride, const T* const* quads, int64_t offset,
                                        int64_t length, const T* weights, bool adds, std::integer_sequence<int, I...>) {
  Vec<T> acc[M * V] = {};
  multiply<T, M, V>(acc, quads, offset, 1, 0, length, weights);
  if (adds) ((acc[I] += load(products + I / V * stride + I % V * kLanes<T>)), ...);
  (store(products + I / V * stride + I % V * kLanes<T>, acc[I]), ...);
}

// One run of a sum, for all quads; asks for as many weights from `ahead` on, if that is not null, in shares. Not
// inlined: its loop needs more address registers than its caller leaves it.
template <class T, int V>
__attribute__((noinline)) void multiply_run(T* products, const T* const* quads, int64_t count, int64_t offset,
                                            int64_t length, const T* weights, bool adds, const T* ahead) {
  constexpr int64_t kWidth = V * kLanes<T>;
  const int64_t stride = quad_stride<T>(kWidth);
  const int64_t share = ahead != nullptr ? ceil_div(length * kWidth, ceil_div(count, kRows)) : 0;
  for_each_block(count, [&](int64_t q, auto M) __attribute__((always_inline)) {
    if (share > 0) prefetch(ahead + q / kRows * share, share);
    multiply_quads<T, M, V>(products + q * stride, stride, quads + q, offset, length, weights, adds,
                            std::make_integer_sequence<int, M * V>{});
  });
}

// The products of positions [s, end) of `count` quads with a panel of a transformed filter; `products` holds a quad for
// each. `next`, if not null, is what will be read of the filter afterwards, and comes from behind the cache.
template <class T>
FUSED_PREACT_INLINE void multiply_positions(const Operand<T>& quads, int64_t count, int64_t C, int64_t s, int64_t end,
                                            const T* panel, int64_t columns, T* products, const T* next) {
  const int64_t parts = ceil_div(C, kQuadRun), part = ceil_div(C, parts);
  with_constant<kColumns>(columns, [&](auto V) __attribute__((always_inline)) {
    constexpr int64_t kWidth = V * kLanes<T>;
    for (; s < end; ++s)
      for (int64_t c = 0; c < C; c += part) {
        const T* const weights = panel + (s * position_rows(C) + c) * kWidth;
        const T* const ahead = next != nullptr && c + part < C ? weights + part * kWidth : next;
        multiply_run<T, V>(products + s * kWidth, quads.pixels, count, s * C + c, minimum(part, C - c), weights, c > 0,
                           ahead);
      }
  });
}

// sink.block for every block of the panel, as correlate, once the products of all positions are there.
template <class T, class Sink>
FUSED_PREACT_INLINE void finish_quads(const Tile& tile, int64_t columns, const T* products, T* block, Sink& sink) {
  with_constant<kColumns>(columns, [&](auto V) __attribute__((always_inline)) {
    transform_products<V>(block, products, tile);
    for_each_block(tile.pixels(), [&](int64_t p, auto M) __attribute__((always_inline)) {
      finish_block<T, M, V>(block + p * V * kLanes<T>, p, sink, std::make_integer_sequence<int, M * V>{});
    });
  });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
