// The operands that kernels form while they read: the activation a, and the incoming dy.
//
// fill(to, ld, pixel, count, begin, end) writes channels [begin, end) of `count` pixels from `pixel` on, `ld` values
// apart, as the type E of `to`. plain<E>() is the tensor itself where there is nothing to form or convert, else null.
#pragma once
#include "vec.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

template <class S, class E, class Form>
FUSED_PREACT_INLINE void fill_rows(E* to, int64_t ld, int64_t count, int64_t begin, int64_t end, const Form& form) {
  for (int64_t p = 0; p < count; ++p, to += ld)
    for_each_vector<Accumulate<S>>(end - begin, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      store_lanes(to + c, form(p, begin + c, n), n);
    });
}

// x where it is stored as E, else null.
template <class E, class S>
const E* as_operand(const S* x) {
  if constexpr (std::is_same_v<S, E>)
    return x;
  else
    return nullptr;
}

// z and xhat's numerator of one vector of channels.
template <class T>
struct NormVector {
  Vec<T> mean, scale, shift;

  NormVector() = default;
  NormVector(const T* rows, int64_t C, int64_t c, int64_t n)
      : mean(load_lanes(rows + kMean * C + c, n)),
        scale(load_lanes(rows + kScale * C + c, n)),
        shift(load_lanes(rows + kShift * C + c, n)) {}

  FUSED_PREACT_INLINE Vec<T> centered(Vec<T> x) const { return x - mean; }
  FUSED_PREACT_INLINE Vec<T> z(Vec<T> x) const { return centered(x) * scale + shift; }
};

template <class S>
struct ActivationSource {
  using T = Accumulate<S>;
  const S* x;
  const T* norm;
  int64_t C;

  ActivationSource(const Activation& a, int64_t channels)
      : x(static_cast<const S*>(a.x)), norm(static_cast<const T*>(a.norm)), C(channels) {}

  template <class E>
  const E* plain() const {
    return norm == nullptr ? as_operand<E>(x) : nullptr;
  }

  template <class E>
  void fill(E* to, int64_t ld, int64_t pixel, int64_t count, int64_t begin, int64_t end) const {
    const S* from = x + pixel * C;
    if (norm == nullptr)
      fill_rows<S>(to, ld, count, begin, end, [&](int64_t p, int64_t c, int64_t n) __attribute__((always_inline)) {
        return load_lanes(from + p * C + c, n);
      });
    else
      fill_rows<S>(to, ld, count, begin, end, [&](int64_t p, int64_t c, int64_t n) __attribute__((always_inline)) {
        return relu(NormVector<T>(norm, C, c, n).z(load_lanes(from + p * C + c, n)));
      });
  }
};

template <class S>
struct GradientSource {
  using T = Accumulate<S>;
  const S* g;
  const S* x;
  const T* norm;
  const T* grad;
  int64_t C;

  GradientSource(const Gradient& dy, int64_t channels)
      : g(static_cast<const S*>(dy.g)),
        x(static_cast<const S*>(dy.x)),
        norm(static_cast<const T*>(dy.norm)),
        grad(static_cast<const T*>(dy.grad)),
        C(channels) {}

  template <class E>
  const E* plain() const {
    return norm == nullptr ? as_operand<E>(g) : nullptr;
  }

  // use(form), where form(at, c, n) is dy of n channels from c on, at element `at` of the tensors.
  template <class Use>
  FUSED_PREACT_INLINE void with_form(const Use& use) const {
    if (norm == nullptr)
      use([&](int64_t at, int64_t, int64_t n) __attribute__((always_inline)) { return load_lanes(g + at, n); });
    else if (grad == nullptr)
      use([&](int64_t at, int64_t c, int64_t n)
              __attribute__((always_inline)) { return load_lanes(g + at, n) * norm_row(kScale, c, n); });
    else
      use([&](int64_t at, int64_t c, int64_t n) __attribute__((always_inline)) {
        const Vec<T> centered = load_lanes(x + at, n) - norm_row(kMean, c, n);
        const Vec<T> scaled = load_lanes(g + at, n) * norm_row(kScale, c, n);
        return centered * grad_row(kSlope, c, n) + (scaled + grad_row(kOffset, c, n));
      });
  }

  template <class E>
  void fill(E* to, int64_t ld, int64_t pixel, int64_t count, int64_t begin, int64_t end) const {
    with_form([&](const auto& form) __attribute__((always_inline)) {
      fill_rows<S>(to, ld, count, begin, end, [&](int64_t p, int64_t c, int64_t n) __attribute__((always_inline)) {
        return form((pixel + p) * C + c, c, n);
      });
    });
  }

 private:
  FUSED_PREACT_INLINE Vec<T> norm_row(NormRow row, int64_t c, int64_t n) const {
    return load_lanes(norm + row * C + c, n);
  }
  FUSED_PREACT_INLINE Vec<T> grad_row(GradRow row, int64_t c, int64_t n) const {
    return load_lanes(grad + row * C + c, n);
  }
};

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
