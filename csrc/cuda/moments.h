// Batch statistics: (count, mean, M2) a channel, merged in a fixed order.
//
// All sums are of distances from an origin near the mean, so that channels with a mean that is large against their
// deviation keep their digits: in float, of a few dozen values a lane, about the mean of a warp's first; in double, of those
// sums, about the first of their origins. Sums move to another origin without a division.
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

  __device__ double mean() const { return origin + s1 / count; }
  __device__ double m2() const { return maximum(s2 - s1 * s1 / count, 0.0); }
};

// What one lane adds up of kLanes channels: sums about an origin that all lanes of a channel share.
template <int L>
struct MomentSums {
  float n = 0, origin[L] = {}, s1[L] = {}, s2[L] = {};
  bool started = false;

  // Sets the origin, where it is not yet set, to the mean of the values of all lanes, where `valid`; `stride` lanes have
  // different channels. Nothing may have been added before that.
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
                                                double unbiased, const Affine& next) {
  const double rstd = 1 / sqrt(variance + next.eps);
  rows[kMean * C + c] = static_cast<float>(mean);
  rows[kRstd * C + c] = static_cast<float>(rstd);
  rows[kVariance * C + c] = static_cast<float>(unbiased);
  rows[kScale * C + c] = static_cast<float>(static_cast<const float*>(next.gamma)[c] * rstd);
  rows[kShift * C + c] = static_cast<const float*>(next.beta)[c];
}

// Moments of every group and channel in global memory, and the rows that come of them.
struct MomentSlots {
  double* data;  // [groups][3][C]
  float* rows;   // [kNormRows][C], or null: then there are no statistics
  int64_t C;
  Affine next;

  static size_t bytes(int64_t groups, int64_t C) { return groups * 3 * C * sizeof(double); }

  __device__ double* slot(int group, int64_t c) const { return data + group * 3 * C + c; }
  __device__ void write(int group, int64_t c, double count, double mean, double m2) const {
    double* to = slot(group, c);
    to[0] = count, to[C] = mean, to[2 * C] = m2;
  }
  __device__ void write(int group, int64_t c, const Moments& m) const { write(group, c, m.count, m.mean(), m.m2()); }

  // Merges channels [begin, end), as merge_groups asks.
  template <int Threads>
  __device__ void merge(double* shared, int begin, int end, int first, int count, int step, bool finish) const {
    sum_members<3, Threads>(
        shared, begin, end, count,
        [&](int64_t c) {
          const double origin = slot(first, c)[C];
          return [this, origin, first, step, c](double (&sum)[3], int i) {
            const double* from = slot(first + i * step, c);
            const double n = from[0], shift = from[C] - origin;
            sum[0] += n, sum[1] += n * shift, sum[2] += from[2 * C] + n * shift * shift;
          };
        },
        [&](int64_t c, const double (&sum)[3]) {
          const double n = sum[0], mean = slot(first, c)[C] + sum[1] / n;
          const double m2 = maximum(sum[2] - sum[1] * sum[1] / n, 0.0);
          if (finish)
            write_norm_rows(rows, C, c, mean, m2 / n, m2 / (n - 1), next);
          else
            write(first, c, n, mean, m2);
        });
  }
};

}  // namespace fused_preact::cuda
