"""The ways to multiply on a GPU, and plain layers that multiply in TF32 on any machine, to measure kernels by.

Torch has the switch for CUDA alone, and there cuDNN heeds it only where it has such a kernel.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Results, Sample, eager

PRODUCTS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The ways to multiply on a GPU, by name, and the dtype of each one's operands."""


class Tf32Convolution(torch.autograd.Function):
    """conv2d of float32 whose operands, forward and backward, are rounded to ten bits of mantissa, as cuDNN's are."""

    @staticmethod
    def forward(ctx, a, weight, *geometry):
        operands = _tf32(a), _tf32(weight)
        ctx.save_for_backward(*operands)
        ctx.geometry = geometry
        return torch.ops.aten.convolution(*operands, None, *geometry)

    @staticmethod
    def backward(ctx, dy):
        mask = [True, True, False]
        da, dweight, _ = torch.ops.aten.convolution_backward(_tf32(dy), *ctx.saved_tensors, None, *ctx.geometry, mask)
        return da, dweight, *[None] * len(ctx.geometry)


def _tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _tf32_conv2d(a, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    y = Tf32Convolution.apply(a, weight, stride, padding, dilation, False, (0, 0), groups)
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def eager_tf32(sample: Sample) -> Results:
    """Plain layers whose convolutions take operands in TF32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", _tf32_conv2d)
        return eager(sample)
