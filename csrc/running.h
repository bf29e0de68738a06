// The running statistics of batch norms.
#pragma once
#include <optional>

#include "expect.h"

namespace fused_preact {

// What nn.BatchNorm2d does in training: adds one to each count and moves mean[i] and var[i] by `momentum`
// towards the batch's in rows[units[i]], in place. Without momentum the weight is one by the count: the average of all
// batches, of one batch norm. A call that is refused changes nothing.
void update_running(const Tensors& mean, const Tensors& var, const Tensors& counts, const Tensors& rows,
                    const Sizes& units, std::optional<double> momentum);

}  // namespace fused_preact
