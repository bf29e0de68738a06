// What the schedule needs of a device besides its kernels.
#pragma once
#include <memory>

#include "kernels.h"

namespace fused_preact {

// A workspace that serves one kernel call after the other.
struct Scratch : Workspace {
  // Everything taken may be handed out again, to work that is queued later.
  virtual void release() noexcept = 0;

 protected:
  ~Scratch() = default;
};

// Memory of tensors that outlast a kernel call.
struct Pool {
  virtual void* take(size_t bytes) = 0;  // 64-byte aligned, uninitialised
  virtual void give_back(void* data, size_t bytes) noexcept = 0;

 protected:
  ~Pool() = default;
};

struct Device {
  const Kernels& kernels;
  std::shared_ptr<Scratch> scratch;
  Pool* pool;             // null where torch's own allocator serves
  int64_t most_products;  // multiply-adds an image: of a heavier convolution the kernels are slower than torch's
};

}  // namespace fused_preact
