// A block of wgrad, and its plan: wgrad.cu has the contract.
#pragma once
#include "block.h"

namespace fused_preact::cuda {

constexpr int kWgradBlocks = 3;    // on a multiprocessor
constexpr int kLogMostPieces = 4;  // of a pixel in a tile, as a power of two

// The units of a warp.
template <int Taps>
struct Units {
  static constexpr int kK = Taps == 1 ? 2 : 1, kC = Taps == 1 ? 4 : 1, kCount = kK * kC * Taps;
  static constexpr int kFloats = kCount * 2 * 4;  // of a lane
  static_assert(kFloats <= 72, "the accumulators fit the registers");
};

template <class Op>
struct WgradParams {
  using S = typename Op::Storage;
  GradientSource<Op> dy;
  ActivationSource<Op> x;
  Window window;
  StripLayout dy_strip, x_strip;
  Runs runs;
  int k_groups, c_groups, splits;  // of warps
  int k_tiles, c_tiles;
  int slot_pixels;  // of dy in shared memory, whole steps
  Teams teams;
  uint32_t* counters;
  float4* slots;       // [groups][k_tiles*c_tiles][slot_vectors]
  double* bias_slots;  // [groups][K], or null
  S* dweight;
  S* dbias;
  int64_t stride_k, stride_c, stride_r, stride_s;

  __host__ __device__ int stage_bytes() const { return dy_strip.bytes + x_strip.bytes; }
  __host__ __device__ int table() const { return slot_pixels + window.strip_pixels(); }
};

template <class Op, int Taps>
__host__ __device__ int slot_vectors(const WgradParams<Op>& p) {
  return p.k_groups * p.c_groups * Units<Taps>::kCount * 2 * 32;
}

template <class Op, int Taps>
size_t shared_bytes(const WgradParams<Op>& p) {
  const size_t exchange = p.splits > 1 ? slot_vectors<Op, Taps>(p) * sizeof(float4) : 0;
  return maximum<size_t>(2 * p.stage_bytes() + 2 * p.table() * sizeof(int), exchange);
}

// Adds one tile to the accumulators of the warp.
template <class Op, int Taps>
__device__ __forceinline__ void multiply_tile(Block (&acc)[Units<Taps>::kCount], const WgradParams<Op>& p,
                                              const std::byte* dy, const std::byte* x, int k_group, int c_group,
                                              int split) {
  using U = Units<Taps>;
  constexpr int kUnitBytes = 16 * sizeof(typename Op::Storage);
  const Window& w = p.window;
  const int lane = threadIdx.x % 32, dy_bytes = p.dy_strip.pixel_bytes(), x_bytes = p.x_strip.pixel_bytes();
  dy += k_group * U::kK * kUnitBytes;
  x += c_group * U::kC * kUnitBytes;
#pragma unroll 1
  for (int first = split * Op::kStepRows; first < p.slot_pixels; first += p.splits * Op::kStepRows) {
    typename Op::A a[U::kK];
#pragma unroll
    for (int k = 0; k < U::kK; ++k)
      Op::load_a_across(a[k], [&](int i) { return dy + (first + i) * dy_bytes + k * kUnitBytes; }, lane);
#pragma unroll
    for (int tap = 0; tap < Taps; ++tap) {
      const int offset = Taps == 1 ? 0 : (tap / 3 * w.cols + tap % 3) * x_bytes;
#pragma unroll
      for (int c = 0; c < U::kC; ++c) {
        typename Op::B b;
        Op::load_b_across(
            b, [&](int i) { return x + w.strip_pixel(first + i) * x_bytes + offset + c * kUnitBytes; }, lane);
#pragma unroll
        for (int k = 0; k < U::kK; ++k) Op::multiply(acc[(k * U::kC + c) * Taps + tap], a[k], b);
      }
    }
  }
}

// Adds a tile's dy to the group's slot of dbias, of which each thread has one channel. It is rarely wanted: so it takes
// no register from the rest, and reads dy again, for what is in shared memory may be rounded for the product.
template <class Op>
__device__ __forceinline__ void add_bias(const WgradParams<Op>& p, int group, int k0, int k_tile, bool first,
                                         int64_t corner, const int* offsets) {
  const int k = k0 + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) >= k_tile || k >= p.dy.C) return;
  double* const slot = p.bias_slots + static_cast<int64_t>(group) * p.dy.C + k;
  double sum = first ? 0 : *slot;
#pragma unroll 1
  for (int q = 0; q < p.slot_pixels; ++q)
    if (offsets[q] >= 0) sum += p.dy.value(corner + offsets[q], k);
  *slot = sum;
}

