// The operands that kernels form while they read: the activation a, and the incoming dy.
//
// fill(to, ld, pixel, count, begin, end) writes channels [begin, end) of `count` pixels from `pixel` on, `ld` values
// apart, as the type E of `to`. plain<E>() is the tensor itself where there is nothing to form or convert, else null.
#pragma once
#include "vec.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// Vectors of channels that are filled side by side, their rows in registers: narrow tensors are so read in one stream.
constexpr int kFillColumns = kRegisters == 32 ? 4 : 2;

template <class S, class E, class MakeForm, int... V>
FUSED_PREACT_INLINE void fill_columns(E* to, int64_t ld, int64_t at, int64_t step, int64_t count, int64_t c,
                                      const MakeForm& make_form, std::integer_sequence<int, V...>) {
  constexpr int64_t kStep = kLanes<Accumulate<S>>;
  using Form = decltype(make_form(c, kStep));
  const Form forms[] = {make_form(c + V * kStep, kStep)...};
  for (int64_t p = 0; p < count; ++p, to += ld, at += step)
    (store(to + V * kStep, forms[V](at + V * kStep, std::integral_constant<int64_t, kStep>{})), ...);
}

// Fills channels [begin, end) of `count` pixels, the first at element `at` of the tensor, `step` apart. make_form(c, n)
// gives the form of n channels from c on, and form(at, n) their values.
template <class S, class E, class MakeForm>
FUSED_PREACT_INLINE void fill_rows(E* to, int64_t ld, int64_t at, int64_t step, int64_t count, int64_t begin,
                                   int64_t end, const MakeForm& make_form) {
  constexpr int64_t kStep = kLanes<Accumulate<S>>;
  int64_t c = begin;
  for (; c + kFillColumns * kStep <= end; c += kFillColumns * kStep)
    fill_columns<S>(to + c - begin, ld, at + c, step, count, c, make_form,
                    std::make_integer_sequence<int, kFillColumns>{});
  for (; c < end; c += kStep)
    with_lanes<Accumulate<S>>(end - c, [&](auto n) __attribute__((always_inline)) {
      const auto form = make_form(c, n);
      for (int64_t p = 0; p < count; ++p) store_lanes(to + p * ld + c - begin, form(at + p * step + c, n), n);
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
    const S* const from = x;
    if (norm == nullptr)
      fill_rows<S>(to, ld, pixel * C, C, count, begin, end, [&](int64_t, int64_t) __attribute__((always_inline)) {
        return [from](int64_t at, auto n) __attribute__((always_inline)) { return load_lanes(from + at, n); };
      });
    else
      fill_rows<S>(to, ld, pixel * C, C, count, begin, end, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        return [from, rows = NormVector<T>(norm, C, c, n)](int64_t at, auto n)
                   __attribute__((always_inline)) { return relu(rows.z(load_lanes(from + at, n))); };
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

  // use(make_form): make_form(c, n) gives the form of n channels from c on, and form(at, n) their dy at element `at` of
  // the tensors.
  template <class Use>
  FUSED_PREACT_INLINE void with_form(const Use& use) const {
    const S *const dz = g, *const input = x;
    if (norm == nullptr)
      use([&](int64_t, int64_t) __attribute__((always_inline)) {
        return [dz](int64_t at, auto n) __attribute__((always_inline)) { return load_lanes(dz + at, n); };
      });
    else if (grad == nullptr)
      use([&](int64_t c, int64_t n) __attribute__((always_inline)) {
        return [dz, scale = norm_row(kScale, c, n)](int64_t at, auto n)
                   __attribute__((always_inline)) { return load_lanes(dz + at, n) * scale; };
      });
    else
      use([&](int64_t c, int64_t n) __attribute__((always_inline)) {
        return [dz, input, mean = norm_row(kMean, c, n), scale = norm_row(kScale, c, n), slope = grad_row(kSlope, c, n),
                offset = grad_row(kOffset, c, n)](int64_t at, auto n) __attribute__((always_inline)) {
          const Vec<T> centered = load_lanes(input + at, n) - mean;
          return centered * slope + (load_lanes(dz + at, n) * scale + offset);
        };
      });
  }

  template <class E>
  void fill(E* to, int64_t ld, int64_t pixel, int64_t count, int64_t begin, int64_t end) const {
    with_form([&](const auto& make_form)
                  __attribute__((always_inline)) { fill_rows<S>(to, ld, pixel * C, C, count, begin, end, make_form); });
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
