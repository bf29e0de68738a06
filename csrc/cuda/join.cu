// join: what runs from block to block, the stream, where it is float32 and the convolutions are not: stream + branch or
// stream - branch, the same rounded to the storage type, and the batch norm rows of that.
//
// The branch is formed as dy is (source.h): of a block's backward it is dx.
// Layout: all [pixels][C]. A block is a run of pixels; one thread has one piece of every n-th of them, and reads two
// pixels ahead. With rows the last block merges (merge.h).
// Bytes: stream and branch (formed: dz and x) read once, joined and narrowed written once.
#include "product.h"
#include "source.h"
#include "statistics.h"

namespace fused_preact::cuda {

namespace {

constexpr int kAhead = 2;
// Blocks on a multiprocessor: a pixel has a third more bytes in flight than in dx, and takes as many more registers.
constexpr int kJoinBlocks = 2;

template <class S>
struct JoinParams {
  GradientSource<Elementwise<S>> branch;
  const float* stream;
  float sign;
  float* joined;
  S* narrowed;  // or null
  bool aligned;
};

// What the channels of one piece have at a pixel; of float32 that is two pieces.
struct JoinPiece {
  uint4 g, x, stream[2];
};

// How a thread reads, joins and writes the pixels of channels from c on. Forms: of a branch that may have a norm.
template <bool Forms, class S>
struct Joiner {
  static constexpr int L = kLanes<S>, kHalf = kLanes<float>;
  const JoinParams<S>& p;
  const int c, C = p.branch.C;
  using Rows = typename GradientSource<Elementwise<S>>::Rows;
  const Rows rows = Forms ? p.branch.rows(c) : Rows{};

  __device__ JoinPiece load(int64_t pixel) const {
    const int64_t at = pixel * C;
    JoinPiece piece{load_piece(p.branch.g + at, c, C, p.aligned), {}, {}};
    if (Forms && p.branch.tensors() == 2) piece.x = load_piece(p.branch.x + at, c, C, p.aligned);
#pragma unroll
    for (int i = 0; i < 2; ++i) piece.stream[i] = load_piece(p.stream + at, c + i * kHalf, C, p.aligned);
    return piece;
  }

  // v becomes what is joined, rounded to S.
  __device__ void join(float (&v)[L], int64_t pixel, const JoinPiece& piece) const {
    unpack<S>(v, piece.g);
    if constexpr (Forms) {
      float x[L];
      unpack<S>(x, piece.x);
      p.branch.form(v, x, rows);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float stream[kHalf];
      unpack<float>(stream, piece.stream[i]);
#pragma unroll
      for (int j = 0; j < kHalf; ++j) stream[j] = v[i * kHalf + j] = fmaf(p.sign, v[i * kHalf + j], stream[j]);
      store_piece(p.joined + pixel * C, c + i * kHalf, C, p.aligned, pack<float>(stream));
    }
    if (p.narrowed == nullptr) return;
    const uint4 rounded = pack<S>(v);
    unpack<S>(v, rounded);
    store_piece(p.narrowed + pixel * C, c, C, p.aligned, rounded);
  }
};

template <class S>
__global__ __launch_bounds__(kPieceThreads, kJoinBlocks) void join_kernel(const __grid_constant__ JoinParams<S> p,
                                                                          const __grid_constant__ PieceGrid grid) {
  take_turn();
  const Joiner<true, S> joiner{p, grid.piece() * kLanes<S>};
  for_each_pixel<kAhead>(
      grid, [&](int64_t pixel) { return joiner.load(pixel); },
      [&](int, int64_t pixel, bool valid, const JoinPiece& piece) {
        float v[kLanes<S>];
        if (valid) joiner.join(v, pixel, piece);
      });
}

template <class S>
__global__ __launch_bounds__(kPieceThreads, kJoinBlocks) void join_statistics_kernel(
    const __grid_constant__ JoinParams<S> p, const __grid_constant__ Summed<MomentSlots> summed) {
  take_turn();
  const Joiner<false, S> joiner{p, summed.grid.piece() * kLanes<S>};
  sum_moments<S, kAhead>(
      summed, [&](int64_t pixel) { return joiner.load(pixel); },
      [&](float (&v)[kLanes<S>], int64_t pixel, const JoinPiece& piece) { joiner.join(v, pixel, piece); });
}

template <class S>
void launch_join(S s, int64_t pixels, int64_t C, const float* stream, const Gradient& branch, bool subtract,
                 float* joined, void* narrowed, const Affine& next, void* next_rows, Workspace& workspace) {
  if (next_rows != nullptr && branch.norm != nullptr)
    throw std::runtime_error("join: expected a branch without a norm where next_rows is not null");
  constexpr int kPixelsAThread = 4;
  const GradientSource<Elementwise<S>> source(branch, C);
  const JoinParams<S> p{source,
                        stream,
                        subtract ? -1.0f : 1.0f,
                        joined,
                        static_cast<S*>(narrowed),
                        source.aligned && are_aligned(stream, joined, narrowed)};
  const PieceGrid grid = PieceGrid::of(s, pixels, C, kPixelsAThread, kJoinBlocks);
  if (next_rows == nullptr) return launch(join_kernel<S>, grid.blocks(), kPieceThreads, 0, workspace.stream, p, grid);
  const Summed<MomentSlots> summed = summed_moments(s, grid, C, next, next_rows, workspace);
  launch(join_statistics_kernel<S>, grid.blocks(), kPieceThreads, summed.shared_bytes(s), workspace.stream, p, summed);
}

}  // namespace

void join(Dtype dtype, int64_t pixels, int64_t C, const void* stream, const Gradient& branch, bool subtract,
          void* joined, void* narrowed, const Affine& next, void* next_rows, Workspace& workspace) {
  with_storage(dtype, [&](auto s) {
    if constexpr (sizeof s == 2)
      launch_join(s, pixels, C, static_cast<const float*>(stream), branch, subtract, static_cast<float*>(joined),
                  narrowed, next, next_rows, workspace);
    else
      throw std::runtime_error("join: expected a branch of 16 bits");
  });
}

}  // namespace fused_preact::cuda