// Writes the accumulators of a lane: its vectors are 32 apart, from `own` on.
template <int Count>
__device__ __forceinline__ void store_units(const Block (&acc)[Count], float4* own) {
#pragma unroll
  for (int i = 0; i < Count * 2; ++i) {
    const float (&d)[4] = acc[i / 2][i % 2];
    own[i * 32] = {d[0], d[1], d[2], d[3]};
  }
}

// Adds the accumulators of the warps that share units, in order, into those of the first of them.
template <int Count>
__device__ __forceinline__ void add_splits(Block (&acc)[Count], float4* shared, int splits, int split, int unit_warp) {
  const int lane = threadIdx.x % 32;
  float4* const own = shared + unit_warp * Count * 2 * 32 + lane;
  for (int from = 1; from < splits; ++from) {
    __syncthreads();
    if (split == from) store_units(acc, own);
    __syncthreads();
    if (split == 0)
#pragma unroll
      for (int i = 0; i < Count * 2; ++i) {
        float (&d)[4] = acc[i / 2][i % 2];
        const float4 other = own[i * 32];
        d[0] += other.x, d[1] += other.y, d[2] += other.z, d[3] += other.w;
      }
  }
}

// Writes vector i of a slot to the gradient: two channels c of the rows k and k + 8 of a unit.
template <int Taps, class Op>
__device__ __forceinline__ void write_vector(const WgradParams<Op>& p, int k0, int c0, int i, const float4& sum) {
  using S = typename Op::Storage;
  using U = Units<Taps>;
  const int lane = i % 32, half = i / 32 % 2, unit = i / 64 % U::kCount, warp = i / 64 / U::kCount;
  const int tap = unit % Taps, pair = unit / Taps;
  const int k = k0 + (warp / p.c_groups * U::kK + pair / U::kC) * 16 + lane / 4;
  const int c = c0 + (warp % p.c_groups * U::kC + pair % U::kC) * 16 + half * 8 + lane % 4 * 2;
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
  S* const to = p.dweight + tap / 3 * p.stride_r + tap % 3 * p.stride_s;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (k + j / 2 * 8 < p.dy.C && c + j % 2 < p.x.C)
      to[(k + j / 2 * 8) * p.stride_k + (c + j % 2) * p.stride_c] = narrow<S>(values[j]);
}

// Merges the slots of dweight of this block's channels, as merge_groups asks.
template <int Taps, class Op>
__device__ __forceinline__ void merge_units(const WgradParams<Op>& p, int column, int k0, int c0, int first, int count,
                                            int step, bool finish) {
  const int vectors = slot_vectors<Op, Taps>(p);
  const int64_t group_vectors = static_cast<int64_t>(p.k_tiles) * p.c_tiles * vectors;
  float4* const slots = p.slots + first * group_vectors + static_cast<int64_t>(column) * vectors;
  // Many loads in flight, or their latency would be most of the time of a small launch.
  constexpr int kVectors = 3, kMembers = 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < vectors; i += kVectors * kThreads) {
    float4 sum[kVectors] = {};
#pragma unroll 1
    for (int j = 0; j < count; j += kMembers) {
      float4 member[kVectors][kMembers];
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int m = 0; m < kMembers; ++m)
          member[v][m] = j + m < count && i + v * kThreads < vectors
                             ? slots[(j + m) * step * group_vectors + i + v * kThreads]
                             : float4{0, 0, 0, 0};
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int m = 0; m < kMembers; ++m) {
          sum[v].x += member[v][m].x, sum[v].y += member[v][m].y;
          sum[v].z += member[v][m].z, sum[v].w += member[v][m].w;
        }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (i + v * kThreads >= vectors) continue;
      if (finish)
        write_vector<Taps>(p, k0, c0, i + v * kThreads, sum[v]);
      else
        slots[i + v * kThreads] = sum[v];
    }
  }
}

// The same of dbias, of which each thread has one channel; with_bias: whether this block sums it.
template <int Taps, class Op>
__device__ __forceinline__ void merge_bias(const WgradParams<Op>& p, int k0, bool with_bias, int first, int count,
                                           int step, bool finish) {
  const int k = k0 + static_cast<int>(threadIdx.x), K = p.dy.C;
  if (!with_bias || threadIdx.x >= p.k_groups * Units<Taps>::kK * 16 || k >= K) return;
  double* const bias = p.bias_slots + static_cast<int64_t>(first) * K + k;
  double sum = 0;
  for (int j = 0; j < count; ++j) sum += bias[static_cast<int64_t>(j) * step * K];
  if (finish)
    p.dbias[k] = narrow<typename Op::Storage>(static_cast<float>(sum));
  else
    *bias = sum;
}

