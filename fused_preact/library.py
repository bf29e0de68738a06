"""The kernels around torch's own convolution and batch norm (oneDNN, cuDNN): any filter, groups and dilation.

What it keeps for backward is what every backend keeps; the activation is computed again there, once a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .kernels import MEAN, RSTD, SCALE, SHIFT, Activation, Affine, Conv, Gradient
from .reference import norm_rows, running

__all__ = ["dgrad", "dx", "forward", "join", "running", "statistics", "wgrad"]

aten = torch.ops.aten


def _a(a: Activation) -> Tensor:
    if a.norm is None:
        return a.x
    if a.value is None:
        # rstd is in scale already: a variance of one and an epsilon of zero leave z = scale*(x - mean) + shift.
        mean, one = a.norm[MEAN], torch.ones_like(a.norm[MEAN])
        z, _, _ = aten.native_batch_norm(a.x, a.norm[SCALE], a.norm[SHIFT], mean, one, False, 0.0, 0.0)
        a.value = z.relu_()
    return a.value


def statistics(x: Tensor, affine: Affine) -> Tensor:
    """Rows [5, C] of the batch norm that reads x [N, C, H, W], from the batch statistics of x."""
    # With a momentum of one the second buffer becomes the unbiased variance.
    unused, unbiased = torch.zeros_like(affine.gamma), torch.zeros_like(affine.gamma)
    mean, variance = aten.batch_norm_update_stats(x, unused, unbiased, 1.0)
    return norm_rows(mean, variance, unbiased, affine)


def forward(
    conv: Conv, x: Activation, weight: Tensor, bias: Tensor | None, residual: Tensor | None, following: Affine | None
) -> tuple[Tensor, Tensor | None]:
    """y = conv(a, weight) + bias + residual, and the rows of the batch norm ``following``, if any, that reads y."""
    y = aten.convolution(_a(x), weight, bias, conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups)
    y = y.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        y.add_(residual)
    return y, None if following is None else statistics(y, following)


def _convolution_backward(conv: Conv, dy: Gradient, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
    args = conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups
    return aten.convolution_backward(dy.g, x, weight, [weight.size(0)], *args, mask)


def dgrad(conv: Conv, dy: Gradient, weight: Tensor, x: Activation, add: Tensor | None, batch: bool) -> Gradient:
    """dz = (conv_transpose(dy, weight) + add) * [z > 0], and from it the gradient that the unit before reads."""
    da, _, _ = _convolution_backward(conv, dy, x.x, weight, [True, False, False])
    da = da.contiguous(memory_format=torch.channels_last)
    if add is not None:
        da.add_(add)
    if x.norm is None:
        return Gradient(da)
    dz = aten.threshold_backward.grad_input(da, _a(x), 0, grad_input=da)
    mean, rstd = x.norm[MEAN], x.norm[RSTD]
    if dz.numel() == 0:  # torch 2.13 divides by zero there
        return Gradient(dz, grad=(torch.zeros_like(mean), torch.zeros_like(mean)))
    gamma, variance = x.norm[SCALE] / rstd, None if batch else rstd.pow(-2)
    args = mean, variance, mean, rstd, batch, 0.0, [True, True, True]
    g, dgamma, dbeta = aten.native_batch_norm_backward(dz, x.x, gamma, *args)
    return Gradient(g, grad=(dgamma, dbeta))


def wgrad(conv: Conv, dy: Gradient, x: Activation, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient of ``weight``, and of the bias where it is wanted."""
    _, dweight, dbias = _convolution_backward(conv, dy, _a(x), weight, [False, True, bias])
    return dweight, dbias


def dx(dy: Gradient, add: Tensor | None) -> Tensor:
    """Gradient of the chain's input: dy + add."""
    return dy.g if add is None else dy.g.add_(add)


def join(
    stream: Tensor, branch: Gradient, subtract: bool, narrow: bool, following: Affine | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What runs from block to block; as `fused_preact.reference.join`."""
    joined, narrowed, _ = reference.join(stream, branch, subtract, narrow or following is not None, None)
    return joined, narrowed, None if following is None else statistics(narrowed, following)
