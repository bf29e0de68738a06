// Filters in the order in which multiply reads them and outer writes them.
//
// Packed: panels of up to kColumns vectors of output channels; in a panel, depth rows (r, s, c) of its
// vectors. The last vector is filled up with zeros. Where a product takes pairs of rows, the two values of a
// lane are next to each other.
#pragma once
#include "gemm.h"
#include "jobs.h"

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

// Row `packed` of a packed filter: the weights from element `stored` on, `step_outer` apart.
struct PackedRow {
  int64_t stored, packed;
};

// All rows, in the order in which the filter stores them: a large one is not in the cache.
template <class Pointer>
const PackedRow* rows_as_stored(const FilterView<Pointer>& f, Workspace& workspace) {
  struct Dimension {
    int64_t size, step, rows;
  } outer{f.taps_h, f.step_h, f.taps_w * f.inner}, middle{f.taps_w, f.step_w, f.inner}, inner{f.inner, f.step_inner, 1};
  PackedRow first{0, 0};
  const auto ascend = [&](Dimension& d) {
    if (d.step >= 0) return;
    first.stored += (d.size - 1) * d.step;
    first.packed += (d.size - 1) * d.rows;
    d.step = -d.step, d.rows = -d.rows;
  };
  const auto order = [](Dimension& a, Dimension& b) {
    if (a.step >= b.step) return;
    const Dimension c = a;
    a = b, b = c;
  };
  ascend(outer), ascend(middle), ascend(inner);
  order(outer, middle), order(middle, inner), order(outer, middle);
  PackedRow* const rows = static_cast<PackedRow*>(workspace.take(f.depth() * sizeof(PackedRow)));
  PackedRow* row = rows;
  for (int64_t a = 0; a < outer.size; ++a)
    for (int64_t b = 0; b < middle.size; ++b)
      for (int64_t c = 0; c < inner.size; ++c)
        *row++ = {first.stored + a * outer.step + b * middle.step + c * inner.step,
                  first.packed + a * outer.rows + b * middle.rows + c * inner.rows};
  return rows;
}

// Whether n rows are next to each other where they are stored.
FUSED_PREACT_INLINE bool are_adjacent(const PackedRow* rows, int n) {
  bool result = true;
  for (int i = 1; i < n; ++i) result &= rows[i].stored == rows[0].stored + i;
  return result;
}

// Asks for the lines of a panel's weights, from `data` on, in one stream: a filter was last used a step ago, and is
// read or written in an order that no hardware foresees.
template <class Pointer>
FUSED_PREACT_INLINE void prefetch_panel(const FilterView<Pointer>& f, Pointer data, int64_t channels, int64_t depth) {
  constexpr bool kWrites = !std::is_const_v<std::remove_pointer_t<Pointer>>;
  constexpr int64_t kLine = kCacheLine / int64_t{sizeof(*data)};
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < depth; i += kLine) __builtin_prefetch(data + c * f.step_outer + i, kWrites, 2);
}

// The part of for_each_weights for one panel. All arguments are copies: what a store might change would be read again
// after each.
template <int Columns, class T, class Pointer, class Visit, class Square>
void for_each_weights_of(int64_t panel, FilterView<Pointer> f, Panels<T> panels, const PackedRow* rows, Visit visit,
                         Square square) {
  constexpr int64_t kWidth = Columns * kLanes<T>;
  const int64_t depth = f.depth(), base = panels.offset(panel), step = kLanes<T> * f.step_outer;
  const int64_t first = panels.first_channel(panel) * f.step_outer, channels = f.outer - panels.first_channel(panel);
  const auto at = [=](int64_t stored, int64_t row) __attribute__((always_inline)) {
    for (int v = 0; v < Columns; ++v)
      with_lanes<T>(channels - v * kLanes<T>, [=](auto n) __attribute__((always_inline)) {
        visit(first + stored + v * step, PackedVector{base, row, kWidth, v * kLanes<T>}, n);
      });
  };
  if (rows == nullptr) {
    int64_t row = 0;
    for (int64_t h = 0; h < f.taps_h; ++h)
      for (int64_t w = 0; w < f.taps_w; ++w)
        for (int64_t i = 0; i < f.inner; ++i) at(h * f.step_h + w * f.step_w + i * f.step_inner, row++);
    return;
  }
  prefetch_panel(f, f.data + rows[0].stored + first, minimum(channels, kWidth), depth);
  for (int64_t r = 0; r < depth;) {
    if (channels < kWidth || r + kLanes<T> > depth || !are_adjacent(rows + r, kLanes<T>)) {
      at(rows[r].stored, rows[r].packed);
      ++r;
      continue;
    }
    for (int v = 0; v < Columns; ++v)
      square(first + rows[r].stored + v * step, rows + r, PackedVector{base, 0, kWidth, v * kLanes<T>});
    r += kLanes<T>;
  }
}

