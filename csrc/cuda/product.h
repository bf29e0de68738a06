// How a warp multiplies: one type for each product, with the tile of its fragments.
//
// A product is D[16][16] += A[16][depth] * B[depth][16]. Lane l = 4g + t holds of D the elements
//   d[half][0..1] = D[g][8*half + 2t ..],  d[half][2..3] = D[g + 8][8*half + 2t ..].
// Operands come from shared memory in rows of 16 bytes and more. `load_a` and `load_b` read operands whose depth runs
// along a row (correlation: channels of a pixel, channels of a filter); `load_a_across` and `load_b_across` those whose
// depth runs from row to row (weight gradient: pixels). `multiply_long` is `multiply` for the sums of correlation, over
// all channels and taps in one chain, of which float32 must not lose more digits than a blocked sum.
#pragma once
#include "values.h"

namespace fused_preact::cuda {

using Block = float[2][4];

template <int Count>
__device__ __forceinline__ void clear(Block (&blocks)[Count]) {
#pragma unroll
  for (int i = 0; i < Count * 8; ++i) blocks[i / 8][i / 4 % 2][i % 4] = 0;
}

// Tensor cores, 16-bit values.
template <class T>
struct MmaHalf {
  using Storage = T;
  static constexpr int kStepBytes = 32;  // of the depth, along a row
  static constexpr int kStepRows = 16;   // of the depth, across rows
  static constexpr int kAddresses = 1;   // rows of A that a lane points at, along a row
  static constexpr bool kRounds = false;
  struct A {
    uint32_t r[4];
  };
  using B = A;

  __device__ static uint4 operand(const float (&v)[8]) { return pack<T>(v); }

  // The row of A that the lane points at, and the byte in it.
  __device__ static int row(int lane, int) { return lane % 16; }
  __device__ static int byte(int lane) { return lane / 16 * 16; }
  __device__ static void load_a(A& a, const std::byte* const (&rows)[1]) { ldmatrix_x4(a.r, rows[0]); }

  // Columns of B are rows of `shared`, `ld` bytes apart.
  __device__ static void load_b(B& b, const std::byte* shared, int ld, int lane) {
    ldmatrix_x4(b.r, shared + (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 16);
  }

  // at(i) is row i of this step of the depth, at the first of the 16 channels.
  template <class At>
  __device__ static void load_a_across(A& a, const At& at, int lane) {
    ldmatrix_x4_trans(a.r, at(lane / 16 * 8 + lane % 8) + lane / 8 % 2 * 16);
  }
  template <class At>
  __device__ static void load_b_across(B& b, const At& at, int lane) {
    ldmatrix_x4_trans(b.r, at(lane % 16) + lane / 16 * 16);
  }

  __device__ static void multiply(Block& d, const A& a, const B& b) {
    mma_m16n8k16<T>(d[0], a.r, {b.r[0], b.r[1]});
    mma_m16n8k16<T>(d[1], a.r, {b.r[2], b.r[3]});
  }
  __device__ static void multiply_long(Block& d, const A& a, const B& b) { multiply(d, a, b); }
};

// Tensor cores, float32 values rounded to ten bits of mantissa. In bytes along a row, the fragments of four-byte values
// are those of two-byte values.
struct MmaTf32 : private MmaHalf<__half> {
  using Storage = float;
  static constexpr int kStepRows = 8;
  static constexpr bool kRounds = true;
  using MmaHalf::A, MmaHalf::B, MmaHalf::kStepBytes, MmaHalf::kAddresses;
  using MmaHalf::row, MmaHalf::byte, MmaHalf::load_a, MmaHalf::load_b;

  __device__ static uint4 operand(const float (&v)[4]) {
    return {to_tf32(v[0]), to_tf32(v[1]), to_tf32(v[2]), to_tf32(v[3])};
  }

