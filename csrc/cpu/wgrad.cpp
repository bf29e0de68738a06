// wgrad: dweight[k,c,r,s] = sum over output pixels of a * dy, dbias[k] = sum of dy.
//
// Reads x through the same strips as forward, so the activation is recomputed, not loaded; dy is formed into a block
// [pixels][channels of this job]. dW is laid out like a packed filter, so that a row of it is a channel of the
// strip and its vectors are output channels: an outer product a pixel.
// Every group of tiles has a dW of its own; the groups are added up in order at the end.
// Bytes: x and dy (or dz' and x') read once, dW written and read once a group.
#include "gemm.h"
#include "pack.h"
#include "source.h"
#include "tile.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

constexpr int64_t kTileBytes = 1 << 16, kLeastPixels = 64, kMostPixels = 128;

// A group's dW costs a write and a read a weight; 256 pixels a group make that small beside the products. Its memory
// is bounded too.
constexpr int64_t kPixelsPerGroup = 256, kMostGroups = 32, kMostPartialBytes = int64_t(1) << 26;

template <class T>
struct Plan {
  Window w;
  Tiling tiling;
  Panels<T> panels;
  int64_t groups, splits;

  explicit Plan(const Conv& conv) : w(forward_window(conv)), tiling(w, tile_pixels(w)), panels{conv.K, w.depth()} {
    const int64_t wanted = minimum(w.N * w.P * w.Q / kPixelsPerGroup, kMostGroups);
    const int64_t affordable = kMostPartialBytes / maximum<int64_t>(panels.size() * sizeof(T), 1);
    groups = maximum<int64_t>(minimum(minimum(wanted, affordable), tiling.count()), 1);
    splits = splits_for(groups, panels.count());
  }

 private:
  static int64_t tile_pixels(const Window& w) {
    return minimum(maximum<int64_t>(kTileBytes / maximum<int64_t>(w.C * sizeof(T), 1), kLeastPixels), kMostPixels);
  }
};

// The dy of one tile for channels [begin, end): in place, or formed into the block with its last vector filled up.
template <class T>
struct Columns {
  const T* data;
  int64_t ld;

  template <class Source>
  Columns(T* block, const Source& source, int64_t pixel, int64_t count, int64_t begin, int64_t end) {
    const int64_t width = ceil_div(end - begin, kLanes<T>) * kLanes<T>;
    if (source.template plain<T>() != nullptr && width == end - begin) {
      data = source.template plain<T>() + pixel * source.C + begin;
      ld = source.C;
      return;
    }
    if (width != end - begin) memset(block, 0, count * width * sizeof(T));
    source.fill(block, width, pixel, count, begin, end);
    data = block;
    ld = width;
  }
};

template <class T, int M, int V, int... I>
FUSED_PREACT_INLINE void outer_block(T* dw, const Operand<T>& a, int64_t offset, int64_t n, const Columns<T>& b,
                                     int64_t column, std::integer_sequence<int, I...>) {
  Vec<T> acc[M * V] = {};
  outer<T, M, V>(acc, a.pixels, offset, n, b.data + column, b.ld);
  (store(dw + I * kLanes<T>, load(dw + I * kLanes<T>) + acc[I]), ...);
}

// Adds one tile to one panel of dW.
template <class T>
void add_panel(T* dw, const Operand<T>& a, const Window& w, int64_t n, const Columns<T>& b, int64_t column,
               int64_t columns) {
  with_constant<kColumns>(columns, [&](auto V) __attribute__((always_inline)) {
    for (int64_t r = 0; r < w.R; ++r, dw += w.S * w.C * V * kLanes<T>)
      for_each_block(w.S * w.C, [&](int64_t i, auto M) __attribute__((always_inline)) {
        outer_block<T, M, V>(dw + i * V * kLanes<T>, a, r * a.row_stride + i, n, b, column,
                             std::make_integer_sequence<int, M * V>{});
      });
  });
}

// Sums a few values in T, and these sums in double.
template <class T>
void add_bias(double* dbias, const Columns<T>& b, int64_t n, int64_t width) {
  constexpr int64_t kFew = 8;
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    Wide<T> total = load_wide<T>(dbias + c);
    for (int64_t first = 0; first < n; first += kFew) {
      Vec<T> sum = {};
      for (int64_t p = first; p < minimum(first + kFew, n); ++p) sum += load(b.data + p * b.ld + c);
      total += widen<T>(sum);
    }
    store_wide<T>(dbias + c, total);
  }
}

