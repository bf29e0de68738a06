// The loop that forward and dgrad share: correlation of a source with a filter, as a matrix product a tile.
//
// A block takes a run of tiles and `Columns` output channels. For each tile, and each chunk of
// the summed channels, it has
//   the strip of source pixels in shared memory (copied while the one before is multiplied; formed in place), by a
//   table of where its pixels lie, made once a tile,
//   the filter's slab [tap][column][chunk], loaded once where all chunks have room, else when it changes,
// and multiplies them tap by tap: the strip serves all taps, without im2col. A warp has 32 pixels of the
// tile; its accumulators then pass through its own rows of shared memory, from where the epilogue takes
// them in pieces of 16 bytes.
// Bytes: source read once a column of blocks (but for the rims that strips share, which come from the L2 cache).
#pragma once
#include "correlation.h"

namespace fused_preact::cuda {

// acc += the strip's pixels of this warp times the slab, over `bytes` of each pixel, for its `columns` in groups of 16;
// the slab has `tap_bytes` a tap.
template <int Columns, class Op>
__device__ __forceinline__ void multiply_strip(Block (&acc)[2][Columns / 16], const Window& w, const std::byte* strip,
                                               const std::byte* slab, int pixel_bytes, int bytes, int tap_bytes,
                                               int columns) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int at[2][Op::kAddresses];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int i = 0; i < Op::kAddresses; ++i)
      at[m][i] = w.strip_pixel(warp * kWarpPixels + m * 16 + Op::row(lane, i)) * pixel_bytes + Op::byte(lane);
#pragma unroll 1
  for (int r = 0; r < w.h.taps; ++r, strip += w.cols * pixel_bytes)
#pragma unroll 1
    for (int s = 0; s < w.w.taps; ++s, slab += tap_bytes) {
      const std::byte* tap = strip + s * pixel_bytes;
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
          for (int m = 0; m < 2; ++m) Op::multiply_long(acc[m][n], a[m], b);
        }
      }
    }
}

// Hands the accumulators of this warp to the epilogue, in pieces; targets: where the tile's pixels lie
// behind its corner, or -1.
template <int Columns, class S, class Epilogue>
__device__ __forceinline__ void finish_tile(const Block (&acc)[2][Columns / 16], int64_t corner, const int* targets,
                                            int n0, float* staging, Epilogue& epilogue) {
  using Rows = Staging<S, Columns>;
  using Beside = typename Epilogue::Beside;
  constexpr int kBatch = minimum(Rows::kPasses, 64 / static_cast<int>(sizeof(Beside)));  // pieces a lane reads ahead
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int piece = lane % Rows::kPieces, c = n0 + piece * kLanes<S>, channels = epilogue.channels();
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
    for (int pass = 0; pass < Rows::kPasses; pass += kBatch) {
      int64_t at[kBatch];
      Beside beside[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int offset = targets[warp * kWarpPixels + m * 16 + ((pass + b) * 32 + lane) / Rows::kPieces];
        at[b] = offset < 0 ? -1 : corner * channels + static_cast<int64_t>(offset) * channels;
        beside[b] = epilogue.read(at[b], c);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int row = ((pass + b) * 32 + lane) / Rows::kPieces;
        float v[kLanes<S>];
#pragma unroll
        for (int i = 0; i < kLanes<S>; i += 4) {
          const float4 four = *reinterpret_cast<const float4*>(staging + row * Rows::kLd + piece * kLanes<S> + i);
          v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
        }
        epilogue.write(v, beside[b], at[b], c, m == 0 && pass == 0 && b == 0 ? Rows::kPieces : 0);
      }
    }
  }
}

// Queues the copies of the only window's slabs, which stay: they come with the first strip.
template <class Op, class Source>
__device__ __forceinline__ void copy_slabs(const Correlation<Op, Source>& p, int n0, std::byte* slabs) {
  for (int i = 0; i < p.chunks; ++i)
    copy_slab(p.filter, p.slab, p.windows[0], n0, i * p.chunk, slabs + i * p.slab.bytes);
}

// Loads a window's slabs, for columns from n0 on: of every chunk where all have a place, else of this one.
template <class Op, class Source>
__device__ __forceinline__ void load_slabs(const Correlation<Op, Source>& p, const Window& w, int n0, int chunk,
                                           std::byte* slabs) {
  for (int i = 0; i < p.slabs(); ++i) {
    const int first = (p.resident ? i : chunk) * p.chunk;
    if (p.filter.along)
      load_slab<Op, true>(p.filter, p.slab, w, n0, first, slabs + i * p.slab.bytes);
    else
      load_slab<Op, false>(p.filter, p.slab, w, n0, first, slabs + i * p.slab.bytes);
  }
}