  template <class At>
  __device__ static void load_a_across(A& a, const At& at, int lane) {
    a.r[0] = word(at(lane % 4), lane / 4), a.r[1] = word(at(lane % 4), lane / 4 + 8);
    a.r[2] = word(at(lane % 4 + 4), lane / 4), a.r[3] = word(at(lane % 4 + 4), lane / 4 + 8);
  }
  template <class At>
  __device__ static void load_b_across(B& b, const At& at, int lane) {
    b.r[0] = word(at(lane % 4), lane / 4), b.r[1] = word(at(lane % 4 + 4), lane / 4);
    b.r[2] = word(at(lane % 4), lane / 4 + 8), b.r[3] = word(at(lane % 4 + 4), lane / 4 + 8);
  }

  __device__ static void multiply(Block& d, const A& a, const B& b) {
    mma_m16n8k8_tf32(d[0], a.r, {b.r[0], b.r[1]});
    mma_m16n8k8_tf32(d[1], a.r, {b.r[2], b.r[3]});
  }
  __device__ static void multiply_long(Block& d, const A& a, const B& b) { multiply(d, a, b); }

 private:
  __device__ static uint32_t word(const std::byte* row, int i) { return reinterpret_cast<const uint32_t*>(row)[i]; }
};

// Fused multiply-adds in float32, in the same layout.
struct Fma {
  using Storage = float;
  static constexpr int kStepBytes = 16, kStepRows = 4, kAddresses = 2;
  static constexpr bool kRounds = false;
  struct A {
    float r[2][4];  // rows g and g + 8, by depth
  };
  struct B {
    float r[2][2][4];  // columns 8*half + 2t + i, by depth
  };

  __device__ static uint4 operand(const float (&v)[4]) { return pack<float>(v); }

  __device__ static int row(int lane, int i) { return lane / 4 + 8 * i; }
  __device__ static int byte(int) { return 0; }
  __device__ static void load_a(A& a, const std::byte* const (&rows)[2]) {
    unpack<float>(a.r[0], *reinterpret_cast<const uint4*>(rows[0]));
    unpack<float>(a.r[1], *reinterpret_cast<const uint4*>(rows[1]));
  }
  __device__ static void load_b(B& b, const std::byte* shared, int ld, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      unpack<float>(b.r[i / 2][i % 2],
                    *reinterpret_cast<const uint4*>(shared + (i / 2 * 8 + lane % 4 * 2 + i % 2) * ld));
  }

  template <class At>
  __device__ static void load_a_across(A& a, const At& at, int lane) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* row = reinterpret_cast<const float*>(at(j)) + lane / 4;
      a.r[0][j] = row[0], a.r[1][j] = row[8];
    }
  }
  template <class At>
  __device__ static void load_b_across(B& b, const At& at, int lane) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 pair = reinterpret_cast<const float2*>(at(j))[4 * half + lane % 4];
        b.r[half][0][j] = pair.x, b.r[half][1][j] = pair.y;
      }
  }

  __device__ static void multiply(Block& d, const A& a, const B& b) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[half][i] = fmaf(a.r[i / 2][j], b.r[half][i % 2][j], d[half][i]);
  }
  // Four products are added up first, so the long sum is rounded a quarter as often.
  __device__ static void multiply_long(Block& d, const A& a, const B& b) {
    Block four = {};
    multiply(four, a, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) d[i / 4][i % 4] += four[i / 4][i % 4];
  }
};

// body(S{}) with the storage type of a dtype.
template <class Body>
void with_storage(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32:
    case Dtype::tf32:
      return body(float{});
    case Dtype::bf16:
      return body(__nv_bfloat16{});
    case Dtype::f16:
      return body(__half{});
    case Dtype::f64:
      break;
  }
  throw std::runtime_error("the CUDA kernels compute in float32, bfloat16 and float16");
}

// body(Op{}) with the product of a dtype.
template <class Body>
void with_product(Dtype dtype, const Body& body) {
  if (dtype == Dtype::tf32) return body(MmaTf32{});
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    body(std::conditional_t<std::is_same_v<S, float>, Fma, MmaHalf<S>>{});
  });
}

}  // namespace fused_preact::cuda
