// The gradients of a batch norm, dbeta = sum dz and dgamma = rstd * sum dz*(x - mean), merged in a fixed order.
#pragma once
#include "merge.h"

namespace fused_preact::cuda {

// What one lane adds up of kLanes channels.
template <int L>
struct GradLanes {
  float dz[L] = {}, dz_x[L] = {};

  // centered: x - mean.
  __device__ void add(const float (&v)[L], const float (&centered)[L]) {
#pragma unroll
    for (int i = 0; i < L; ++i) dz[i] += v[i], dz_x[i] = fmaf(v[i], centered[i], dz_x[i]);
  }

  // Sums over the lanes of a channel, writes those of this lane's channels, and begins at zero again.
  __device__ void store(float4* to, int lane, int stride) {
    sum_lanes(dz, stride);
    sum_lanes(dz_x, stride);
    if (lane < stride)
#pragma unroll
      for (int i = 0; i < L; ++i) to[lane * L + i] = {dz[i], dz_x[i], 0, 0};
    *this = {};
  }
};

struct GradSums {
  double dz = 0, dz_x = 0;

  __device__ void add(const float4& sums) { dz += sums.x, dz_x += sums.y; }
};

// The two sums of every group and channel in global memory, and the rows that come of them.
struct GradSlots {
  using Total = GradSums;

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

}  // namespace fused_preact::cuda
