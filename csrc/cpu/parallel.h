// Threads and memory for the CPU kernels, behind plain functions: a kernel source is compiled once per instruction
// set and must see neither torch nor inline standard code, these are compiled once, for the oldest machine.
#pragma once
#include "../kernels.h"

namespace fused_preact::cpu {

// Calls body(context, begin, end) on disjoint ranges that together are [0, n), on at most as many threads as torch is
// set to use, which round as the calling thread does; returns when all are done, or throws what one of them threw. The
// cut depends on the number of threads: no result may depend on it.
void parallel_for(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context);

// Threads that torch is set to use.
int64_t num_threads();

// Uninitialised memory of the calling thread, 64-byte aligned. It grows, is kept from call to call unless it is large,
// and is valid until the same thread asks again, or its body ends: one call a body.
void* thread_scratch(size_t bytes);

}  // namespace fused_preact::cpu
