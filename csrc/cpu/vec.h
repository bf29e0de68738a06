// Vectors of one instruction set, and the storage types they are loaded from.
//
// Every kernel source is compiled once per instruction set in the namespace FUSED_PREACT_ISA. Nothing here or in a
// kernel uses a library function that the linker could share between instruction sets.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"

#define FUSED_PREACT_INLINE inline __attribute__((always_inline))

namespace fused_preact::cpu::FUSED_PREACT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Vector registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

// A vector type V of T as it lies in memory. Accesses through it are accesses to T for the compiler, which so knows
// that they change no pointer and no size; after a memcpy it would read all of these again.
template <class T, class V>
struct InMemory {
  typedef V type __attribute__((aligned(alignof(T))));
};
template <class V, class T>
FUSED_PREACT_INLINE V load_as(const T* from) {
  return *reinterpret_cast<const typename InMemory<T, V>::type*>(from);
}
template <class V, class T>
FUSED_PREACT_INLINE void store_as(T* to, V v) {
  *reinterpret_cast<typename InMemory<T, V>::type*>(to) = v;
}

constexpr int64_t kCacheLine = 64;

// Asks for the lines of n values for the second level cache, which has room for what is not read at once.
template <class S>
FUSED_PREACT_INLINE void prefetch(const S* x, int64_t n) {
  const char* line = reinterpret_cast<const char*>(x);
  for (int64_t i = 0; i < n * int64_t{sizeof(S)}; i += kCacheLine) __builtin_prefetch(line + i, 0, 2);
}

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

struct BFloat16 {
  uint16_t bits;
};

// Two values that are summed one after the other, the first in the low half.
struct BFloat16Pair {
  uint32_t bits;
};

// There are no vectors of them: bf16 is loaded as float. Without a type, the templates below step aside for overloads.
template <>
struct VecOf<BFloat16> {};
template <>
struct VecOf<BFloat16Pair> {};

// The type that values of storage type S are computed and accumulated in.
template <class S>
struct AccumulateOf {
  using type = S;
};
template <>
struct AccumulateOf<BFloat16> {
  using type = float;
};
template <>
struct AccumulateOf<BFloat16Pair> {
  using type = float;
};
template <class S>
using Accumulate = typename AccumulateOf<S>::type;

// The type that a product may read values of storage type S in: bf16 where the processor multiplies pairs of it.
#if defined(__AVX512BF16__)
template <class S>
using Native = S;
#else
template <class S>
using Native = Accumulate<S>;
#endif

// How many values of the summed dimension one multiply-add takes.
template <class E>
constexpr int kPair = sizeof(Accumulate<E>) / sizeof(E);

template <class T>
FUSED_PREACT_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

template <class T>
FUSED_PREACT_INLINE Vec<T> load(const T* from) {
  return load_as<Vec<T>>(from);
}

template <class T>
FUSED_PREACT_INLINE void store(T* to, Vec<T> v) {
  store_as(to, v);
}

constexpr int kBf16Lanes = kLanes<float>;
typedef uint16_t HalfBits __attribute__((vector_size(kBf16Lanes * sizeof(uint16_t))));

// Of lanes below 2^16. One instruction or two, of which GCC makes up to five of a __builtin_convertvector.
#if defined(__AVX512F__)
// The intrinsics with this mask are those without one, but for a warning of GCC 12 about what these leave undefined.
constexpr uint32_t kAllLanes = ~uint32_t{0};

