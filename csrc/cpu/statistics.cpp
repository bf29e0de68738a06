// statistics: the batch norm rows of a tensor whose producer could not supply them. running: those of given statistics.
//
// Layout: x [pixels][C]. One job is a group of tiles (moments.h).
// Bytes: x read once.
#include "moments.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

void statistics(Dtype dtype, int64_t pixels, int64_t C, const void* x, const Affine& next, void* rows,
                Workspace& workspace) {
  with_storage(dtype, [&](auto s) {
    const auto* values = static_cast<const decltype(s)*>(x);
    statistics_of(pixels, C, values, next, rows, workspace,
                  [&](int64_t p, int64_t run, int64_t c, int64_t n) __attribute__((always_inline)) {
                    // The next tile, a part a column: read column by column, it would come line by line.
                    prefetch(values + (p + run) * C + c * run, n * run);
                  });
  });
}

void running(Dtype dtype, int64_t C, const void* mean, const void* variance, const Affine& next, void* rows,
             Workspace&) {
  with_storage(dtype, [&](auto s) {
    using T = Accumulate<decltype(s)>;
    const T* var = static_cast<const T*>(variance);
    for (int64_t c = 0; c < C; ++c)
      norm_rows<T>(static_cast<T*>(rows), C, c, static_cast<const T*>(mean)[c], var[c], var[c], next);
  });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
