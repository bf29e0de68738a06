"""Forward and backward of a chain of BN-ReLU-Conv units, over a table of kernels.

A table is a module with the functions ``forward``, ``dgrad``, ``wgrad``, ``statistics``, ``running`` and ``dx``:
`reference` and `library` are two. csrc/schedule.cpp is the same text for the tables that are written in C++;
docs/design.md states both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MEAN, RSTD, VARIANCE, SCALE, SHIFT = range(5)
DGAMMA, DBETA, SLOPE, OFFSET = range(4)
GEOMETRY = 7  # integers a convolution


class Conv(NamedTuple):
    """Geometry of one convolution, in the order of the operators' ``geometry``."""

    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int

    @property
    def stride(self) -> tuple[int, int]:
        """(vertical, horizontal)."""
        return self[0:2]

    @property
    def padding(self) -> tuple[int, int]:
        """(vertical, horizontal), the same on both sides."""
        return self[2:4]

    @property
    def dilation(self) -> tuple[int, int]:
        """(vertical, horizontal)."""
        return self[4:6]

    def output_shape(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, int, int, int]:
        """Shape [N, K, P, Q] of the convolution of an x of shape [N, C, H, W] by a weight [K, C/groups, R, S]."""
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, _ = self
        P = (x[2] + 2 * pad_h - dilation_h * (weight[2] - 1) - 1) // stride_h + 1
        Q = (x[3] + 2 * pad_w - dilation_w * (weight[3] - 1) - 1) // stride_w + 1
        return x[0], weight[0], P, Q


class Affine(NamedTuple):
    """What turns the moments of a tensor into the rows of the batch norm that reads it; gamma and beta are [C]."""

    gamma: Tensor
    beta: Tensor
    eps: float


@dataclass(slots=True)
class Activation:
    """a = max(z, 0) of x, or x where norm is None; a table may keep a in ``value`` for its next reader."""

    x: Tensor
    norm: Tensor | None  # [5, C]: mean, rstd, unbiased variance, scale, shift
    value: Tensor | None = None


class Gradient(NamedTuple):
    """dy = scale*g + slope*(x - mean) + offset with the rows of the batch norm behind it; g itself where norm is None.

    The rows dgamma and dbeta are there whenever grad is, whether or not a table has formed dy in g already.
    """

    g: Tensor
    x: Tensor | None = None
    norm: Tensor | None = None
    grad: Sequence[Tensor] | None = None  # dgamma, dbeta, slope, offset, [C] each


