// The table of this instruction set's kernels; `move` is the same for all.
#include "../kernels.h"

namespace fused_preact::cpu {

Kernel<decltype(Kernels::move)> move;

namespace FUSED_PREACT_ISA {

Kernel<decltype(Kernels::forward)> forward;
Kernel<decltype(Kernels::dgrad)> dgrad;
Kernel<decltype(Kernels::wgrad)> wgrad;
Kernel<decltype(Kernels::statistics)> statistics;
Kernel<decltype(Kernels::running)> running;
Kernel<decltype(Kernels::dx)> dx;
Kernel<decltype(Kernels::gradients)> gradients;
Kernel<decltype(Kernels::convert)> convert;
Kernel<decltype(Kernels::permute)> permute;
Kernel<decltype(Kernels::join)> join;
Kernel<decltype(Kernels::activate)> activate;
Kernel<decltype(Kernels::activate_backward)> activate_backward;

const Kernels& kernels() {
  static constexpr Kernels table{forward, dgrad, wgrad, statistics, running,          dx, gradients, convert,
                                 permute, join,  move,  activate,   activate_backward};
  return table;
}

}  // namespace FUSED_PREACT_ISA

}  // namespace fused_preact::cpu
