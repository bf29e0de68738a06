// What the blocks that multiply have in common, so that those of dgrad and of wgrad may share a launch.
#pragma once
#include "merge.h"
#include "product.h"
#include "source.h"

namespace fused_preact::cuda {

constexpr int kLogPixels = 7;           // of the output pixels of a tile, at most
constexpr int kMostShared = 99 * 1024;  // bytes of a block, on every architecture
constexpr int kWantShared = 72 * 1024;  // lets three blocks share a multiprocessor of 228 KiB

// The output pixels of a convolution, and the pixels of its input that they read.
inline Window forward_window(const Conv& conv) {
  return window(conv.N, Axis::forward(conv.H, conv.P, conv.R, conv.stride_h, conv.pad_h),
                Axis::forward(conv.W, conv.Q, conv.S, conv.stride_w, conv.pad_w), kLogPixels);
}

}  // namespace fused_preact::cuda
