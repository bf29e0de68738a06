#include "device.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels.h"

// A torch that was built without CUDA does not have it, and loads this binary all the same.
#pragma weak aoti_torch_get_current_cuda_stream

namespace fused_preact::cuda {

namespace {

// On an H200, in 16 bits and channels_last, convolutions of 2 million took less time than torch's, and those of 38
// million more.
constexpr int64_t kMostProducts = 1 << 23;  // _MOST_CUDA_PRODUCTS in fused_preact/backends.py

constexpr size_t kAlignment = 256, kLeastBytes = size_t{1} << 20;

// One tensor that is cut into pieces, and another one when it is full. All work is queued on one stream, so pieces may
// be handed out again as soon as the kernel that used them is queued, and a tensor may be given back then.
class TensorScratch final : public Scratch {
 public:
  explicit TensorScratch(const Tensor& like) : guard_(like.get_device_index()), like_(like) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  }

  uint32_t* counters() override {
    if (!counters_) {
      counters_ = empty(like_, ScalarType::Int, {kCounters});
      torch::stable::zero_(*counters_);
    }
    return static_cast<uint32_t*>(counters_->mutable_data_ptr());
  }

  void* take(size_t bytes) override {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes_ - used_ < bytes) {
      bytes_ = std::max(bytes, kLeastBytes);
      full_.push_back(std::exchange(block_, empty(like_, ScalarType::Byte, {static_cast<int64_t>(bytes_)})));
      used_ = 0;
    }
    return static_cast<char*>(block_->mutable_data_ptr()) + std::exchange(used_, used_ + bytes);
  }

  void release() noexcept override {
    full_.clear();
    used_ = 0;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Tensor like_;
  std::optional<Tensor> counters_, block_;
  std::vector<std::optional<Tensor>> full_;
  size_t bytes_ = 0, used_ = 0;  // of the block
};

}  // namespace

Device device(const Tensor& like) { return {kernels(), std::make_shared<TensorScratch>(like), nullptr, kMostProducts}; }

}  // namespace fused_preact::cuda
