"""The unit as a function, and the path that every fused call takes: checks, autocast, choice of backend, node, running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, ops, schedule
from .checks import Shortcut, Unit

_NO_SHORTCUT = Shortcut()


def bn_relu_conv2d(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """conv2d(relu(batch_norm(x)), weight, bias) + residual, as one autograd node that keeps only x for backward.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, of any strides.
        weight: [K, C/groups, R, S], the dtype of x.
        bn_weight, bn_bias: gamma and beta [C], the dtype of x or float32; None is one and zero.
        running_mean, running_var: [C]. In training they are updated in place, once, with ``momentum``, where they are given; else they
            are what x is normalised by.
        bias: [K] or None.
        residual: [N, K, P, Q] or None, added to the result.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; the padding is zeros, after the ReLU.
        training: normalise by the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        backend: one of `backends.NAMES`.

    Returns:
        y [N, K, P, Q], channels_last where x is.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """
    checks._is_tensor("weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"weight must have 4 dimensions (K, C/groups, R, S), got shape {tuple(weight.shape)}")
    conv = checks.geometry(stride, padding, dilation, groups, weight.shape[2:])
    if not isinstance(momentum, float | int):
        raise TypeError(f"momentum must be a number, got {momentum!r}")
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing} is None while the other running statistic is given; give both or neither")
    unit = Unit(weight, bias, bn_weight, bn_bias, running_mean, running_var, training, eps, conv)
    y, rows = run(x, [unit], residual=residual, backend=backend, where="bn_relu_conv2d")
    if training and running_mean is not None:
        update_running([running_mean, running_var], [rows[0][schedule.MEAN], rows[0][schedule.VARIANCE]], momentum)
    return y


def run(
    x: Tensor,
    units: Sequence[Unit],
    *,
    shortcut: Shortcut = _NO_SHORTCUT,
    residual: Tensor | None = None,
    backend: str = "auto",
    where: Any,
) -> tuple[Tensor, list[Tensor]]:
    """The chain of ``units``: (y, rows), with rows[i] the [5, C] rows of batch norm i. ``where`` names the call in explanations.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    checks._is_tensor("x", x)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, units, shortcut, residual = _cast(x, units, shortcut, residual, dtype)
        with torch.autocast(device, enabled=False):
            return _run(x, units, shortcut, residual, backend, where)
    return _run(x, units, shortcut, residual, backend, where)


def _run(x, units, shortcut, residual, backend, where) -> tuple[Tensor, list[Tensor]]:
    checks.call(x, units, shortcut, residual)
    convolutions = [(unit.conv, tuple(unit.weight.shape)) for unit in units]
    if shortcut.weight is not None:
        convolutions.append((shortcut.conv, tuple(shortcut.weight.shape)))
    problem = backends.Problem(x.device.type, x.dtype, tuple(x.shape), tuple(convolutions))
    chosen = backends.choose(backend, problem)
    if backends.is_recording():
        backends.record(backends.describe(where, backend, problem))

    weight, bias, bn_weight, bn_bias, running_mean, running_var = [], [], [], [], [], []
    biased = any(unit.bias is not None for unit in units)
    fixed = any(not unit.batch for unit in units)
    for unit in units:
        weight.append(unit.weight)
        C = x.size(1) if unit is units[0] else weight[-2].size(0)
        bn_weight.append(x.new_ones(C) if unit.bn_weight is None else unit.bn_weight)
        bn_bias.append(x.new_zeros(C) if unit.bn_bias is None else unit.bn_bias)
        if biased:
            bias.append(x.new_zeros(unit.weight.size(0)) if unit.bias is None else unit.bias)
        if fixed:
            running_mean.append(bn_weight[-1] if unit.batch else unit.running_mean)
            running_var.append(bn_weight[-1] if unit.batch else unit.running_var)
    facts = ops.Facts(
        [unit.batch for unit in units],
        [unit.eps for unit in units],
        [number for conv, _ in convolutions for number in conv],
        shortcut.kind,
        chosen,
        running_mean,
        running_var,
    )
    return ops.chain(facts, x, residual, weight, bias, bn_weight, bn_bias, shortcut.weight)


def _cast(x, units, shortcut, residual, dtype: torch.dtype) -> tuple[Tensor, list[Unit], Shortcut, Tensor | None]:
    """What autocast casts for a convolution, cast; float64 stays, as there."""

    def cast(t: Any) -> Any:
        eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype not in (torch.float64, dtype)
        return t.to(dtype) if eligible else t

    units = [unit._replace(weight=cast(unit.weight), bias=cast(unit.bias)) for unit in units]
    return cast(x), units, shortcut._replace(weight=cast(shortcut.weight)), cast(residual)


def update_running(buffers: list[Tensor], batch: list[Tensor], momentum: float | Tensor) -> None:
    """buffer = (1 - momentum)*buffer + momentum*batch, in place."""
    batch = [value.to(buffer.dtype) for buffer, value in zip(buffers, batch, strict=True)]
    with torch.no_grad():
        if isinstance(momentum, Tensor):
            for buffer, value in zip(buffers, batch, strict=True):
                buffer.lerp_(value, momentum.to(buffer.dtype))
        else:
            torch._foreach_lerp_(buffers, batch, momentum)
