// What the schedule needs of a device besides its kernels.
#pragma once
#include <memory>

#include "kernels.h"

namespace fused_preact {

// A workspace that serves one kernel call after the other.
struct Scratch : Workspace {
  // Everything taken may be handed out again, to work that is queued later.
  virtual void release() = 0;

 protected:
  ~Scratch() = default;
};

struct Device {
  const Kernels& kernels;
  std::shared_ptr<Scratch> scratch;
  void (*copy)(void* to, const void* from, size_t bytes, void* stream);
};

}  // namespace fused_preact
