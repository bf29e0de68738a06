// The table of this instruction set's kernels.
#include "../kernels.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

void forward(const Conv&, Dtype, const Activation&, const Weight&, const void*, const void*, void*, const Affine&,
             void*, Workspace&);
void dgrad(const Conv&, Dtype, const Gradient&, const Weight&, const Activation&, const void*, void*, const NormGrad&,
           Workspace&);
void wgrad(const Conv&, Dtype, const Gradient&, const Activation&, const WeightGrad&, void*, Workspace&);
void gradients(const Conv&, Dtype, const Gradient&, const Weight&, const Activation&, const void*, void*,
               const NormGrad&, const WeightGrad&, void*, Workspace&);
void statistics(Dtype, int64_t, int64_t, const void*, const Affine&, void*, Workspace&);
void running(Dtype, int64_t, const void*, const void*, const Affine&, void*, Workspace&);
void dx(Dtype, int64_t, int64_t, const Gradient&, const void*, void*, Workspace&);
void convert(Dtype, Dtype, const Conversion*, int64_t, Workspace&);
void permute(int64_t, int64_t, int64_t, int64_t, const void*, void*, Workspace&);
void join(Dtype, int64_t, int64_t, const void*, const Gradient&, bool, void*, void*, const Affine&, void*, Workspace&);

const Kernels& kernels() {
  static constexpr Kernels table{forward,   dgrad,   wgrad,   statistics, running, dx,
                                 gradients, convert, permute, join,       nullptr};
  return table;
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
