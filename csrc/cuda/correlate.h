// The loop that forward and dgrad share: correlation of a source with a filter, as a matrix product a tile.
//
// A block takes a run of tiles and `Columns` output channels. For each tile, and each chunk of the summed channels, it has
//   the strip of source pixels in shared memory (copied while the one before is multiplied; formed in place),
//   the filter's slab [tap][Columns][chunk], loaded once where all chunks have room, else when it changes,
// and multiplies them tap by tap: the strip serves all taps, without im2col. A warp has 32 pixels of the tile; its
// accumulators then pass through its own rows of shared memory, from where the epilogue takes them in pieces of 16 bytes.
// Bytes: source read once a column of blocks (but for the rims that strips share, which come from the L2 cache).
#pragma once
#include "merge.h"
#include "product.h"
#include "source.h"

namespace fused_preact::cuda {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kLogPixels = 7, kWarpPixels = 32;
constexpr int kMostWindows = 4;
constexpr int kMostShared = 99 * 1024;  // of a block, on every architecture
constexpr int kWantShared = 72 * 1024;  // lets three blocks share a multiprocessor of 228 KiB

// Blocks that share a multiprocessor, by their registers.
constexpr int resident_blocks(int columns) { return columns == 16 ? 4 : 3; }

// filter(n, d, r, s), n of N output channels, d of D summed ones.
template <class S>
struct FilterView {
  const S* data;
  int64_t stride_n, stride_d, stride_r, stride_s;
  int N, D;
};

template <class Op, class Source>
struct Correlation {
  using S = typename Op::Storage;
  Source source;
  FilterView<S> filter;
  Window windows[kMostWindows];
  int window_count, columns;  // Columns of blocks
  Runs runs;
  StripLayout strip;
  int chunk, chunks, slab_bytes;  // channels of a chunk
  bool resident;                  // every chunk's slab has a place
  Teams teams;
  uint32_t* counters;

