"""The kernels in plain torch calls, for any dtype and device: the oracle that the other tables are held to.

Every sum, product and comparison of batch norm is done in the accumulation type, as the formulas of docs/design.md say.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import MEAN, RSTD, SCALE, SHIFT, Activation, Affine, Conv, Gradient, accumulation_type


def _column(row: Tensor) -> Tensor:
    return row.view(1, -1, 1, 1)


def _z(a: Activation) -> Tensor:
    mean, scale, shift = (_column(a.norm[row]) for row in (MEAN, SCALE, SHIFT))
    return scale * (a.x.to(a.norm.dtype) - mean) + shift


def _a(a: Activation) -> Tensor:
    return a.x if a.norm is None else _z(a).relu().to(a.x.dtype)


def _formed(dy: Gradient) -> Tensor:
    if dy.norm is None:
        return dy.g
    formed = _column(dy.norm[SCALE]) * dy.g
    if len(dy.grad) > 2:
        _, _, slope, offset = (_column(row) for row in dy.grad)
        formed = formed + slope * (dy.x.to(dy.norm.dtype) - _column(dy.norm[MEAN])) + offset
    return formed


def _dy(dy: Gradient) -> Tensor:
    return _formed(dy).to(dy.g.dtype)


def norm_rows(mean: Tensor, variance: Tensor, unbiased: Tensor, affine: Affine) -> Tensor:
    """Rows [5, C] of a batch norm with these statistics [C]."""
    rstd = (variance + affine.eps).rsqrt()
    return torch.stack([mean, rstd, unbiased, affine.gamma * rstd, affine.beta])


def statistics(x: Tensor, affine: Affine) -> Tensor:
    """Rows [5, C] of the batch norm that reads x [N, C, H, W], from the batch statistics of x."""
    m = x.numel() // x.size(1)
    variance, mean = torch.var_mean(x.to(accumulation_type(x.dtype)), (0, 2, 3), correction=0)
    return norm_rows(mean, variance, variance * (m / (m - 1)), affine)


def running(mean: Tensor, variance: Tensor, affine: Affine) -> Tensor:
    """Rows [5, C] of a batch norm that uses the given statistics [C]."""
    return norm_rows(mean, variance, variance, affine)


def forward(
    conv: Conv, x: Activation, weight: Tensor, bias: Tensor | None, residual: Tensor | None, following: Affine | None
) -> tuple[Tensor, Tensor | None]:
    """y = conv(a, weight) + bias + residual, and the rows of the batch norm ``following``, if any, that reads y."""
    y = F.conv2d(_a(x), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    y = (y if residual is None else y + residual).contiguous(memory_format=torch.channels_last)
    return y, None if following is None else statistics(y, following)


def dgrad(conv: Conv, dy: Gradient, weight: Tensor, x: Activation, add: Tensor | None, batch: bool) -> Gradient:
    """dz = (conv_transpose(dy, weight) + add) * [z > 0] with its rows; no mask and no rows where x.norm is None."""
    args = conv.stride, conv.padding, conv.dilation, conv.groups
    da = torch.nn.grad.conv2d_input(x.x.shape, weight, _dy(dy), *args)
    da = da if add is None else da + add
    if x.norm is None:
        return Gradient(da)
    dz = da.masked_fill(_z(x) <= 0, 0)
    wide, rstd, m = dz.to(x.norm.dtype), x.norm[RSTD], dz.numel() // dz.size(1)
    dbeta = wide.sum((0, 2, 3))
    dgamma = (wide * (x.x.to(wide.dtype) - _column(x.norm[MEAN])) * _column(rstd)).sum((0, 2, 3))
    if not batch:  # x, which may be infinite or NaN where no output reads it, is no part of dx
        return Gradient(dz, x.x, x.norm, (dgamma, dbeta))
    slope, offset = -x.norm[SCALE] * rstd * dgamma / m, -x.norm[SCALE] * dbeta / m
    return Gradient(dz, x.x, x.norm, (dgamma, dbeta, slope, offset))


def wgrad(conv: Conv, dy: Gradient, x: Activation, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient of ``weight``, and of the bias where it is wanted."""
    g = _dy(dy)
    dweight = torch.nn.grad.conv2d_weight(_a(x), weight.shape, g, conv.stride, conv.padding, conv.dilation, conv.groups)
    dbias = g.to(accumulation_type(g.dtype)).sum((0, 2, 3)).to(g.dtype) if bias else None
    return dweight, dbias


def dx(dy: Gradient, add: Tensor | None) -> Tensor:
    """Gradient of the chain's input: dy + add."""
    return _dy(dy) if add is None else _dy(dy) + add


def join(
    stream: Tensor, branch: Gradient, subtract: bool, narrow: bool, following: Affine | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Stream + branch, or minus it, in the dtype of the stream, which is wider than that of the branch.

    Besides, where it is wanted or ``following`` is a batch norm that reads it, the same in the dtype of the branch, and
    the rows of that batch norm. The branch is formed as dy is, and not rounded before it is added.
    """
    joined = stream - _formed(branch) if subtract else stream + _formed(branch)
    if not narrow and following is None:
        return joined, None, None
    narrowed = joined.to(branch.g.dtype)
    return joined, narrowed, None if following is None else statistics(narrowed, following)
