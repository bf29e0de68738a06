// Convolutions that the kernels do not take, as they would compute them: torch's own between kernels of batch norm and
// ReLU, with nothing else kept for backward.
#include <torch/csrc/stable/ops.h>

#include "launch.h"

namespace fused_preact {

namespace {

// dweight in the layout that a gradient of `weight` has.
Tensor laid_out_as(const Tensor& weight, const Tensor& dweight, Pool* pool) {
  const auto sizes = weight.sizes(), strides = weight.strides(), others = dweight.strides();
  bool alike = true;
  for (size_t i = 0; i < sizes.size(); ++i) alike &= sizes[i] == 1 || strides[i] == others[i];
  if (alike) return dweight;
  Tensor to = empty_gradient(weight, pool);
  return torch::stable::copy_(to, dweight);
}

}  // namespace

bool Launch::takes(const Convolution& conv) const {
  const double products = double(conv.K) * conv.C * conv.R * conv.S * conv.P * conv.Q;
  return has_kernel(conv) && products <= double(device_.most_products);
}

std::pair<Tensor, std::optional<Tensor>> Launch::library_forward(const Convolution& conv, const Activation& x,
                                                                 const Tensor& weight,
                                                                 const std::optional<Tensor>& bias,
                                                                 const std::optional<Tensor>& residual,
                                                                 const std::optional<Affine>& next) const {
  // Autocast may have given the product another type.
  const Tensor y = dense_nhwc(fused_preact::convert(convolve(conv, activate(x), weight, bias), type_));
  if (residual) dx({y}, residual);
  std::optional<Tensor> rows;
  if (next) rows = statistics(y, *next);
  return {y, rows};
}

Launch::Gradients Launch::library_gradients(const Convolution& conv, const Gradient& dy, const Tensor& weight,
                                            const Activation& x, const std::optional<Tensor>& add, bool batch,
                                            const std::array<bool, 3>& wanted) const {
  // Where no gradient of the weight is wanted, only the shape of x is read.
  const auto [da, dweight, dbias] =
      convolve_backward(conv, dx(dy, std::nullopt), wanted[1] ? activate(x) : x.x, weight, wanted);
  Gradients made;
  if (da) made.of_x = behind_product(*da, x, add, batch);
  if (dweight) made.of_weight = WeightGradient{laid_out_as(weight, *dweight, device_.pool), dbias};
  return made;
}

Launch::Gradient Launch::behind_product(const Tensor& da, const Activation& x, const std::optional<Tensor>& add,
                                        bool batch) const {
  const Tensor sum = dx({dense_nhwc(da)}, add);
  return x.norm ? activate_backward(sum, x, batch) : Gradient{sum};
}

}  // namespace fused_preact
