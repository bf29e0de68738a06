// The gradients of a batch norm, dbeta = sum dz and dgamma = rstd * sum dz*(x - mean), added up in groups of pixels.
#pragma once
#include "wide.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// The two sums of each group, [groups][2][channels padded to whole vectors].
template <class T>
class NormSums {
 public:
  // Zero.
  NormSums(int64_t groups, int64_t C, Workspace& workspace)
      : groups_(groups), C_(C), padded_(ceil_div(C, kLanes<T>) * kLanes<T>) {
    const size_t bytes = groups * size() * sizeof(double);
    sums_ = static_cast<double*>(workspace.take(bytes));
    memset(sums_, 0, bytes);
  }

  // Adds the sums of dz and of dz*(x - mean) of the vector of channels at c, which it settles.
  FUSED_PREACT_INLINE void add(int64_t group, int64_t c, LongSum<T>& dz, LongSum<T>& centered) const {
    double* const to = sums_ + group * size() + c;
    dz.settle();
    centered.settle();
    store_wide(to, load_wide<T>(to) + dz.total);
    store_wide(to + padded_, load_wide<T>(to + padded_) + centered.total);
  }

  // Merges the groups in order, and writes what comes of `count` values a channel of a batch norm of these rows.
  void finish(const T* norm, const NormGrad& grad, double count) const {
    for (int64_t g = 1; g < groups_; ++g)
      for (int64_t i = 0; i < size(); ++i) sums_[i] += sums_[g * size() + i];
    T* const rows = static_cast<T*>(grad.rows);
    for (int64_t c = 0; c < C_; ++c) {
      const double rstd = norm[kRstd * C_ + c], scale = norm[kScale * C_ + c];
      const double dbeta = sums_[c], dgamma = sums_[padded_ + c] * rstd;
      static_cast<T*>(grad.dgamma)[c] = T(dgamma);
      static_cast<T*>(grad.dbeta)[c] = T(dbeta);
      if (rows == nullptr) continue;
      rows[kSlope * C_ + c] = T(-scale * rstd * dgamma / count);
      rows[kOffset * C_ + c] = T(-scale * dbeta / count);
    }
  }

 private:
  int64_t size() const { return 2 * padded_; }

  const int64_t groups_, C_, padded_;
  double* sums_;
};

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