def memory_format(x: Tensor) -> torch.memory_format:
    """Layout that the result of an operator on x has."""
    return torch.channels_last if x.stride(1) == 1 and x.size(1) > 1 else torch.contiguous_format


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """Type of the per-channel rows of tensors of type dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def convolutions(geometry: Sequence[int]) -> list[Conv]:
    """The operators' ``geometry`` by convolution."""
    return [Conv(*geometry[i : i + GEOMETRY]) for i in range(0, len(geometry), GEOMETRY)]


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def forward(
    kernels: Any,
    x: Tensor,
    residual: Tensor | None,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    bn_weight: Sequence[Tensor],
    bn_bias: Sequence[Tensor],
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    shortcut_weight: Tensor | None,
    training: Sequence[bool],
    eps: Sequence[float],
    geometry: Sequence[int],
    shortcut: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(y, hidden, rows) of the chain; see `fused_preact.ops` for the arguments."""
    n, conv, layout = len(weight), convolutions(geometry), memory_format(x)
    accumulation = accumulation_type(x.dtype)
    affine = [Affine(bn_weight[i].to(accumulation), bn_bias[i].to(accumulation), eps[i]) for i in range(n)]

    def running(i: int) -> Tensor:
        return kernels.running(running_mean[i].to(accumulation), running_var[i].to(accumulation), affine[i])

    h = x = _dense(x)
    norm = kernels.statistics(x, affine[0]) if training[0] else running(0)
    hidden, rows = [], [norm]
    for i in range(n):
        last = i == n - 1
        a = Activation(h, norm)
        if i == 0 and shortcut != "none":
            if shortcut == "identity":
                residual = x
            else:
                source = a if shortcut == "activated" else Activation(x, None)
                residual, _ = kernels.forward(conv[n], source, shortcut_weight, None, None, None)
        following = affine[i + 1] if not last and training[i + 1] else None
        offset, added = bias[i] if bias else None, residual if last else None
        h, norm = kernels.forward(conv[i], a, weight[i], offset, added, following)
        if not last:
            norm = running(i + 1) if norm is None else norm
            hidden.append(h)
            rows.append(norm)
    return h.contiguous(memory_format=layout), hidden, rows


def backward(
    kernels: Any,
    dy: Tensor,
    x: Tensor,
    hidden: Sequence[Tensor],
    rows: Sequence[Tensor],
    weight: Sequence[Tensor],
    shortcut_weight: Tensor | None,
    training: Sequence[bool],
    geometry: Sequence[int],
    shortcut: str,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """(dx, dweight, dbias, dbn_weight, dbn_bias, dshortcut_weight) of the chain; empty where ``needs`` says no."""
    n, conv, layout = len(weight), convolutions(geometry), memory_format(x)
    need_x, need_weight, need_bias, need_bn, need_shortcut = split_needs(needs, n)
    dx, dshortcut = dy.new_empty(0), dy.new_empty(0)
    dweight, dbias = [dy.new_empty(0) for _ in range(n)], [dy.new_empty(0) for _ in range(n)]
    dbn_weight, dbn_bias = [rows[0].new_empty(0) for _ in range(n)], [rows[0].new_empty(0) for _ in range(n)]

    x, dy = _dense(x), _dense(dy)
    inputs = [x, *hidden]
    g, add = Gradient(dy), None
    for i in reversed(range(n)):
        a = Activation(inputs[i], rows[i])
        # Whether anything at or before batch norm i wants a gradient.
        wanted = need_x or any(need_bn[: i + 1]) or any(need_weight[:i]) or any(need_bias[:i])
        if i == 0 and shortcut == "activated":
            if need_shortcut:
                dshortcut, _ = kernels.wgrad(conv[n], Gradient(dy), a, shortcut_weight, False)
            if wanted:
                add = kernels.dgrad(conv[n], Gradient(dy), shortcut_weight, Activation(x, None), None, False).g
        if need_weight[i] or need_bias[i]:
            dw, db = kernels.wgrad(conv[i], g, a, weight[i], need_bias[i])
            if need_weight[i]:
                dweight[i] = dw
            if need_bias[i]:
                dbias[i] = db
        if not wanted:
            continue
        g = kernels.dgrad(conv[i], g, weight[i], a, add, training[i])
        if need_bn[i]:
            dbn_weight[i], dbn_bias[i] = g.grad[DGAMMA], g.grad[DBETA]
    if shortcut == "raw" and need_shortcut:
        dshortcut, _ = kernels.wgrad(conv[n], Gradient(dy), Activation(x, None), shortcut_weight, False)
    if need_x:
        add = dy if shortcut == "identity" else None
        if shortcut == "raw":
            add = kernels.dgrad(conv[n], Gradient(dy), shortcut_weight, Activation(x, None), None, False).g
        dx = kernels.dx(g, add).contiguous(memory_format=layout)
    return dx, dweight, dbias, dbn_weight, dbn_bias, dshortcut


def split_needs(needs: Sequence[bool], n: int) -> tuple[bool, list[bool], list[bool], list[bool], bool]:
    """The operators' ``needs`` by kind: x, n weights, n biases, n batch norms, the shortcut's weight."""
    weight, bias, bn = (list(needs[1 + k * n : 1 + (k + 1) * n]) for k in range(3))
    return needs[0], weight, bias, bn, needs[-1]
