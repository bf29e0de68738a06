// Batch statistics: (count, mean, M2) a channel, merged by Chan's formula in a fixed order.
#pragma once
#include "jobs.h"
#include "wide.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// The rows of channel c of a batch norm with these statistics.
template <class T>
void norm_rows(T* rows, int64_t C, int64_t c, double mean, double variance, double unbiased, const Affine& next) {
  const double rstd = 1 / __builtin_sqrt(variance + next.eps), scale = static_cast<const T*>(next.gamma)[c] * rstd;
  const double lost = T(mean) - mean, beta = static_cast<const T*>(next.beta)[c];
  rows[kMean * C + c] = T(mean);
  rows[kRstd * C + c] = T(rstd);
  rows[kVariance * C + c] = T(unbiased);
  rows[kScale * C + c] = T(scale);
  // Of an infinite mean nothing is lost, and an infinite scale makes no NaN of that.
  rows[kShift * C + c] = T(lost > 0 || lost < 0 ? beta + scale * lost : beta);
}

// The statistics of one group of tiles, for channels padded to whole vectors.
template <class T>
struct Moments {
  double* mean;
  double* m2;

  static int64_t padded(int64_t channels) { return ceil_div(channels, kLanes<T>) * kLanes<T>; }
  static size_t bytes(int64_t channels) { return 2 * padded(channels) * sizeof(double); }

  Moments(void* base, int64_t group, int64_t channels)
      : mean(static_cast<double*>(base) + group * 2 * padded(channels)), m2(mean + padded(channels)) {}

  // Merges the vector at channel c of a set of n values into that of the `count` values that are here.
  FUSED_PREACT_INLINE void merge(int64_t c, double count, Wide<T> other_mean, Wide<T> other_m2, double n) const {
    if (count == 0) {
      store_wide(mean + c, other_mean);
      store_wide(m2 + c, other_m2);
      return;
    }
    const double share = n / (count + n), weight = count * share;
    const Wide<T> here = load_wide<T>(mean + c), delta = other_mean - here;
    store_wide(mean + c, here + delta * share);
    store_wide(m2 + c, load_wide<T>(m2 + c) + other_m2 + delta * delta * weight);
  }
};

// Sums over a run of values of one vector of channels, about an origin near their mean, which keeps the digits of
// channels with a large mean: of d = value - origin, and of d*d. To settle every few values.
template <class T>
struct RunSums {
  Vec<T> origin;
  LongSum<T> sum, squares;

  explicit RunSums(Vec<T> near_mean) : origin(near_mean) {}
  RunSums() = default;

  FUSED_PREACT_INLINE void add(Vec<T> few, Vec<T> few_squares) {
    sum.add(few);
    squares.add(few_squares);
  }

  FUSED_PREACT_INLINE void settle() {
    sum.settle();
    squares.settle();
  }

  // Merges the run, of n values, into the channels from c on of a group that holds `count`.
  FUSED_PREACT_INLINE void merge_into(const Moments<T>& moments, int64_t c, int64_t count, int64_t n) const {
    const Wide<T> mean = sum.total / double(n);
    moments.merge(c, count, widen(origin) + mean, relu(squares.total - sum.total * mean), n);
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
    for (int64_t c = 0; c < C; c += kLanes<T>)
      total.merge(c, count, load_wide<T>(group.mean + c), load_wide<T>(group.m2 + c), n);
    count += n;
  }
  for (int64_t c = 0; c < C; ++c)
    norm_rows<T>(static_cast<T*>(rows), C, c, total.mean[c], total.m2[c] / count, total.m2[c] / (count - 1), next);
}

// The origin of a tile's sums is the mean of its first kAround pixels.
constexpr int64_t kStatisticsPixels = 64, kAround = 8, kFew = 32, kStatisticsGroups = 64;

// The rows of `next` from the batch statistics of values [pixels][C]. One job is a group of tiles of kStatisticsPixels
// pixels; the groups depend on the shape alone. prepare(p, run, c, n) comes before n channels from c on of `run` pixels
// from p on are read.
template <class S, class Prepare>
void statistics_of(int64_t pixels, int64_t C, const S* values, const Affine& next, void* rows, Workspace& workspace,
                   const Prepare& prepare) {
  using T = Accumulate<S>;
  const int64_t tiles = ceil_div(pixels, kStatisticsPixels), groups = minimum(tiles, kStatisticsGroups);
  const auto start = [&](int64_t g) { return minimum(part_begin(tiles, groups, g) * kStatisticsPixels, pixels); };
  void* moments = workspace.take(groups * Moments<T>::bytes(C));
  parallel(groups, [&](int64_t g) {
    for (int64_t p = start(g); p < start(g + 1); p += kStatisticsPixels)
      for_each_vector<T>(C, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        const S* value = values + p * C + c;
        const int64_t run = minimum(kStatisticsPixels, pixels - p), near = minimum(kAround, run);
        prepare(p, run, c, n);
        Vec<T> around[4] = {};
        side_by_side(0, near, [&](int64_t i, int which) __attribute__((always_inline)) {
          around[which] += load_lanes(value + i * C, n);
        });
        RunSums<T> sums(total(around) * splat(T(1) / T(near)));
        for (int64_t first = 0; first < run; first += kFew) {
          Vec<T> sum[4] = {}, squares[4] = {};
          side_by_side(first, minimum(first + kFew, run), [&](int64_t i, int which) __attribute__((always_inline)) {
            const Vec<T> d = load_lanes(value + i * C, n) - sums.origin;
            sum[which] += d;
            squares[which] += d * d;
          });
          sums.add(total(sum), total(squares));
          sums.settle();
        }
        sums.merge_into(Moments<T>(moments, g, C), c, p - start(g), run);
      });
  });
  finish_moments<T>(moments, groups, C, [&](int64_t g) { return start(g + 1) - start(g); }, next, rows);
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
