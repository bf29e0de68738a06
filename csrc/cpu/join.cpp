// join: what runs from block to block, the stream, where it is float32 and the convolutions are not: stream + branch or
// stream - branch, the same rounded to the storage type, and the batch norm rows of that.
//
// The branch is formed as dy is (source.h): of a block's backward it is dx.
// Layout: all [pixels][C]. One job is a run of kRunPixels pixels, or with rows a group of tiles (moments.h).
// Bytes: stream and branch (formed: dz and x) read once, joined and narrowed written once.
#include "moments.h"
#include "source.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

template <class S>
void join_of(int64_t pixels, int64_t C, const float* stream, const Gradient& branch, float sign, float* joined,
             S* narrowed, const Affine& next, void* rows, Workspace& workspace) {
  const GradientSource<S> source(branch, C);
  source.with_form([&](const auto& make_form) __attribute__((always_inline)) {
    // Of n channels from c on of `run` pixels from p on.
    const auto write = [=](int64_t p, int64_t run, int64_t c, int64_t n) __attribute__((always_inline)) {
      with_lanes<float>(n, [&](auto lanes) __attribute__((always_inline)) {
        const auto form = make_form(c, lanes);
        for (int64_t at = p * C + c, end = at + run * C; at < end; at += C) {
          const Vec<float> value = load_lanes(stream + at, lanes) + splat(sign) * form(at, lanes);
          store_lanes(joined + at, value, lanes);
          if (narrowed != nullptr) store_lanes(narrowed + at, value, lanes);
        }
      });
    };
    if (rows != nullptr) return statistics_of(pixels, C, narrowed, next, rows, workspace, write);
    for_runs(pixels, [&](int64_t first, int64_t run) {
      for_each_vector<float>(C, [&](int64_t c, int64_t n) __attribute__((always_inline)) { write(first, run, c, n); });
    });
  });
}

}  // namespace

void join(Dtype dtype, int64_t pixels, int64_t C, const void* stream, const Gradient& branch, bool subtract,
          void* joined, void* narrowed, const Affine& next, void* next_rows, Workspace& workspace) {
  if (dtype == Dtype::bf16)
    join_of(pixels, C, static_cast<const float*>(stream), branch, subtract ? -1.0f : 1.0f, static_cast<float*>(joined),
            static_cast<BFloat16*>(narrowed), next, next_rows, workspace);
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
