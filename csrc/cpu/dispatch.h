// The instruction sets that the CPU kernels are compiled for, and the one in use.
#pragma once
#include <string>
#include <vector>

#include "../device.h"

namespace fused_preact::cpu {

struct InstructionSet {
  const char* name;
  bool supported;  // by this processor and its operating system
  const Kernels& (*kernels)();
};

// All that were compiled in, the widest first; the last one runs everywhere.
const std::vector<InstructionSet>& instruction_sets();

// The name of the one in use: at load the first that is supported.
const char* isa();

// Uses another one; throws std::runtime_error for a name that is not built or not supported.
// Calls under way keep theirs.
void set_isa(const std::string& name);

// The kernels in use, with the calling thread's scratch memory.
Device device();

}  // namespace fused_preact::cpu
