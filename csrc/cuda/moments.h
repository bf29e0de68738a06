// Batch statistics: (count, origin, s1, s2) a channel, merged in a fixed order.
//
// All sums are of distances from an origin near the mean, so that channels with a mean that is large against their
// deviation keep their digits: in float, of a lane's values (up to kMostSummed behind a product, else all that it has
// in a block's run of pixels), about the mean of a warp's first; in double, of those sums, about the first of their
// origins. Sums move to another origin without a division. Mean and variance take none either, since the values of a
// channel are counted before the launch: all wait for the last block, and so for what it divides.
#pragma once
#include "merge.h"

namespace fused_preact::cuda {

struct Moments {
  double count = 0, origin = 0, s1 = 0, s2 = 0;

  // (n, origin, s1, s2) of n values: the sum and the sum of squares of their distances from an origin of their own.
  __device__ void add(const float4& sums) {
    if (sums.x == 0) return;
    if (count == 0) origin = sums.y;
    const double n = sums.x, shift = sums.y - origin;
    s2 += sums.w + shift * (2.0 * sums.z + n * shift);
    s1 += sums.z + n * shift;
    count += n;
  }
};

// What one lane adds up of kLanes channels: sums about an origin that all lanes of a channel share.
template <int L>
struct MomentSums {
  float n = 0, origin[L] = {}, s1[L] = {}, s2[L] = {};
  bool started = false;

  // Sets the origin, where it is not yet set, to the mean of the values of all lanes, where `valid`; `stride` lanes
  // have different channels. Nothing may have been added before that.
  __device__ void start(const float (&v)[L], bool valid, int stride) {
    if (started) return;
    float sum[L + 1];
#pragma unroll
    for (int i = 0; i < L; ++i) sum[i] = valid ? v[i] : 0.0f;
    sum[L] = valid;
    sum_lanes(sum, stride);
    started = sum[L] > 0;  // the same for all lanes, since all channels of a pixel are as valid
    const float scale = started ? 1 / sum[L] : 0.0f;
#pragma unroll
    for (int i = 0; i < L; ++i) origin[i] = sum[i] * scale;
  }

  __device__ void add(const float (&v)[L]) {
    n += 1;
#pragma unroll
    for (int i = 0; i < L; ++i) {
      const float d = v[i] - origin[i];
      s1[i] += d;
      s2[i] = fmaf(d, d, s2[i]);
    }
  }

  // Sums over the lanes of a channel, writes (n, origin, s1, s2) of this lane's channels, and begins at zero again.
  __device__ void store(float4* to, int lane, int stride) {
    float count[1] = {n};
    sum_lanes(count, stride);
    sum_lanes(s1, stride);
    sum_lanes(s2, stride);
    if (lane < stride)
#pragma unroll
      for (int i = 0; i < L; ++i) to[lane * L + i] = {count[0], origin[i], s1[i], s2[i]};
    *this = {};
  }
};

// The rows of channel c of a batch norm with these statistics.
__device__ __forceinline__ void write_norm_rows(float* rows, int64_t C, int64_t c, double mean, double variance,
                                                double unbiased, double eps, float gamma, float beta) {
  const double rstd = 1 / sqrt(variance + eps), scale = gamma * rstd, lost = static_cast<float>(mean) - mean;
  rows[kMean * C + c] = static_cast<float>(mean);
  rows[kRstd * C + c] = static_cast<float>(rstd);
  rows[kVariance * C + c] = static_cast<float>(unbiased);
  rows[kScale * C + c] = static_cast<float>(scale);
  // Of an infinite mean nothing is lost, and an infinite scale makes no NaN of that.
  rows[kShift * C + c] = lost > 0 || lost < 0 ? static_cast<float>(beta + scale * lost) : beta;
}

// Moments of every group and channel in global memory, and the rows that come of them.
struct MomentSlots {
  using Total = Moments;
  static constexpr int kValues = 4;  // count, origin, s1, s2

  double* data;  // [groups][kValues][C]
  float* rows;   // [kNormRows][C], or null: then there are no statistics
  int64_t C;
  Affine next;
  double part, unbiased_part;  // 1 / values of a channel, and 1 / one less

  // Of a batch norm of C channels of so many `values`; without statistics where next_rows is null.
  MomentSlots(Workspace& workspace, int64_t groups, int64_t channels, int64_t values, const Affine& norm,
              void* next_rows)
      : data(next_rows != nullptr ? static_cast<double*>(workspace.take(bytes(groups, channels))) : nullptr),
        rows(static_cast<float*>(next_rows)),
        C(channels),
        next(norm),
        part(1.0 / static_cast<double>(values)),
        unbiased_part(1.0 / static_cast<double>(values - 1)) {}

  static size_t bytes(int64_t groups, int64_t C) { return groups * kValues * C * sizeof(double); }

  __device__ double* slot(int group, int64_t c) const { return data + group * kValues * C + c; }
  __device__ void write(int group, int64_t c, const Moments& m) const {
    double* to = slot(group, c);
    to[0] = m.count, to[C] = m.origin, to[2 * C] = m.s1, to[3 * C] = m.s2;
  }

  // The sums of the slots first, first + step, ... about the origin of the first.
  struct Channel {
    const MomentSlots& slots;
    int64_t c;
    int first, step;
    bool last;  // of all slots: then the rows follow
    double origin;
    float gamma, beta;

    __device__ Channel(const MomentSlots& of, int64_t channel, int begin, int stride, bool finish)
        : slots(of), c(channel), first(begin), step(stride), last(finish), origin(of.slot(begin, channel)[of.C]) {
      if (last) gamma = static_cast<const float*>(of.next.gamma)[c], beta = static_cast<const float*>(of.next.beta)[c];
    }
    __device__ void add(double (&sum)[3], int i) const {
      const double* from = slots.slot(first + i * step, c);
      const double n = from[0], shift = from[slots.C] - origin, s1 = from[2 * slots.C];
      sum[0] += n, sum[1] += s1 + n * shift, sum[2] += from[3 * slots.C] + shift * (2.0 * s1 + n * shift);
    }
    __device__ void finish(const double (&sum)[3]) const {
      if (!last) return slots.write(first, c, {sum[0], origin, sum[1], sum[2]});
      const double mean = sum[1] * slots.part, spread = sum[2] - sum[1] * mean,
                   m2 = spread < 0 ? 0 : spread;  // or a NaN
      write_norm_rows(slots.rows, slots.C, c, origin + mean, m2 * slots.part, m2 * slots.unbiased_part, slots.next.eps,
                      gamma, beta);
    }
  };

  // Merges channels [begin, end), as merge_groups asks.
  template <int Threads>
  __device__ void merge(double* shared, int begin, int end, int first, int count, int step, bool finish) const {
    sum_members<3, Threads>(shared, begin, end, count,
                            [&](int64_t c) { return Channel(*this, c, first, step, finish); });
  }
};

}  // namespace fused_preact::cuda