// Adds up the groups in order and stores the sum in the layout of the filter.
template <class S>
void finish(const Accumulate<S>* partial, const double* bias_partial, const Plan<Accumulate<S>>& plan,
            const FilterView<S*>& dweight, S* dbias, Workspace& workspace) {
  using T = Accumulate<S>;
  const auto total = [partial, groups = plan.groups, size = plan.panels.size()](int64_t i)
                         __attribute__((always_inline)) {
                           Vec<T> sum = load(partial + i);
                           for (int64_t g = 1; g < groups; ++g) sum += load(partial + g * size + i);
                           return sum;
                         };
  const auto vector = [total, dweight](int64_t stored, const PackedVector& at, auto n) __attribute__((always_inline)) {
    store_strided(dweight.data + stored, dweight.step_outer, total(at.index()), n);
  };
  const auto square = [total, dweight](int64_t stored, const PackedRow* rows, PackedVector at)
                          __attribute__((always_inline)) {
                            Vec<T> values[kLanes<T>];
                            for (int l = 0; l < kLanes<T>; ++l) {
                              at.row = rows[l].packed;
                              values[l] = total(at.index());
                            }
                            transpose<T>(values);
                            for (int l = 0; l < kLanes<T>; ++l)
                              store(dweight.data + stored + l * dweight.step_outer, values[l]);
                          };
  for_each_weights<T>(dweight, workspace, vector, square);
  if (dbias == nullptr) return;
  const int64_t padded = plan.panels.padded_channels();
  for_each_vector<T>(plan.panels.channels, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    Wide<T> sum = load_wide<T>(bias_partial + k);
    for (int64_t g = 1; g < plan.groups; ++g) sum += load_wide<T>(bias_partial + g * padded + k);
    store_lanes(dbias + k, __builtin_convertvector(sum, Vec<T>), n);
  });
}

template <class S>
void wgrad_of(const Conv& conv, const Gradient& dy, const Activation& x, const WeightGrad& dweight, void* dbias,
              Workspace& workspace) {
  using T = Accumulate<S>;
  const Plan<T> plan(conv);
  const Window& w = plan.w;
  const Panels<T>& panels = plan.panels;
  const ActivationSource<S> activation(x, conv.C);
  const GradientSource<S> gradient(dy, conv.K);
  T* partial = static_cast<T*>(workspace.take(plan.groups * panels.size() * sizeof(T)));
  double* bias_partial = static_cast<double*>(workspace.take(plan.groups * panels.padded_channels() * sizeof(double)));

  parallel(plan.groups * plan.splits, [&](int64_t job) {
    const int64_t g = job / plan.splits, part = job % plan.splits;
    const int64_t first_panel = cut(panels.count(), plan.splits, part);
    const int64_t last_panel = cut(panels.count(), plan.splits, part + 1);
    const int64_t begin = panels.first_channel(first_panel);
    const int64_t width = minimum(panels.first_channel(last_panel), panels.padded_channels()) - begin;
    const int64_t end = minimum(begin + width, conv.K);
    T* dw = partial + g * panels.size();
    double* dbias_part = bias_partial + g * panels.padded_channels() + begin;
    memset(dw + begin * panels.depth, 0, width * panels.depth * sizeof(T));
    memset(dbias_part, 0, width * sizeof(double));
    TileScratch<T> scratch(plan.tiling, plan.tiling.most_pixels() * width);
    const int64_t tiles = plan.tiling.count();
    for (int64_t t = cut(tiles, plan.groups, g); t < cut(tiles, plan.groups, g + 1); ++t) {
      const Tile tile = plan.tiling[t];
      gather(scratch.operand, scratch.strip, w, tile, activation);
      const Columns<T> columns(scratch.block, gradient, (tile.n * w.P + tile.i0) * w.Q + tile.j0, tile.pixels(), begin,
                               end);
      for (int64_t panel = first_panel; panel < last_panel; ++panel)
        add_panel(dw + panels.offset(panel), scratch.operand, w, tile.pixels(), columns,
                  panels.first_channel(panel) - begin, panels.columns(panel));
      if (dbias != nullptr) add_bias(dbias_part, columns, tile.pixels(), width);
    }
  });
  finish<S>(partial, bias_partial, plan, forward_view<S>(conv, dweight), static_cast<S*>(dbias), workspace);
}

}  // namespace

void wgrad(const Conv& conv, Dtype dtype, const Gradient& dy, const Activation& x, const WeightGrad& dweight,
           void* dbias, Workspace& workspace) {
  with_storage(dtype, [&](auto s) { wgrad_of<decltype(s)>(conv, dy, x, dweight, dbias, workspace); });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
