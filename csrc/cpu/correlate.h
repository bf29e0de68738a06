// One panel of a convolution over one tile: the product, and what is done with each vector of it.
#pragma once
#include "gemm.h"
#include "tile.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

template <class T, int M, int V, class Sink, int... I>
FUSED_PREACT_INLINE void correlate_block(const Operand<T>& a, int64_t p, const Window& w, const T* panel,
                                         const Sink& sink, std::integer_sequence<int, I...>) {
  Vec<T> acc[M * V] = {};
  multiply<T, M, V>(acc, a.pixels + p, w.R, a.row_stride, w.S * w.C, panel);
  (sink(p + I / V, I % V, acc[I]), ...);
}

// sink(pixel, column, vector) for each of n pixels and `columns` vectors of the panel.
template <class T, class Sink>
FUSED_PREACT_INLINE void correlate(const Operand<T>& a, int64_t n, const Window& w, const T* panel, int64_t columns,
                                   const Sink& sink) {
  with_constant<kColumns>(columns, [&](auto V) __attribute__((always_inline)) {
    int64_t p = 0;
    for (; p + kPixels <= n; p += kPixels)
      correlate_block<T, kPixels, V>(a, p, w, panel, sink, std::make_integer_sequence<int, kPixels * V>{});
    if (p < n)
      with_constant<kPixels - 1>(n - p, [&](auto M) __attribute__((always_inline)) {
        correlate_block<T, M, V>(a, p, w, panel, sink, std::make_integer_sequence<int, M * V>{});
      });
  });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
