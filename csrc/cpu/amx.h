// Products of bf16 where the processor multiplies matrices (AMX): one instruction adds the product of up to 16 rows of
// 32 values and 16 rows of pairs, as pack.h and outer.h lay them out, to 16 x 16 sums in float. It makes many times
// as many products a second as the pairs of gemm.h.
//
//   acc[block][column] += a[block] * b[column]        16 x 16 sums = rows x depth values * depth/2 pairs x 16
//
// The eight registers: four of sums, for two blocks of rows times two columns, and the factors of both. Rows of a block
// are a step apart, so they are read where they lie.
#pragma once
#include "vec.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// Clang before 16 spells it without the underscore.
#if defined(__AMX_BF16__) || defined(__AMXBF16__)
#define FUSED_PREACT_MATRICES
constexpr bool kHasMatrices = true;
#else
constexpr bool kHasMatrices = false;
#endif

// The most rows of a factor, and values in each row of bf16.
constexpr int64_t kMatrixRows = 16, kMatrixDepth = 32;

// The largest divisor of n, of those of `step`, up to `most`; 0 if there is none.
inline int64_t largest_divisor(int64_t n, int64_t most, int64_t step) {
  for (int64_t d = most / step * step; d > 0; d -= step)
    if (n % d == 0) return d;
  return 0;
}

#if defined(FUSED_PREACT_MATRICES)
// The registers by name: sums of block i and column j are 2*i + j.
constexpr int kRowFactor = 4, kColumnFactor = 6;

// Sets the shape of all registers as long as it lives, in the thread that made it: `rows` in a block, `depth` values in
// each; of no rows, none. At the end they are given up, or the system would go on to save them.
class MatrixShape {
 public:
  MatrixShape(int64_t rows, int64_t depth) : is_set_(rows > 0) {
    if (!is_set_) return;
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    static_assert(sizeof config == 64, "the layout that the instruction reads");
    config.palette = 1;
    for (int t = 0; t < kColumnFactor + 2; ++t) {
      config.rows[t] = t < kColumnFactor ? rows : depth / 2;
      config.row_bytes[t] = t < kRowFactor || t >= kColumnFactor ? kVectorBytes : 2 * depth;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~MatrixShape() {
    if (is_set_) __asm__ volatile("tilerelease");
  }
  MatrixShape(const MatrixShape&) = delete;
  MatrixShape& operator=(const MatrixShape&) = delete;

 private:
  const bool is_set_;
};

template <int T>
FUSED_PREACT_INLINE void zero_matrix() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}

// Rows that are `step` values apart. The compiler is told that memory is read and written: it does not see which.
template <int T, class E>
FUSED_PREACT_INLINE void load_matrix(const E* from, int64_t step) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(step * int64_t{sizeof(E)}), "i"(T) : "memory");
}

template <int T>
FUSED_PREACT_INLINE void store_matrix(float* to, int64_t step) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(step * int64_t{sizeof(float)}), "i"(T) : "memory");
}

template <int Sum, int Row, int Column>
FUSED_PREACT_INLINE void multiply_matrices() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Row), "i"(Column));
}

// The sums of Blocks blocks of rows and V columns.
template <int Blocks, int V>
struct MatrixSums {
  template <class Each>
  static FUSED_PREACT_INLINE void for_each(const Each& each) {
    each(std::integral_constant<int, 0>{}, 0, 0);
    if constexpr (V > 1) each(std::integral_constant<int, 1>{}, 0, 1);
    if constexpr (Blocks > 1) each(std::integral_constant<int, 2>{}, 1, 0);
    if constexpr (Blocks > 1 && V > 1) each(std::integral_constant<int, 3>{}, 1, 1);
  }

  static FUSED_PREACT_INLINE void zero() {
    for_each([](auto t, int, int) __attribute__((always_inline)) { zero_matrix<t>(); });
  }

  // Block i is at[i] on, its columns side by side, its rows `step` apart.
  static FUSED_PREACT_INLINE void load(const float* const (&at)[2], int64_t step) {
    for_each([&](auto t, int i, int j)
                 __attribute__((always_inline)) { load_matrix<t>(at[i] + j * kLanes<float>, step); });
  }
  static FUSED_PREACT_INLINE void store(float* const (&at)[2], int64_t step) {
    for_each([&](auto t, int i, int j)
                 __attribute__((always_inline)) { store_matrix<t>(at[i] + j * kLanes<float>, step); });
  }

  // Adds the product of rows from a[i] on, `row_step` apart, and pairs from b on, `pair_step` pairs apart.
  static FUSED_PREACT_INLINE void multiply(const BFloat16* const (&a)[2], int64_t row_step, int64_t offset,
                                           const BFloat16Pair* b, int64_t pair_step) {
    load_matrix<kColumnFactor>(b, pair_step);
    load_matrix<kRowFactor>(a[0] + offset, row_step);
    multiply_matrices<0, kRowFactor, kColumnFactor>();
    if constexpr (V > 1) {
      load_matrix<kColumnFactor + 1>(b + kLanes<float>, pair_step);
      multiply_matrices<1, kRowFactor, kColumnFactor + 1>();
    }
    if constexpr (Blocks > 1) {
      load_matrix<kRowFactor + 1>(a[1] + offset, row_step);
      multiply_matrices<2, kRowFactor + 1, kColumnFactor>();
    }
    if constexpr (Blocks > 1 && V > 1) multiply_matrices<3, kRowFactor + 1, kColumnFactor + 1>();
  }
};
#else
struct MatrixShape {
  MatrixShape(int64_t, int64_t) {}
};
#endif

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