// acc += a strip of one chunk times its slab.
template <int Columns, class Op, class Source>
__device__ __forceinline__ void multiply_chunk(Block (&acc)[2][Columns / 16], const Correlation<Op, Source>& p,
                                               const Window& w, int chunk, const std::byte* strip,
                                               const std::byte* slabs) {
  const int depth = minimum(p.filter.D - chunk * p.chunk, p.chunk) * static_cast<int>(sizeof(typename Op::Storage));
  multiply_strip<Columns, Op>(acc, w, strip, slabs + (p.resident ? chunk : 0) * p.slab.bytes, p.strip.pixel_bytes(),
                              depth, p.slab.tap_bytes, p.slab.columns);
}

// Ends a tile: hands it to the epilogue and, behind every kTiles-th of a block and its last, stores the warps' sums, if
// there are any. Whether it has: others read them behind the next barrier. `unstored`: tiles since the last store.
template <int Columns, class Op, class Source, class Epilogue>
__device__ __forceinline__ bool end_tile(const Block (&acc)[2][Columns / 16], const Window& w, int t, bool last, int n0,
                                         const CorrelationMemory<Columns, Op, Source, typename Epilogue::Total>& m,
                                         const typename Epilogue::Output& output, Epilogue& epilogue, int& unstored) {
  using Rows = Staging<typename Op::Storage, Columns>;
  if constexpr (Rows::kTiles == 1) epilogue.restart();
  finish_tile<Columns, typename Op::Storage>(acc, w.target_corner(w.tile(t)), m.targets, n0, m.staging, epilogue);
  const bool stores = output.has_sums() && (++unstored == Rows::kTiles || last);
  if (stores) {
    epilogue.store_sums(m.sums + threadIdx.x / 32 * Columns, threadIdx.x % 32, Rows::kPieces);
    unstored = 0;
  }
  return stores;
}

// Adds the sums of the warps to the totals.
template <int Columns, class Total>
__device__ __forceinline__ void add_sums(const float4* sums, Total* totals) {
  if (threadIdx.x < Columns)
#pragma unroll 1
    for (int warp = 0; warp < kWarps; ++warp) totals[threadIdx.x].add(sums[warp * Columns + threadIdx.x]);
}

// Writes the slot of a group, for columns from n0 on, and merges the groups; staging is room for that.
template <int Columns, class Op, class Source, class Output, class Total>
__device__ __forceinline__ void merge_totals(const Correlation<Op, Source>& p, const Output& output, int group, int n0,
                                             const Total* totals, float* staging) {
  const int n = n0 + threadIdx.x;
  if (threadIdx.x < Columns && n < p.filter.N) output.slots.write(group, n, totals[threadIdx.x]);
  merge_groups(p.counters + n0 / Columns * p.teams.counters(), p.teams, group,
               [&](int first, int count, int step, bool finish) {
                 output.slots.template merge<kThreads>(reinterpret_cast<double*>(staging), n0,
                                                       minimum(n0 + Columns, p.filter.N), first, count, step, finish);
               });
}

