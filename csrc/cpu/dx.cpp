// dx: the gradient of a chain's input, dx = dy + add, with dy formed from dz and x of the first batch norm.
//
// Layout: all [pixels][C]. One job is a run of kRunPixels pixels; dx may be dy.g.
// Bytes: dz, x and add read once, dx written once.
#include "jobs.h"
#include "source.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

template <class S>
void dx_of(int64_t pixels, int64_t C, const Gradient& dy, const void* add, void* dx) {
  using T = Accumulate<S>;
  const GradientSource<S> source(dy, C);
  const S* other = static_cast<const S*>(add);
  S* to = static_cast<S*>(dx);
  source.with_form([&](const auto& make_form) __attribute__((always_inline)) {
    for_runs(pixels, [&](int64_t first, int64_t count) {
      fill_rows<S>(to + first * C, C, first * C, C, count, 0, C,
                   [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                     return [form = make_form(c, n), other](int64_t at, auto n) __attribute__((always_inline)) {
                       const Vec<T> value = form(at, n);
                       return other != nullptr ? value + load_lanes(other + at, n) : value;
                     };
                   });
    });
  });
}

}  // namespace

void dx(Dtype dtype, int64_t pixels, int64_t C, const Gradient& dy, const void* add, void* to, Workspace&) {
  with_storage(dtype, [&](auto s) { dx_of<decltype(s)>(pixels, C, dy, add, to); });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
