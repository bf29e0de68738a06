// dgrad: dz = (conv_transpose(dy, weight) + add) * [z > 0], and the sums over dz that the batch norm's gradient needs.
//
// The transpose of a convolution of stride (a, b) is a*b convolutions of stride 1, one for each class of input pixels
// (h mod a, w mod b), with the filter taps that reach the class, in reverse. Each runs like forward, over strips of dy,
// which are formed from dz' and x' of the unit behind while they are read.
// The epilogue applies the mask to the registers of a block, writes dz and adds up
// dbeta = sum dz and sum dz*(x - mean).
// Bytes: dy (or dz' and x') and x read once, add read once, dz written once.
#include "norm_grad.h"
#include "product.h"
#include "source.h"
#include "walk.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

// One dimension of a class: its pixels are phase + i*stride; pixel i reads `taps` pixels of dy from i + first on, with
// the filter taps last_tap, last_tap - stride, ...
struct Phase {
  int64_t pixels, taps, first, last_tap;

  Phase(int64_t phase, int64_t size, int64_t filter, int64_t stride, int64_t pad) {
    const int64_t first_tap = (phase + pad) % stride;
    pixels = ceil_div(size - phase, stride);
    taps = ceil_div(filter - first_tap, stride);
    first = (phase + pad - first_tap) / stride - (taps - 1);
    last_tap = first_tap + (taps - 1) * stride;
  }
};

// What is the same for all panels and tiles.
template <class S>
struct Output {
  using T = Accumulate<S>;
  const S* x;
  const T* norm;  // or null: plain
  const S* add;   // or null
  S* dz;
  int64_t C;
};

// Adds `add` to the blocks of one panel, masks them, stores them and sums them up.
template <class S>
struct Epilogue {
  using T = Accumulate<S>;
  const Output<S>& out;
  const int64_t* outputs;  // the element at which each output pixel begins
  int64_t c0;
  NormVector<T> norm[kColumns];
  LongSum<T> dbeta[kColumns], dgamma[kColumns];

  Epilogue(const Output<S>& output, const int64_t* output_pixels, int64_t channel, int64_t columns)
      : out(output), outputs(output_pixels), c0(channel) {
    if (out.norm == nullptr) return;
    for (int64_t v = 0; v < columns; ++v) norm[v] = NormVector<T>(out.norm, out.C, c0 + v * kLanes<T>, lanes(v));
  }

  template <int M, int V, int... I>
  FUSED_PREACT_INLINE void block(int64_t p, Vec<T> (&acc)[M * V], std::integer_sequence<int, I...> each) {
    with_lanes<T>(lanes(V - 1), [&](auto last) __attribute__((always_inline)) {
      int64_t at[M];
      for (int m = 0; m < M; ++m) at[m] = outputs[p + m] + c0;
      if (const S* add = out.add; add != nullptr)
        ((acc[I] += load_lanes(add + at[I / V] + I % V * kLanes<T>, block_lanes<T, V>(I, last))), ...);
      if (out.norm == nullptr)
        plain<M, V>(at, acc, last, each);
      else
        masked<M, V>(p, at, acc, last, each);
    });
  }

  void add_to(const NormSums<T>& sums, int64_t group, int64_t columns) {
    for (int64_t v = 0; v < columns; ++v) sums.add(group, c0 + v * kLanes<T>, dbeta[v], dgamma[v]);
  }

 private:
  FUSED_PREACT_INLINE int64_t lanes(int64_t v) const { return minimum<int64_t>(out.C - c0 - v * kLanes<T>, kLanes<T>); }

  template <int M, int V, class Last, int... I>
  FUSED_PREACT_INLINE void plain(const int64_t (&at)[M], Vec<T> (&acc)[M * V], Last last,
                                 std::integer_sequence<int, I...>) const {
    constexpr int64_t kStep = kLanes<T>;
    S* dz = out.dz;
    (store_lanes(dz + at[I / V] + I % V * kStep, acc[I], block_lanes<T, V>(I, last)), ...);
  }

