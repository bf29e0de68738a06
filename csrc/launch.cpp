#include "launch.h"

#include <torch/csrc/stable/ops.h>

namespace fused_preact {

namespace {

const void* pointer(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

Activation raw(const Launch::Activation& x) { return {x.x.const_data_ptr(), pointer(x.norm)}; }

Gradient raw(const Launch::Gradient& dy) {
  return {dy.g.const_data_ptr(), pointer(dy.x), pointer(dy.norm), dy.batch ? pointer(dy.grad) : nullptr};
}

Affine raw(const Launch::Affine& affine) {
  return {affine.gamma.const_data_ptr(), affine.beta.const_data_ptr(), affine.eps};
}

// Gives the scratch memory of a kernel call back when the call is over, or has thrown.
class Scope {
 public:
  explicit Scope(Scratch& scratch) : scratch_(scratch) {}
  Scope(const Scope&) = delete;
  ~Scope() { scratch_.release(); }
  operator Workspace&() const { return scratch_; }

 private:
  Scratch& scratch_;
};

int64_t pixels(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

}  // namespace

std::pair<Tensor, std::optional<Tensor>> Launch::forward(const Conv& conv, const Activation& x, const Tensor& weight,
                                                         const std::optional<Tensor>& bias,
                                                         const std::optional<Tensor>& residual,
                                                         const std::optional<Affine>& next) const {
  const Tensor y = empty_nhwc(x.x, type_, conv.N, conv.K, conv.P, conv.Q, device_.pool);
  std::optional<Tensor> rows;
  if (next) rows = empty_rows(x.x, kNormRows, conv.K);
  if (conv.N > 0)
    device_.kernels.forward(conv, dtype_, raw(x), filter(weight), pointer(bias), pointer(residual),
                            y.mutable_data_ptr(), next ? raw(*next) : fused_preact::Affine{nullptr, nullptr, 0},
                            next ? rows->mutable_data_ptr() : nullptr, Scope(*device_.scratch));
  return {y, rows};
}

Launch::Gradient Launch::dgrad(const Conv& conv, const Gradient& dy, const Tensor& weight, const Activation& x,
                               const std::optional<Tensor>& add, bool batch) const {
  const Tensor dz = empty_nhwc(x.x, type_, conv.N, conv.C, conv.H, conv.W, device_.pool);
  Gradient result{dz, std::nullopt, std::nullopt, std::nullopt, false};
  if (x.norm) result = {dz, x.x, x.norm, empty_rows(x.x, kGradRows, conv.C), batch};
  if (conv.N > 0)
    device_.kernels.dgrad(conv, dtype_, raw(dy), filter(weight), raw(x), pointer(add), dz.mutable_data_ptr(),
                          x.norm ? result.grad->mutable_data_ptr() : nullptr, batch, Scope(*device_.scratch));
  else if (x.norm)
    torch::stable::zero_(*result.grad);
  return result;
}

std::pair<Tensor, std::optional<Tensor>> Launch::wgrad(const Conv& conv, const Gradient& dy, const Activation& x,
                                                       const Tensor& weight, bool need_bias) const {
  std::pair<Tensor, std::optional<Tensor>> result{empty_gradient(weight), std::nullopt};
  auto& [dweight, dbias] = result;
  if (need_bias) dbias = empty(weight, type_, {conv.K});
  if (conv.N > 0) {
    device_.kernels.wgrad(conv, dtype_, raw(dy), raw(x), filter_gradient(dweight),
                          need_bias ? dbias->mutable_data_ptr() : nullptr, Scope(*device_.scratch));
  } else {
    torch::stable::zero_(dweight);
    if (need_bias) torch::stable::zero_(*dbias);
  }
  return result;
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

Tensor Launch::dx(const Gradient& dy, const std::optional<Tensor>& add) const {
  const Tensor& dx = dy.g;
  if (dx.numel() > 0)
    device_.kernels.dx(dtype_, pixels(dx), dx.size(1), raw(dy), pointer(add), dx.mutable_data_ptr(),
                       Scope(*device_.scratch));
  return dx;
}

Tensor Launch::row(const Tensor& rows, int64_t row) const {
  const int64_t C = rows.size(1);
  const Tensor result = empty(rows, rows.scalar_type(), {C});
  const size_t bytes = C * rows.element_size();
  device_.copy(result.mutable_data_ptr(), static_cast<const char*>(rows.const_data_ptr()) + row * bytes, bytes,
               device_.scratch->stream);
  return result;
}

Tensor Launch::empty_rows(const Tensor& like, int64_t rows, int64_t C) const {
  return empty(like, accumulation_type(type_), {rows, C});
}

}  // namespace fused_preact
