// wgrad: dweight[k,c,r,s] = sum over output pixels of a * dy, dbias[k] = sum of dy.
//
// Reads x through the same strips as forward, so the activation is recomputed, not loaded; dy is formed into a block
// [pixels][channels of this job]. dW is laid out like a packed filter, so that a row of it is a channel of the
// strip and its vectors are output channels: an outer product a pixel.
// Where Winograd's filtering serves (winograd.h), a step is a quad, and dW is that of the transformed filter until
// the groups are added up.
// Every group of tiles has a dW of its own, stored by its first tile; the groups are added up in order at the end.
// Bytes: x and dy (or dz' and x') read once, dW written and read once a group.
#include "cut.h"
#include "walk.h"
#include "wide.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

constexpr int64_t kTileBytes = 1 << 16, kLeastPixels = 64, kMostPixels = 128;

// Each tile reads and writes its group's dW. Beside the products of matrices (amx.h) and of quads one that leaves the
// second level cache takes much of the time: it is to meet more pixels at once.
constexpr int64_t kPixelsForLargeFilter = 512;

// A group's dW costs a write and a read a weight; so many pixels a group make that small beside the products: more
// where it does not stay in the second level cache. Its memory is bounded too.
constexpr int64_t kPixelsPerGroup = 256, kPixelsPerLargeGroup = 1024, kMostCachedBytes = 1 << 17;
constexpr int64_t kMostGroups = 32, kMostPartialBytes = int64_t(1) << 26;

template <class E>
struct Plan : Cut<E> {
  using T = Accumulate<E>;
  Panels<T> panels;
  int64_t groups, splits;

  explicit Plan(const Conv& conv) : Plan(conv, forward_window(conv)) {}

 private:
  Plan(const Conv& conv, const Window& w) : Cut<E>(w, conv.K, tile_pixels(w, conv.K)), panels{conv.K, this->depth()} {
    const int64_t bytes = panels.size() * sizeof(T);
    const int64_t pixels = bytes > kMostCachedBytes ? kPixelsPerLargeGroup : kPixelsPerGroup;
    const int64_t wanted = minimum(w.N * w.P * w.Q / pixels, kMostGroups);
    const int64_t affordable = kMostPartialBytes / maximum<int64_t>(bytes, 1);
    groups = maximum<int64_t>(minimum(minimum(wanted, affordable), this->tiles()), 1);
    splits = splits_for(groups, panels.count(), w.N * w.P * w.Q / groups * panels.size());
  }

  static int64_t tile_pixels(const Window& w, int64_t K) {
    const bool of_matrices = matrix_rows<E>(w) > 0 && w.depth() * K * int64_t{sizeof(T)} > kCachedFilterBytes;
    if (of_matrices || filter_leaves_cache<E>(w, K)) return kPixelsForLargeFilter;
    return minimum(maximum<int64_t>(kTileBytes / maximum<int64_t>(w.C * sizeof(T), 1), kLeastPixels), kMostPixels);
  }
};

// The steps of a tile that a row of the filter takes, or by position one of its taps: `parts` runs of `count`, `stride`
// apart.
struct Steps {
  int64_t first, count, parts, stride;
};

// Which of n pixels, `stride` apart, read one of `size` pixels with a tap whose first one is `offset`.
struct Readers {
  int64_t begin, end;

  Readers(int64_t offset, int64_t stride, int64_t size, int64_t n)
      : begin(offset < 0 ? ceil_div(-offset, stride) : 0), end(minimum(ceil_div(size - offset, stride), n)) {}

  int64_t count() const { return maximum<int64_t>(end - begin, 0); }
};

// Where each image of the tile has this many, a run of steps an image is worth leaving out the rows that read padding.
constexpr int64_t kLeastSteps = 24;

