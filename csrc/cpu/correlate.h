// One panel of a convolution over one tile: the product, and an epilogue on each register block of it.
#pragma once
#include "gemm.h"
#include "tile.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// How many pixels ahead the epilogues ask for what they will read and write: a panel is a column of cache lines, whose
// large stride the hardware does not foresee.
constexpr int64_t kAhead = 2 * kRows;

template <class E, int M, int V, class Sink, int... I>
FUSED_PREACT_INLINE void correlate_block(const Operand<E>& a, int64_t p, const Window& w, const E* panel, Sink& sink,
                                         std::integer_sequence<int, I...> each) {
  Vec<Accumulate<E>> acc[M * V] = {};
  multiply<E, M, V>(acc, a.pixels + p, w.R, a.row_stride, w.S * w.C, panel);
  sink.template block<M, V>(p, acc, each);
}

// sink.block<M, V>(p, acc, each) for every block of the panel: acc[i], i in `each`, is the product for pixel p + i / V
// and column i % V.
template <class E, class Sink>
FUSED_PREACT_INLINE void correlate(const Operand<E>& a, int64_t n, const Window& w, const E* panel, int64_t columns,
                                   Sink& sink) {
  with_constant<kColumns>(columns, [&](auto V) __attribute__((always_inline)) {
    for_each_block(n, [&](int64_t p, auto M) __attribute__((always_inline)) {
      correlate_block<E, M, V>(a, p, w, panel, sink, std::make_integer_sequence<int, M * V>{});
    });
  });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
