#include "convolution.h"

#include <torch/csrc/stable/ops.h>

#include <sstream>
#include <stdexcept>
#include <vector>

namespace fused_preact {

namespace {

using torch::stable::detail::from;
using Pair = std::vector<int64_t>;

// torch's own message does not come through its C functions; that memory is short is the likeliest.
void call(const char* name, StableIValue* stack, const Convolution& conv) {
  if (torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION) == TORCH_SUCCESS) return;
  std::ostringstream message;
  message << "out of memory, or not what " << name << " takes: an input of " << conv.N << " x " << conv.C << " x "
          << conv.H << " x " << conv.W << ", a filter of " << conv.K << " x " << conv.C / conv.groups << " x " << conv.R
          << " x " << conv.S;
  throw std::runtime_error(message.str());
}

// Behind the last of its tensors an operator takes stride, padding, dilation, transposed, output_padding and groups.
template <size_t N>
void set_geometry(std::array<StableIValue, N>& stack, size_t at, const Convolution& conv) {
  stack[at] = from(Pair{conv.stride_h, conv.stride_w});
  stack[at + 1] = from(Pair{conv.pad_h, conv.pad_w});
  stack[at + 2] = from(Pair{conv.dilation_h, conv.dilation_w});
  stack[at + 3] = from(false);
  stack[at + 4] = from(Pair{0, 0});
  stack[at + 5] = from(conv.groups);
}

}  // namespace

bool has_kernel(const Convolution& conv) {
  const bool filter = conv.R == conv.S && (conv.R == 1 || conv.R == 3);
  const bool stride = conv.stride_h == conv.stride_w && conv.stride_h <= 2;
  return filter && stride && conv.groups == 1 && conv.dilation_h == 1 && conv.dilation_w == 1;
}

Tensor convolve(const Convolution& conv, const Tensor& a, const Tensor& weight, const std::optional<Tensor>& bias) {
  // One channel is NHWC and NCHW at once. By the strides of NHWC oneDNN makes wrong values where a row makes one
  // output, at a stride beyond one (torch 2.13).
  const Tensor input = conv.C == 1 ? torch::stable::unsqueeze(torch::stable::squeeze(a, 1), 1) : a;
  std::array<StableIValue, 9> stack{from(input), from(weight), from(bias)};
  set_geometry(stack, 3, conv);
  call("aten::convolution", stack.data(), conv);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::array<std::optional<Tensor>, 3> convolve_backward(const Convolution& conv, const Tensor& dy, const Tensor& a,
                                                       const Tensor& weight, const std::array<bool, 3>& wanted) {
  std::array<StableIValue, 11> stack{from(dy), from(a), from(weight), from(std::optional(Pair{conv.K}))};
  set_geometry(stack, 4, conv);
  stack[10] = from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), wanted.size()));
  call("aten::convolution_backward", stack.data(), conv);
  std::array<std::optional<Tensor>, 3> gradients;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor gradient = torch::stable::detail::to<Tensor>(stack[i]);
    if (wanted[i]) gradients[i] = gradient;
  }
  return gradients;
}

}  // namespace fused_preact
