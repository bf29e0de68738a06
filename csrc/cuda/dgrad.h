// What dgrad multiplies, and its epilogue: dgrad.cu has the contract.
#pragma once
#include "correlate.h"

namespace fused_preact::cuda {

struct GradSums {
  double dz = 0, dz_x = 0;

  __device__ void add(const float4& sums) { dz += sums.x, dz_x += sums.y; }
};

// The two sums of every group and channel in global memory, and the rows that come of them.
struct GradSlots {
  double* data;       // [groups][2][C]
  const float* norm;  // [kNormRows][C], or null: then there are no sums
  NormGrad grad;
  int64_t C;
  double part;  // 1 / values of a channel

  static size_t bytes(int64_t groups, int64_t C) { return groups * 2 * C * sizeof(double); }

  __device__ double* slot(int group, int64_t c) const { return data + group * 2 * C + c; }
  __device__ void write(int group, int64_t c, const GradSums& sums) const {
    slot(group, c)[0] = sums.dz, slot(group, c)[C] = sums.dz_x;
  }

  // The sums of the slots first, first + step, ...
  struct Channel {
    const GradSlots& slots;
    int64_t c;
    int first, step;
    bool last;  // of all slots: then the rows follow
    double rstd, scale;

    __device__ Channel(const GradSlots& of, int64_t channel, int begin, int stride, bool finish)
        : slots(of), c(channel), first(begin), step(stride), last(finish) {
      if (last) rstd = of.norm[kRstd * of.C + c], scale = of.norm[kScale * of.C + c];
    }
    __device__ void add(double (&sum)[2], int i) const {
      const double* from = slots.slot(first + i * step, c);
      sum[0] += from[0], sum[1] += from[slots.C];
    }
    __device__ void finish(const double (&sum)[2]) const {
      if (!last) return slots.write(first, c, {sum[0], sum[1]});
      const double dbeta = sum[0], dgamma = sum[1] * rstd;
      static_cast<float*>(slots.grad.dgamma)[c] = static_cast<float>(dgamma);
      static_cast<float*>(slots.grad.dbeta)[c] = static_cast<float>(dbeta);
      float* const rows = static_cast<float*>(slots.grad.rows);
      if (rows == nullptr) return;
      const double each = -scale * slots.part;
      rows[kSlope * slots.C + c] = static_cast<float>(each * rstd * dgamma);
      rows[kOffset * slots.C + c] = static_cast<float>(each * dbeta);
    }
  };

  // Merges channels [begin, end), as merge_groups asks.
  template <int Threads>
  __device__ void merge(double* shared, int begin, int end, int first, int count, int step, bool finish) const {
    sum_members<2, Threads>(shared, begin, end, count,
                            [&](int64_t c) { return Channel(*this, c, first, step, finish); });
  }
};

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
  float dz[L] = {}, dz_x[L] = {};  // since the last store_sums

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
#pragma unroll
    for (int i = 0; i < L; ++i) dz[i] += v[i], dz_x[i] = fmaf(v[i], x[i], dz_x[i]);
  }

  __device__ void restart() {
#pragma unroll
    for (int i = 0; i < L; ++i) dz[i] = dz_x[i] = 0;
  }
  __device__ void store_sums(float4* to, int lane, int stride) {
    sum_lanes(dz, stride);
    sum_lanes(dz_x, stride);
    if (lane < stride)
#pragma unroll
      for (int i = 0; i < L; ++i) to[lane * L + i] = {dz[i], dz_x[i], 0, 0};
    restart();
  }
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
    const bool aligned =
        conv.C % kLanes<S> == 0 && is_aligned(dz) && is_aligned(x.x) && is_aligned(add) && is_aligned(x.norm);
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
