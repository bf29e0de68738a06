#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace fused_preact::cpu {

void parallel_for(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace fused_preact::cpu
