// torch's own convolution (oneDNN, cuDNN), for what the kernels of this package do not take.
#pragma once
#include <array>
#include <optional>

#include "tensors.h"

namespace fused_preact {

// Of any filter, stride, dilation and groups: weight is [K, C / groups, R, S].
struct Convolution : Conv {
  int64_t dilation_h = 1, dilation_w = 1, groups = 1;
};

// Whether the kernels of this package can compute it: 1x1 and 3x3 filters, stride 1 and 2, no groups, no dilation.
bool has_kernel(const Convolution&);

// y = conv(a, weight) + bias. These two throw std::runtime_error where torch cannot compute it, mostly for want of
// memory.
Tensor convolve(const Convolution&, const Tensor& a, const Tensor& weight, const std::optional<Tensor>& bias);

// The gradients of a, of the weight and of a bias, those that are wanted.
std::array<std::optional<Tensor>, 3> convolve_backward(const Convolution&, const Tensor& dy, const Tensor& a,
                                                       const Tensor& weight, const std::array<bool, 3>& wanted);

}  // namespace fused_preact
