// activate: batch norm and ReLU by themselves, a = max(z, 0), for convolutions that are another library's.
// activate_backward: from da the gradients of the batch norm, and dx as dgrad and dx make it.
//
// Layout: all [pixels][C]. One job is a run of kRunPixels pixels; of the sums, which come first, a group of runs. The
// groups depend on the shape alone. dx may be da.
// Bytes: x read once, a written once; da and x read twice, dx written once.
#include "jobs.h"
#include "norm_grad.h"
#include "source.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

constexpr int64_t kMostGroups = 64;

template <class S>
struct ActivateBackward {
  using T = Accumulate<S>;
  const S *da, *x;
  const T* norm;
  int64_t C;

  // x - mean and dz of n channels, at element `at` of the tensors.
  struct Values {
    Vec<T> centered, dz;
  };
  template <class Lanes>
  FUSED_PREACT_INLINE static Values values(const S* da, const S* x, const NormVector<T>& rows, int64_t at, Lanes n) {
    const Vec<T> input = load_lanes(x + at, n);
    return {rows.centered(input), rows.z(input) <= Vec<T>{} ? Vec<T>{} : load_lanes(da + at, n)};
  }

  // Of the pixels [first, last), to those of a group.
  void sum_up(const NormSums<T>& sums, int64_t group, int64_t first, int64_t last) const {
    for (int64_t p = first; p < last; p += kRunPixels) {
      const int64_t run = minimum(kRunPixels, last - p);
      for_each_vector<T>(C, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        with_lanes<T>(n, [&](auto lanes) __attribute__((always_inline)) {
          const NormVector<T> rows(norm, C, c, n);
          // The next run, a part a column: read column by column, it would come line by line.
          prefetch(da + (p + run) * C + c * run, n * run);
          prefetch(x + (p + run) * C + c * run, n * run);
          Vec<T> dz[4] = {}, centered[4] = {};
          side_by_side(0, run, [&](int64_t i, int which) __attribute__((always_inline)) {
            const Values v = values(da, x, rows, (p + i) * C + c, lanes);
            dz[which] += v.dz;
            centered[which] += v.dz * v.centered;
          });
          LongSum<T> of_dz, of_centered;
          of_dz.add(total(dz));
          of_centered.add(total(centered));
          sums.add(group, c, of_dz, of_centered);
        });
      });
    }
  }

  // Of `count` pixels from `first` on; grad: the rows [kGradRows][C], or null.
  void form(S* dx, const T* grad, int64_t first, int64_t count) const {
    const S *const from = da, *const input = x;
    const T* const all_rows = norm;
    const int64_t channels = C;
    if (grad == nullptr)
      fill_rows<S>(
          dx + first * C, C, first * C, C, count, 0, C, [=](int64_t c, int64_t n) __attribute__((always_inline)) {
            return [=, rows = NormVector<T>(all_rows, channels, c, n)](int64_t at, auto n)
                       __attribute__((always_inline)) { return values(from, input, rows, at, n).dz * rows.scale; };
          });
    else
      fill_rows<S>(
          dx + first * C, C, first * C, C, count, 0, C, [=](int64_t c, int64_t n) __attribute__((always_inline)) {
            return
                [=, rows = NormVector<T>(all_rows, channels, c, n), slope = load_lanes(grad + kSlope * channels + c, n),
                 offset = load_lanes(grad + kOffset * channels + c, n)](int64_t at, auto n)
                    __attribute__((always_inline)) {
                      const Values v = values(from, input, rows, at, n);
                      return v.centered * slope + (v.dz * rows.scale + offset);
                    };
          });
  }
};

}  // namespace

void activate(Dtype dtype, int64_t pixels, int64_t C, const Activation& x, void* a, Workspace&) {
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    const ActivationSource<S> source(x, C);
    for_runs(pixels,
             [&](int64_t first, int64_t count) { source.fill(static_cast<S*>(a) + first * C, C, first, count, 0, C); });
  });
}

void activate_backward(Dtype dtype, int64_t pixels, int64_t C, const void* da, const Activation& x, void* dx,
                       const NormGrad& grad, Workspace& workspace) {
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    using T = Accumulate<S>;
    const ActivateBackward<S> backward{static_cast<const S*>(da), static_cast<const S*>(x.x),
                                       static_cast<const T*>(x.norm), C};
    const int64_t runs = ceil_div(pixels, kRunPixels), groups = minimum(runs, kMostGroups);
    const auto start = [&](int64_t g) { return minimum(part_begin(runs, groups, g) * kRunPixels, pixels); };
    const NormSums<T> sums(groups, C, workspace);
    parallel(groups, [&](int64_t g) { backward.sum_up(sums, g, start(g), start(g + 1)); });
    sums.finish(backward.norm, grad, double(pixels));
    for_runs(pixels, [&](int64_t first, int64_t count) {
      backward.form(static_cast<S*>(dx), static_cast<const T*>(grad.rows), first, count);
    });
  });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
