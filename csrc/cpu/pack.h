// Filters in the order in which multiply reads them and outer writes them.
//
// Packed: panels of up to kColumns vectors of output channels; in a panel, depth rows (r, s, c) of its vectors. The last
// vector is filled up with zeros. Where a product takes pairs of rows, the two values of a lane are next to each other.
#pragma once
#include "gemm.h"
#include "tile.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// A filter as one product sees it: `taps_h` x `taps_w` taps, `inner` summed channels, `outer` produced ones, with the
// step in the stored filter that each index makes.
template <class Pointer>
struct FilterView {
  Pointer data;
  int64_t taps_h, taps_w, inner, outer;
  int64_t step_h, step_w, step_inner, step_outer;

  int64_t depth() const { return taps_h * taps_w * inner; }
};

template <class T>
struct Panels {
  int64_t channels, depth;

  int64_t vectors() const { return ceil_div(channels, kLanes<T>); }
  int64_t count() const { return ceil_div(vectors(), kColumns); }
  int64_t size() const { return vectors() * kLanes<T> * depth; }
  int64_t padded_channels() const { return vectors() * kLanes<T>; }

  int64_t first_channel(int64_t panel) const { return panel * kColumns * kLanes<T>; }
  int64_t columns(int64_t panel) const { return minimum<int64_t>(vectors() - panel * kColumns, kColumns); }
  int64_t width(int64_t panel) const { return columns(panel) * kLanes<T>; }
  int64_t offset(int64_t panel) const { return first_channel(panel) * depth; }
};

// Below this many weights a second thread costs more than it saves.
constexpr int64_t kWorthThreads = 1 << 14;

// Where a vector of a packed filter is: lanes from `lane` on of a row of a panel.
struct PackedVector {
  int64_t panel, row, width, lane;

  int64_t index() const { return panel + row * width + lane; }
  // Of its first value; the next ones are `pair` apart.
  int64_t paired_index(int64_t pair) const { return panel + (row - row % pair) * width + lane * pair + row % pair; }
};

// Calls visit(stored index, packed vector, n) for every vector of a packed filter: n output channels, `step_outer` apart
// in the stored one. The loops follow the order in which the filter is stored, since a large one is not in the cache.
// Where that has its summed channels next to each other, square(stored index, packed vector) takes kLanes of the next rows
// at once, whole vectors of as many output channels: a transpose.
template <class T, class Pointer, class Visit, class Square>
FUSED_PREACT_INLINE void for_each_weights(const FilterView<Pointer>& f, const Visit& visit, const Square& square) {
  const Panels<T> panels{f.outer, f.depth()};
  const auto stored = [&](int64_t i, int64_t h, int64_t w, int64_t v) __attribute__((always_inline)) {
    return v * kLanes<T> * f.step_outer + i * f.step_inner + h * f.step_h + w * f.step_w;
  };
  const auto packed = [&](int64_t i, int64_t h, int64_t w, int64_t v) __attribute__((always_inline)) {
    const int64_t panel = v / kColumns, row = (h * f.taps_w + w) * f.inner + i;
    return PackedVector{panels.offset(panel), row, panels.width(panel), v % kColumns * kLanes<T>};
  };
  const auto at = [&](int64_t i, int64_t h, int64_t w, int64_t v) __attribute__((always_inline)) {
    with_lanes<T>(f.outer - v * kLanes<T>,
                  [&](auto n) __attribute__((always_inline)) { visit(stored(i, h, w, v), packed(i, h, w, v), n); });
  };
  const auto each = [&](int64_t count, const auto& body) {
    if (panels.size() >= kWorthThreads) return parallel(count, body);
    for (int64_t job = 0; job < count; ++job) body(job);
  };
  if (f.step_outer == 1)
    each(f.inner, [&](int64_t i) {
      for (int64_t h = 0; h < f.taps_h; ++h)
        for (int64_t w = 0; w < f.taps_w; ++w)
          for (int64_t v = 0; v < panels.vectors(); ++v) at(i, h, w, v);
    });
  else if (f.step_inner == 1)
    each(panels.vectors(), [&](int64_t v) {
      const int64_t squares = (v + 1) * kLanes<T> <= f.outer ? f.inner - f.inner % kLanes<T> : 0;
      for (int64_t h = 0; h < f.taps_h; ++h)
        for (int64_t w = 0; w < f.taps_w; ++w) {
          for (int64_t i = 0; i < squares; i += kLanes<T>) square(stored(i, h, w, v), packed(i, h, w, v));
          for (int64_t i = squares; i < f.inner; ++i) at(i, h, w, v);
        }
    });
  else
    each(panels.vectors(), [&](int64_t v) {
      for (int64_t i = 0; i < f.inner; ++i)
        for (int64_t h = 0; h < f.taps_h; ++h)
          for (int64_t w = 0; w < f.taps_w; ++w) at(i, h, w, v);
    });
}

