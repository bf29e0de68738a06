// CUDA as the schedule sees it.
#pragma once
#include "../device.h"
#include "../tensors.h"

namespace fused_preact::cuda {

// The kernels, on the device of `like` and torch's current stream there. As long as a copy of the result lives, that
// device is the current one, and scratch memory, which comes from torch's allocator, stays.
Device device(const Tensor& like);

}  // namespace fused_preact::cuda