FUSED_PREACT_INLINE Vec<uint32_t> extend(HalfBits bits) {
  return (Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(__mmask16(kAllLanes), (__m256i)bits);
}
FUSED_PREACT_INLINE HalfBits low_halves(Vec<uint32_t> v) {
  return (HalfBits)_mm512_maskz_cvtepi32_epi16(__mmask16(kAllLanes), (__m512i)v);
}
#elif defined(__AVX2__)
FUSED_PREACT_INLINE Vec<uint32_t> extend(HalfBits bits) { return (Vec<uint32_t>)_mm256_cvtepu16_epi32((__m128i)bits); }
FUSED_PREACT_INLINE HalfBits low_halves(Vec<uint32_t> v) {
  return (HalfBits)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
#else
FUSED_PREACT_INLINE Vec<uint32_t> extend(HalfBits bits) { return __builtin_convertvector(bits, Vec<uint32_t>); }
FUSED_PREACT_INLINE HalfBits low_halves(Vec<uint32_t> v) { return __builtin_convertvector(v, HalfBits); }
#endif

FUSED_PREACT_INLINE Vec<float> widened(HalfBits bits) { return (Vec<float>)(extend(bits) << 16); }

FUSED_PREACT_INLINE Vec<uint32_t> load_bits(const BFloat16* from) { return extend(load_as<HalfBits>(&from->bits)); }

FUSED_PREACT_INLINE Vec<float> load(const BFloat16* from) { return widened(load_as<HalfBits>(&from->bits)); }

// The sum of each pair.
FUSED_PREACT_INLINE Vec<float> load(const BFloat16Pair* from) {
  const Vec<uint32_t> bits = load_as<Vec<uint32_t>>(&from->bits);
  return (Vec<float>)(bits << 16) + (Vec<float>)(bits & 0xffff0000u);
}

// Rounds to nearest even; a NaN stays a (quiet) NaN. The instruction takes values below the least normal one for zero,
// as do the products of pairs.
FUSED_PREACT_INLINE HalfBits rounded(Vec<float> v) {
#if defined(__AVX512BF16__)
  return (HalfBits)_mm512_cvtneps_pbh((__m512)v);
#else
  const Vec<uint32_t> bits = (Vec<uint32_t>)v;
  const Vec<uint32_t> nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vec<uint32_t> nan = (bits >> 16) | 0x40u;
  return low_halves((Vec<int32_t>)(v != v) ? nan : nearest);
#endif
}

FUSED_PREACT_INLINE void store(BFloat16* to, Vec<float> v) { store_as(&to->bits, rounded(v)); }

// Stores past the cache, which so need not read what is overwritten: for whole cache lines, written soon after each
// other. `to` is aligned to the vector. Other threads see it after a fence.
template <class T>
FUSED_PREACT_INLINE void stream(T* to, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(to), (__m256)v);
#else
  store(to, v);
#endif
}

FUSED_PREACT_INLINE void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first n < lanes values, the other lanes zero. What is behind them is neither read nor written.
template <class S>
FUSED_PREACT_INLINE Vec<Accumulate<S>> load_first(const S* from, int64_t n) {
  S buffer[kLanes<Accumulate<S>>] = {};
  memcpy(buffer, from, n * sizeof(S));
  return load(buffer);
}

template <class S>
FUSED_PREACT_INLINE void store_first(S* to, Vec<Accumulate<S>> v, int64_t n) {
  S buffer[kLanes<Accumulate<S>>];
  store(buffer, v);
  memcpy(to, buffer, n * sizeof(S));
}

// Where the instruction set has masks, by one: the copy through a buffer takes many times as long as a vector.
#if defined(__AVX512F__)
FUSED_PREACT_INLINE uint32_t first_lanes(int64_t n) { return (1u << n) - 1; }

FUSED_PREACT_INLINE Vec<float> load_first(const float* from, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16(first_lanes(n)), from);
}
FUSED_PREACT_INLINE Vec<double> load_first(const double* from, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8(first_lanes(n)), from);
}
FUSED_PREACT_INLINE Vec<float> load_first(const BFloat16* from, int64_t n) {
  return widened((HalfBits)_mm256_maskz_loadu_epi16(__mmask16(first_lanes(n)), from));
}

FUSED_PREACT_INLINE void store_first(float* to, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(to, __mmask16(first_lanes(n)), (__m512)v);
}
FUSED_PREACT_INLINE void store_first(double* to, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(to, __mmask8(first_lanes(n)), (__m512d)v);
}
#elif defined(__AVX2__)
FUSED_PREACT_INLINE __m256i first_lanes_of_float(int64_t n) {
  return (__m256i)(Vec<int32_t>{0, 1, 2, 3, 4, 5, 6, 7} < splat(int32_t(n)));
}
FUSED_PREACT_INLINE __m256i first_lanes_of_double(int64_t n) { return (__m256i)(Vec<int64_t>{0, 1, 2, 3} < splat(n)); }

FUSED_PREACT_INLINE Vec<float> load_first(const float* from, int64_t n) {
  return (Vec<float>)_mm256_maskload_ps(from, first_lanes_of_float(n));
}
FUSED_PREACT_INLINE Vec<double> load_first(const double* from, int64_t n) {
  return (Vec<double>)_mm256_maskload_pd(from, first_lanes_of_double(n));
}

FUSED_PREACT_INLINE void store_first(float* to, Vec<float> v, int64_t n) {
  _mm256_maskstore_ps(to, first_lanes_of_float(n), (__m256)v);
}
FUSED_PREACT_INLINE void store_first(double* to, Vec<double> v, int64_t n) {
  _mm256_maskstore_pd(to, first_lanes_of_double(n), (__m256d)v);
}
#endif

FUSED_PREACT_INLINE void store_first_bits(BFloat16* to, HalfBits bits, int64_t n) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(to, __mmask16(first_lanes(n)), (__m256i)bits);
#else
  memcpy(to, &bits, n * sizeof(BFloat16));
