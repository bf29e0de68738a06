// activate: batch norm and ReLU by themselves, a = max(z, 0), for convolutions that are another library's.
// activate_backward: from da the gradients of the batch norm, and dx as dgrad and dx make it.
//
// Layout: all [pixels][C]. A block is a run of pixels; one thread has one piece of every n-th of them. Backward is two
// launches: the first adds up dz and dz*(x - mean), merged by its last block (merge.h), the second turns da into dx. dx
// may be da.
// Bytes: x read once, a written once; da and x read twice, dx written once.
#include "norm_grad.h"
#include "product.h"
#include "source.h"
#include "sums.h"

namespace fused_preact::cuda {

namespace {

template <class S>
struct ActivateParams {
  ActivationSource<Elementwise<S>> source;
  S* a;
  PieceGrid grid;
  bool aligned;
};

template <class S>
__global__ __launch_bounds__(kPieceThreads, kBlocks) void activate_kernel(const __grid_constant__ ActivateParams<S> p) {
  take_turn();
  constexpr int L = kLanes<S>, kAhead = 4;
  const int C = p.source.C, c = p.grid.piece() * L;
  const auto rows = p.source.rows(c);
  for_each_pixel<kAhead>(
      p.grid, [&](int64_t pixel) { return load_piece(p.source.x + pixel * C, c, C, p.aligned); },
      [&](int, int64_t pixel, bool valid, uint4 piece) {
        if (!valid) return;
        float v[L];
        unpack<S>(v, piece);
        p.source.form(v, rows);
        store_piece(p.a + pixel * C, c, C, p.aligned, pack<S>(v));
      });
}

// Blocks of backward on a multiprocessor: a thread has five rows of its channels in registers.
constexpr int kBackwardAhead = 2, kBackwardBlocks = 2;

// What both launches of backward read.
template <class S>
struct MaskedGradient {
  static constexpr int L = kLanes<S>;
  const S* da;
  ActivationSource<Elementwise<S>> x;
  bool aligned;

  struct Piece {
    uint4 da, x;
  };
  __device__ Piece load(int64_t pixel, int c) const {
    const int64_t at = pixel * x.C;
    return {load_piece(da + at, c, x.C, aligned), load_piece(x.x + at, c, x.C, aligned)};
  }
  // dz, and x - mean.
  __device__ void values(float (&dz)[L], float (&centered)[L], const Piece& piece,
                         const typename ActivationSource<Elementwise<S>>::Rows& rows) const {
    unpack<S>(dz, piece.da);
    unpack<S>(centered, piece.x);
#pragma unroll
    for (int i = 0; i < L; ++i) {
      centered[i] -= rows.mean[i];
      if (fmaf(centered[i], rows.scale[i], rows.shift[i]) <= 0.0f) dz[i] = 0;
    }
  }
};

template <class S>
__global__ __launch_bounds__(kPieceThreads,
                             kBackwardBlocks) void norm_grad_kernel(const __grid_constant__ MaskedGradient<S> p,
                                                                    const __grid_constant__ Summed<GradSlots> summed) {
  take_turn();
  constexpr int L = kLanes<S>;
  const int c = summed.grid.piece() * L;
  const auto rows = p.x.rows(c);
  sum_up<S, kBackwardAhead, GradLanes<L>>(
      summed, [&](int64_t pixel) { return p.load(pixel, c); },
      [&](GradLanes<L>& sums, int, int64_t, bool valid, const auto& piece) {
        if (!valid) return;
        float dz[L], centered[L];
        p.values(dz, centered, piece, rows);
        sums.add(dz, centered);
      });
}

// grad: the rows that norm_grad_kernel made, or null.
template <class S>
__global__ __launch_bounds__(kPieceThreads,
                             kBackwardBlocks) void activate_dx_kernel(const __grid_constant__ MaskedGradient<S> p,
                                                                      const __grid_constant__ PieceGrid grid,
                                                                      const float* grad, S* dx) {
  take_turn();
  constexpr int L = kLanes<S>;
  const int C = p.x.C, c = grid.piece() * L;
  const auto rows = p.x.rows(c);
  float slope[L], offset[L];
  load_row(slope, grad != nullptr ? grad + kSlope * C : nullptr, c, C, p.aligned);
  load_row(offset, grad != nullptr ? grad + kOffset * C : nullptr, c, C, p.aligned);
  for_each_pixel<kBackwardAhead>(
      grid, [&](int64_t pixel) { return p.load(pixel, c); },
      [&](int, int64_t pixel, bool valid, const auto& piece) {
        if (!valid) return;
        float v[L], centered[L];
        p.values(v, centered, piece, rows);
#pragma unroll
        for (int i = 0; i < L; ++i) {
          v[i] = fmaf(v[i], rows.scale[i], offset[i]);
          if (grad != nullptr) v[i] = fmaf(centered[i], slope[i], v[i]);
        }
        store_piece(dx + pixel * C, c, C, p.aligned, pack<S>(v));
      });
}

}  // namespace

void activate(Dtype dtype, int64_t pixels, int64_t C, const Activation& x, void* a, Workspace& workspace) {
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    constexpr int kPixelsAThread = 4;
    const ActivationSource<Elementwise<S>> source(x, C);
    const ActivateParams<S> p{source, static_cast<S*>(a), PieceGrid::of(s, pixels, C, kPixelsAThread),
                              source.aligned && are_aligned(a)};
    launch(activate_kernel<S>, p.grid.blocks(), kPieceThreads, 0, workspace.stream, p);
  });
}

void activate_backward(Dtype dtype, int64_t pixels, int64_t C, const void* da, const Activation& x, void* dx,
                       const NormGrad& grad, Workspace& workspace) {
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    constexpr int kPixelsAThread = 4;
    const ActivationSource<Elementwise<S>> source(x, C);
    const MaskedGradient<S> p{static_cast<const S*>(da), source, source.aligned && are_aligned(da, dx, grad.rows)};
    const PieceGrid grid = PieceGrid::of(s, pixels, C, kPixelsAThread, kBackwardBlocks);
    const Summed<GradSlots> summed(s, grid, workspace, [&](int groups) {
      return GradSlots{static_cast<double*>(workspace.take(GradSlots::bytes(groups, C))), source.norm, grad, C,
                       1.0 / static_cast<double>(pixels)};
    });
    launch(norm_grad_kernel<S>, grid.blocks(), kPieceThreads, summed.shared_bytes(s), workspace.stream, p, summed);
    launch(activate_dx_kernel<S>, grid.blocks(), kPieceThreads, 0, workspace.stream, p, grid,
           static_cast<const float*>(grad.rows), static_cast<S*>(dx));
  });
}

}  // namespace fused_preact::cuda
