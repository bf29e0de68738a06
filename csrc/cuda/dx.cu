// dx: the gradient of a chain's input, dx = dy + add, with dy formed from dz and x of the first batch norm.
//
// Layout: all [pixels][C]. A block is a run of pixels; one thread has one piece of every n-th of them, so that it reads
// the rows of its channels once; it reads two pixels ahead. dx may be dy.g.
// Bytes: dz, x and add read once, dx written once.
#include "elementwise.h"
#include "product.h"
#include "source.h"

namespace fused_preact::cuda {

namespace {

template <class S>
struct DxParams {
  GradientSource<Elementwise<S>> source;
  const S* add;  // or null
  S* dx;
  PieceGrid grid;
  bool aligned;
};

struct DxPiece {
  uint4 g, x, add;
};

template <class S>
__global__ __launch_bounds__(kPieceThreads, kBlocks) void dx_kernel(const __grid_constant__ DxParams<S> p) {
  take_turn();
  constexpr int L = kLanes<S>, kAhead = 2;
  const int C = p.source.C, c = p.grid.piece() * L;
  const bool forms = p.source.tensors() == 2;
  const auto rows = p.source.rows(c);
  for_each_pixel<kAhead>(
      p.grid,
      [&](int64_t pixel) {
        const int64_t at = pixel * C;
        DxPiece piece{load_piece(p.source.g + at, c, C, p.aligned), {}, {}};
        if (forms) piece.x = load_piece(p.source.x + at, c, C, p.aligned);
        if (p.add != nullptr) piece.add = load_piece(p.add + at, c, C, p.aligned);
        return piece;
      },
      [&](int, int64_t pixel, bool valid, const DxPiece& piece) {
        if (!valid) return;
        float v[L], other[L];
        unpack<S>(v, piece.g);
        unpack<S>(other, piece.x);
        p.source.form(v, other, rows);
        if (p.add != nullptr) {
          unpack<S>(other, piece.add);
#pragma unroll
          for (int j = 0; j < L; ++j) v[j] += other[j];
        }
        store_piece(p.dx + pixel * C, c, C, p.aligned, pack<S>(v));
      });
}

}  // namespace

void dx(Dtype dtype, int64_t pixels, int64_t C, const Gradient& dy, const void* add, void* to, Workspace& workspace) {
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    constexpr int kPixelsAThread = 2;
    const GradientSource<Elementwise<S>> source(dy, C);
    const DxParams<S> p{source, static_cast<const S*>(add), static_cast<S*>(to),
                        PieceGrid::of(s, pixels, C, kPixelsAThread), source.aligned && are_aligned(add, to)};
    launch(dx_kernel<S>, p.grid.blocks(), kPieceThreads, 0, workspace.stream, p);
  });
}

}  // namespace fused_preact::cuda