#endif
}

FUSED_PREACT_INLINE void store_first(BFloat16* to, Vec<float> v, int64_t n) { store_first_bits(to, rounded(v), n); }

// body(c, n) for each vector of a row of C channels: n lanes from channel c on, all of them but in the last one.
template <class T, class Body>
FUSED_PREACT_INLINE void for_each_vector(int64_t C, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes<T> <= C; c += kLanes<T>) body(c, kLanes<T>);
  if (c < C) body(c, C - c);
}

// body(n) with n a constant where it is a whole vector, so that a loop in body has no branch on it.
template <class T, class Body>
FUSED_PREACT_INLINE void with_lanes(int64_t n, const Body& body) {
  if (n >= kLanes<T>)
    body(std::integral_constant<int64_t, kLanes<T>>{});
  else
    body(n);
}

// Whole vectors take the plain load and store, so that a loop over them has no call in it.
template <class S>
FUSED_PREACT_INLINE Vec<Accumulate<S>> load_lanes(const S* from, int64_t n) {
  return n == kLanes<Accumulate<S>> ? load(from) : load_first(from, n);
}

template <class S>
FUSED_PREACT_INLINE void store_lanes(S* to, Vec<Accumulate<S>> v, int64_t n) {
  if (n == kLanes<Accumulate<S>>)
    store(to, v);
  else
    store_first(to, v, n);
}

// Lane l is element I[l] of a followed by b.
template <class T, int... I>
FUSED_PREACT_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Index{I...});
#endif
}

// One step of a transpose: of rows that are Half apart, the halves (lanes with and without the bit Half) are exchanged.
template <class T, int Half, int... I>
FUSED_PREACT_INLINE void exchange(Vec<T> (&rows)[kLanes<T>], std::integer_sequence<int, I...>) {
  for (int l = 0; l < kLanes<T>; ++l) {
    if (l & Half) continue;
    const Vec<T> a = rows[l], b = rows[l + Half];
    rows[l] = shuffle<T, ((I & Half) ? kLanes<T> + I - Half : I)...>(a, b);
    rows[l + Half] = shuffle<T, ((I & Half) ? kLanes<T> + I : I + Half)...>(a, b);
  }
}

template <class T, int Half = kLanes<T> / 2>
FUSED_PREACT_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  exchange<T, Half>(rows, std::make_integer_sequence<int, kLanes<T>>{});
  if constexpr (Half > 1) transpose<T, Half / 2>(rows);
}

// max(z, 0) that keeps a NaN, as torch.relu does.
template <class V>
FUSED_PREACT_INLINE V relu(V z) {
  const V zero = {};
  return zero > z ? zero : z;
}

// The instruction, which GCC does not find, gives its second operand where one is a NaN.
#if defined(__AVX512F__)
FUSED_PREACT_INLINE Vec<float> relu(Vec<float> z) {
  return (Vec<float>)_mm512_maskz_max_ps(__mmask16(kAllLanes), __m512{}, (__m512)z);
}
FUSED_PREACT_INLINE Vec<double> relu(Vec<double> z) {
  return (Vec<double>)_mm512_maskz_max_pd(__mmask8(kAllLanes), __m512d{}, (__m512d)z);
}
#elif defined(__AVX2__)
FUSED_PREACT_INLINE Vec<float> relu(Vec<float> z) { return (Vec<float>)_mm256_max_ps(__m256{}, (__m256)z); }
FUSED_PREACT_INLINE Vec<double> relu(Vec<double> z) { return (Vec<double>)_mm256_max_pd(__m256d{}, (__m256d)z); }
#elif defined(__x86_64__)
FUSED_PREACT_INLINE Vec<float> relu(Vec<float> z) { return (Vec<float>)_mm_max_ps(__m128{}, (__m128)z); }
FUSED_PREACT_INLINE Vec<double> relu(Vec<double> z) { return (Vec<double>)_mm_max_pd(__m128d{}, (__m128d)z); }
#endif

template <class T>
FUSED_PREACT_INLINE T minimum(T a, T b) {
  return a < b ? a : b;
}

template <class T>
FUSED_PREACT_INLINE T maximum(T a, T b) {
  return a > b ? a : b;
}

// body(S{}) with the storage type of a dtype; the CPU has no kernels for f16.
template <class Body>
void with_storage(Dtype dtype, const Body& body) {
  if (dtype == Dtype::f32) body(float{});
  if (dtype == Dtype::f64) body(double{});
  if (dtype == Dtype::bf16) body(BFloat16{});
}

FUSED_PREACT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Up to whole cache lines.
FUSED_PREACT_INLINE int64_t aligned(int64_t bytes) { return ceil_div(bytes, kCacheLine) * kCacheLine; }

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