inline Steps steps_of(const Window& w, const Tile& tile, int64_t r, int64_t s, int64_t steps) {
  const Readers rows(tile.i0 * w.stride_h + w.top + r, w.stride_h, w.H, tile.rows);
  if (tile.by_position) {
    const Readers cols(w.left + s, w.stride_w, w.W, tile.cols);
    const int64_t of_position = steps / (tile.rows * tile.cols);
    return {(rows.begin * tile.cols + cols.begin) * of_position, cols.count() * of_position, rows.count(),
            tile.cols * of_position};
  }
  const int64_t in_image = steps / tile.images, in_row = in_image / tile.rows;
  if (rows.count() == tile.rows || in_image < kLeastSteps) return {0, steps, 1, 0};
  return {rows.begin * in_row, rows.count() * in_row, tile.images, in_image};
}

// Adds to dw, or of a group's first tile stores in it. Not inlined: its loop needs more address registers
// than its caller leaves it.
template <class E, int M, int V, int... I>
__attribute__((noinline)) void outer_block(Accumulate<E>* dw, bool is_first, const OuterOperands<E>& x, int64_t offset,
                                           int64_t column, const Steps& steps, std::integer_sequence<int, I...>) {
  using T = Accumulate<E>;
  Vec<T> acc[M * V] = {};
  int64_t first = steps.first;
  for (int64_t part = 0; part < steps.parts; ++part, first += steps.stride)
    outer<E, M, V>(acc, x.activation.pixels + first, offset, steps.count, x.dy + first * x.ld + column, x.ld);
  if (!is_first) ((acc[I] += load(dw + I * kLanes<T>)), ...);
  (store(dw + I * kLanes<T>, acc[I]), ...);
}

// Adds one tile of quads to one position of one panel of the transformed dW; the columns of a position are `width`
// after those of the last.
template <class T>
void add_position(T* dw, bool is_first, const OuterOperands<T>& x, int64_t s, int64_t C, int64_t column,
                  int64_t columns) {
  const Steps steps{0, x.steps, 1, 0};
  with_constant<kColumns>(columns, [&](auto V) __attribute__((always_inline)) {
    constexpr int64_t kWidth = V * kLanes<T>;
    for_each_block(C, [&](int64_t c, auto M) __attribute__((always_inline)) {
      outer_block<T, M, V>(dw + (s * position_rows(C) + c) * kWidth, is_first, x, s * C + c, column, steps,
                           std::make_integer_sequence<int, M * V>{});
    });
  });
}

// Adds one tile to one panel of dW.
template <class E>
void add_panel(Accumulate<E>* dw, bool is_first, const OuterOperands<E>& x, const Window& w, const Tile& tile,
               int64_t column, int64_t columns) {
  const int64_t taps = tile.by_position ? w.S : 1, values = w.S * w.C / taps;
  with_constant<kColumns>(columns, [&](auto V) __attribute__((always_inline)) {
    constexpr int64_t kWidth = V * kLanes<Accumulate<E>>;
    for (int64_t r = 0; r < w.R; ++r)
      for (int64_t s = 0; s < taps; ++s, dw += values * kWidth) {
        const Steps steps = steps_of(w, tile, r, s, x.steps);
        const int64_t offset = r * x.activation.row_stride + s * values;
        for_each_block(values, [&](int64_t i, auto M) __attribute__((always_inline)) {
          outer_block<E, M, V>(dw + i * kWidth, is_first, x, offset + i, column, steps,
                               std::make_integer_sequence<int, M * V>{});
        });
      }
  });
}

// Sums a few values in T, and these sums in double.
template <class Operands>
void add_bias(double* dbias, const Operands& x, int64_t width, int64_t column) {
  using T = Accumulate<std::decay_t<decltype(*x.dy)>>;
  constexpr int64_t kFew = 8;
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    Wide<T> total = load_wide<T>(dbias + c);
    for (int64_t first = 0; first < x.steps; first += kFew) {
      Vec<T> sum = {};
      for (int64_t p = first; p < minimum(first + kFew, x.steps); ++p) sum += load(x.dy + p * x.ld + column + c);
      total += widen(sum);
    }
    store_wide(dbias + c, total);
  }
}

// The sum of all groups, in order, from index i on.
template <class T>
struct GroupSum {
  const T* partial;
  int64_t groups, size;

