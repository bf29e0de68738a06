// forward: y = conv(a, weight) + bias + residual, and the batch norm rows that the next unit needs of y.
//
// Layout: x, residual, y NHWC; the filter by its strides. One block is a run of tiles of at most 128 output pixels and
// 16 or 64 output channels (correlate.h). Statistics are of y as stored, in float over one tile or several (moments.h),
// merged by the last block (merge.h).
// Bytes: x read once a column of blocks, residual read once, y written once.
#include "correlate.h"
#include "moments.h"

namespace fused_preact::cuda {

namespace {

template <class Op>
struct ForwardEpilogue {
  using S = typename Op::Storage;
  static constexpr int L = kLanes<S>;

  struct Output {
    const S* bias;      // or null
    const S* residual;  // or null
    S* y;
    int K;
    bool aligned;
    MomentSlots slots;

    __device__ bool has_sums() const { return slots.rows != nullptr; }
  };
  using Beside = uint4;
  using Total = Moments;

  const Output& out;
  MomentSums<L> sums;

  __device__ explicit ForwardEpilogue(const Output& output) : out(output) {}

  __device__ int channels() const { return out.K; }
  __device__ Beside read(int64_t at, int c) const {
    if (out.residual == nullptr || at < 0) return {0, 0, 0, 0};
    return load_piece(out.residual + at, c, out.K, out.aligned);
  }

  __device__ void write(float (&v)[L], const Beside& beside, int64_t at, int c, int start) {
    if (out.bias != nullptr)
#pragma unroll
      for (int i = 0; i < L; ++i) v[i] += c + i < out.K ? widen(out.bias[c + i]) : 0.0f;
    if (out.residual != nullptr) {
      float residual[L];
      unpack<S>(residual, beside);
#pragma unroll
      for (int i = 0; i < L; ++i) v[i] += residual[i];
    }
    const uint4 stored = pack<S>(v);
    if (at >= 0) store_piece(out.y + at, c, out.K, out.aligned, stored);
    if (!out.has_sums()) return;
    unpack<S>(v, stored);
    if (start > 0) sums.start(v, at >= 0, start);
    if (at >= 0) sums.add(v);
  }

  __device__ void restart() { sums = {}; }
  __device__ void store_sums(float4* to, int lane, int stride) { sums.store(to, lane, stride); }
};

}  // namespace

void forward(const Conv& conv, Dtype dtype, const Activation& x, const Weight& weight, const void* bias,
             const void* residual, void* y, const Affine& next, void* next_rows, Workspace& workspace) {
  with_product(dtype, [&](auto op) {
    using Op = decltype(op);
    using S = typename Op::Storage;
    using Source = ActivationSource<Op>;
    const int K = static_cast<int>(conv.K), C = static_cast<int>(conv.C);
    Correlation<Op, Source> c{
        Source(x, conv.C),
        {weight.data, weight.stride_k, weight.stride_c, weight.stride_r, weight.stride_s, conv, K, C}};
    c.windows[0] = forward_window(conv);
    c.window_count = 1;
    const bool aligned = conv.K % kLanes<S> == 0 && are_aligned(y, residual);
    launch_correlate<ForwardEpilogue<Op>>(c, workspace, [&](const Teams& teams) {
      return typename ForwardEpilogue<Op>::Output{
          static_cast<const S*>(bias),
          static_cast<const S*>(residual),
          static_cast<S*>(y),
          K,
          aligned,
          MomentSlots(workspace, teams.groups, conv.K, conv.N * conv.P * conv.Q, next, next_rows)};
    });
  });
}

}  // namespace fused_preact::cuda
