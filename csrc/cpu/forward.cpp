// forward: y = conv(a, weight) + bias + residual, and the batch norm rows that the next unit needs of y.
//
// Layout: x, residual, y NHWC; the filter is packed once a call. One job is a group of tiles (for few groups: and a
// part of the output channels); a tile is at most kMostPixels output pixels or one row of them, by position some more,
// whose strip of activations stays in the first or second level cache while all panels of output channels pass over it.
// Bytes: x and residual read once (but for the rows that neighbouring tiles share), y written once.
#include "moments.h"
#include "product.h"
#include "source.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

// A y of so many bytes has left the cache since its memory was last used, a step ago. Reading its lines only to
// overwrite them would take as long as the products of a 1x1 convolution.
constexpr int64_t kLeastStreamed = int64_t{2} << 20;

// Whether a tensor of so many values is one that passes the cache by.
template <class S>
bool is_streamed(int64_t values) {
  return values * int64_t{sizeof(S)} >= kLeastStreamed;
}

// Whether y, of [pixels][K], may and should be written past the cache. Rounded values are read
// back for their statistics.
template <class S>
bool streams(const void* y, int64_t pixels, int64_t K) {
  const bool whole_lines = K * int64_t{sizeof(S)} % kCacheLine == 0 && reinterpret_cast<intptr_t>(y) % kCacheLine == 0;
  constexpr bool kPanelsOfLines = kColumns * kVectorBytes >= kCacheLine;
  return std::is_same_v<S, Accumulate<S>> && kPanelsOfLines && whole_lines && is_streamed<S>(pixels * K);
}

// What is the same for all panels and tiles.
template <class S>
struct Output {
  using T = Accumulate<S>;
  const T* bias;  // padded to whole vectors, or null
  const S* residual;
  S* y;
  int64_t K;
  void* moments;  // or null
  bool streams;   // y is written past the cache
  const S* x;     // what comes from memory, `x_step` values for each pixel of y; or null
  int64_t x_step;
};

// Adds bias and residual to the blocks of one panel, stores them, and sums them up as stored.
template <class S>
struct Epilogue {
  using T = Accumulate<S>;
  const Output<S>& out;
  const Tile& tile;
  int64_t first, k0;  // pixel, channel
  RunSums<T> sums[kColumns];

  Epilogue(const Output<S>& output, const Tile& of, int64_t pixel, int64_t channel)
      : out(output), tile(of), first(pixel), k0(channel) {}

  template <int M, int V, int... I>
  FUSED_PREACT_INLINE void block(int64_t p, Vec<T> (&acc)[M * V], std::integer_sequence<int, I...> each) {
    if (out.x != nullptr && k0 == 0) prefetch_far(out.x + (first + p) * out.x_step, M * out.x_step);
    with_lanes<T>(out.K - k0 - (V - 1) * kLanes<T>, [&](auto last) __attribute__((always_inline)) {
      finish<M, V>((first + tile.offset(p)) * out.K + k0, tile.offset_step() * out.K, acc, last, each);
    });
    if (out.moments == nullptr) return;
    Vec<T> sum[V] = {}, squares[V] = {};
    if (p == 0) {
      ((sum[I % V] += acc[I]), ...);
      ((I < V ? void(sums[I % V] = RunSums<T>(sum[I % V] * splat(T(1) / M))) : void()), ...);
      ((I < V ? void(sum[I % V] = Vec<T>{}) : void()), ...);
    }
    ((acc[I] -= sums[I % V].origin, sum[I % V] += acc[I], squares[I % V] += acc[I] * acc[I]), ...);
    ((I < V ? sums[I % V].add(sum[I % V], squares[I % V]) : void()), ...);
    if (settles_after<M>(p)) ((I < V ? sums[I % V].settle() : void()), ...);
  }

  void merge(int64_t g, int64_t count, int64_t n, int64_t columns) {
    for (int64_t v = 0; v < columns; ++v) {
      sums[v].settle();
      sums[v].merge_into(Moments<T>(out.moments, g, out.K), k0 + v * kLanes<T>, count, n);
    }
  }

