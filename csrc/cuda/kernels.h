// The table of the CUDA kernels.
#pragma once
#include "../kernels.h"

namespace fused_preact::cuda {

const Kernels& kernels();

}  // namespace fused_preact::cuda
