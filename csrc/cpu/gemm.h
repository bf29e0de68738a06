// The two register-blocked products that every convolution here is made of.
//
//   multiply:  acc[m][v] += sum_r sum_i  a[m][r*row_stride + i] * w[(r*length + i)*V + v]     (forward, dgrad)
//   outer:     acc[m][v] += sum_p        a[p][m] * b[p*ldb + v]                               (wgrad)
//
// m counts pixels (or rows of dW), v vectors of output channels. The accumulators must stay in registers: they are a
// local array that only pack expansions in one inlined function touch; with loops over them the compiler leaves them in
// memory. Operands are of type E: the accumulation type, or, where the processor multiplies pairs of bf16, bf16 in
// multiply, whose pairs lie next to each other, and BFloat16Pair in outer.
#pragma once
#include <utility>

#include "vec.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// Register block: kRows x kColumns accumulators. Sixteen registers hold twelve, two columns and a broadcast. Of
// thirty-two sixteen are as many as hide the latency of four multiply-adds a cycle; more rows than eight run
// out of address registers.
constexpr int kColumns = 2;
constexpr int kRows = kRegisters == 32 ? 8 : 6;

template <class T>
FUSED_PREACT_INLINE Vec<T> broadcast(const T* a) {
  return splat(*a);
}

template <class V>
FUSED_PREACT_INLINE V multiply_add(V acc, V a, V b) {
  return acc + a * b;
}

#if defined(__AVX512BF16__)
// Each lane is a pair of values that are next to each other in the summed dimension.
FUSED_PREACT_INLINE __m512bh load_pairs(const BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }

FUSED_PREACT_INLINE __m512bh broadcast(const BFloat16* a) {
  int32_t pair;
  memcpy(&pair, a, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

FUSED_PREACT_INLINE __m512bh load_pairs(const BFloat16Pair* from) { return (__m512bh)_mm512_loadu_si512(from); }

FUSED_PREACT_INLINE __m512bh broadcast(const BFloat16Pair* a) { return (__m512bh)_mm512_set1_epi32(a->bits); }

FUSED_PREACT_INLINE Vec<float> multiply_add(Vec<float> acc, __m512bh a, __m512bh b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, a, b);
}
#endif

template <class T>
FUSED_PREACT_INLINE Vec<T> load_pairs(const T* from) {
  return load(from);
}

template <class E, int M, int V, int... I, int... J>
FUSED_PREACT_INLINE void multiply_step(Vec<Accumulate<E>> (&acc)[M * V], const E* const (&a)[M], int64_t i, const E* w,
                                       std::integer_sequence<int, I...>, std::integer_sequence<int, J...>) {
  constexpr int kStep = kLanes<Accumulate<E>> * kPair<E>;
  const decltype(load_pairs(w)) column[V] = {load_pairs(w + J * kStep)...};
  ((acc[I] = multiply_add(acc[I], broadcast(a[I / V] + i), column[I % V])), ...);
}

// `length` is a multiple of kPair<E>.
template <class E, int M, int V>
FUSED_PREACT_INLINE void multiply(Vec<Accumulate<E>> (&acc)[M * V], const E* const* pixels, int64_t offset,
                                  int64_t rows, int64_t row_stride, int64_t length, const E* w) {
  const E* a[M];
  for (int m = 0; m < M; ++m) a[m] = pixels[m] + offset;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < length; i += kPair<E>, w += V * kLanes<Accumulate<E>> * kPair<E>)
      multiply_step<E, M, V>(acc, a, i, w, std::make_integer_sequence<int, M * V>{},
                             std::make_integer_sequence<int, V>{});
    for (int m = 0; m < M; ++m) a[m] += row_stride;
  }
}

template <class E, int M, int V, int... I, int... J>
FUSED_PREACT_INLINE void outer_step(Vec<Accumulate<E>> (&acc)[M * V], const E* a, const E* b,
                                    std::integer_sequence<int, I...>, std::integer_sequence<int, J...>) {
  const decltype(load_pairs(b)) column[V] = {load_pairs(b + J * kLanes<Accumulate<E>>)...};
  ((acc[I] = multiply_add(acc[I], broadcast(a + I / V), column[I % V])), ...);
}

template <class E, int M, int V>
FUSED_PREACT_INLINE void outer(Vec<Accumulate<E>> (&acc)[M * V], const E* const* pixels, int64_t offset, int64_t n,
                               const E* b, int64_t ldb) {
  for (int64_t p = 0; p < n; ++p, b += ldb)
    outer_step<E, M, V>(acc, pixels[p] + offset, b, std::make_integer_sequence<int, M * V>{},
                        std::make_integer_sequence<int, V>{});
}

// body(first, std::integral_constant<int, size>) for blocks of kRows that make up [0, n), and a few smaller ones.
template <int Size = kRows, class Body>
FUSED_PREACT_INLINE void for_each_block(int64_t n, const Body& body, int64_t first = 0) {
  for (; first + Size <= n; first += Size) body(first, std::integral_constant<int, Size>{});
  if constexpr (Size > 1) for_each_block<Size <= 4 ? Size / 2 : 4>(n, body, first);
}

// body(std::integral_constant<int, n>) for a runtime n in 1..Most.
template <int Most, class Body>
FUSED_PREACT_INLINE void with_constant(int64_t n, const Body& body) {
  if constexpr (Most > 1) {
    if (n < Most) return with_constant<Most - 1>(n, body);
  }
  body(std::integral_constant<int, Most>{});
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
