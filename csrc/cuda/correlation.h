// What the blocks of a correlation (correlate.h) are given, their shared memory, and how a launch is planned.
#pragma once
#include "slab.h"

namespace fused_preact::cuda {

constexpr int kWarpPixels = 32;
constexpr int kBoxPixels = 1 << kLogPixels;
constexpr int kMostWindows = 4;
constexpr int kMostSummed = 64;  // values that a lane sums in float

// Blocks that share a multiprocessor, by their registers.
constexpr int resident_blocks(int columns) { return columns == 16 ? 4 : 3; }

template <class Op, class Source>
struct Correlation {
  using S = typename Op::Storage;
  Source source;
  FilterView<S> filter;
  Window windows[kMostWindows];
  int window_count, columns;  // columns of blocks beside each other
  Runs runs;
  StripLayout strip;
  int strip_pixels;   // of the largest strip
  int chunk, chunks;  // channels of a chunk
  SlabLayout slab;
  bool resident;  // every chunk's slab has a place
  Teams teams;
  uint32_t* counters;

  __host__ __device__ int slabs() const { return resident ? chunks : 1; }
  __host__ __device__ int strips_bytes() const { return 2 * strip.bytes; }
  __host__ __device__ int tables() const { return 2 * strip_pixels + kBoxPixels; }

  // The window that tile t belongs to.
  __device__ int window_of(int t) const {
    int i = 0;
    while (i + 1 < window_count && t >= windows[i + 1].first_tile) ++i;
    return i;
  }
  // Of two tables of where the pixels of a strip lie, that of tile t.
  __device__ int* table_of(int t, int* tables) const { return tables + (t & 1) * strip_pixels; }
  // Fills it.
  __device__ void index_source(int t, int* tables) const {
    const Window& w = windows[window_of(t)];
    w.index_source(w.tile(t), table_of(t, tables));
  }
  // Queues the copies of the tile's strip, of one chunk, to one of two strips.
  __device__ void copy_chunk(int t, int number, int which, std::byte* strips, int* tables) const {
    const Window& w = windows[window_of(t)];
    if (w.taps() > 0)
      copy_strip(source, number * chunk, strip, strips + which * strip.bytes, w.strip_pixels(),
                 w.source_corner(w.tile(t)), table_of(t, tables));
  }
};

template <class S, int Columns>
struct Staging {
  static constexpr int kRows = 16, kLd = Columns + (Columns > 16 ? 8 : 4);  // spreads rows over the banks
  static constexpr int kBytes = kWarps * kRows * kLd * static_cast<int>(sizeof(float));
  static constexpr int kPieces = Columns / kLanes<S>;  // of a pixel
  static constexpr int kPasses = kRows * kPieces / 32;
  // Tiles between two stores of the lanes' sums: a lane has kPieces pieces of a tile. Wide accumulators leave the sums
  // no registers beyond a tile.
  static constexpr int kTiles = Columns > 16 ? 1 : kMostSummed / kPieces;
  static_assert(kPieces <= 32 && 32 % kPieces == 0 && kPasses >= 1);
  static_assert(kBytes >= 3 * kThreads * static_cast<int>(sizeof(double)), "it is also the room of sum_members");
};

// The shared memory of a block.
template <int Columns, class Op, class Source, class Total>
struct CorrelationMemory {
  std::byte* strips;  // two, of a chunk and the next
  std::byte* slabs;
  float* staging;
  float4* sums;   // [warp][column]
  Total* totals;  // each of one thread
  int* targets;
  int* sources;  // two tables, of a tile and the next

  __device__ explicit CorrelationMemory(const Correlation<Op, Source>& p)
      : strips(shared_memory()),
        slabs(strips + p.strips_bytes()),
        staging(reinterpret_cast<float*>(slabs + p.slabs() * p.slab.bytes)),
        sums(reinterpret_cast<float4*>(staging + Staging<typename Op::Storage, Columns>::kBytes / sizeof(float))),
        totals(reinterpret_cast<Total*>(sums + kWarps * Columns)),
        targets(reinterpret_cast<int*>(totals + Columns)),
        sources(targets + kBoxPixels) {}
};

// Its bytes, of a block of `Columns` channels.
template <int Columns, class Epilogue, class Op, class Source>
size_t shared_bytes(const Correlation<Op, Source>& c) {
  using Rows = Staging<typename Op::Storage, Columns>;
  return c.strips_bytes() + c.slabs() * c.slab.bytes + Rows::kBytes +
         Columns * (kWarps * sizeof(float4) + sizeof(typename Epilogue::Total)) + c.tables() * sizeof(int);
}

template <int Columns, class Op, class Source>
void lay_out(Correlation<Op, Source>& c, int log_pieces) {
  int pixels = 0, taps = 0;
  for (int i = 0; i < c.window_count; ++i) {
    pixels = maximum(pixels, c.windows[i].strip_pixels());
    taps = maximum(taps, c.windows[i].taps());
  }
  c.strip = StripLayout(log_pieces, pixels, c.source.tensors());
  c.strip_pixels = pixels;
  c.chunk = kLanes<typename Op::Storage> << log_pieces;
  c.chunks = ceil_div(c.filter.D, c.chunk);
  c.slab = SlabLayout(minimum(ceil_div(c.filter.N, 16) * 16, Columns), taps, c.strip);
}

// Chooses the chunk, the largest that leaves room for other blocks, and whether the filter stays; the tiles in runs
// for so many blocks at once.
template <int Columns, class Epilogue, class Op, class Source>
void plan_shared(Correlation<Op, Source>& c, int64_t blocks) {
  constexpr int kLeast = 1, kMost = 3;  // pieces of a chunk, as powers of two
  int log_pieces = maximum(log2_ceil(ceil_div(c.filter.D, kLanes<typename Op::Storage>), kMost), kLeast);
  c.resident = false;
  lay_out<Columns>(c, log_pieces);
  while (log_pieces > kLeast && shared_bytes<Columns, Epilogue>(c) > kWantShared) lay_out<Columns>(c, --log_pieces);
  while (shared_bytes<Columns, Epilogue>(c) > kMostShared) {
    bool smaller = false;
    for (int i = 0; i < c.window_count; ++i) smaller |= shrink(c.windows[i]);
    if (!smaller) throw std::runtime_error("the CUDA kernels have no room for a filter of this size");
    lay_out<Columns>(c, log_pieces);
  }
  c.resident = c.window_count == 1;
  if (shared_bytes<Columns, Epilogue>(c) > kWantShared) c.resident = false;
  int64_t tiles = 0;
  for (int i = 0; i < c.window_count; ++i) {
    c.windows[i].first_tile = static_cast<int>(minimum<int64_t>(tiles, INT32_MAX));
    tiles += c.windows[i].tiles();
  }
  c.columns = ceil_div(c.filter.N, Columns);
  c.runs = Runs(tiles, c.columns, blocks);
  c.teams = Teams(c.runs.count(), Columns * sizeof(typename Epilogue::Total));
}

// Whether blocks have 16 columns: all channels, or there would be too few blocks. Else they have 64.
template <class Op, class Source>
bool is_narrow(const Correlation<Op, Source>& c) {
  int64_t tiles = 0;
  for (int i = 0; i < c.window_count; ++i) tiles += c.windows[i].tiles();
  return c.filter.N <= 16 || tiles * ceil_div(c.filter.N, 64) < multiprocessors();
}

}  // namespace fused_preact::cuda