// The epilogue of a thread, of tensors with channels() channels. read(at, c): what lies beside the piece at channel c
// of the pixel that begins at value `at`. write(v, beside, at, c, start): the piece, at -1 outside of the tensor; all
// lanes of a warp call it together, with start > 0 at the first of a tile: so many lanes then have different
// channels. Where that has no pixel of the tensor, no other of the warp and the tile has one: a box is full up to
// some line, row and image.
// store_sums: those of what a warp has written since the last, or since restart, for the Total of each channel.
template <int Columns, class Op, class Source, class Epilogue>
__device__ __forceinline__ void correlate_block(const Correlation<Op, Source>& p,
                                                const typename Epilogue::Output& output, int block) {
  using Total = typename Epilogue::Total;
  const CorrelationMemory<Columns, Op, Source, Total> m(p);
  const int group = block / p.columns, n0 = block % p.columns * Columns;
  const int begin = p.runs.begin(group), end = p.runs.end(group);
  const auto index_source = [&](int t) {
    if (t < end) p.index_source(t, m.sources);
  };
  const auto copy = [&](int t, int chunk, int which) {
    if (t < end) p.copy_chunk(t, chunk, which, m.strips, m.sources);
    cp_async_commit();
  };

  Epilogue epilogue(output);
#pragma unroll 1
  for (int t = begin; t < begin + 2; ++t) index_source(t);
  if (threadIdx.x < Columns) m.totals[threadIdx.x] = Total{};
  take_turn();  // what comes before reads shared memory and arguments alone
  Block acc[2][Columns / 16];
  int loaded_window = -1, loaded_chunk = -1, unstored = 0;
  bool stored = false;
  if (!Op::kRounds && p.resident && p.filter.along && begin < end) copy_slabs(p, n0, m.slabs), loaded_window = 0;
  __syncthreads();
  // Each step queues the copies of the next chunk, or tile, and multiplies those that the step before it queued.
  for (int t = begin - 1, chunk = p.chunks - 1, which = 1; t < end; which ^= 1) {
    const bool last = chunk == p.chunks - 1;
    const int next_t = last ? t + 1 : t, next_chunk = last ? 0 : chunk + 1;
    copy(next_t, next_chunk, which ^ 1);
    if (t >= begin) {
      const int window = p.window_of(t);
      const Window& w = p.windows[window];
      const auto rows = p.source.rows(own_channel<Source>(p.strip, chunk * p.chunk));
      if (window != loaded_window || (!p.resident && chunk != loaded_chunk)) {
        load_slabs(p, w, n0, chunk, m.slabs);
        loaded_window = window, loaded_chunk = chunk;
      }
      cp_async_wait<1>();
      std::byte* const strip = m.strips + which * p.strip.bytes;
      if (w.taps() > 0) form_strip(p.source, rows, p.strip, strip, w.strip_pixels(), p.table_of(t, m.sources));
      if (chunk == 0) clear(acc[0]), clear(acc[1]);
      __syncthreads();
      if (stored) add_sums<Columns>(m.sums, m.totals);
      stored = false;
      if (last) {
        w.index_target(w.tile(t), kBoxPixels, m.targets);
        index_source(t + 2);  // in place of that of this tile
      }
      multiply_chunk<Columns>(acc, p, w, chunk, strip, m.slabs);
      __syncthreads();
      if (last) stored = end_tile(acc, w, t, t + 1 == end, n0, m, output, epilogue, unstored);
    }
    t = next_t, chunk = next_chunk;
  }
  if (!output.has_sums()) return;
  __syncthreads();
  add_sums<Columns>(m.sums, m.totals);
  merge_totals<Columns>(p, output, group, n0, m.totals, m.staging);
}

template <int Columns, class Op, class Source, class Epilogue>
__global__ __launch_bounds__(kThreads,
                             resident_blocks(Columns)) void correlate(const __grid_constant__ Correlation<Op, Source> p,
                                                                      const __grid_constant__
                                                                      typename Epilogue::Output output) {
  correlate_block<Columns, Op, Source, Epilogue>(p, output, static_cast<int>(blockIdx.x));
}

// What a launch takes besides the correlation.
template <class Epilogue>
struct Plan {
  typename Epilogue::Output output;
  int blocks;
  size_t shared_bytes;
};

// make_output(teams) makes what the epilogue is given; `blocks` have room at once.
template <int Columns, class Epilogue, class Op, class Source, class MakeOutput>
Plan<Epilogue> plan(Correlation<Op, Source>& c, Workspace& workspace, int64_t blocks, const MakeOutput& make_output) {
  plan_shared<Columns, Epilogue>(c, blocks);
  c.counters = take_counters(workspace, c.teams, c.columns);
  return {make_output(c.teams), c.teams.groups * c.columns, shared_bytes<Columns, Epilogue>(c)};
}

template <class Epilogue, class Op, class Source, class MakeOutput>
void launch_correlate(Correlation<Op, Source>& c, Workspace& workspace, const MakeOutput& make_output) {
  const auto with_columns = [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    const int64_t blocks = static_cast<int64_t>(multiprocessors()) * resident_blocks(kColumns);
    const Plan<Epilogue> of = plan<kColumns, Epilogue>(c, workspace, blocks, make_output);
    launch(correlate<kColumns, Op, Source, Epilogue>, of.blocks, kThreads, of.shared_bytes, workspace.stream, c,
           of.output);
  };
  if (is_narrow(c))
    with_columns(std::integral_constant<int, 16>());
  else
    with_columns(std::integral_constant<int, 64>());
}

}  // namespace fused_preact::cuda