  __host__ __device__ int slabs() const { return resident ? chunks : 1; }
  __host__ __device__ int strips_bytes() const { return 2 * strip.bytes; }
};

template <class S, int Columns>
struct Staging {
  static constexpr int kRows = 16, kLd = Columns + 4;  // 16 bytes spread rows over the banks
  static constexpr int kBytes = kWarps * kRows * kLd * static_cast<int>(sizeof(float));
  static constexpr int kPieces = Columns / kLanes<S>;  // of a pixel
  static constexpr int kPasses = kRows * kPieces / 32;
  static constexpr int kBatch = kPasses < 2 ? kPasses : 2;  // pieces a lane reads ahead
  static_assert(kPieces <= 32 && 32 % kPieces == 0 && kPasses >= 1);
};

// Windows of one convolution, with a common plan for the shared memory of blocks of `Columns` channels.
template <int Columns, class Op, class Source>
size_t shared_bytes(const Correlation<Op, Source>& c) {
  using Rows = Staging<typename Op::Storage, Columns>;
  return c.strips_bytes() + c.slabs() * c.slab_bytes + Rows::kBytes + kWarps * Columns * sizeof(float4);
}

template <int Columns, class Op, class Source>
void lay_out(Correlation<Op, Source>& c, int log_pieces) {
  int pixels = 0, taps = 0;
  for (int i = 0; i < c.window_count; ++i) {
    pixels = maximum(pixels, c.windows[i].strip_pixels());
    taps = maximum(taps, c.windows[i].taps());
  }
  c.strip = StripLayout(log_pieces, pixels, c.source.tensors());
  c.chunk = kLanes<typename Op::Storage> << log_pieces;
  c.chunks = ceil_div(c.filter.D, c.chunk);
  c.slab_bytes = taps * Columns * c.strip.pixel_bytes();
}

// Chooses the chunk, the largest that leaves room for other blocks, and whether the filter stays.
template <int Columns, class Op, class Source>
void plan_shared(Correlation<Op, Source>& c) {
  constexpr int kLeast = 1, kMost = 3;  // pieces of a chunk, as powers of two
  int log_pieces = maximum(log2_ceil(ceil_div(c.filter.D, kLanes<typename Op::Storage>), kMost), kLeast);
  c.resident = false;
  lay_out<Columns>(c, log_pieces);
  while (log_pieces > kLeast && shared_bytes<Columns>(c) > kWantShared) lay_out<Columns>(c, --log_pieces);
  while (shared_bytes<Columns>(c) > kMostShared) {
    bool smaller = false;
    for (int i = 0; i < c.window_count; ++i) smaller |= shrink(c.windows[i]);
    if (!smaller) throw std::runtime_error("the CUDA kernels have no room for a filter of this size");
    lay_out<Columns>(c, log_pieces);
  }
  c.resident = c.window_count == 1;
  if (shared_bytes<Columns>(c) > kWantShared) c.resident = false;
  int64_t tiles = 0;
  for (int i = 0; i < c.window_count; ++i) {
    c.windows[i].first_tile = static_cast<int>(minimum<int64_t>(tiles, INT32_MAX));
    tiles += c.windows[i].tiles();
  }
  c.columns = ceil_div(c.filter.N, Columns);
  c.runs = Runs(tiles, c.columns, static_cast<int64_t>(multiprocessors()) * resident_blocks(Columns));
  c.teams = Teams(c.runs.count());
}

// body(integral_constant of Columns): all channels or 64, and 16 where there would be too few blocks.
template <class Op, class Source, class Body>
void with_columns(const Correlation<Op, Source>& c, const Body& body) {
  int64_t tiles = 0;
  for (int i = 0; i < c.window_count; ++i) tiles += c.windows[i].tiles();
  if (c.filter.N <= 16 || tiles * ceil_div(c.filter.N, 64) < multiprocessors())
    return body(std::integral_constant<int, 16>());
  return body(std::integral_constant<int, 64>());
}

// Loads chunk `chunk` of the filter's columns from n0 on into its slab.
template <int Columns, class Op, class Source>
__device__ __forceinline__ void load_slab(const Correlation<Op, Source>& p, const Window& w, int n0, int chunk,
                                          std::byte* slab) {
  using S = typename Op::Storage;
  const int width = p.chunk, log_width = p.strip.log_pieces + (sizeof(S) == 4 ? 2 : 3);
#pragma unroll 1
  for (int r = 0; r < w.h.taps; ++r)
#pragma unroll 1
    for (int s = 0; s < w.w.taps; ++s) {
      const S* tap = p.filter.data + (w.h.tap0 + r * w.h.tap_step) * p.filter.stride_r +
                     (w.w.tap0 + s * w.w.tap_step) * p.filter.stride_s;
      for (int i = threadIdx.x; i < Columns << log_width; i += kThreads) {
        const int column = i >> log_width, d = i & (width - 1), n = n0 + column, from = chunk * width + d;
        const bool inside = n < p.filter.N && from < p.filter.D;
        reinterpret_cast<S*>(slab + column * p.strip.pixel_bytes())[d] =
            inside ? Op::rounded(tap[n * p.filter.stride_n + from * p.filter.stride_d]) : narrow<S>(0.0f);
      }
      slab += Columns * p.strip.pixel_bytes();
    }
}

// acc += the strip's pixels of this warp times the slab, over `bytes` of each pixel, for blocks of 16 of the first `columns` channels.
template <int Columns, class Op>
__device__ __forceinline__ void multiply_strip(Block (&acc)[2][Columns / 16], const Window& w, const std::byte* strip,
                                               const std::byte* slab, int pixel_bytes, int bytes, int columns) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int at[2][Op::kAddresses];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int i = 0; i < Op::kAddresses; ++i)
      at[m][i] = w.strip_pixel(warp * kWarpPixels + m * 16 + Op::row(lane, i)) * pixel_bytes + Op::byte(lane);
#pragma unroll 1
  for (int r = 0; r < w.h.taps; ++r)
