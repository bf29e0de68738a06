#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <stdexcept>
#include <string>

namespace fused_preact {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;

namespace {

constexpr size_t kLeastPooled = size_t{2} << 10;  // malloc is as fast with what is smaller

// The C function behind torch.empty_strided: a third of the time that the dispatcher takes.
Tensor empty_strided(const Tensor& like, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, int32_t dtype) {
  AtenTensorHandle handle;
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  if (aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device, like.get_device_index(),
                               &handle) == TORCH_SUCCESS)
    return Tensor(handle);
  std::string shape;
  for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  throw std::runtime_error("out of memory: torch could not allocate a tensor of shape (" + shape +
                           "); its own message stands on stderr");
}

int32_t shim_dtype(ScalarType dtype) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)); }

// Whether x fills its memory in the order of `dims`, outermost first. The stride of a dimension of size 1 says nothing.
bool is_dense(const Tensor& x, const std::array<int, 4>& dims) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  for (int i = 3; i >= 0; --i) {
    const int64_t size = sizes[dims[i]];
    if (size != 1 && strides[dims[i]] != expected) return false;
    expected *= size;
  }
  return true;
}

constexpr std::array<int, 4> kNchw = {0, 1, 2, 3}, kNhwc = {0, 2, 3, 1};

template <class Pointer>
Filter<Pointer> filter_of(Pointer data, const Tensor& weight) {
  const auto strides = weight.strides();
  return {data, strides[0], strides[1], strides[2], strides[3]};
}

Tensor empty_pooled(const Tensor& like, ScalarType type, const std::array<int64_t, 4>& sizes,
                    const std::array<int64_t, 4>& strides, Pool* pool) {
  const size_t bytes = sizes[0] * sizes[1] * sizes[2] * sizes[3] * element_size(type);
  if (pool == nullptr || bytes < kLeastPooled)
    return empty_strided(like, {sizes.data(), 4}, {strides.data(), 4}, shim_dtype(type));
  return torch::stable::from_blob(pool->take(bytes), {sizes.data(), 4}, {strides.data(), 4}, like.device(), type,
                                  [pool, bytes](void* data) { pool->give_back(data, bytes); });
}

}  // namespace

ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

size_t element_size(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

Dtype kernel_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::Double:
      return Dtype::f64;
    default:
      throw std::runtime_error(std::string("x: expected a floating-point tensor, got ") +
                               torch::headeronly::toString(type));
  }
}

Tensor empty_nhwc(const Tensor& like, ScalarType type, int64_t N, int64_t C, int64_t H, int64_t W, Pool* pool) {
  return empty_pooled(like, type, {N, C, H, W}, {H * W * C, 1, W * C, C}, pool);
}

Tensor empty_nchw(const Tensor& like, ScalarType type, int64_t N, int64_t C, int64_t H, int64_t W, Pool* pool) {
  return empty_pooled(like, type, {N, C, H, W}, {C * H * W, H * W, W, 1}, pool);
}

Tensor empty(const Tensor& like, ScalarType type, std::initializer_list<int64_t> sizes) {
  std::array<int64_t, 4> strides;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes.begin()[i]) strides[i] = stride;
  return empty_strided(like, {sizes.begin(), sizes.size()}, {strides.data(), sizes.size()}, shim_dtype(type));
}

std::optional<Tensor> empty_alike(const Tensor& x, ScalarType type, Pool* pool) {
  if (x.dim() != 4 || !(is_nchw(x) || is_nhwc(x))) return std::nullopt;
  const auto sizes = x.sizes(), strides = x.strides();
  return empty_pooled(x, type, {sizes[0], sizes[1], sizes[2], sizes[3]},
                      {strides[0], strides[1], strides[2], strides[3]}, pool);
}

Tensor empty_gradient(const Tensor& weight, Pool* pool) {
  const std::optional<Tensor> alike = empty_alike(weight, weight.scalar_type(), pool);
  return alike ? *alike : torch::stable::empty_like(weight);
}

bool is_nhwc(const Tensor& x) { return is_dense(x, kNhwc); }

bool is_nchw(const Tensor& x) { return is_dense(x, kNchw); }

Tensor dense_nhwc(const Tensor& x) { return is_nhwc(x) ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast); }

Tensor convert(const Tensor& x, ScalarType type) { return x.scalar_type() == type ? x : torch::stable::to(x, type); }

Tensor negative(const Tensor& x) { return torch::stable::subtract(x, x, 2); }  // exact

Tensor contiguous(const Tensor& x, ScalarType type) {
  const Tensor typed = convert(x, type);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

Weight filter(const Tensor& weight) { return filter_of<const void*>(weight.const_data_ptr(), weight); }

WeightGrad filter_gradient(const Tensor& dweight) { return filter_of<void*>(dweight.mutable_data_ptr(), dweight); }

}  // namespace fused_preact
