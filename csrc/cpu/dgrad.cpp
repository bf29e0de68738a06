// dgrad: dz = (conv_transpose(dy, weight) + add) * [z > 0], and the sums over dz that the batch norm's gradient needs.
//
// The transpose of a convolution of stride (a, b) is a*b convolutions of stride 1, one for each class of input pixels
// (h mod a, w mod b), with the filter taps that reach the class, in reverse. Each runs like forward, over strips of dy,
// which are formed from dz' and x' of the unit behind while they are read.
// One tile's product for one panel of channels goes to a small block; a second pass over it applies the mask,
// writes dz and adds up dbeta = sum dz and sum dz*(x - mean).
// Bytes: dy (or dz' and x') and x read once, add read once, dz written once.
#include "correlate.h"
#include "pack.h"
#include "source.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

constexpr int64_t kTileBytes = 1 << 15, kLeastPixels = 48, kMostPixels = 240, kMostGroups = 64;

// One dimension of a class: its pixels are phase + i*stride; pixel i reads `taps` pixels of dy from i + first on, with
// the filter taps last_tap, last_tap - stride, ...
struct Phase {
  int64_t pixels, taps, first, last_tap;

  Phase(int64_t phase, int64_t size, int64_t filter, int64_t stride, int64_t pad) {
    const int64_t first_tap = (phase + pad) % stride;
    pixels = phase < size ? ceil_div(size - phase, stride) : 0;
    taps = first_tap < filter ? ceil_div(filter - first_tap, stride) : 0;
    first = (phase + pad - first_tap) / stride - (taps - 1);
    last_tap = first_tap + (taps - 1) * stride;
  }
};

// dz of one vector of channels over the pixels of a tile.
template <class S>
struct MaskedStore {
  using T = Accumulate<S>;
  const S* x;
  const T* norm;
  const S* add;
  S* dz;
  int64_t C;

  Vec<T> product(const T* block, int64_t at, int64_t n) const {
    const Vec<T> value = load(block);
    return add != nullptr ? value + load_lanes(add + at, n) : value;
  }

  void plain(const T* block, int64_t ld, const int64_t* outputs, int64_t pixels, int64_t c, int64_t n) const {
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t at = outputs[p] * C + c;
      store_lanes(dz + at, product(block + p * ld, at, n), n);
    }
  }

  void masked(const T* block, int64_t ld, const int64_t* outputs, int64_t pixels, int64_t c, int64_t n,
              T* sums) const {
    const NormVector<T> bn(norm, C, c, n);
    Vec<T> dbeta = {}, dgamma = {};
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t at = outputs[p] * C + c;
      const Vec<T> value = load_lanes(x + at, n);
      const Vec<T> masked = bn.z(value) <= Vec<T>{} ? Vec<T>{} : product(block + p * ld, at, n);
      store_lanes(dz + at, masked, n);
      dbeta += masked;
      dgamma += masked * bn.centered(value);
    }
    const int64_t padded = ceil_div(C, kLanes<T>) * kLanes<T>;
    store(sums + c, load(sums + c) + dbeta);
    store(sums + padded + c, load(sums + padded + c) + dgamma);
  }
};

template <class S>
struct Pass {
  using T = Accumulate<S>;
  const Conv& conv;
  const GradientSource<S> source;
  const FilterView<const S*> filter;  // of forward
  const MaskedStore<S> result;
  Workspace& workspace;

  int64_t sums_size() const { return 2 * ceil_div(conv.C, kLanes<T>) * kLanes<T>; }

  // Adds the class (phase_h, phase_w) to the sums of kMostGroups groups.
  void run(int64_t phase_h, int64_t phase_w, T* sums) const {
    const Phase h(phase_h, conv.H, conv.R, conv.stride_h, conv.pad_h);
    const Phase v(phase_w, conv.W, conv.S, conv.stride_w, conv.pad_w);
    Window w{conv.N, conv.P, conv.Q, conv.K, h.pixels, v.pixels, h.taps, v.taps, 1, 1, h.first, v.first};
    const bool whole = conv.stride_h == 1 && conv.stride_w == 1;
    if (whole) w = flattened(w);
    const Tiling tiling(w, tile_pixels(w));
    const int64_t tiles = tiling.count(), groups = minimum(tiles, kMostGroups);
    const FilterView<const S*> view{
        filter.data + h.last_tap * filter.step_h + v.last_tap * filter.step_w, h.taps, v.taps, conv.K, conv.C,
        -conv.stride_h * filter.step_h, -conv.stride_w * filter.step_w, filter.step_outer, filter.step_inner};
    const T* packed = pack<S>(view, workspace);
    const Panels<T> panels{view.outer, view.depth()};
    const int64_t splits = splits_for(groups, panels.count()), ld = kColumns * kLanes<T>;

    parallel(groups * splits, [&](int64_t job) {
      const int64_t g = job / splits, part = job % splits;
      TileScratch<T> scratch(tiling, tiling.most_pixels() * ld);
      for (int64_t t = cut(tiles, groups, g); t < cut(tiles, groups, g + 1); ++t) {
        const Tile tile = tiling[t];
        gather(scratch.operand, scratch.strip, w, tile, source);
        if (whole)
          list_outputs(scratch.outputs, tile, w.P, w.Q, 0, 0, 1, 1);
        else
          list_outputs(scratch.outputs, tile, conv.H, conv.W, phase_h, phase_w, conv.stride_h, conv.stride_w);
        for (int64_t p = cut(panels.count(), splits, part); p < cut(panels.count(), splits, part + 1); ++p)
          one_panel(scratch, w, tile, panels, p, packed, sums + g * sums_size());
      }
    });
  }