#pragma unroll 1
    for (int s = 0; s < w.w.taps; ++s, slab += Columns * pixel_bytes) {
      const std::byte* tap = strip + (r * w.cols + s) * pixel_bytes;
#pragma unroll 1
      for (int k = 0; k < bytes; k += Op::kStepBytes) {
        typename Op::A a[2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const std::byte* rows[Op::kAddresses];
#pragma unroll
          for (int i = 0; i < Op::kAddresses; ++i) rows[i] = tap + at[m][i] + k;
          Op::load_a(a[m], rows);
        }
#pragma unroll
        for (int n = 0; n < Columns / 16; ++n) {
          if (n * 16 >= columns) break;
          typename Op::B b;
          Op::load_b(b, slab + n * 16 * pixel_bytes + k, pixel_bytes, lane);
#pragma unroll
          for (int m = 0; m < 2; ++m) Op::multiply(acc[m][n], a[m], b);
        }
      }
    }
}

// Hands the accumulators of this warp to the epilogue, in pieces.
template <int Columns, class S, class Epilogue>
__device__ __forceinline__ void finish_tile(const Block (&acc)[2][Columns / 16], const Window& w, const Tile& tile,
                                            int n0, float* staging, Epilogue& epilogue) {
  using Rows = Staging<S, Columns>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int piece = lane % Rows::kPieces, c = n0 + piece * kLanes<S>;
  staging += warp * Rows::kRows * Rows::kLd;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    __syncwarp();
#pragma unroll
    for (int n = 0; n < Columns / 8; ++n) {
      const float (&d)[4] = acc[m][n / 2][n % 2];
      float* to = staging + lane / 4 * Rows::kLd + n * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = {d[0], d[1]};
      *reinterpret_cast<float2*>(to + 8 * Rows::kLd) = {d[2], d[3]};
    }
    __syncwarp();
#pragma unroll 1
    for (int pass = 0; pass < Rows::kPasses; pass += Rows::kBatch) {
      int64_t pixel[Rows::kBatch];
      typename Epilogue::Beside beside[Rows::kBatch];
#pragma unroll
      for (int b = 0; b < Rows::kBatch; ++b) {
        const int row = ((pass + b) * 32 + lane) / Rows::kPieces;
        pixel[b] = w.target_pixel(tile, warp * kWarpPixels + m * 16 + row);
        beside[b] = epilogue.read(pixel[b], c);
      }
#pragma unroll
      for (int b = 0; b < Rows::kBatch; ++b) {
        const int row = ((pass + b) * 32 + lane) / Rows::kPieces;
        float v[kLanes<S>];
#pragma unroll
        for (int i = 0; i < kLanes<S>; i += 4) {
          const float4 four = *reinterpret_cast<const float4*>(staging + row * Rows::kLd + piece * kLanes<S> + i);
          v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
        }
        epilogue.write(v, beside[b], pixel[b], c, m == 0 && pass == 0 && b == 0 ? Rows::kPieces : 0);
      }
    }
  }
}

