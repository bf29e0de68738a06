// dx: the gradient of a chain's input, dx = dy + add, with dy formed from dz and x of the first batch norm.
//
// Layout: all [pixels][C]. One thread has one piece of every n-th pixel, so that it reads the rows of its channels
// once; it reads two pixels ahead. dx may be dy.g.
// Bytes: dz, x and add read once, dx written once.
#include "elementwise.h"
#include "product.h"
#include "source.h"

namespace fused_preact::cuda {

namespace {

constexpr int kAhead = 2;

// In place of a product, of which the source asks the storage type.
template <class S>
struct Elementwise {
  using Storage = S;
};

template <class S>
struct DxParams {
  GradientSource<Elementwise<S>> source;
  const S* add;  // or null
  S* dx;
  int64_t pixels;
  PieceGrid grid;
  bool aligned;
};

template <class S>
__global__ __launch_bounds__(kThreads, kBlocks) void dx_kernel(const __grid_constant__ DxParams<S> p) {
  constexpr int L = kLanes<S>;
  const int C = p.source.C, column = blockIdx.x % p.grid.columns;
  const int c = ((column << p.grid.log_pieces) + static_cast<int>(threadIdx.x & ((1 << p.grid.log_pieces) - 1))) * L;
  const int64_t step = static_cast<int64_t>(gridDim.x / p.grid.columns) * (kThreads >> p.grid.log_pieces);
  const int64_t start = static_cast<int64_t>(blockIdx.x / p.grid.columns) * (kThreads >> p.grid.log_pieces) +
                        (threadIdx.x >> p.grid.log_pieces);
  const bool forms = p.source.tensors() == 2;
  const auto rows = p.source.rows(c);
  for (int64_t first = start; first < p.pixels; first += kAhead * step) {
    uint4 g[kAhead], x[kAhead] = {}, add[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = (first + i * step) * C;
      if (first + i * step >= p.pixels) continue;
      g[i] = load_piece(p.source.g + at, c, C, p.aligned);
      if (forms) x[i] = load_piece(p.source.x + at, c, C, p.aligned);
      if (p.add != nullptr) add[i] = load_piece(p.add + at, c, C, p.aligned);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i * step >= p.pixels) continue;
      float v[L], other[L];
      unpack<S>(v, g[i]);
      unpack<S>(other, x[i]);
      p.source.form(v, other, rows);
      if (p.add != nullptr) {
        unpack<S>(other, add[i]);
#pragma unroll
        for (int j = 0; j < L; ++j) v[j] += other[j];
      }
      store_piece(p.dx + (first + i * step) * C, c, C, p.aligned, pack<S>(v));
    }
  }
}

}  // namespace

void dx(Dtype dtype, int64_t pixels, int64_t C, const Gradient& dy, const void* add, void* to, Workspace& workspace) {
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    const GradientSource<Elementwise<S>> source(dy, C);
    const PieceGrid grid = PieceGrid::of(s, C);
    const DxParams<S> p{source,
                        static_cast<const S*>(add),
                        static_cast<S*>(to),
                        pixels,
                        grid,
                        source.aligned && is_aligned(add) && is_aligned(to)};
    launch(dx_kernel<S>, static_cast<unsigned>(grid.groups(pixels, kAhead) * grid.columns), kThreads, 0,
           static_cast<cudaStream_t>(workspace.stream), p);
  });
}

}  // namespace fused_preact::cuda
