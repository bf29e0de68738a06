// Operands that kernels form while they read: the activation a, and the incoming dy.
//
// A strip lies in shared memory as [pixel][piece], each pixel followed by 16 bytes that spread rows over the banks. A
// thread copies pieces there without waiting; when they have come it forms those that it copied itself, in place, so no
// barrier stands between. Padding is zero after forming: it is copied as zeros and left alone.
#pragma once
#include "window.h"

namespace fused_preact::cuda {

// Copies what is valid of a piece of which the first `channels` are channels of the tensor, value by value.
template <class S>
__device__ __forceinline__ void copy_values(std::byte* shared, const S* from, bool valid, int channels) {
#pragma unroll 1
  for (int i = 0; i < kLanes<S>; ++i)
    reinterpret_cast<S*>(shared)[i] = valid && i < channels ? from[i] : narrow<S>(0.0f);
}

// a = max(scale*(x - mean) + shift, 0), or x where there is no norm.
template <class Op>
struct ActivationSource {
  using S = typename Op::Storage;
  static constexpr int L = kLanes<S>;
  const S* x;
  const float* norm;
  int C;
  bool aligned;

  ActivationSource(const Activation& a, int64_t channels)
      : x(static_cast<const S*>(a.x)),
        norm(static_cast<const float*>(a.norm)),
        C(static_cast<int>(channels)),
        aligned(channels % L == 0 && are_aligned(a.x, a.norm)) {}

  __host__ __device__ int tensors() const { return 1; }
  __device__ bool forms() const { return norm != nullptr || Op::kRounds; }
  // copy(to, from) for each tensor, of the piece at value `at` of each.
  template <class Copy>
  __device__ void copy(std::byte* to, int, int64_t at, const Copy& copy) const {
    copy(to, x + at);
  }

  struct Rows {
    float mean[L], scale[L], shift[L];
  };
  __device__ Rows rows(int c) const {
    Rows rows{};
    if (norm == nullptr) return rows;
    load_row(rows.mean, norm + kMean * C, c, C, aligned);
    load_row(rows.scale, norm + kScale * C, c, C, aligned);
    load_row(rows.shift, norm + kShift * C, c, C, aligned);
    return rows;
  }
  // a of a piece of x, of which it takes the place.
  __device__ void form(float (&v)[L], const Rows& rows) const {
    if (norm == nullptr) return;
#pragma unroll
    for (int i = 0; i < L; ++i) v[i] = relu(fmaf(v[i] - rows.mean[i], rows.scale[i], rows.shift[i]));
  }
  __device__ void form(std::byte* at, int, const Rows& rows) const {
    float v[L];
    unpack<S>(v, *reinterpret_cast<const uint4*>(at));
    form(v, rows);
    *reinterpret_cast<uint4*>(at) = Op::operand(v);
  }
};

// dy = scale*g + slope*(x - mean) + offset; scale*g without grad; g without norm.
template <class Op>
struct GradientSource {
  using S = typename Op::Storage;
  static constexpr int L = kLanes<S>;
  const S* g;
  const S* x;
  const float* norm;
  const float* grad;
  int C;
  bool aligned;

  GradientSource(const Gradient& dy, int64_t channels)
      : g(static_cast<const S*>(dy.g)),
        x(static_cast<const S*>(dy.x)),
        norm(static_cast<const float*>(dy.norm)),
        grad(static_cast<const float*>(dy.grad)),
        C(static_cast<int>(channels)),
        aligned(channels % L == 0 && are_aligned(dy.g, dy.x, dy.norm, dy.grad)) {}

  // x is read beside g where the batch's statistics depend on it; its piece lies `second` bytes behind that of g.
  __host__ __device__ int tensors() const { return grad != nullptr ? 2 : 1; }
  __device__ bool forms() const { return norm != nullptr || Op::kRounds; }
  template <class Copy>
  __device__ void copy(std::byte* to, int second, int64_t at, const Copy& copy) const {
    copy(to, g + at);
    if (grad != nullptr) copy(to + second, x + at);
  }

