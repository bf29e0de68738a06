// The kernel of gemm.cu on raw pointers.
#pragma once

namespace fused_preact::planted {

enum class Bug {
  none,
  no_barrier_after_wait,        // other threads' copies are read before they are there
  no_barrier_before_overwrite,  // the next stage is written while another warp still reads it
  weak_wait,                    // one group more may be under way than the next read bears
  little_shared_memory,         // the launch asks for less than the kernel uses
  divergent_barrier,            // one warp waits once more than the other
  no_fence,                     // a block's sum need not be visible when its arrival is
  first_block_sums_up,          // before the others are there
  no_turn,                      // the launches before may not be over
};

// A launch of a kernel that does nothing, or waits for those before and then does nothing.
void idle(bool takes_turn);

// c, sums [blocks], *total and *arrived as in gemm.cu; everything is on the host.
void gemm(Bug, int M, int N, int K, const void* a, const void* b, float* c, float* sums, unsigned* arrived,
          float* total);

}  // namespace fused_preact::planted
