// Batch statistics: (count, mean, M2) a channel, merged by Chan's formula in a fixed order.
#pragma once
#include "tile.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// The rows of channel c of a batch norm with these statistics.
template <class T>
void norm_rows(T* rows, int64_t C, int64_t c, T mean, T variance, T unbiased, const Affine& next) {
  const double rstd = 1 / __builtin_sqrt(double(variance) + next.eps);
  rows[kMean * C + c] = mean;
  rows[kRstd * C + c] = T(rstd);
  rows[kVariance * C + c] = unbiased;
  rows[kScale * C + c] = T(static_cast<const T*>(next.gamma)[c] * rstd);
  rows[kShift * C + c] = static_cast<const T*>(next.beta)[c];
}

// The statistics of one group of tiles, for channels padded to whole vectors.
template <class T>
struct Moments {
  T* mean;
  T* m2;

  static size_t bytes(int64_t channels) { return 2 * padded(channels) * sizeof(T); }
  static int64_t padded(int64_t channels) { return ceil_div(channels, kLanes<T>) * kLanes<T>; }

  Moments(void* base, int64_t group, int64_t channels)
      : mean(static_cast<T*>(base) + group * 2 * padded(channels)), m2(mean + padded(channels)) {}

  // Merges the vector at channel c of a set of n values into that of the `count` values that are here.
  FUSED_PREACT_INLINE void merge(int64_t c, T count, Vec<T> other_mean, Vec<T> other_m2, T n) const {
    if (count == 0) {
      store(mean + c, other_mean);
      store(m2 + c, other_m2);
      return;
    }
    const T share = n / (count + n);
    const Vec<T> here = load(mean + c), delta = other_mean - here;
    store(mean + c, here + delta * splat(share));
    store(m2 + c, load(m2 + c) + other_m2 + delta * delta * splat(count * share));
  }
};

// Sums over a run of values of one vector of channels, about the first of them, which keeps the digits of channels with
// a large mean.
template <class T>
struct RunSums {
  Vec<T> origin, sum, squares;

  explicit RunSums(Vec<T> first) : origin(first), sum{}, squares{} {}
  RunSums() = default;

  FUSED_PREACT_INLINE void add(Vec<T> value) {
    const Vec<T> d = value - origin;
    sum += d;
    squares += d * d;
  }

  // Merges the run, of n values, into the channels from c on of a group that holds `count`.
  FUSED_PREACT_INLINE void merge_into(const Moments<T>& moments, int64_t c, int64_t count, int64_t n) const {
    const Vec<T> mean = sum * splat(T(1) / T(n));
    moments.merge(c, T(count), origin + mean, relu(squares - sum * mean), T(n));
  }
};

// Merges all groups, in order, into the first, and makes the rows of the batch norm that reads the tensor.
template <class T, class Count>
void finish_moments(void* base, int64_t groups, int64_t C, const Count& values_in_group, const Affine& next,
                    void* rows) {
  const Moments<T> total(base, 0, C);
  int64_t count = values_in_group(0);
  for (int64_t g = 1; g < groups; ++g) {
    const Moments<T> group(base, g, C);
    const int64_t n = values_in_group(g);
    for (int64_t c = 0; c < C; c += kLanes<T>) total.merge(c, T(count), load(group.mean + c), load(group.m2 + c), T(n));
    count += n;
  }
  for (int64_t c = 0; c < C; ++c)
    norm_rows<T>(static_cast<T*>(rows), C, c, total.mean[c], total.m2[c] / T(count), total.m2[c] / T(count - 1), next);
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
