#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "workspace.h"

namespace fused_preact::cpu {

#if defined(__x86_64__)
namespace avx512_bf16 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
#endif
namespace baseline {
const Kernels& kernels();
}

const std::vector<InstructionSet>& instruction_sets() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
  static const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                 __builtin_cpu_supports("fma");
#endif
  static const std::vector<InstructionSet> sets = {
#if defined(__x86_64__)
      {"avx512_bf16", has_avx512 && __builtin_cpu_supports("avx512bf16"), avx512_bf16::kernels},
      {"avx512", has_avx512, avx512::kernels},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       avx2::kernels},
#endif
      {"baseline", true, baseline::kernels},
  };
  return sets;
}

namespace {

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set = &*std::find_if(
      instruction_sets().begin(), instruction_sets().end(), [](const InstructionSet& set) { return set.supported; });
  return set;
}

}  // namespace

const char* isa() { return chosen().load()->name; }

void set_isa(const std::string& name) {
  std::string usable;
  for (const InstructionSet& set : instruction_sets()) {
    if (!set.supported) continue;
    if (set.name == name) {
      chosen() = &set;
      return;
    }
    usable += (usable.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::runtime_error("instruction set: expected one that is built and that this processor has (" + usable +
                           "), got \"" + name + "\"");
}

Device device() {
  return {chosen().load()->kernels(), scratch(),
          [](void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }};
}

}  // namespace fused_preact::cpu
