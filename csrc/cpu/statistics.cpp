// statistics: the batch norm rows of a tensor whose producer could not supply them. running: those of given statistics.
//
// Layout: x [pixels][C]. One job is a group of tiles of kTilePixels pixels; the groups depend on the shape alone.
// Bytes: x read once.
#include "moments.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

// The origin of a tile's sums is the mean of its first kAround pixels.
constexpr int64_t kTilePixels = 64, kAround = 8, kFew = 32, kMostGroups = 64;

// add(i, which) for each i of [first, last), `which` of four sums side by side: that hides the latency of an addition,
// and keeps each sum short.
template <class Add>
FUSED_PREACT_INLINE void side_by_side(int64_t first, int64_t last, const Add& add) {
  for (; first + 4 <= last; first += 4) add(first, 0), add(first + 1, 1), add(first + 2, 2), add(first + 3, 3);
  for (; first < last; ++first) add(first, 0);
}

template <class V>
FUSED_PREACT_INLINE V total(const V (&sums)[4]) {
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

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
        const int64_t run = minimum(kTilePixels, pixels - p), near = minimum(kAround, run);
        // The next tile, a part a column: read column by column, it would come line by line.
        prefetch(values + (p + kTilePixels) * C + c * kTilePixels, n * kTilePixels);
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
