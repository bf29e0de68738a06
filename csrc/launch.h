// The table of kernels on tensors: the same functions, which allocate their results. A convolution that the kernels do
// not take is torch's, between what they do around theirs (library.cpp).
#pragma once
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "convolution.h"
#include "device.h"
#include "tensors.h"

namespace fused_preact {

// What serves tensors on the device of x.
Device device_of(const Tensor& x);

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

// Activations are dense NHWC, rows and Affine in the accumulation type, all of one device. Of no image sums are zero,
// but `statistics` expects one at least. `batch`: the batch norm of x used the statistics of the batch.
class Launch {
 public:
  struct Activation {
    Tensor x;
    std::optional<Tensor> norm;
  };
  struct Gradient {
    Tensor g;
    std::optional<Tensor> x{}, norm{}, grad{};
    std::optional<Tensor> dgamma{}, dbeta{};  // of the batch norm, in the accumulation type
  };
  struct Affine {
    Tensor gamma, beta;
    double eps;
  };

  // tf32: float32 may be multiplied as TF32, where the device has that.
  Launch(const Device& device, ScalarType type, bool tf32)
      : device_(device), type_(type), dtype_(tf32 && type == ScalarType::Float ? Dtype::tf32 : kernel_dtype(type)) {}

  // y, and the rows of `next` where there is one.
  std::pair<Tensor, std::optional<Tensor>> forward(const Convolution&, const Activation&, const Tensor& weight,
                                                   const std::optional<Tensor>& bias,
                                                   const std::optional<Tensor>& residual,
                                                   const std::optional<Affine>& next) const;

  struct WeightGradient {
    Tensor dweight;
    std::optional<Tensor> dbias;
  };
  struct Gradients {
    std::optional<Gradient> of_x;  // dz with what forms the gradient of x from it; where x has no norm, that itself
    std::optional<WeightGradient> of_weight;
  };
  // wanted: the gradient of x, that of the weight, and with it that of a bias.
  Gradients gradients(const Convolution&, const Gradient& dy, const Tensor& weight, const Activation& x,
                      const std::optional<Tensor>& add, bool batch, const std::array<bool, 3>& wanted) const;
  Tensor statistics(const Tensor& x, const Affine& next) const;
  Tensor running(const Tensor& mean, const Tensor& variance, const Affine& next) const;
  // Puts a copy of the type in place of each tensor that has another.
  void convert(const std::vector<Tensor*>& tensors, ScalarType type) const;
  // Overwrites dy.g.
  Tensor dx(const Gradient& dy, const std::optional<Tensor>& add) const;

  struct Joined {
    Tensor stream;
    std::optional<Tensor> narrowed, rows;
  };
  // stream + branch, or minus it, in float32 as the stream is, of a branch of 16 bits; with `narrow` also that in the
  // type of the kernels; with `next`, which implies it and a branch without a norm, also the rows of that batch norm.
  Joined join(const Tensor& stream, const Gradient& branch, bool subtract, bool narrow,
              const std::optional<Affine>& next) const;

  // x in dense NHWC: itself, or a copy.
  Tensor dense_nhwc(const Tensor& x) const;
  // y, which is dense NHWC, in the layout that results have for an input x: channels_last where x is, else contiguous.
  Tensor laid_out_like(const Tensor& x, const Tensor& y) const;

 private:
  // Uninitialised, but for sums over no image.
  Gradient empty_dgrad(const Conv&, const Activation& x, bool batch) const;
  Gradient with_norm(const Tensor& dz, const Activation& x, bool batch) const;  // what its batch norm gets beside dz
  WeightGradient empty_wgrad(const Conv&, const Tensor& weight, bool need_bias) const;
  Tensor empty_rows(const Tensor& like, int64_t rows, int64_t C) const;
  void permute(const Tensor& from, int64_t rows, int64_t columns, const Tensor& to) const;

  // Whether the kernels take it: 1x1 and 3x3 filters, stride 1 and 2, and no more products than the device says.
  bool takes(const Convolution&) const;
  // What the public functions do of a convolution that is torch's.
  std::pair<Tensor, std::optional<Tensor>> library_forward(const Convolution&, const Activation&, const Tensor& weight,
                                                           const std::optional<Tensor>& bias,
                                                           const std::optional<Tensor>& residual,
                                                           const std::optional<Affine>& next) const;
  Gradients library_gradients(const Convolution&, const Gradient& dy, const Tensor& weight, const Activation& x,
                              const std::optional<Tensor>& add, bool batch, const std::array<bool, 3>& wanted) const;
  // a of x; x itself where it has no norm.
  Tensor activate(const Activation& x) const;
  // The gradient of x from da, and those of its batch norm. Overwrites da.
  Gradient activate_backward(const Tensor& da, const Activation& x, bool batch) const;
  // What comes of da + add, the gradient of the activation: that of x, which it is itself where x has no norm.
  // Overwrites da.
  Gradient behind_product(const Tensor& da, const Activation& x, const std::optional<Tensor>& add, bool batch) const;

  Device device_;
  ScalarType type_;
  Dtype dtype_;
};

}  // namespace fused_preact
