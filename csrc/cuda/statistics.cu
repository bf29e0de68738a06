// statistics: the batch norm rows of a tensor whose producer could not supply them. running: those of given statistics.
//
// Layout: x [pixels][C]. One block is a run of pixels of up to 32 pieces of channels: a thread has one piece of every
// n-th pixel, and reads four of them ahead. The last block merges (merge.h). Of running one thread is one channel.
// Bytes: x read once; of running, four rows read and five written once.
#include "product.h"
#include "statistics.h"

namespace fused_preact::cuda {

namespace {

template <class S>
struct StatisticsParams {
  const S* x;
  bool aligned;
  Summed<MomentSlots> summed;
};

template <class S>
__global__ __launch_bounds__(kPieceThreads,
                             kBlocks) void statistics_kernel(const __grid_constant__ StatisticsParams<S> p) {
  take_turn();
  constexpr int L = kLanes<S>, kAhead = 4;
  const int C = static_cast<int>(p.summed.slots.C), c = p.summed.grid.piece() * L;
  sum_moments<S, kAhead>(
      p.summed, [&](int64_t pixel) { return load_piece(p.x + pixel * C, c, C, p.aligned); },
      [&](float (&v)[L], int64_t, uint4 piece) { unpack<S>(v, piece); });
}

struct RunningParams {
  const float* mean;
  const float* variance;
  Affine next;
  float* rows;
  int64_t C;
};

__global__ __launch_bounds__(kPieceThreads) void running_kernel(const __grid_constant__ RunningParams p) {
  take_turn();
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kPieceThreads + threadIdx.x;
  if (c >= p.C) return;
  write_norm_rows(p.rows, p.C, c, p.mean[c], p.variance[c], p.variance[c], p.next.eps,
                  static_cast<const float*>(p.next.gamma)[c], static_cast<const float*>(p.next.beta)[c]);
}

}  // namespace

void statistics(Dtype dtype, int64_t pixels, int64_t C, const void* x, const Affine& next, void* rows,
                Workspace& workspace) {
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    constexpr int kPixelsAThread = 8;
    const PieceGrid grid = PieceGrid::of(s, pixels, C, kPixelsAThread);
    const StatisticsParams<S> p{static_cast<const S*>(x), C % kLanes<S> == 0 && are_aligned(x),
                                summed_moments(s, grid, C, next, rows, workspace)};
    launch(statistics_kernel<S>, grid.blocks(), kPieceThreads, p.summed.shared_bytes(s), workspace.stream, p);
  });
}

void running(Dtype, int64_t C, const void* mean, const void* variance, const Affine& next, void* rows,
             Workspace& workspace) {
  const RunningParams p{static_cast<const float*>(mean), static_cast<const float*>(variance), next,
                        static_cast<float*>(rows), C};
  launch(running_kernel, static_cast<unsigned>(ceil_div<int64_t>(C, kPieceThreads)), kPieceThreads, 0, workspace.stream,
         p);
}

}  // namespace fused_preact::cuda