  FUSED_PREACT_INLINE Vec<T> operator()(int64_t i) const {
    Vec<T> sum = load(partial + i);
    for (int64_t g = 1; g < groups; ++g) sum += load(partial + g * size + i);
    return sum;
  }
};

// Stores one panel of a packed dW in the layout of the filter; total(i) is its vector at i.
template <class S, class Total>
void store_panel(int64_t panel, const FilterView<S*>& dweight, const PackedRow* order, const Total& total) {
  using T = Accumulate<S>;
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
  for_each_weights<T>(panel, dweight, order, vector, square);
}

// The same from its positions. A panel's taps stay in the cache of its thread.
template <class S, class T>
void store_positions(int64_t panel, const FilterView<S*>& dweight, const PackedRow* order, const Panels<T>& positions,
                     const GroupSum<T>& total) {
  const Panels<T> taps{dweight.outer, dweight.depth()};
  const int64_t width = taps.width(panel), first = positions.offset(panel);
  const int64_t position = position_rows(dweight.inner) * width;
  T* const packed = static_cast<T*>(thread_scratch(taps.depth * width * sizeof(T)));
  transform_filter_gradient(packed, dweight.inner * width, [=](int64_t s, int64_t i) __attribute__((always_inline)) {
    return total(first + s * position + i);
  });
  store_panel(panel, dweight, order, [from = packed - taps.offset(panel)](int64_t i) __attribute__((always_inline)) {
    return load(from + i);
  });
}

// Adds up the groups and stores the sum in the layout of the filter.
template <class S>
void merge_groups(const Accumulate<S>* partial, const double* bias_partial, const Plan<OuterOperand<S>>& plan,
                  const FilterView<S*>& dweight, S* dbias, Workspace& workspace) {
  using T = Accumulate<S>;
  const GroupSum<T> total{partial, plan.groups, plan.panels.size()};
  const PackedRow* const order = order_of_rows(dweight, workspace);
  for_each_panel(plan.panels, [&](int64_t panel) {
    if (plan.is(Method::kQuads))
      store_positions(panel, dweight, order, plan.panels, total);
    else
      store_panel(panel, dweight, order, total);
  });
  if (dbias == nullptr) return;
  const int64_t padded = plan.panels.padded_channels();
  for_each_vector<T>(plan.panels.channels, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    Wide<T> sum = load_wide<T>(bias_partial + k);
    for (int64_t g = 1; g < plan.groups; ++g) sum += load_wide<T>(bias_partial + g * padded + k);
    store_lanes(dbias + k, narrowed<T>(sum), n);
  });
}

// A prepared call.
template <class S>
class Wgrad {
  using T = Accumulate<S>;
  using E = OuterOperand<S>;

 public:
  Wgrad(const Conv& conv, const Gradient& dy, const Activation& x, const WeightGrad& dweight, void* dbias,
        Workspace& workspace)
      : plan_(conv),
        activation_(x, conv.C),
        gradient_(dy, conv.K),
        dweight_(forward_view<S>(conv, dweight)),
        dbias_(static_cast<S*>(dbias)),
        workspace_(workspace),
        partial_(static_cast<T*>(workspace.take(plan_.groups * plan_.panels.size() * sizeof(T)))),
        bias_partial_(
            static_cast<double*>(workspace.take(plan_.groups * plan_.panels.padded_channels() * sizeof(double)))) {}

  int64_t tiles() const { return plan_.tiles(); }
  int64_t groups() const { return plan_.groups; }
  int64_t splits() const { return plan_.splits; }

  void start(int64_t g, int64_t part) const {
    const Part p(*this, g, part);
    memset(p.dbias, 0, p.width * sizeof(double));
  }

