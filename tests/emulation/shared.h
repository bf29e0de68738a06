// The shared memory of a block: filled with NaN, with a guard zone behind it.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>

#include "fiber.h"

namespace fused_preact::emulation {

inline constexpr size_t kGuard = 4096;
inline constexpr int kNan = 0xff;  // bytes of it make a NaN in every format, and an integer that is no index

struct Shared {
  explicit Shared(size_t size) : bytes(size), memory(new (kAlignment) std::byte[size + kGuard]) {
    std::memset(memory.get(), kNan, size + kGuard);
#ifdef EMULATION_ASAN
    __asan_poison_memory_region(memory.get() + bytes, kGuard);
#endif
  }
  ~Shared() {
#ifdef EMULATION_ASAN
    __asan_unpoison_memory_region(memory.get() + bytes, kGuard);
#endif
  }
  bool overrun() const {
#ifdef EMULATION_ASAN
    return false;  // would have been reported at once
#else
    const auto* guard = memory.get() + bytes;
    return std::any_of(guard, guard + kGuard, [](std::byte b) { return b != static_cast<std::byte>(kNan); });
#endif
  }
  bool holds(const void* from, size_t size) const {
    const auto* first = static_cast<const std::byte*>(from);
    return first >= memory.get() && first + size <= memory.get() + bytes;
  }

  static constexpr std::align_val_t kAlignment{128};
  struct Delete {
    void operator()(std::byte* p) const { operator delete[](p, kAlignment); }
  };
  size_t bytes;
  std::unique_ptr<std::byte[], Delete> memory;
};

}  // namespace fused_preact::emulation
