// The table of the CUDA kernels.
#include "kernels.h"

namespace fused_preact::cuda {

Kernel<decltype(Kernels::forward)> forward;
Kernel<decltype(Kernels::dgrad)> dgrad;
Kernel<decltype(Kernels::wgrad)> wgrad;
Kernel<decltype(Kernels::statistics)> statistics;
Kernel<decltype(Kernels::running)> running;
Kernel<decltype(Kernels::dx)> dx;
Kernel<decltype(Kernels::gradients)> gradients;
Kernel<decltype(Kernels::convert)> convert;
Kernel<decltype(Kernels::join)> join;
Kernel<decltype(Kernels::move)> move;
Kernel<decltype(Kernels::activate)> activate;
Kernel<decltype(Kernels::activate_backward)> activate_backward;

const Kernels& kernels() {
  static constexpr Kernels table{forward, dgrad, wgrad, statistics, running,          dx, gradients, convert,
                                 nullptr, join,  move,  activate,   activate_backward};
  return table;
}

}  // namespace fused_preact::cuda
