// Filters in the order in which multiply reads them and outer writes them.
//
// Packed: panels of up to kColumns vectors of output channels; in a panel, depth rows (r, s, c) of its vectors. The last
// vector is filled up with zeros.
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

// Calls visit(stored index, packed index) for every weight of one panel.
template <class T, class Pointer, class Visit>
FUSED_PREACT_INLINE void for_each_weight(const FilterView<Pointer>& f, const Panels<T>& panels, int64_t panel,
                                         const Visit& visit) {
  const int64_t first = panels.first_channel(panel), width = panels.width(panel);
  const int64_t last = minimum(first + width, f.outer);
  for (int64_t i = 0; i < f.inner; ++i)
    for (int64_t o = first; o < last; ++o) {
      const int64_t stored = i * f.step_inner + o * f.step_outer, packed = panels.offset(panel) + i * width + o - first;
      for (int64_t h = 0; h < f.taps_h; ++h)
        for (int64_t w = 0; w < f.taps_w; ++w)
          visit(stored + h * f.step_h + w * f.step_w, packed + (h * f.taps_w + w) * f.inner * width);
    }
}

FUSED_PREACT_INLINE float widened(float value) { return value; }
FUSED_PREACT_INLINE double widened(double value) { return value; }
FUSED_PREACT_INLINE float widened(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Below this a second thread costs more than it saves.
constexpr int64_t kWorthThreads = 1 << 13;

template <class S>
Accumulate<S>* pack(const FilterView<const S*>& f, Workspace& workspace) {
  using T = Accumulate<S>;
  const Panels<T> panels{f.outer, f.depth()};
  T* to = static_cast<T*>(workspace.take(panels.size() * sizeof(T)));
  const auto pack_panel = [&](int64_t panel) {
    if (panels.first_channel(panel) + panels.width(panel) > f.outer)
      memset(to + panels.offset(panel), 0, panels.width(panel) * panels.depth * sizeof(T));
    for_each_weight(f, panels, panel, [&](int64_t stored, int64_t packed) __attribute__((always_inline)) {
      to[packed] = widened(f.data[stored]);
    });
  };
  if (panels.size() >= kWorthThreads)
    parallel(panels.count(), pack_panel);
  else
    for (int64_t panel = 0; panel < panels.count(); ++panel) pack_panel(panel);
  return to;
}

// The filter of the forward product, and of wgrad's result: taps (r, s), inner C, outer K.
template <class S, class Pointer>
auto forward_view(const Conv& c, const Filter<Pointer>& weight) {
  using Data = std::conditional_t<std::is_same_v<Pointer, void*>, S*, const S*>;
  return FilterView<Data>{static_cast<Data>(weight.data), c.R, c.S, c.C, c.K, weight.stride_r, weight.stride_s,
                          weight.stride_c, weight.stride_k};
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
