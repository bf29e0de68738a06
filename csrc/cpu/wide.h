// Sums over many values, which are kept in double, as torch keeps them on the CPU.
#pragma once
#include "vec.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// The lanes of a vector of float, widened. One vector type of twice the width would say the same, but GCC takes such a
// one apart into single values.
struct WideFloat {
  Vec<double> low = {}, high = {};
};

FUSED_PREACT_INLINE WideFloat operator+(WideFloat a, WideFloat b) { return {a.low + b.low, a.high + b.high}; }
FUSED_PREACT_INLINE WideFloat operator-(WideFloat a, WideFloat b) { return {a.low - b.low, a.high - b.high}; }
FUSED_PREACT_INLINE WideFloat operator*(WideFloat a, WideFloat b) { return {a.low * b.low, a.high * b.high}; }
FUSED_PREACT_INLINE WideFloat operator*(WideFloat a, double b) { return {a.low * b, a.high * b}; }
FUSED_PREACT_INLINE WideFloat operator/(WideFloat a, double b) { return {a.low / b, a.high / b}; }
FUSED_PREACT_INLINE WideFloat& operator+=(WideFloat& a, WideFloat b) { return a = a + b; }
FUSED_PREACT_INLINE WideFloat relu(WideFloat z) { return {relu(z.low), relu(z.high)}; }

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, float>, WideFloat, Vec<double>>;

FUSED_PREACT_INLINE Vec<double> widen(Vec<double> v) { return v; }

#if defined(__AVX512F__)
template <int Half>
FUSED_PREACT_INLINE Vec<double> widen_half(Vec<float> v) {
  constexpr __mmask8 kAll = __mmask8(kAllLanes);
  return (Vec<double>)_mm512_maskz_cvtps_pd(kAll, _mm512_maskz_extractf32x8_ps(kAll, (__m512)v, Half));
}
FUSED_PREACT_INLINE WideFloat widen(Vec<float> v) { return {widen_half<0>(v), widen_half<1>(v)}; }
#elif defined(__AVX2__)
FUSED_PREACT_INLINE WideFloat widen(Vec<float> v) {
  const __m256 all = (__m256)v;
  return {(Vec<double>)_mm256_cvtps_pd(_mm256_castps256_ps128(all)),
          (Vec<double>)_mm256_cvtps_pd(_mm256_extractf128_ps(all, 1))};
}
#else
FUSED_PREACT_INLINE WideFloat widen(Vec<float> v) { return {Vec<double>{v[0], v[1]}, Vec<double>{v[2], v[3]}}; }
#endif

template <class T>
FUSED_PREACT_INLINE Wide<T> load_wide(const double* from) {
  if constexpr (std::is_same_v<T, float>)
    return {load(from), load(from + kLanes<double>)};
  else
    return load(from);
}

FUSED_PREACT_INLINE void store_wide(double* to, Vec<double> v) { store(to, v); }

FUSED_PREACT_INLINE void store_wide(double* to, WideFloat v) {
  store(to, v.low);
  store(to + kLanes<double>, v.high);
}

template <class T>
FUSED_PREACT_INLINE Vec<T> narrowed(Wide<T> v) {
  double values[kLanes<T>];
  store_wide(values, v);
  Vec<T> result = {};
  for (int l = 0; l < kLanes<T>; ++l) result[l] = T(values[l]);
  return result;
}

// A sum over many values: a few in T, and these sums in double.
template <class T>
struct LongSum {
  Vec<T> few = {};
  Wide<T> total = {};

  FUSED_PREACT_INLINE void add(Vec<T> v) { few += v; }
  FUSED_PREACT_INLINE void settle() {
    total += widen(few);
    few = Vec<T>{};
  }
};

// add(i, which) for each i of [first, last), `which` of four sums side by side: that hides the latency of an addition,
// and keeps each sum short.
template <class Add>
FUSED_PREACT_INLINE void side_by_side(int64_t first, int64_t last, const Add& add) {
  for (; first + 4 <= last; first += 4) add(first, 0), add(first + 1, 1), add(first + 2, 2), add(first + 3, 3);
  for (; first < last; ++first) add(first, 0);
}

template <class V>
FUSED_PREACT_INLINE V total(const V (&sums)[4]) {
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
