// statistics: the batch norm rows of a tensor whose producer could not supply them. running: those of given statistics.
//
// Layout: x [pixels][C]. One job is a group of tiles of kTilePixels pixels; the groups depend on the shape alone.
// Bytes: x read once.
#include "moments.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

constexpr int64_t kTilePixels = 64, kFew = 32, kMostGroups = 64;

template <class S>
void statistics_of(int64_t pixels, int64_t C, const void* x, const Affine& next, void* rows, Workspace& workspace) {
  using T = Accumulate<S>;
  const S* values = static_cast<const S*>(x);
  const int64_t tiles = ceil_div(pixels, kTilePixels), groups = minimum(tiles, kMostGroups);
  const auto start = [&](int64_t g) { return minimum(cut(tiles, groups, g) * kTilePixels, pixels); };
  void* moments = workspace.take(groups * Moments<T>::bytes(C));
  parallel(groups, [&](int64_t g) {
    for (int64_t p = start(g); p < start(g + 1); p += kTilePixels)
      for_each_vector<T>(C, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        const S* value = values + p * C + c;
        const int64_t run = minimum(kTilePixels, pixels - p);
        Vec<T> total = {};
        for (int64_t i = 0; i < run; ++i) total += load_lanes(value + i * C, n);
        RunSums<T> sums(total * splat(T(1) / T(run)));
        for (int64_t first = 0; first < run; first += kFew) {
          // Four sums side by side, which hides the latency of an addition and keeps each sum short.
          Vec<T> sum[4] = {}, squares[4] = {};
          int64_t i = first;
          const auto add = [&](int64_t at, int which) __attribute__((always_inline)) {
            const Vec<T> d = load_lanes(value + at * C, n) - sums.origin;
            sum[which] += d;
            squares[which] += d * d;
          };
          for (; i + 4 <= minimum(first + kFew, run); i += 4) add(i, 0), add(i + 1, 1), add(i + 2, 2), add(i + 3, 3);
          for (; i < minimum(first + kFew, run); ++i) add(i, 0);
          sums.add((sum[0] + sum[1]) + (sum[2] + sum[3]), (squares[0] + squares[1]) + (squares[2] + squares[3]));
        }
        sums.merge_into(Moments<T>(moments, g, C), c, p - start(g), run);
      });
  });
  finish_moments<T>(moments, groups, C, [&](int64_t g) { return start(g + 1) - start(g); }, next, rows);
}

}  // namespace

void statistics(Dtype dtype, int64_t pixels, int64_t C, const void* x, const Affine& next, void* rows,
                Workspace& workspace) {
  with_storage(dtype, [&](auto s) { statistics_of<decltype(s)>(pixels, C, x, next, rows, workspace); });
}

void running(Dtype dtype, int64_t C, const void* mean, const void* variance, const Affine& next, void* rows,
             Workspace&) {
  with_storage(dtype, [&](auto s) {
    using T = Accumulate<decltype(s)>;
    const T* var = static_cast<const T*>(variance);
    for (int64_t c = 0; c < C; ++c)
      norm_rows<T>(static_cast<T*>(rows), C, c, static_cast<const T*>(mean)[c], var[c], var[c], next);
  });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
