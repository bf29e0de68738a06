// Forward and backward of a run of blocks, each a chain of BN-ReLU-Conv units, over the table of kernels of a device.
//
// docs/design.md states the schedule; fused_preact/schedule.py is the same text for tables written in Python.
#pragma once
#include <optional>
#include <vector>

#include "device.h"
#include "launch.h"

namespace fused_preact {

enum class Shortcut { none, identity, activated, raw };

// What forward keeps for backward: of every block its input and all hidden tensors, but of every 32nd not the first
// of several; the hidden tensors alone where the input can be rebuilt; only the last hidden tensor; or nothing, where
// there will be no backward.
enum class Memory { fast, lean, min, none };
constexpr size_t kRepeating = 32;  // REPEATING in fused_preact/schedule.py

// One block. n = units; of conv and weight there is one more where the shortcut is a convolution, the last.
struct Chain {
  size_t first;  // index of its first unit among those of the stage
  size_t units;
  Shortcut shortcut;
  std::vector<Convolution> conv;
  std::vector<Tensor> weight;  // in the type of the stage
};

// Whether the shortcut is a convolution.
inline bool projects(const Chain& chain) { return chain.conv.size() > chain.units; }

// A run of blocks. Convolutions compute in `type`; what runs from block to block, the stream, has the type of x.
struct Stage {
  ScalarType type;
  Memory memory;
  std::vector<Chain> blocks;
  std::vector<bool> training;  // by unit, as all that follows
  std::vector<Tensor> bias;    // empty, or one for each unit

  size_t units() const { return training.size(); }
  // x itself is always at hand. A later block's input is its output minus its branch where the
  // shortcut is the identity.
  bool keeps_input(size_t block) const;
  bool keeps_hidden(size_t block, size_t unit) const;
  bool needs_y() const { return blocks.size() > 1 && !keeps_input(blocks.size() - 1); }  // that forward returned
  std::optional<Tensor> bias_of(size_t unit) const;
};

// The parameters of the batch norms; running statistics are read of units that are not training.
struct Norms {
  std::vector<Tensor> weight, bias, running_mean, running_var;
  std::vector<double> eps;
};

// kept: by block its input (not of the first) and its hidden tensors, those that the stage keeps.
struct ForwardResult {
  Tensor y;
  std::vector<Tensor> kept, rows;
};

// Which gradients are wanted; shortcut_weight has one value for each block.
struct Needs {
  bool x;
  std::vector<bool> weight, bias, norm, shortcut_weight;
};

// Empty tensors where Needs says no; dbias has one for each bias, dshortcut_weight for each projection.
struct BackwardResult {
  Tensor dx;
  std::vector<Tensor> dweight, dbias, dbn_weight, dbn_bias, dshortcut_weight;
};

// x and residual dense NHWC. A residual is for a stage of one block without a shortcut.
ForwardResult forward(const Launch&, const Stage&, const Norms&, const Tensor& x,
                      const std::optional<Tensor>& residual);

// x, y, kept and dy dense NHWC; kept and rows as forward gave them. y, what forward returned, is read where the last
// block does not keep its input.
BackwardResult backward(const Launch&, const Stage&, const Tensor& dy, const Tensor& x, const std::optional<Tensor>& y,
                        const std::vector<Tensor>& kept, const std::vector<Tensor>& rows, const Needs&);

}  // namespace fused_preact