 private:
  // Makes of the products the values as they are stored, from element `at` on, `step` from pixel to pixel, so that the
  // statistics are those of y. The last column has `last` lanes.
  template <int M, int V, class Last, int... I>
  FUSED_PREACT_INLINE void finish(int64_t at, int64_t step, Vec<T> (&acc)[M * V], Last last,
                                  std::integer_sequence<int, I...>) const {
    const int64_t ahead = kAhead * out.K;
    if (out.bias != nullptr) ((acc[I] += load(out.bias + k0 + I % V * kLanes<T>)), ...);
    if (const S* residual = out.residual; residual != nullptr) {
      residual += at;
      ((acc[I] += load_lanes(residual + I / V * step + I % V * kLanes<T>, block_lanes<T, V>(I, last))), ...);
      (__builtin_prefetch(residual + I / V * step + ahead + I % V * kLanes<T>), ...);
    }
    S* y = out.y + at;
    if constexpr (std::is_same_v<S, T>) {
      if (out.streams) return (stream(y + I / V * step + I % V * kLanes<T>, acc[I]), ...);
    }
    (store_lanes(y + I / V * step + I % V * kLanes<T>, acc[I], block_lanes<T, V>(I, last)), ...);
    ((I % V == 0 ? __builtin_prefetch(y + I / V * step + ahead, 1) : void()), ...);
    if constexpr (!std::is_same_v<S, T>)
      if (out.moments != nullptr)
        ((acc[I] = load_lanes(y + I / V * step + I % V * kLanes<T>, block_lanes<T, V>(I, last))), ...);
  }
};

template <class T, class S>
const T* padded_bias(const void* bias, const Panels<T>& panels, Workspace& workspace) {
  if (bias == nullptr) return nullptr;
  T* padded = static_cast<T*>(workspace.take(panels.padded_channels() * sizeof(T)));
  for (int64_t k = 0; k < panels.padded_channels(); ++k)
    padded[k] = k < panels.channels ? widened(static_cast<const S*>(bias)[k]) : T(0);
  return padded;
}

template <class S, class E>
void forward_of(const Conv& conv, const Activation& x, const Weight& weight, const void* bias, const void* residual,
                void* y, const Affine& next, void* next_rows, Workspace& workspace) {
  using T = Accumulate<S>;
  const Product<E> product({forward_window(conv), conv.K}, forward_view<S>(conv, weight), workspace);
  const int64_t tiles = product.tiles(), groups = product.groups(), splits = product.splits;
  const Panels<T>& panels = product.panels;
  const ActivationSource<S> source(x, conv.C);
  const Output<S> output{padded_bias<T, S>(bias, panels, workspace),
                         static_cast<const S*>(residual),
                         static_cast<S*>(y),
                         conv.K,
                         next_rows != nullptr ? workspace.take(groups * Moments<T>::bytes(conv.K)) : nullptr,
                         streams<S>(y, conv.N * conv.P * conv.Q, conv.K),
                         is_streamed<S>(conv.N * conv.H * conv.W * conv.C) ? static_cast<const S*>(x.x) : nullptr,
                         conv.H * conv.W * conv.C / (conv.P * conv.Q)};

  parallel(groups * splits, [&](int64_t job) {
    const int64_t g = job / splits, part = job % splits;
    int64_t count = 0;
    for (int64_t t = part_begin(tiles, groups, g); t < part_begin(tiles, groups, g + 1); ++t) {
      const Tile tile = product.tiling[t];
      const int64_t n = tile.pixels(), first = (tile.n * product.w.P + tile.i0) * product.w.Q + tile.j0;
      const typename Product<E>::Strip strip(product, tile, source, part);
      for (int64_t panel = product.first_panel(part); panel < product.first_panel(part + 1); ++panel) {
        Epilogue<S> epilogue(output, tile, first, panels.first_channel(panel));
        strip.times(panel, epilogue);
        if (output.moments != nullptr) epilogue.merge(g, count, n, panels.columns(panel));
      }
      count += n;
    }
    if (output.streams) fence_streams();
  });

  if (next_rows != nullptr)
    finish_moments<T>(
        output.moments, groups, conv.K,
        [&](int64_t g) {
          int64_t count = 0;
          for (int64_t t = part_begin(tiles, groups, g); t < part_begin(tiles, groups, g + 1); ++t)
            count += product.tiling[t].pixels();
          return count;
        },
        next, next_rows);
}

}  // namespace

void forward(const Conv& conv, Dtype dtype, const Activation& x, const Weight& weight, const void* bias,
             const void* residual, void* y, const Affine& next, void* next_rows, Workspace& workspace) {
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    with_operand<S>(conv.C, [&](auto e) {
      forward_of<S, decltype(e)>(conv, x, weight, bias, residual, y, next, next_rows, workspace);
    });
  });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