// The epilogue of a thread. read(pixel, c): what lies beside a piece. write(v, beside, pixel, c, start): the piece, of pixel -1
// outside of the tensor; all lanes of a warp call it together, with start > 0 at the first piece of a tile: so many
// lanes then have different channels. store_sums: those of a warp's tile, for merge_sums by the thread of each channel.
template <int Columns, class Op, class Source, class Epilogue>
__global__ __launch_bounds__(kThreads,
                             resident_blocks(Columns)) void correlate(const __grid_constant__ Correlation<Op, Source> p,
                                                                      const __grid_constant__
                                                                      typename Epilogue::Output output) {
  using S = typename Op::Storage;
  using Rows = Staging<S, Columns>;
  std::byte* const strips = shared_memory();
  std::byte* const slabs = strips + p.strips_bytes();
  float* const staging = reinterpret_cast<float*>(slabs + p.slabs() * p.slab_bytes);
  float4* const sums = reinterpret_cast<float4*>(staging + Rows::kBytes / sizeof(float));

  const int group = blockIdx.x / p.columns, n0 = static_cast<int>(blockIdx.x % p.columns) * Columns;
  const int begin = p.runs.begin(group), end = p.runs.end(group);
  const auto window_of = [&](int t) {
    int i = 0;
    while (i + 1 < p.window_count && t >= p.windows[i + 1].first_tile) ++i;
    return i;
  };
  const auto copy = [&](int t, int chunk, int which) {
    if (t < end) {
      const Window& w = p.windows[window_of(t)];
      const Tile tile = w.tile(t);
      if (w.taps() > 0)
        copy_strip<kThreads>(p.source, chunk * p.chunk, p.strip, strips + which * p.strip.bytes, w.strip_pixels(),
                             [&](int q) { return w.source_pixel(tile, q); });
    }
    cp_async_commit();
  };

  Epilogue epilogue(output);
  Block acc[2][Columns / 16];
  int loaded_window = -1, loaded_chunk = -1;
  // Each step queues the copies of the next chunk, or tile, and multiplies those that the step before it queued.
  for (int t = begin - 1, chunk = p.chunks - 1, which = 1; t < end; which ^= 1) {
    const bool last = chunk == p.chunks - 1;
    const int next_t = last ? t + 1 : t, next_chunk = last ? 0 : chunk + 1;
    copy(next_t, next_chunk, which ^ 1);
    if (t >= begin) {
      const int window = window_of(t);
      const Window& w = p.windows[window];
      const Tile tile = w.tile(t);
      if (window != loaded_window || (!p.resident && chunk != loaded_chunk)) {
        for (int i = 0; i < p.slabs(); ++i)
          load_slab<Columns>(p, w, n0, p.resident ? i : chunk, slabs + i * p.slab_bytes);
        loaded_window = window, loaded_chunk = chunk;
      }
      cp_async_wait<1>();
      std::byte* const strip = strips + which * p.strip.bytes;
      if (w.taps() > 0)
        form_strip<kThreads>(p.source, chunk * p.chunk, p.strip, strip, w.strip_pixels(),
                             [&](int q) { return w.source_pixel(tile, q); });
      if (chunk == 0) clear(acc[0]), clear(acc[1]);
      __syncthreads();
      const int depth = minimum(p.filter.D - chunk * p.chunk, p.chunk) * static_cast<int>(sizeof(S));
      multiply_strip<Columns, Op>(acc, w, strip, slabs + (p.resident ? chunk : 0) * p.slab_bytes, p.strip.pixel_bytes(),
                                  depth, p.filter.N - n0);
      __syncthreads();
      if (last) {
        finish_tile<Columns, S>(acc, w, tile, n0, staging, epilogue);
        if (output.has_sums()) {
          epilogue.store_sums(sums + threadIdx.x / 32 * Columns, threadIdx.x % 32, Rows::kPieces);
          __syncthreads();
          if (threadIdx.x < Columns)
            for (int warp = 0; warp < kWarps; ++warp) epilogue.merge_sums(sums[warp * Columns + threadIdx.x]);
        }
      }
    }
    t = next_t, chunk = next_chunk;
  }
  if (!output.has_sums()) return;
  const int n = n0 + threadIdx.x;
  if (threadIdx.x < Columns && n < p.filter.N) epilogue.write_slot(group, n);
  merge_groups(p.counters + n0 / Columns * p.teams.counters(), p.teams, group,
               [&](int first, int count, int step, bool finish) {
                 output.merge(n0, minimum(n0 + Columns, p.filter.N), first, count, step, finish);
               });
}

// Plans and launches; output(teams) makes what the epilogue is given.
template <class Epilogue, class Op, class Source, class MakeOutput>
void launch_correlate(Correlation<Op, Source>& c, const Workspace& workspace, const MakeOutput& output) {
  with_columns(c, [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    plan_shared<kColumns>(c);
    c.counters = take_counters(workspace, c.teams, c.columns);
    launch(correlate<kColumns, Op, Source, Epilogue>, c.teams.groups * c.columns, kThreads, shared_bytes<kColumns>(c),
           static_cast<cudaStream_t>(workspace.stream), c, output(c.teams));
  });
}

}  // namespace fused_preact::cuda
