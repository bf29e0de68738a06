// What dgrad multiplies, and its epilogue: dgrad.cu has the contract.
#pragma once
#include "correlate.h"
#include "norm_grad.h"

namespace fused_preact::cuda {

template <class Op>
struct DgradEpilogue {
  using S = typename Op::Storage;
  static constexpr int L = kLanes<S>;

  struct Output {
    const S* x;
    const S* add;  // or null
    S* dz;
    int C;
    bool aligned;
    GradSlots slots;

    __device__ bool has_sums() const { return slots.norm != nullptr; }
  };
  struct Beside {
    uint4 x, add;
  };
  using Total = GradSums;

  const Output& out;
  GradLanes<L> sums;

  __device__ explicit DgradEpilogue(const Output& output) : out(output) {}

  __device__ int channels() const { return out.C; }
  __device__ Beside read(int64_t at, int c) const {
    Beside beside{};
    if (at < 0) return beside;
    if (out.has_sums()) beside.x = load_piece(out.x + at, c, out.C, out.aligned);
    if (out.add != nullptr) beside.add = load_piece(out.add + at, c, out.C, out.aligned);
    return beside;
  }

  __device__ void write(float (&v)[L], const Beside& beside, int64_t at, int c, int) {
    if (out.add != nullptr) {
      float add[L];
      unpack<S>(add, beside.add);
#pragma unroll
      for (int i = 0; i < L; ++i) v[i] += add[i];
    }
    if (!out.has_sums()) {
      if (at >= 0) store_piece(out.dz + at, c, out.C, out.aligned, pack<S>(v));
      return;
    }
    float x[L], scale[L], shift[L];
    unpack<S>(x, beside.x);
    load_row(scale, out.slots.norm + kMean * out.C, c, out.C, out.aligned);
#pragma unroll
    for (int i = 0; i < L; ++i) x[i] -= scale[i];
    load_row(scale, out.slots.norm + kScale * out.C, c, out.C, out.aligned);
    load_row(shift, out.slots.norm + kShift * out.C, c, out.C, out.aligned);
#pragma unroll
    for (int i = 0; i < L; ++i)
      if (fmaf(x[i], scale[i], shift[i]) <= 0.0f) v[i] = 0;
    const uint4 stored = pack<S>(v);
    if (at >= 0) store_piece(out.dz + at, c, out.C, out.aligned, stored);
    if (at < 0) return;
    unpack<S>(v, stored);
    sums.add(v, x);
  }

  __device__ void restart() { sums = {}; }
  __device__ void store_sums(float4* to, int lane, int stride) { sums.store(to, lane, stride); }
};

// The classes of input pixels; those of no pixel are left out.
template <class Op>
void add_windows(Correlation<Op, GradientSource<Op>>& c, const Conv& conv) {
  if (conv.stride_h * conv.stride_w > kMostWindows)
    throw std::runtime_error("the CUDA kernels have strides of 1 and 2");
  c.window_count = 0;
  for (int64_t i = 0; i < conv.stride_h; ++i)
    for (int64_t j = 0; j < conv.stride_w; ++j) {
      const Axis h = Axis::transposed(conv.P, conv.H, conv.R, conv.stride_h, conv.pad_h, i);
      const Axis w = Axis::transposed(conv.Q, conv.W, conv.S, conv.stride_w, conv.pad_w, j);
      if (h.count > 0 && w.count > 0) c.windows[c.window_count++] = window(conv.N, h, w, kLogPixels);
    }
}

template <class Op>
Correlation<Op, GradientSource<Op>> dgrad_correlation(const Conv& conv, const Gradient& dy, const Weight& weight) {
  const int K = static_cast<int>(conv.K), C = static_cast<int>(conv.C);
  Correlation<Op, GradientSource<Op>> c{
      GradientSource<Op>(dy, conv.K),
      {weight.data, weight.stride_c, weight.stride_k, weight.stride_r, weight.stride_s, conv, C, K}};
  add_windows(c, conv);
  return c;
}

// What makes the epilogue's output, from the teams of the plan.
template <class Op>
auto dgrad_output(const Conv& conv, const Activation& x, const void* add, void* dz, const NormGrad& grad,
                  Workspace& workspace) {
  return [&, add, dz](const Teams& teams) {
    using S = typename Op::Storage;
    const bool sums = x.norm != nullptr;
    const bool aligned = conv.C % kLanes<S> == 0 && are_aligned(dz, x.x, add, x.norm);
    double* slots = nullptr;
    if (sums) slots = static_cast<double*>(workspace.take(GradSlots::bytes(teams.groups, conv.C)));
    return typename DgradEpilogue<Op>::Output{
        static_cast<const S*>(x.x),
        static_cast<const S*>(add),
        static_cast<S*>(dz),
        static_cast<int>(conv.C),
        aligned,
        {slots, static_cast<const float*>(x.norm), grad, conv.C, 1.0 / static_cast<double>(conv.N * conv.H * conv.W)}};
  };
}

}  // namespace fused_preact::cuda