  void run(int64_t g, int64_t part, int64_t t) const {
    const Part p(*this, g, part);
    const Window& w = plan_.w;
    const Panels<T>& panels = plan_.panels;
    const Tile tile = plan_.tiling[t];
    const bool is_first = t == part_begin(tiles(), groups(), g);
    if constexpr (std::is_same_v<E, T>)
      if (plan_.is(Method::kQuads)) return run_quads(p, tile, is_first);
    if constexpr (kHasMatrices && std::is_same_v<E, BFloat16Pair>)
      if (plan_.is(Method::kMatrices)) return run_matrices(p, tile, is_first);
    const OuterOperands<E> operands(w, plan_.tiling, tile, activation_, gradient_, p.begin, p.width);
    for (int64_t panel = p.first_panel; panel < p.last_panel; ++panel)
      add_panel(p.dw + panels.offset(panel), is_first, operands, w, tile, panels.first_channel(panel) - p.begin,
                panels.columns(panel));
    if (dbias_ != nullptr) add_bias(p.dbias, operands, p.width, 0);
  }

  void finish() const { merge_groups<S>(partial_, bias_partial_, plan_, dweight_, dbias_, workspace_); }

 private:
  // The panels of one part of a group's dW.
  struct Part {
    int64_t first_panel, last_panel, begin, width;
    T* dw;
    double* dbias;

    Part(const Wgrad& call, int64_t g, int64_t part) {
      const Panels<T>& panels = call.plan_.panels;
      first_panel = part_begin(panels.count(), call.plan_.splits, part);
      last_panel = part_begin(panels.count(), call.plan_.splits, part + 1);
      begin = panels.first_channel(first_panel);
      width = minimum(panels.first_channel(last_panel), panels.padded_channels()) - begin;
      dw = call.partial_ + g * panels.size();
      dbias = call.bias_partial_ + g * panels.padded_channels() + begin;
    }
  };

  void run_quads(const Part& p, const Tile& tile, bool is_first) const {
    const Panels<T>& panels = plan_.panels;
    const auto operands = outer_quads<T>(plan_.w, plan_.tiling, tile, activation_, gradient_, p.begin, p.width);
    for (int64_t s = 0; s < kPositions; ++s)
      for (int64_t panel = p.first_panel; panel < p.last_panel; ++panel)
        add_position(p.dw + panels.offset(panel), is_first, operands, s, plan_.w.C,
                     s * p.width + panels.first_channel(panel) - p.begin, panels.columns(panel));
    // Position (1, 1) of A dy A' is the sum of a quad.
    if (dbias_ != nullptr) add_bias(p.dbias, operands, p.width, 5 * p.width);
  }

#if defined(FUSED_PREACT_MATRICES)
  void run_matrices(const Part& p, const Tile& tile, bool is_first) const {
    const Panels<T>& panels = plan_.panels;
    const int64_t rows = matrix_rows<E>(plan_.w);
    const MatrixOperands operands(plan_.w, tile, activation_, gradient_, p.begin, p.width);
    const MatrixShape shape(rows, kMatrixDepth);
    for (int64_t panel = p.first_panel; panel < p.last_panel; ++panel)
      add_panel_of_matrices(p.dw + panels.offset(panel), is_first, operands, plan_.w, rows,
                            panels.first_channel(panel) - p.begin, panels.columns(panel));
    if (dbias_ != nullptr) add_bias(p.dbias, operands, p.width, 0);
  }
#endif

  const Plan<E> plan_;
  const ActivationSource<S> activation_;
  const GradientSource<S> gradient_;
  const FilterView<S*> dweight_;
  S* const dbias_;
  Workspace& workspace_;
  T* const partial_;
  double* const bias_partial_;
};

}  // namespace

void prepare_wgrad(const Conv& conv, Dtype dtype, const Gradient& dy, const Activation& x, const WeightGrad& dweight,
                   void* dbias, Workspace& workspace, const Walker& walker) {
  with_storage(dtype, [&](auto s) {
    const Wgrad<decltype(s)> call(conv, dy, x, dweight, dbias, workspace);
    walker(Walk(call));
    call.finish();
  });
}

void wgrad(const Conv& conv, Dtype dtype, const Gradient& dy, const Activation& x, const WeightGrad& dweight,
           void* dbias, Workspace& workspace) {
  prepare_wgrad(conv, dtype, dy, x, dweight, dbias, workspace, [](const Walk& walk) { walk_alone(walk); });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
