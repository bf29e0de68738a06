#include "launch.h"

#include <torch/csrc/stable/ops.h>

#include <map>

#include "cpu/dispatch.h"
#if defined(FUSED_PREACT_CUDA)
#include "cuda/device.h"
#endif

namespace fused_preact {

namespace {

const void* pointer(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

Activation raw(const Launch::Activation& x) { return {x.x.const_data_ptr(), pointer(x.norm)}; }

Gradient raw(const Launch::Gradient& dy) {
  return {dy.g.const_data_ptr(), pointer(dy.x), pointer(dy.norm), pointer(dy.grad)};
}

void* mutable_pointer(const std::optional<Tensor>& x) { return x ? x->mutable_data_ptr() : nullptr; }

NormGrad sums(const Launch::Gradient& dz) {
  return {mutable_pointer(dz.dgamma), mutable_pointer(dz.dbeta), mutable_pointer(dz.grad)};
}

Affine raw(const Launch::Affine& affine) {
  return {affine.gamma.const_data_ptr(), affine.beta.const_data_ptr(), affine.eps};
}
Affine raw(const std::optional<Launch::Affine>& affine) { return affine ? raw(*affine) : Affine{}; }

// Sums over no image.
void set_to_zero(std::initializer_list<std::optional<Tensor>> sums) {
  for (std::optional<Tensor> sum : sums)
    if (sum) torch::stable::zero_(*sum);
}

int64_t pixels(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

}  // namespace

Device device_of([[maybe_unused]] const Tensor& x) {
#if defined(FUSED_PREACT_CUDA)
  if (x.is_cuda()) return cuda::device(x);
#endif
  return cpu::device();
}

std::pair<Tensor, std::optional<Tensor>> Launch::forward(const Convolution& conv, const Activation& x,
                                                         const Tensor& weight, const std::optional<Tensor>& bias,
                                                         const std::optional<Tensor>& residual,
                                                         const std::optional<Affine>& next) const {
  if (!takes(conv)) return library_forward(conv, x, weight, bias, residual, next);
  const Tensor y = empty_nhwc(x.x, type_, conv.N, conv.K, conv.P, conv.Q, device_.pool);
  std::optional<Tensor> rows;
  if (next) rows = empty_rows(x.x, kNormRows, conv.K);
  if (conv.N > 0)
    device_.kernels.forward(conv, dtype_, raw(x), filter(weight), pointer(bias), pointer(residual),
                            y.mutable_data_ptr(), raw(next), mutable_pointer(rows), Scope(*device_.scratch));
  return {y, rows};
}

Launch::Gradients Launch::gradients(const Convolution& conv, const Gradient& dy, const Tensor& weight,
                                    const Activation& x, const std::optional<Tensor>& add, bool batch,
                                    const std::array<bool, 3>& wanted) const {
  if (!takes(conv)) return library_gradients(conv, dy, weight, x, add, batch, wanted);
  const auto [need_x, need_weight, need_bias] = wanted;
  Gradients made;
  if (need_x) made.of_x = empty_dgrad(conv, x, batch);
  if (need_weight) made.of_weight = empty_wgrad(conv, weight, need_bias);
  if (conv.N == 0) return made;
  const Kernels& kernels = device_.kernels;
  const Scope scope(*device_.scratch);
  if (need_x && need_weight)
    kernels.gradients(conv, dtype_, raw(dy), filter(weight), raw(x), pointer(add), made.of_x->g.mutable_data_ptr(),
                      sums(*made.of_x), filter_gradient(made.of_weight->dweight),
                      mutable_pointer(made.of_weight->dbias), scope);
  else if (need_x)
    kernels.dgrad(conv, dtype_, raw(dy), filter(weight), raw(x), pointer(add), made.of_x->g.mutable_data_ptr(),
                  sums(*made.of_x), scope);
  else if (need_weight)
    kernels.wgrad(conv, dtype_, raw(dy), raw(x), filter_gradient(made.of_weight->dweight),
                  mutable_pointer(made.of_weight->dbias), scope);
  return made;
}

Tensor Launch::statistics(const Tensor& x, const Affine& next) const {
  const Tensor rows = empty_rows(x, kNormRows, x.size(1));
  device_.kernels.statistics(dtype_, pixels(x), x.size(1), x.const_data_ptr(), raw(next), rows.mutable_data_ptr(),
                             Scope(*device_.scratch));
  return rows;
}

Tensor Launch::running(const Tensor& mean, const Tensor& variance, const Affine& next) const {
  const Tensor rows = empty_rows(mean, kNormRows, mean.size(0));
  device_.kernels.running(dtype_, mean.size(0), mean.const_data_ptr(), variance.const_data_ptr(), raw(next),
                          rows.mutable_data_ptr(), Scope(*device_.scratch));
  return rows;
}

void Launch::convert(const std::vector<Tensor*>& tensors, ScalarType type) const {
  std::map<ScalarType, std::vector<Conversion>> batches;  // by the type that tensors have
  std::vector<Tensor> sources;                            // live until all is queued
  for (Tensor* tensor : tensors) {
    const ScalarType from = tensor->scalar_type();
    if (from == type) continue;
    const auto served = [&](ScalarType t) {
      return t != ScalarType::Double && (t != ScalarType::Half || !tensor->is_cpu());
    };
    std::optional<Tensor> to;
    if (served(from) && served(type) && tensor->numel() > 0) to = empty_alike(*tensor, type, device_.pool);
    if (to) {
      batches[from].push_back({tensor->const_data_ptr(), to->mutable_data_ptr(), tensor->numel()});
      sources.push_back(std::exchange(*tensor, *to));
    } else {
      *tensor = fused_preact::convert(*tensor, type);
    }
  }
  for (const auto& [from, batch] : batches)
    device_.kernels.convert(kernel_dtype(from), kernel_dtype(type), batch.data(), batch.size(),
                            Scope(*device_.scratch));
}

Tensor Launch::dx(const Gradient& dy, const std::optional<Tensor>& add) const {
  const Tensor& dx = dy.g;
  if (dx.numel() > 0 && (dy.norm || add))
    device_.kernels.dx(dtype_, pixels(dx), dx.size(1), raw(dy), pointer(add), dx.mutable_data_ptr(),
                       Scope(*device_.scratch));
  return dx;
}

Launch::Joined Launch::join(const Tensor& stream, const Gradient& branch, bool subtract, bool narrow,
                            const std::optional<Affine>& next) const {
  const int64_t N = stream.size(0), C = stream.size(1), H = stream.size(2), W = stream.size(3);
  Joined result{empty_nhwc(stream, ScalarType::Float, N, C, H, W, device_.pool), std::nullopt, std::nullopt};
  if (narrow || next) result.narrowed = empty_nhwc(stream, type_, N, C, H, W, device_.pool);
  if (next) result.rows = empty_rows(stream, kNormRows, C);
  if (N > 0)
    device_.kernels.join(dtype_, pixels(stream), C, stream.const_data_ptr(), raw(branch), subtract,
                         result.stream.mutable_data_ptr(), mutable_pointer(result.narrowed), raw(next),
                         mutable_pointer(result.rows), Scope(*device_.scratch));
  return result;
}

Tensor Launch::activate(const Activation& x) const {
  if (!x.norm) return x.x;
  const Tensor a = empty_nhwc(x.x, type_, x.x.size(0), x.x.size(1), x.x.size(2), x.x.size(3), device_.pool);
  if (a.numel() > 0)
    device_.kernels.activate(dtype_, pixels(a), a.size(1), raw(x), a.mutable_data_ptr(), Scope(*device_.scratch));
  return a;
}

Launch::Gradient Launch::activate_backward(const Tensor& da, const Activation& x, bool batch) const {
  const Gradient made = with_norm(da, x, batch);
  if (da.numel() > 0)
    device_.kernels.activate_backward(dtype_, pixels(da), da.size(1), da.const_data_ptr(), raw(x),
                                      da.mutable_data_ptr(), sums(made), Scope(*device_.scratch));
  return {da, std::nullopt, std::nullopt, std::nullopt, made.dgamma, made.dbeta};
}

Tensor Launch::dense_nhwc(const Tensor& x) const {
  if (device_.kernels.permute == nullptr || is_nhwc(x) || !is_nchw(x) || x.numel() == 0)
    return fused_preact::dense_nhwc(x);
  const Tensor to = empty_nhwc(x, x.scalar_type(), x.size(0), x.size(1), x.size(2), x.size(3), device_.pool);
  permute(x, x.size(1), x.size(2) * x.size(3), to);
  return to;
}

Tensor Launch::laid_out_like(const Tensor& x, const Tensor& y) const {
  if (x.stride(1) == 1 && x.size(1) > 1) return y;
  if (device_.kernels.permute == nullptr || is_nchw(y) || y.numel() == 0) return torch::stable::contiguous(y);
  const Tensor to = empty_nchw(y, y.scalar_type(), y.size(0), y.size(1), y.size(2), y.size(3), device_.pool);
  permute(y, y.size(2) * y.size(3), y.size(1), to);
  return to;
}

void Launch::permute(const Tensor& from, int64_t rows, int64_t columns, const Tensor& to) const {
  device_.kernels.permute(element_size(from.scalar_type()), from.size(0), rows, columns, from.const_data_ptr(),
                          to.mutable_data_ptr(), Scope(*device_.scratch));
}

Launch::Gradient Launch::empty_dgrad(const Conv& conv, const Activation& x, bool batch) const {
  const Tensor dz = empty_nhwc(x.x, type_, conv.N, conv.C, conv.H, conv.W, device_.pool);
  return x.norm ? with_norm(dz, x, batch) : Gradient{dz};
}

Launch::Gradient Launch::with_norm(const Tensor& dz, const Activation& x, bool batch) const {
  const int64_t C = dz.size(1);
  const ScalarType type = accumulation_type(type_);
  Gradient result{dz, x.x, x.norm, std::nullopt, empty(dz, type, {C}), empty(dz, type, {C})};
  if (batch) result.grad = empty_rows(dz, kGradRows, C);
  if (dz.numel() == 0) set_to_zero({result.dgamma, result.dbeta, result.grad});
  return result;
}

Launch::WeightGradient Launch::empty_wgrad(const Conv& conv, const Tensor& weight, bool need_bias) const {
  WeightGradient result{empty_gradient(weight, device_.pool), std::nullopt};
  if (need_bias) result.dbias = empty(weight, type_, {conv.K});
  if (conv.N == 0) set_to_zero({result.dweight, result.dbias});
  return result;
}

Tensor Launch::empty_rows(const Tensor& like, int64_t rows, int64_t C) const {
  return empty(like, accumulation_type(type_), {rows, C});
}

}  // namespace fused_preact