  template <int M, int V, class Last, int... I>
  FUSED_PREACT_INLINE void masked(int64_t p, const int64_t (&at)[M], Vec<T> (&acc)[M * V], Last last,
                                  std::integer_sequence<int, I...>) {
    constexpr int64_t kStep = kLanes<T>;
    const S* x = out.x;
    S* dz = out.dz;
    Vec<T> sums[V] = {}, centered[V] = {};
    const auto mask = [&](int64_t to, int v, int64_t n, Vec<T> value) __attribute__((always_inline)) {
      const Vec<T> input = load_lanes(x + to, n);
      value = norm[v].z(input) <= Vec<T>{} ? Vec<T>{} : value;
      store_lanes(dz + to, value, n);
      // The sums are those of dz as stored: what they take away from it in dx cancels exactly.
      if constexpr (!std::is_same_v<S, T>) value = load_lanes(dz + to, n);
      sums[v] += value;
      centered[v] += value * norm[v].centered(input);
    };
    (mask(at[I / V] + I % V * kStep, I % V, block_lanes<T, V>(I, last), acc[I]), ...);
    for (int m = 0; m < M; ++m) prefetch_far(x + at[m], V * kStep);
    const int64_t ahead = kAhead * out.C;
    ((I % V == 0 ? __builtin_prefetch(dz + at[I / V] + ahead, 1) : void()), ...);
    ((I < V ? dbeta[I % V].add(sums[I % V]) : void()), ...);
    ((I < V ? dgamma[I % V].add(centered[I % V]) : void()), ...);
    if (settles_after<M>(p)) ((I < V ? (dbeta[I % V].settle(), dgamma[I % V].settle()) : void()), ...);
  }
};

template <class S, class E>
struct Pass {
  using T = Accumulate<S>;
  const Conv& conv;
  const GradientSource<S> source;
  const FilterView<const S*> filter;  // of forward
  const Output<S> output;
  Workspace& workspace;

  bool is_whole() const { return conv.stride_h == 1 && conv.stride_w == 1; }

  // A class of input pixels, cut into tiles.
  struct Class {
    int64_t phase_h, phase_w;
    Phase h, v;
    ProductCut<E> cut;
  };

  Class class_of(int64_t phase_h, int64_t phase_w) const {
    const Phase h(phase_h, conv.H, conv.R, conv.stride_h, conv.pad_h);
    const Phase v(phase_w, conv.W, conv.S, conv.stride_w, conv.pad_w);
    Window w{conv.N, conv.P, conv.Q, conv.K, h.pixels, v.pixels, h.taps, v.taps, 1, 1, h.first, v.first};
    if (is_whole()) w = flattened(w);
    return {phase_h, phase_w, h, v, {w, conv.C}};
  }

  // The call for one class, which adds to the sums of its groups.
  class Call {
   public:
    Call(const Pass& pass, const Class& pixels, const NormSums<T>& sums)
        : pass_(pass), class_(pixels), sums_(sums), product_(pixels.cut, view(), pass.workspace) {}

    int64_t tiles() const { return product_.tiles(); }
    int64_t groups() const { return product_.groups(); }
    int64_t splits() const { return product_.splits; }
    void start(int64_t, int64_t) const {}

    void run(int64_t g, int64_t part, int64_t t) const {
      const Window& w = product_.w;
      const Conv& conv = pass_.conv;
      const Panels<T>& panels = product_.panels;
      const Tile tile = product_.tiling[t];
      const typename Product<E>::Strip strip(product_, tile, pass_.source, part);
      if (pass_.is_whole())
        list_outputs(strip.outputs(), tile, conv.C, w.P, w.Q, 0, 0, 1, 1);
      else
        list_outputs(strip.outputs(), tile, conv.C, conv.H, conv.W, class_.phase_h, class_.phase_w, conv.stride_h,
                     conv.stride_w);
      for (int64_t p = product_.first_panel(part); p < product_.first_panel(part + 1); ++p) {
        Epilogue<S> epilogue(pass_.output, strip.outputs(), panels.first_channel(p), panels.columns(p));
        strip.times(p, epilogue);
        if (pass_.output.norm != nullptr) epilogue.add_to(sums_, g, panels.columns(p));
      }
    }

