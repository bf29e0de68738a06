// Forward and backward of a chain of BN-ReLU-Conv units, over the table of kernels of a device.
//
// docs/design.md states the schedule; fused_preact/schedule.py is the same text for tables written in Python.
#pragma once
#include <optional>
#include <vector>

#include "device.h"
#include "launch.h"

namespace fused_preact {

enum class Shortcut { none, identity, activated, raw };

// What forward and backward have in common. n = training.size() units; of conv and weight there is one more where the
// shortcut is a convolution, the last.
struct Chain {
  ScalarType type;
  std::vector<Conv> conv;
  std::vector<Tensor> weight;
  std::vector<bool> training;
  Shortcut shortcut;

  size_t units() const { return training.size(); }
};

// The parameters of the chain's batch norms; running statistics are read of units that are not training.
struct Norms {
  std::vector<Tensor> weight, bias, running_mean, running_var;
  std::vector<double> eps;
};

struct ForwardResult {
  Tensor y;
  std::vector<Tensor> hidden, rows;
};

// Empty tensors where Needs says no.
struct BackwardResult {
  Tensor dx;
  std::vector<Tensor> dweight, dbias, dbn_weight, dbn_bias;
  Tensor dshortcut_weight;
};

struct Needs {
  bool x;
  std::vector<bool> weight, bias, norm;
  bool shortcut_weight;
};

// The rows of batch norm i of the chain for its input x, which is read where the unit is training.
Tensor norm_rows(const Launch&, const Chain&, const Norms&, size_t i, const Tensor& x);

// x and residual dense NHWC; bias empty or one for each unit; rows those of the first batch norm.
ForwardResult forward(const Launch&, const Chain&, const Norms&, const Tensor& x, std::optional<Tensor> residual,
                      const std::vector<Tensor>& bias, const Tensor& rows);

// x, hidden and dy dense NHWC; hidden and rows as forward gave them.
BackwardResult backward(const Launch&, const Chain&, const Tensor& dy, const Tensor& x,
                        const std::vector<Tensor>& hidden, const std::vector<Tensor>& rows, const Needs&);

}  // namespace fused_preact