FUSED_PREACT_INLINE float widened(float value) { return value; }
FUSED_PREACT_INLINE double widened(double value) { return value; }
FUSED_PREACT_INLINE float widened(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class S, int... L>
FUSED_PREACT_INLINE Vec<Accumulate<S>> load_strided(const S* from, int64_t step, std::integer_sequence<int, L...>) {
  return Vec<Accumulate<S>>{widened(from[L * step])...};
}

// n values, `step` apart, and zeros.
template <class S>
FUSED_PREACT_INLINE Vec<Accumulate<S>> load_strided(const S* from, int64_t step, int64_t n) {
  using T = Accumulate<S>;
  if (step == 1) return load_lanes(from, n);
  if (n == kLanes<T>) return load_strided(from, step, std::make_integer_sequence<int, kLanes<T>>{});
  T buffer[kLanes<T>] = {};
  for (int64_t l = 0; l < n; ++l) buffer[l] = widened(from[l * step]);
  return load(buffer);
}

template <class S>
FUSED_PREACT_INLINE void store_strided(S* to, int64_t step, Vec<Accumulate<S>> v, int64_t n) {
  if (step == 1) return store_lanes(to, v, n);
  S buffer[kLanes<Accumulate<S>>];
  store(buffer, v);
  for (int64_t l = 0; l < n; ++l) to[l * step] = buffer[l];
}

template <class E, class S>
E* pack(const FilterView<const S*>& f, Workspace& workspace) {
  using T = Accumulate<S>;
  const Panels<T> panels{f.outer, f.depth()};
  E* to = static_cast<E*>(workspace.take(panels.size() * sizeof(E)));
  const auto vector = [&](int64_t stored, const PackedVector& at, auto n) __attribute__((always_inline)) {
    store_strided(to + at.paired_index(kPair<E>), kPair<E>, load_strided(f.data + stored, f.step_outer, n), kLanes<T>);
  };
  const auto square = [&](int64_t stored, PackedVector at) __attribute__((always_inline)) {
    Vec<T> rows[kLanes<T>];
    for (int l = 0; l < kLanes<T>; ++l) rows[l] = load(f.data + stored + l * f.step_outer);
    transpose<T>(rows);
    for (int l = 0; l < kLanes<T>; ++l, ++at.row)
      store_strided(to + at.paired_index(kPair<E>), kPair<E>, rows[l], kLanes<T>);
  };
  for_each_weights<T>(f, vector, square);
  return to;
}

// body(E{}) with the type that a product over `inner` summed channels reads its operands in.
template <class S, class Body>
void with_operand(int64_t inner, const Body& body) {
  if (inner % kPair<Native<S>> == 0)
    body(Native<S>{});
  else
    body(Accumulate<S>{});
}

// The filter of the forward product, and of wgrad's result: taps (r, s), inner C, outer K.
template <class S, class Pointer>
auto forward_view(const Conv& c, const Filter<Pointer>& weight) {
  using Data = std::conditional_t<std::is_same_v<Pointer, void*>, S*, const S*>;
  return FilterView<Data>{static_cast<Data>(weight.data),
                          c.R,
                          c.S,
                          c.C,
                          c.K,
                          weight.stride_r,
                          weight.stride_s,
                          weight.stride_c,
                          weight.stride_k};
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