   private:
    // The filter's taps that reach the class.
    FilterView<const S*> view() const {
      const Phase &h = class_.h, &v = class_.v;
      const Conv& conv = pass_.conv;
      const FilterView<const S*>& filter = pass_.filter;
      return {filter.data + h.last_tap * filter.step_h + v.last_tap * filter.step_w,
              h.taps,
              v.taps,
              conv.K,
              conv.C,
              -conv.stride_h * filter.step_h,
              -conv.stride_w * filter.step_w,
              filter.step_outer,
              filter.step_inner};
    }

    const Pass& pass_;
    const Class& class_;
    const NormSums<T>& sums_;
    const Product<E> product_;
  };

 private:
  static void list_outputs(int64_t* outputs, const Tile& tile, int64_t C, int64_t H, int64_t W, int64_t phase_h,
                           int64_t phase_w, int64_t stride_h, int64_t stride_w) {
    for (int64_t n = 0; n < tile.images; ++n) {
      int64_t* output = outputs + n * tile.image_step();
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t row = ((tile.n + n) * H + (tile.i0 + i) * stride_h + phase_h) * W + phase_w;
        for (int64_t j = 0; j < tile.cols; ++j, output += tile.pixel_step())
          *output = (row + (tile.j0 + j) * stride_w) * C;
      }
    }
  }
};

template <class S, class E>
void dgrad_of(const Conv& conv, const Gradient& dy, const Weight& weight, const Activation& x, const void* add,
              void* dz, const NormGrad& grad, Workspace& workspace, const Walker& walker) {
  using T = Accumulate<S>;
  const T* norm = static_cast<const T*>(x.norm);
  const Pass<S, E> pass{conv,
                        GradientSource<S>(dy, conv.K),
                        forward_view<S>(conv, weight),
                        {static_cast<const S*>(x.x), norm, static_cast<const S*>(add), static_cast<S*>(dz), conv.C},
                        workspace};
  const auto for_each_class = [&](const auto& body) {
    for (int64_t h = 0; h < conv.stride_h; ++h)
      for (int64_t w = 0; w < conv.stride_w; ++w) body(pass.class_of(h, w));
  };
  int64_t groups = 1;
  for_each_class([&](const auto& pixels) { groups = maximum(groups, pixels.cut.groups()); });
  const NormSums<T> sums(groups, conv.C, workspace);
  for_each_class([&](const auto& pixels) { walker(Walk(typename Pass<S, E>::Call(pass, pixels, sums))); });
  if (norm != nullptr) sums.finish(norm, grad, double(conv.N) * conv.H * conv.W);
}

}  // namespace

void prepare_dgrad(const Conv& conv, Dtype dtype, const Gradient& dy, const Weight& weight, const Activation& x,
                   const void* add, void* dz, const NormGrad& grad, Workspace& workspace, const Walker& walker) {
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    with_operand<S>(conv.K,
                    [&](auto e) { dgrad_of<S, decltype(e)>(conv, dy, weight, x, add, dz, grad, workspace, walker); });
  });
}

void dgrad(const Conv& conv, Dtype dtype, const Gradient& dy, const Weight& weight, const Activation& x,
           const void* add, void* dz, const NormGrad& grad, Workspace& workspace) {
  prepare_dgrad(conv, dtype, dy, weight, x, add, dz, grad, workspace, [](const Walk& walk) { walk_alone(walk); });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