  struct Rows {
    float mean[L], scale[L], slope[L], offset[L];
  };
  __device__ Rows rows(int c) const {
    Rows rows{};
    if (norm == nullptr) return rows;
    load_row(rows.scale, norm + kScale * C, c, C, aligned);
    // An infinite mean makes no NaN where x is not read.
    load_row(rows.mean, grad != nullptr ? norm + kMean * C : nullptr, c, C, aligned);
    load_row(rows.slope, grad != nullptr ? grad + kSlope * C : nullptr, c, C, aligned);
    load_row(rows.offset, grad != nullptr ? grad + kOffset * C : nullptr, c, C, aligned);
    return rows;
  }
  // dy of one channel of a pixel, in float.
  __device__ float value(int64_t pixel, int c) const {
    const float dz = widen(g[pixel * C + c]);
    if (norm == nullptr) return dz;
    const float scaled = dz * norm[kScale * C + c];
    if (grad == nullptr) return scaled;
    return fmaf(widen(x[pixel * C + c]) - norm[kMean * C + c], grad[kSlope * C + c], scaled + grad[kOffset * C + c]);
  }
  // dy of a piece from g, of which it takes the place, and x.
  __device__ void form(float (&v)[L], const float (&input)[L], const Rows& rows) const {
    if (norm == nullptr) return;
#pragma unroll
    for (int i = 0; i < L; ++i)
      v[i] = fmaf(input[i] - rows.mean[i], rows.slope[i], fmaf(v[i], rows.scale[i], rows.offset[i]));
  }
  __device__ void form(std::byte* at, int second, const Rows& rows) const {
    float v[L], input[L] = {};
    unpack<S>(v, *reinterpret_cast<const uint4*>(at));
    if (grad != nullptr) unpack<S>(input, *reinterpret_cast<const uint4*>(at + second));
    form(v, input, rows);
    *reinterpret_cast<uint4*>(at) = Op::operand(v);
  }
};

// Where the strips of a kernel lie: 2^log_pieces pieces of a pixel, of as many tensors as the source reads.
struct StripLayout {
  int log_pieces, tensor_bytes, bytes;

  StripLayout() = default;
  StripLayout(int log, int pixels, int tensors)
      : log_pieces(log), tensor_bytes(pixels * ((kPieceBytes << log) + kPieceBytes)), bytes(tensors * tensor_bytes) {}
  __host__ __device__ int pixel_bytes() const { return (kPieceBytes << log_pieces) + kPieceBytes; }
};

// body(pixel of the strip, its piece) for every piece that belongs to this thread, always of the same channels.
template <int Unroll, class Body>
__device__ __forceinline__ void for_own_pieces(const StripLayout& layout, int pixels, const Body& body) {
  const int piece = threadIdx.x & ((1 << layout.log_pieces) - 1), step = kThreads >> layout.log_pieces;
  int q = threadIdx.x >> layout.log_pieces, at = q * layout.pixel_bytes() + piece * kPieceBytes;
#pragma unroll Unroll
  for (; q < pixels; q += step, at += step * layout.pixel_bytes()) body(q, at);
}

template <class Source>
__device__ __forceinline__ int own_channel(const StripLayout& layout, int first) {
  return first + (threadIdx.x & ((1 << layout.log_pieces) - 1)) * Source::L;
}

// Queues the copies of a strip of `pixels` pixels, of channels from `first` on: pixel q of the strip is pixel corner +
// offsets[q] of the tensor, or zeros where the offset is -1.
template <class Source>
__device__ __forceinline__ void copy_strip(const Source& source, int first, const StripLayout& layout, std::byte* strip,
                                           int pixels, int64_t corner, const int* offsets) {
  const int c = own_channel<Source>(layout, first);
  const int64_t origin = corner * source.C + c;
  const auto copy_all = [&](auto unroll, const auto& copy) {
    for_own_pieces<decltype(unroll)::value>(layout, pixels, [&](int q, int at) {
      const bool valid = offsets[q] >= 0 && c < source.C;
      source.copy(strip + at, layout.tensor_bytes, origin + static_cast<int64_t>(offsets[q]) * source.C,
                  [&](std::byte* to, const auto* from) { copy(to, from, valid); });
    });
  };
  if (source.aligned)
    copy_all(std::integral_constant<int, 4>(),
             [](std::byte* to, const auto* from, bool valid) { cp_async(to, from, valid); });
  else
    copy_all(std::integral_constant<int, 1>(),
             [&](std::byte* to, const auto* from, bool valid) { copy_values(to, from, valid, source.C - c); });
}

// Forms the strip when its copies have come, with the rows of own_channel.
template <class Source>
__device__ __forceinline__ void form_strip(const Source& source, const typename Source::Rows& rows,
                                           const StripLayout& layout, std::byte* strip, int pixels,
                                           const int* offsets) {
  if (!source.forms()) return;
  for_own_pieces<2>(layout, pixels, [&](int q, int at) {
    if (offsets[q] >= 0) source.form(strip + at, layout.tensor_bytes, rows);
  });
}

}  // namespace fused_preact::cuda
