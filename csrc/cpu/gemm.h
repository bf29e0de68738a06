// The two register-blocked products that every convolution here is made of.
//
//   multiply:  acc[m][v] += sum_r sum_i  a[m][r*row_stride + i] * w[(r*length + i)*V + v]     (forward, dgrad)
//   outer:     acc[m][v] += sum_p        a[p][m] * b[p*ldb + v]                               (wgrad)
//
// m counts pixels (or rows of dW), v vectors of output channels. The accumulators must stay in registers: they are a
// local array that only pack expansions in one inlined function touch; with loops over them the compiler leaves
// them in memory.
#pragma once
#include <utility>

#include "vec.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// Register block: kRows x kColumns accumulators. Sixteen registers hold twelve, two columns and a broadcast; more rows
// than eight run out of address registers.
constexpr int kColumns = 2;
#if defined(__AVX512F__)
constexpr int kRows = 8;
#else
constexpr int kRows = 6;
#endif

template <class T, int M, int V, int... I, int... J>
FUSED_PREACT_INLINE void multiply_step(Vec<T> (&acc)[M * V], const T* const (&a)[M], int64_t i, const T* w,
                                       std::integer_sequence<int, I...>, std::integer_sequence<int, J...>) {
  const Vec<T> column[V] = {load(w + J * kLanes<T>)...};
  ((acc[I] += splat(a[I / V][i]) * column[I % V]), ...);
}

template <class T, int M, int V>
FUSED_PREACT_INLINE void multiply(Vec<T> (&acc)[M * V], const T* const* pixels, int64_t rows, int64_t row_stride,
                                  int64_t length, const T* w) {
  const T* a[M];
  for (int m = 0; m < M; ++m) a[m] = pixels[m];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < length; ++i, w += V * kLanes<T>)
      multiply_step<T, M, V>(acc, a, i, w, std::make_integer_sequence<int, M * V>{},
                             std::make_integer_sequence<int, V>{});
    for (int m = 0; m < M; ++m) a[m] += row_stride;
  }
}

template <class T, int M, int V, int... I, int... J>
FUSED_PREACT_INLINE void outer_step(Vec<T> (&acc)[M * V], const T* a, const T* b, std::integer_sequence<int, I...>,
                                    std::integer_sequence<int, J...>) {
  const Vec<T> column[V] = {load(b + J * kLanes<T>)...};
  ((acc[I] += splat(a[I / V]) * column[I % V]), ...);
}

template <class T, int M, int V>
FUSED_PREACT_INLINE void outer(Vec<T> (&acc)[M * V], const T* const* pixels, int64_t offset, int64_t n, const T* b,
                               int64_t ldb) {
  for (int64_t p = 0; p < n; ++p, b += ldb)
    outer_step<T, M, V>(acc, pixels[p] + offset, b, std::make_integer_sequence<int, M * V>{},
                        std::make_integer_sequence<int, V>{});
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
