// Pieces: the 16 bytes of one storage type that every access to an activation is made of.
#pragma once
#include <cstring>

#include "../kernels.h"
#include "ptx.h"

namespace fused_preact::cuda {

constexpr int kPieceBytes = 16;

template <class S>
constexpr int kLanes = kPieceBytes / static_cast<int>(sizeof(S));

template <class T>
__host__ __device__ __forceinline__ constexpr T minimum(T a, T b) {
  return a < b ? a : b;
}

template <class T>
__host__ __device__ __forceinline__ T maximum(T a, T b) {
  return a > b ? a : b;
}

template <class T>
__host__ __device__ __forceinline__ T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The two values of a word: of 16-bit types only.
__device__ __forceinline__ float2 widen(uint32_t word, __half) { return __half22float2(bits_as<__half2>(word)); }
__device__ __forceinline__ float2 widen(uint32_t word, __nv_bfloat16) {
  return {bits_as<float>(word << 16), bits_as<float>(word & 0xffff0000u)};
}
__device__ __forceinline__ uint32_t narrow(float a, float b, __half) {
  return bits_as<uint32_t>(__floats2half2_rn(a, b));
}
__device__ __forceinline__ uint32_t narrow(float a, float b, __nv_bfloat16) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(a, b));
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class S>
__device__ __forceinline__ S narrow(float x) {
  if constexpr (std::is_same_v<S, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<S, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

template <class S>
__device__ __forceinline__ void unpack(float (&v)[kLanes<S>], uint4 piece) {
  if constexpr (sizeof(S) == 4) {
    v[0] = bits_as<float>(piece.x), v[1] = bits_as<float>(piece.y);
    v[2] = bits_as<float>(piece.z), v[3] = bits_as<float>(piece.w);
  } else {
    const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen(words[i], S{});
      v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
  }
}

template <class S>
__device__ __forceinline__ uint4 pack(const float (&v)[kLanes<S>]) {
  if constexpr (sizeof(S) == 4)
    return {bits_as<uint32_t>(v[0]), bits_as<uint32_t>(v[1]), bits_as<uint32_t>(v[2]), bits_as<uint32_t>(v[3])};
  else
    return {narrow(v[0], v[1], S{}), narrow(v[2], v[3], S{}), narrow(v[4], v[5], S{}), narrow(v[6], v[7], S{})};
}

// Channels [c, c + kLanes) of a pixel, zeros from channel C on. `aligned` says that C is a multiple of kLanes and the
// tensor aligned to a piece: then a piece is one access, and wholly inside or outside.
template <class S>
__device__ __forceinline__ uint4 load_piece(const S* pixel, int c, int C, bool aligned) {
  if (aligned) return c < C ? *reinterpret_cast<const uint4*>(pixel + c) : uint4{0, 0, 0, 0};
  float v[kLanes<S>];
#pragma unroll
  for (int i = 0; i < kLanes<S>; ++i) v[i] = c + i < C ? widen(pixel[c + i]) : 0.0f;
  return pack<S>(v);
}

template <class S>
__device__ __forceinline__ void store_piece(S* pixel, int c, int C, bool aligned, uint4 piece) {
  if (aligned) {
    if (c < C) *reinterpret_cast<uint4*>(pixel + c) = piece;
    return;
  }
  float v[kLanes<S>];
  unpack<S>(v, piece);
#pragma unroll
  for (int i = 0; i < kLanes<S>; ++i)
    if (c + i < C) pixel[c + i] = narrow<S>(v[i]);
}

// The same of a row of per-channel values, zeros from C on and where there is no row.
template <int L>
__device__ __forceinline__ void load_row(float (&v)[L], const float* row, int c, int C, bool aligned) {
  if (row != nullptr && aligned && c + L <= C) {
#pragma unroll
    for (int i = 0; i < L; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + c + i);
      v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < L; ++i) v[i] = row != nullptr && c + i < C ? row[c + i] : 0.0f;
}

// The least power of two that holds n, or `most`.
inline int log2_ceil(int64_t n, int most) {
  int log = 0;
  while (log < most && (int64_t{1} << log) < n) ++log;
  return log;
}

// Whether each of them is to a piece.
template <class... Pointers>
bool are_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kPieceBytes == 0) && ...);
}

// max(z, 0) that keeps NaN.
__device__ __forceinline__ float relu(float z) { return z <= 0.0f ? 0.0f : z; }

}  // namespace fused_preact::cuda