// body(panel) for each panel, on several threads where that is worth it.
template <class T, class Body>
void for_each_panel(const Panels<T>& panels, const Body& body) {
  if (panels.size() >= kWorthThreads) return parallel(panels.count(), body);
  for (int64_t panel = 0; panel < panels.count(); ++panel) body(panel);
}

// The order in which for_each_weights takes the rows: that of the packed filter (null) where the output channels
// are stored side by side.
template <class Pointer>
const PackedRow* order_of_rows(const FilterView<Pointer>& f, Workspace& workspace) {
  return f.step_outer == 1 ? nullptr : rows_as_stored(f, workspace);
}

// Calls visit(stored index, packed vector, n) for every vector of one panel: n output channels, `step_outer` apart in
// the stored filter. Where kLanes rows are stored side by side, square(stored index, rows, packed vector) takes whole
// vectors of all of them at once: a transpose. Both are to hold what they use by value.
template <class T, class Pointer, class Visit, class Square>
void for_each_weights(int64_t panel, const FilterView<Pointer>& f, const PackedRow* rows, const Visit& visit,
                      const Square& square) {
  const Panels<T> panels{f.outer, f.depth()};
  if (panels.depth == 0) return;  // where a stride is wider than the filter, some pixels of dx meet none of its taps
  with_constant<kColumns>(panels.columns(panel), [&](auto columns) __attribute__((always_inline)) {
    for_each_weights_of<columns>(panel, f, panels, rows, visit, square);
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

#if defined(__AVX512BF16__)
// Every other value, which is one of each pair.
FUSED_PREACT_INLINE void store_in_pairs(BFloat16* to, Vec<float> v) {
  _mm512_mask_storeu_epi16(to, __mmask32(0x55555555), (__m512i)extend(rounded(v)));
}
#endif

template <class S>
FUSED_PREACT_INLINE void store_strided(S* to, int64_t step, Vec<Accumulate<S>> v, int64_t n) {
  if (step == 1) return store_lanes(to, v, n);
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<S, BFloat16>)
    if (step == 2 && n == kLanes<float>) return store_in_pairs(to, v);
#endif
  S buffer[kLanes<Accumulate<S>>];
  store(buffer, v);
  for (int64_t l = 0; l < n; ++l) to[l * step] = buffer[l];
}

// Packs one panel; `to` is where the first one goes.
template <class E, class S>
void pack_panel(E* to, int64_t panel, const FilterView<const S*>& f, const PackedRow* order) {
  using T = Accumulate<S>;
  const auto vector = [f, to](int64_t stored, const PackedVector& at, auto n) __attribute__((always_inline)) {
    store_strided(to + at.paired_index(kPair<E>), kPair<E>, load_strided(f.data + stored, f.step_outer, n), kLanes<T>);
  };
  const auto square = [f, to](int64_t stored, const PackedRow* rows, PackedVector at) __attribute__((always_inline)) {
    Vec<T> values[kLanes<T>];
    for (int l = 0; l < kLanes<T>; ++l) values[l] = load(f.data + stored + l * f.step_outer);
    transpose<T>(values);
    for (int l = 0; l < kLanes<T>; ++l) {
      at.row = rows[l].packed;
      store_strided(to + at.paired_index(kPair<E>), kPair<E>, values[l], kLanes<T>);
    }
  };
  for_each_weights<T>(panel, f, order, vector, square);
}

template <class E, class S>
const E* pack(const FilterView<const S*>& f, Workspace& workspace) {
  const Panels<Accumulate<S>> panels{f.outer, f.depth()};
  E* const to = static_cast<E*>(workspace.take(panels.size() * sizeof(E)));
  const PackedRow* const order = order_of_rows(f, workspace);
  for_each_panel(panels, [&](int64_t panel) { pack_panel(to, panel, f, order); });
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
