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

Launch::Gradient Launch::library_dgrad(const Convolution& conv, const Gradient& dy, const Tensor& weight,
                                       const Activation& x, const std::optional<Tensor>& add, bool batch) const {
  const auto [da, dweight, dbias] =
      convolve_backward(conv, dx(dy, std::nullopt), x.x, weight, {true, false, false});  // of x the shape alone is read
  return behind_product(*da, x, add, batch);
}

Launch::WeightGradient Launch::library_wgrad(const Convolution& conv, const Gradient& dy, const Activation& x,
                                             const Tensor& weight, bool need_bias) const {
  const auto [da, dweight, dbias] =
      convolve_backward(conv, dx(dy, std::nullopt), activate(x), weight, {false, true, need_bias});
  return {laid_out_as(weight, *dweight, device_.pool), dbias};
}

std::pair<Launch::Gradient, Launch::WeightGradient> Launch::library_gradients(const Convolution& conv,
                                                                              const Gradient& dy, const Tensor& weight,
                                                                              const Activation& x,
                                                                              const std::optional<Tensor>& add,
                                                                              bool batch, bool need_bias) const {
  const auto [da, dweight, dbias] =
      convolve_backward(conv, dx(dy, std::nullopt), activate(x), weight, {true, true, need_bias});
  return {behind_product(*da, x, add, batch), {laid_out_as(weight, *dweight, device_.pool), dbias}};
}

Launch::Gradient Launch::behind_product(const Tensor& da, const Activation& x, const std::optional<Tensor>& add,
                                        bool batch) const {
  const Tensor sum = dx({dense_nhwc(da)}, add);
  return x.norm ? activate_backward(sum, x, batch) : Gradient{sum};
}

}  // namespace fused_preact