// The shared memory of a block, and how tiles get there.
template <class Op>
struct WgradMemory {
  const WgradParams<Op>& p;
  const Window& w;
  int k0, c0, end;    // first channels; behind the last tile
  std::byte* stages;  // two, of a tile and the next: the strip of dy, and behind it that of x
  int* tables;        // two, of a tile and the next: where the pixels of those lie

  __device__ WgradMemory(const WgradParams<Op>& of, int k, int c, int tiles_end)
      : p(of),
        w(p.window),
        k0(k),
        c0(c),
        end(tiles_end),
        stages(shared_memory()),
        tables(reinterpret_cast<int*>(stages + 2 * p.stage_bytes())) {}

  __device__ std::byte* stage(int which) const { return stages + which * p.stage_bytes(); }
  __device__ int* dy_table(int t) const { return tables + (t & 1) * p.table(); }
  __device__ int* x_table(int t) const { return dy_table(t) + p.slot_pixels; }

  // Fills the tables of tile t.
  __device__ void index(int t) const {
    if (t >= end) return;
    w.index_target(w.tile(t), p.slot_pixels, dy_table(t));
    w.index_source(w.tile(t), x_table(t));
  }
  // Queues the copies of tile t to a stage, as one group.
  __device__ void copy(int t, std::byte* to) const {
    if (t < end) {
      const Tile tile = w.tile(t);
      copy_strip(p.dy, k0, p.dy_strip, to, p.slot_pixels, w.target_corner(tile), dy_table(t));
      copy_strip(p.x, c0, p.x_strip, to + p.dy_strip.bytes, w.strip_pixels(), w.source_corner(tile), x_table(t));
    }
    cp_async_commit();
  }
  // Waits for all but the latest copies and forms tile t in its stage.
  __device__ void form(int t, std::byte* at) const {
    const auto dy_rows = p.dy.rows(own_channel<GradientSource<Op>>(p.dy_strip, k0));
    cp_async_wait<1>();
    form_strip(p.dy, dy_rows, p.dy_strip, at, p.slot_pixels, dy_table(t));
    const auto x_rows = p.x.rows(own_channel<ActivationSource<Op>>(p.x_strip, c0));
    form_strip(p.x, x_rows, p.x_strip, at + p.dy_strip.bytes, w.strip_pixels(), x_table(t));
  }
};

template <class Op, int Taps>
__device__ __forceinline__ void wgrad_block(const WgradParams<Op>& p, int block) {
  using U = Units<Taps>;
  const int columns = p.k_tiles * p.c_tiles;
  const int group = block / columns, column = block % columns;
  const int k_tile = p.k_groups * U::kK * 16, c_tile = p.c_groups * U::kC * 16;
  const int k0 = column / p.c_tiles * k_tile, c0 = column % p.c_tiles * c_tile;
  const int warp = threadIdx.x / 32, unit_warps = p.k_groups * p.c_groups;
  const int unit_warp = warp % unit_warps, split = warp / unit_warps;
  const int begin = p.runs.begin(group), end = p.runs.end(group);
  const WgradMemory<Op> m(p, k0, c0, end);

  Block acc[U::kCount];
  clear(acc);
  const bool with_bias = p.bias_slots != nullptr && c0 == 0;
#pragma unroll 1
  for (int t = begin; t < begin + 2; ++t) m.index(t);
  take_turn();  // what comes before reads shared memory and arguments alone
  __syncthreads();
  // Each step queues the copies of the next tile, and multiplies the one that the step before it queued.
  for (int t = begin - 1, which = 1; t < end; ++t, which ^= 1) {
    m.copy(t + 1, m.stage(which ^ 1));
    if (t < begin) continue;
    std::byte* const stage = m.stage(which);
    m.form(t, stage);
    if (with_bias) add_bias(p, group, k0, k_tile, t == begin, m.w.target_corner(m.w.tile(t)), m.dy_table(t));
    __syncthreads();
    m.index(t + 2);  // in place of the tables of this tile
    multiply_tile<Op, Taps>(acc, p, stage, stage + p.dy_strip.bytes, unit_warp / p.c_groups, unit_warp % p.c_groups,
                            split);
    __syncthreads();
  }

  add_splits(acc, reinterpret_cast<float4*>(m.stages), p.splits, split, unit_warp);
  if (split == 0) {
    const int64_t slot = static_cast<int64_t>(group) * columns + column;
    store_units(acc, p.slots + slot * slot_vectors<Op, Taps>(p) + unit_warp * U::kCount * 2 * 32 + threadIdx.x % 32);
  }
  merge_groups(p.counters + column * p.teams.counters(), p.teams, group,
               [&](int first, int count, int step, bool finish) {
                 merge_units<Taps>(p, column, k0, c0, first, count, step, finish);
                 merge_bias<Taps>(p, k0, with_bias, first, count, step, finish);
               });
}

