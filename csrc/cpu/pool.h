// Memory of activations and gradients, which outlasts a kernel call and is kept from step to step.
//
// A net allocates and frees the same tensors every step. The system takes freed ones back and hands out fresh
// pages, which it clears first: half a microsecond per 4 KB, as much as the kernel takes that writes them. Blocks that
// wait here are written again without either.
#pragma once
#include "../device.h"

namespace fused_preact::cpu {

// One for the process. Any thread may take and give back, also while another forks. Blocks of one size are cut from
// slabs. A slab none of whose blocks is in use goes back to the system when another block is given back and its last
// one has waited for longer than kMostIdleSeconds, as in jemalloc; and so do those that have waited longest where more
// bytes wait than kMostIdle times what was ever in use at a time: blocks of all sizes that a step uses one after the
// other are less. Where the system has no more memory for the kernels, all that wait go back to it first. A block in
// use keeps its slab, whose others wait for as long.
class TensorPool final : public Pool {
 public:
  static constexpr int kMostIdleSeconds = 10;
  static constexpr size_t kMostIdle = 2;

  static TensorPool& instance();

  void* take(size_t bytes) override;
  void give_back(void* data, size_t bytes) noexcept override;

  // Gives all slabs back to the system none of whose blocks is in use.
  void drop_idle() noexcept;

 private:
  TensorPool();
  ~TensorPool() = delete;  // tensors may outlive every static object

  struct State;
  State& state_;
};

}  // namespace fused_preact::cpu