 private:
  static int64_t tile_pixels(const Window& w) {
    const int64_t pixels = kTileBytes / maximum<int64_t>(w.C * sizeof(T), 1);
    return minimum(maximum(pixels, kLeastPixels), kMostPixels) / kPixels * kPixels;
  }

  static void list_outputs(int64_t* outputs, const Tile& tile, int64_t H, int64_t W, int64_t phase_h, int64_t phase_w,
                           int64_t stride_h, int64_t stride_w) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t row = (tile.n * H + (tile.i0 + i) * stride_h + phase_h) * W + phase_w;
      for (int64_t j = 0; j < tile.cols; ++j) *outputs++ = row + (tile.j0 + j) * stride_w;
    }
  }

  void one_panel(const TileScratch<T>& scratch, const Window& w, const Tile& tile, const Panels<T>& panels,
                 int64_t panel, const T* packed, T* sums) const {
    const int64_t ld = kColumns * kLanes<T>, first = panels.first_channel(panel), pixels = tile.pixels();
    correlate(scratch.operand, pixels, w, packed + panels.offset(panel), panels.columns(panel),
              [&](int64_t p, int64_t v, Vec<T> value) __attribute__((always_inline)) {
                store(scratch.block + p * ld + v * kLanes<T>, value);
              });
    const int64_t last = minimum(first + panels.width(panel), conv.C);
    for (int64_t c = first; c < last; c += kLanes<T>) {
      const int64_t n = minimum<int64_t>(last - c, kLanes<T>);
      if (result.norm == nullptr)
        result.plain(scratch.block + c - first, ld, scratch.outputs, pixels, c, n);
      else
        result.masked(scratch.block + c - first, ld, scratch.outputs, pixels, c, n, sums);
    }
  }
};

// Adds the sums of all groups in order into the first.
template <class T>
void merge_groups(T* sums, int64_t size) {
  for (int64_t g = 1; g < kMostGroups; ++g)
    for (int64_t c = 0; c < size; c += kLanes<T>) store(sums + c, load(sums + c) + load(sums + g * size + c));
}

template <class T>
void gradient_rows(const T* dbeta, const T* centered, int64_t C, const T* norm, T* rows, bool batch, double count) {
  for (int64_t c = 0; c < C; ++c) {
    const double rstd = norm[kRstd * C + c], scale = norm[kScale * C + c], dgamma = centered[c] * rstd;
    rows[kDgamma * C + c] = T(dgamma);
    rows[kDbeta * C + c] = dbeta[c];
    if (!batch) continue;
    rows[kSlope * C + c] = T(-scale * rstd * dgamma / count);
    rows[kOffset * C + c] = T(-scale * dbeta[c] / count);
  }
}

template <class S>
void dgrad_of(const Conv& conv, const Gradient& dy, const Weight& weight, const Activation& x, const void* add,
              void* dz, void* grad_rows, bool batch, Workspace& workspace) {
  using T = Accumulate<S>;
  const T* norm = static_cast<const T*>(x.norm);
  const Pass<S> pass{conv,
                     GradientSource<S>(dy, conv.K),
                     forward_view<S>(conv, weight),
                     {static_cast<const S*>(x.x), norm, static_cast<const S*>(add), static_cast<S*>(dz), conv.C},
                     workspace};
  T* sums = static_cast<T*>(workspace.take(kMostGroups * pass.sums_size() * sizeof(T)));
  memset(sums, 0, kMostGroups * pass.sums_size() * sizeof(T));
  for (int64_t h = 0; h < conv.stride_h; ++h)
    for (int64_t w = 0; w < conv.stride_w; ++w) pass.run(h, w, sums);
  if (norm == nullptr) return;
  merge_groups(sums, pass.sums_size());
  gradient_rows(sums, sums + pass.sums_size() / 2, conv.C, norm, static_cast<T*>(grad_rows), batch,
                double(conv.N) * conv.H * conv.W);
}

}  // namespace

void dgrad(const Conv& conv, Dtype dtype, const Gradient& dy, const Weight& weight, const Activation& x,
           const void* add, void* dz, void* grad_rows, bool batch, Workspace& workspace) {
  with_storage(dtype, [&](auto s) {
    dgrad_of<decltype(s)>(conv, dy, weight, x, add, dz, grad_rows, batch, workspace);
  });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