// How many groups of `unit` channels of a tensor warps share, at most `most`: a power of two.
template <class S>
int warp_groups(int channels, int unit, int most) {
  const int fitting = (kLanes<S> << kLogMostPieces) / unit;
  return 1 << log2_ceil(ceil_div(channels, unit), log2_ceil(minimum(fitting, most), 3));
}

template <class Op, int Taps>
void plan_wgrad(WgradParams<Op>& p, bool need_bias, Workspace& workspace, int64_t blocks, int64_t taken) {
  using S = typename Op::Storage;
  using U = Units<Taps>;
  const int K = p.dy.C, C = p.x.C;
  p.k_groups = warp_groups<S>(K, U::kK * 16, kWarps);
  p.c_groups = warp_groups<S>(C, U::kC * 16, kWarps / p.k_groups);
  // Channels in as few blocks as can be, each of which reads dy and x once for all of them; but where that leaves
  // multiprocessors idle, in more: to sum over pixels within a block takes less time than over blocks.
  const int64_t tiles = p.window.tiles();
  const auto k_tile = [&] { return p.k_groups * U::kK * 16; };
  const auto c_tile = [&] { return p.c_groups * U::kC * 16; };
  while (p.k_groups * p.c_groups > 1 && tiles * ceil_div(K, k_tile()) * ceil_div(C, c_tile()) < blocks)
    (p.k_groups > p.c_groups ? p.k_groups : p.c_groups) /= 2;
  p.splits = kWarps / (p.k_groups * p.c_groups);
  p.k_tiles = ceil_div(K, k_tile()), p.c_tiles = ceil_div(C, c_tile());
  const auto lay_out = [&] {
    p.slot_pixels = maximum(p.window.box_pixels(), Op::kStepRows);
    p.dy_strip = StripLayout(log2_ceil(k_tile() / kLanes<S>, kLogMostPieces), p.slot_pixels, p.dy.tensors());
    p.x_strip = StripLayout(log2_ceil(c_tile() / kLanes<S>, kLogMostPieces), p.window.strip_pixels(), p.x.tensors());
  };
  lay_out();
  while (2 * p.stage_bytes() > kWantShared && shrink(p.window)) lay_out();
  if (shared_bytes<Op, Taps>(p) > kMostShared)
    throw std::runtime_error("the CUDA kernels have no room for a filter of this size");
  const int64_t columns = static_cast<int64_t>(p.k_tiles) * p.c_tiles;
  p.window.first_tile = 0;
  p.runs = Runs(p.window.tiles(), columns, blocks);
  p.teams = Teams(p.runs.count(), slot_vectors<Op, Taps>(p) * sizeof(float4));
  p.counters = take_counters(workspace, p.teams, columns, taken);
  p.slots = static_cast<float4*>(workspace.take(p.teams.groups * columns * slot_vectors<Op, Taps>(p) * sizeof(float4)));
  p.bias_slots = need_bias ? static_cast<double*>(workspace.take(p.teams.groups * K * sizeof(double))) : nullptr;
}

// Plans wgrad for so many blocks at once, and calls body(parameters, integral_constant of Taps, blocks, bytes of shared
// memory). `taken` counters are another's.
template <class Op, class Body>
void with_wgrad(const Conv& conv, const Gradient& dy, const Activation& x, const WeightGrad& dweight, void* dbias,
                Workspace& workspace, int64_t blocks, int64_t taken, const Body& body) {
  using S = typename Op::Storage;
  WgradParams<Op> p{GradientSource<Op>(dy, conv.K), ActivationSource<Op>(x, conv.C)};
  p.window = forward_window(conv);
  p.dweight = static_cast<S*>(dweight.data), p.dbias = static_cast<S*>(dbias);
  p.stride_k = dweight.stride_k, p.stride_c = dweight.stride_c;
  p.stride_r = dweight.stride_r, p.stride_s = dweight.stride_s;
  const auto with_taps = [&](auto taps) {
    constexpr int kTaps = decltype(taps)::value;
    plan_wgrad<Op, kTaps>(p, dbias != nullptr, workspace, blocks, taken);
    body(p, taps, p.teams.groups * p.k_tiles * p.c_tiles, shared_bytes<Op, kTaps>(p));
  };
  if (conv.R == 1 && conv.S == 1) return with_taps(std::integral_constant<int, 1>());
  if (conv.R == 3 && conv.S == 3) return with_taps(std::integral_constant<int, 9>());
  throw std::runtime_error("the CUDA kernels have filters of 1x1 and 3x3");
}

}  // namespace fused_preact::cuda
