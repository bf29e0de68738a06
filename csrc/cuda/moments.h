// Batch statistics: (count, mean, M2) a channel, merged by Chan's formula in a fixed order.
//
// A warp sums in float, about an origin near the mean of its values, so that channels with a mean that is large against
// their deviation keep their digits. What it has summed is merged in double, a few values a tile.
#pragma once
#include "merge.h"

namespace fused_preact::cuda {

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  __device__ void merge(double n, double other_mean, double other_m2) {
    if (n == 0) return;
    const double share = n / (count + n), delta = other_mean - mean;
    m2 += other_m2 + delta * delta * count * share;
    mean += delta * share;
    count += n;
  }

  // n values whose distances from origin have the sum s1 and the sum of squares s2.
  __device__ void merge(const float4& sums) {
    if (sums.x == 0) return;
    const double n = sums.x, s1 = sums.z, m2_here = sums.w - s1 * s1 / n;
    merge(n, sums.y + s1 / n, m2_here < 0 ? 0 : m2_here);
  }
};

// What one lane adds up of kLanes channels: sums about an origin that all lanes of a channel share.
template <int L>
struct MomentSums {
  float n = 0, origin[L] = {}, s1[L] = {}, s2[L] = {};

  // Sets the origin to the mean of the first values: one of each lane, where `valid`. `stride` lanes have different
  // channels.
  __device__ void start(const float (&v)[L], bool valid, int stride) {
    float sum[L + 1];
#pragma unroll
    for (int i = 0; i < L; ++i) sum[i] = valid ? v[i] : 0.0f;
    sum[L] = valid;
    sum_lanes(sum, stride);
    const float scale = sum[L] > 0 ? 1 / sum[L] : 0.0f;
#pragma unroll
    for (int i = 0; i < L; ++i) origin[i] = sum[i] * scale, s1[i] = s2[i] = 0;
    n = 0;
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

  // Sums over the lanes of a channel and writes (n, origin, s1, s2) of this lane's channels.
  __device__ void store(float4* to, int lane, int stride) {
    float count[1] = {n};
    sum_lanes(count, stride);
    sum_lanes(s1, stride);
    sum_lanes(s2, stride);
    if (lane >= stride) return;
#pragma unroll
    for (int i = 0; i < L; ++i) to[lane * L + i] = {count[0], origin[i], s1[i], s2[i]};
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
  __device__ void write(int group, int64_t c, const Moments& m) const {
    double* to = slot(group, c);
    to[0] = m.count, to[C] = m.mean, to[2 * C] = m.m2;
  }

  // Merges channels [begin, end), as merge_groups asks.
  __device__ void merge(int64_t begin, int64_t end, int first, int count, int step, bool finish) const {
    for (int64_t c = begin + threadIdx.x; c < end; c += blockDim.x) {
      Moments total;
      for (int i = 0; i < count; ++i) {
        const double* from = slot(first + i * step, c);
        total.merge(from[0], from[C], from[2 * C]);
      }
      if (finish)
        write_norm_rows(rows, C, c, total.mean, total.m2 / total.count, total.m2 / (total.count - 1), next);
      else
        write(first, c, total);
    }
  }
};

}  // namespace fused_preact::cuda
