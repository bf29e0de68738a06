// statistics: the batch norm rows of a tensor whose producer could not supply them. running: those of given statistics.
//
// Layout: x [pixels][C]. One block is a run of pixels of up to 32 pieces of channels: a thread has one piece of every
// n-th pixel, and reads four of them ahead. The last block merges (merge.h).
// Bytes: x read once.
#include "elementwise.h"
#include "moments.h"
#include "product.h"

namespace fused_preact::cuda {

namespace {

constexpr int kWarps = kThreads / 32, kAhead = 4;

template <class S>
struct StatisticsParams {
  const S* x;
  int64_t pixels;
  int C;
  PieceGrid grid;
  bool aligned;
  Teams teams;
  uint32_t* counters;
  MomentSlots slots;
};

template <class S>
__global__ __launch_bounds__(kThreads, kBlocks) void statistics_kernel(const __grid_constant__ StatisticsParams<S> p) {
  constexpr int L = kLanes<S>;
  float4* const shared = reinterpret_cast<float4*>(shared_memory());
  const int group = blockIdx.x / p.grid.columns, column = blockIdx.x % p.grid.columns;
  const int pieces = 1 << p.grid.log_pieces, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = column * pieces * L, c = first + static_cast<int>(threadIdx.x & (pieces - 1)) * L;
  const int64_t begin = p.pixels * group / p.teams.groups, end = p.pixels * (group + 1) / p.teams.groups;
  const int step = kThreads >> p.grid.log_pieces;

  MomentSums<L> sums;
  // Every lane takes as many steps, since they share an origin.
  for (int64_t base = begin; base < end; base += kAhead * step) {
    uint4 piece[kAhead];
    int64_t pixel[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      pixel[i] = base + i * step + (threadIdx.x >> p.grid.log_pieces);
      if (pixel[i] < end) piece[i] = load_piece(p.x + pixel[i] * p.C, c, p.C, p.aligned);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float v[L] = {};
      if (pixel[i] < end) unpack<S>(v, piece[i]);
      if (i == 0) sums.start(v, pixel[i] < end, pieces);
      if (pixel[i] < end) sums.add(v);
    }
  }
  sums.store(shared + warp * pieces * L, lane, pieces);
  __syncthreads();
  for (int i = threadIdx.x; i < pieces * L && first + i < p.C; i += kThreads) {
    Moments moments;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) moments.add(shared[w * pieces * L + i]);
    p.slots.write(group, first + i, moments);
  }
  merge_groups(p.counters + column * p.teams.counters(), p.teams, group,
               [&](int from, int count, int stride, bool finish) {
                 p.slots.template merge<kThreads>(reinterpret_cast<double*>(shared), first,
                                                  minimum(first + pieces * L, p.C), from, count, stride, finish);
               });
}

// For the sums of each warp, then for those that `merge` adds up.
size_t shared_bytes(int channels) { return maximum(kWarps * channels * sizeof(float4), 3 * kThreads * sizeof(double)); }

struct RunningParams {
  const float* mean;
  const float* variance;
  Affine next;
  float* rows;
  int64_t C;
};

__global__ __launch_bounds__(kThreads) void running_kernel(const __grid_constant__ RunningParams p) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= p.C) return;
  write_norm_rows(p.rows, p.C, c, p.mean[c], p.variance[c], p.variance[c], p.next.eps,
                  static_cast<const float*>(p.next.gamma)[c], static_cast<const float*>(p.next.beta)[c]);
}

}  // namespace

void statistics(Dtype dtype, int64_t pixels, int64_t C, const void* x, const Affine& next, void* rows,
                Workspace& workspace) {
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    constexpr int L = kLanes<S>, kPixelsAThread = 8;
    const PieceGrid grid = PieceGrid::of(s, C);
    const int channels = L << grid.log_pieces;  // of a block
    const Teams teams(grid.groups(pixels, kPixelsAThread), MomentSlots::bytes(1, channels));
    StatisticsParams<S> p{static_cast<const S*>(x),
                          pixels,
                          static_cast<int>(C),
                          grid,
                          C % L == 0 && is_aligned(x),
                          teams,
                          take_counters(workspace, teams, grid.columns),
                          MomentSlots(workspace, teams.groups, C, pixels, next, rows)};
    launch(statistics_kernel<S>, teams.groups * grid.columns, kThreads, shared_bytes(channels),
           static_cast<cudaStream_t>(workspace.stream), p);
  });
}

void running(Dtype, int64_t C, const void* mean, const void* variance, const Affine& next, void* rows,
             Workspace& workspace) {
  const RunningParams p{static_cast<const float*>(mean), static_cast<const float*>(variance), next,
                        static_cast<float*>(rows), C};
  launch(running_kernel, static_cast<unsigned>(ceil_div<int64_t>(C, kThreads)), kThreads, 0,
         static_cast<cudaStream_t>(workspace.stream), p);
}

}  // namespace fused_preact::cuda
