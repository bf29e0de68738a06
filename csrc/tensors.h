// Tensors as the kernels want them: dense NHWC activations, rows in the accumulation type, raw pointers.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "device.h"

namespace fused_preact {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float64 for float64, else float32.
ScalarType accumulation_type(ScalarType);
size_t element_size(ScalarType);  // bytes, of a type that a kernel has
Dtype kernel_dtype(ScalarType);   // throws for a type that no kernel has

// Uninitialised, on the device of `like`: an activation [N, C, H, W] in dense NHWC or NCHW, and a contiguous tensor.
// Where there is a pool, those of four dimensions are taken from it, but for small ones.
Tensor empty_nhwc(const Tensor& like, ScalarType, int64_t N, int64_t C, int64_t H, int64_t W, Pool*);
Tensor empty_nchw(const Tensor& like, ScalarType, int64_t N, int64_t C, int64_t H, int64_t W, Pool*);
Tensor empty(const Tensor& like, ScalarType, std::initializer_list<int64_t> sizes);
// Of the shape and type of `weight`, and of its layout where that is dense, for then autograd keeps it without a copy.
Tensor empty_gradient(const Tensor& weight, Pool*);

// Of the shape and layout of x, a dense tensor of 4 dimensions; nothing where it is none.
std::optional<Tensor> empty_alike(const Tensor& x, ScalarType, Pool*);

// Whether an activation is dense in this order; one of a single channel or pixel may be both.
bool is_nhwc(const Tensor& x);
bool is_nchw(const Tensor& x);

// x itself where it is what is asked for, else a copy.
Tensor dense_nhwc(const Tensor& x);
Tensor contiguous(const Tensor& x, ScalarType);
Tensor convert(const Tensor& x, ScalarType);

Tensor negative(const Tensor& x);  // -x

Weight filter(const Tensor& weight);
WeightGrad filter_gradient(const Tensor& dweight);

}  // namespace fused_preact
