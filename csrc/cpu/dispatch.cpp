#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "pool.h"
#include "workspace.h"

namespace fused_preact::cpu {

namespace {

// Whether this machine runs what was compiled with the flags of the same name in build_backend/toolchain.py. The
// builtin also asks the operating system whether it saves the wide registers.
#if defined(__x86_64__)
[[maybe_unused]] bool supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

[[maybe_unused]] bool supports_avx512_bf16() { return supports_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The processor's word for matrices of bf16, and the system's, which a process has to ask for leave to use them. From
// then on a signal stack of one of its threads must have room for them too.
[[maybe_unused]] bool supports_amx_bf16() {
  constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;
  constexpr long kTileData = 18, kAskForLeave = 0x1023;
  unsigned a, b, c, d;
  if (!supports_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kTiles | kBf16)) != 0) return false;
  return syscall(SYS_arch_prctl, kAskForLeave, kTileData) == 0;
}

[[maybe_unused]] bool supports_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

bool supports_baseline() { return true; }

}  // namespace

// The build gives the list of what it compiled: ISA(avx2) ISA(baseline), for example.
#define ISA(name)           \
  namespace name {          \
  const Kernels& kernels(); \
  }
FUSED_PREACT_ISAS
#undef ISA

const std::vector<InstructionSet>& instruction_sets() {
#define ISA(name) {#name, supports_##name(), name::kernels},
  static const std::vector<InstructionSet> sets = {FUSED_PREACT_ISAS};
#undef ISA
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
  const std::shared_ptr<void> not_owned;
  return {chosen().load()->kernels(), {not_owned, &scratch()}, &TensorPool::instance(), INT64_MAX};
}

}  // namespace fused_preact::cpu
