"""The unit as a function, and what every fused call does: checks, autocast, choice of a backend, running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks, ops
from .checks import Shortcut, Unit
from .schedule import MEAN, VARIANCE, memory_format

NO_SHORTCUT = Shortcut()


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
        running_mean, running_var: [C]. In training they are updated in place, once, with ``momentum``, where they are
            given; else they are what x is normalised by.
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
    checks.number("momentum", momentum)
    checks.number("eps", eps)
    conv = checks.geometry(stride, padding, dilation, groups, weight)
    unit = Unit(weight, bias, bn_weight, bn_bias, running_mean, running_var, training, eps, conv)
    plan = make_plan(x, [unit], NO_SHORTCUT, residual, backend)
    plan.record("bn_relu_conv2d")
    if plan.backend == "eager":
        z = F.batch_norm(x, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
        y = F.conv2d(F.relu(z, inplace=True), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y if residual is None else y.add_(residual)
    y, rows = execute(plan, x, [unit], NO_SHORTCUT, residual)
    if training and running_mean is not None:
        update_running([running_mean, running_var], [rows[0][MEAN], rows[0][VARIANCE]], momentum)
    return y


class Plan(NamedTuple):
    """What is known of a call before its tensors are read; the same for every call with the same shapes and types."""

    asked: str
    problem: backends.Problem
    backend: str
    cast: torch.dtype | None  # autocast's, where it is on
    training: list[bool]
    eps: list[float]
    geometry: list[int]

    def record(self, where: Any) -> None:
        """Note the choice for `explain`; ``where`` is a name, or the module that calls."""
        if backends.is_recording():
            backends.record(backends.describe(where, self.asked, self.problem))


_plans: dict[tuple[Any, ...], Plan] = {}


def make_plan(
    x: Tensor, units: Sequence[Unit], shortcut: Shortcut, residual: Tensor | None = None, backend: str = "auto"
) -> Plan:
    """Check the arguments of a chain and choose its backend, once for calls that differ in the numbers only.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    checks.tensor("x", x)
    device = x.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if torch.compiler.is_compiling():
        return _make_plan(x, units, shortcut, residual, backend, cast)
    key = [backend, cast, shortcut.kind, shortcut.conv, memory_format(x) if x.dim() == 4 else None]
    tensors = [x, residual, shortcut.weight]
    for unit in units:
        tensors += unit[:6]
        key.append(unit[6:])
    key += [(t.shape, t.dtype, t.device, t.layout) if isinstance(t, Tensor) else type(t) for t in tensors]
    key = tuple(key)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 4096:
            _plans.clear()
        plan = _plans[key] = _make_plan(x, units, shortcut, residual, backend, cast)
    return plan


def _make_plan(x, units, shortcut, residual, backend, cast) -> Plan:
    if cast is not None:
        with torch.no_grad():
            x, units, shortcut, residual = _cast(x, units, shortcut, residual, cast)
    checks.call(x, units, shortcut, residual)
    convolutions = [(unit.conv, tuple(unit.weight.shape)) for unit in units]
    if shortcut.weight is not None:
        convolutions.append((shortcut.conv, tuple(shortcut.weight.shape)))
    channels_last = memory_format(x) == torch.channels_last
    layout = "channels_last" if channels_last else "contiguous"
    problem = backends.Problem(x.device.type, x.dtype, tuple(x.shape), tuple(convolutions), layout)
    return Plan(
        backend,
        problem,
        backends.choose(backend, problem),
        cast,
        [unit.batch for unit in units],
        [float(unit.eps) for unit in units],
        [number for conv, _ in convolutions for number in conv],
    )


def execute(
    plan: Plan, x: Tensor, units: Sequence[Unit], shortcut: Shortcut, residual: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Run a chain by its plan: (y, rows), with rows[i] the [5, C] rows of batch norm i."""
    if plan.cast is None:
        return _execute(plan, x, units, shortcut, residual)
    with torch.autocast(x.device.type, enabled=False):
        return _execute(plan, *_cast(x, units, shortcut, residual, plan.cast))


def _execute(plan: Plan, x, units, shortcut, residual) -> tuple[Tensor, list[Tensor]]:
    weight, bias, bn_weight, bn_bias, running_mean, running_var, *_ = map(list, zip(*units, strict=True))
    shapes = [w.shape for w in weight]
    if any(t is None for t in (*bn_weight, *bn_bias)):
        channels = [x.size(1), *(shape[0] for shape in shapes)]
        bn_weight = [x.new_ones(channels[i]) if t is None else t for i, t in enumerate(bn_weight)]
        bn_bias = [x.new_zeros(channels[i]) if t is None else t for i, t in enumerate(bn_bias)]
    if all(t is None for t in bias):
        bias = []
    else:
        bias = [x.new_zeros(shape[0]) if t is None else t for t, shape in zip(bias, shapes, strict=True)]
    if all(plan.training):
        running_mean = running_var = []
    else:  # Those of training units are not read.
        running_mean = [g if t is None else t for t, g in zip(running_mean, bn_weight, strict=True)]
        running_var = [g if t is None else t for t, g in zip(running_var, bn_weight, strict=True)]
    facts = ops.Facts(plan.training, plan.eps, plan.geometry, shortcut.kind, plan.backend, running_mean, running_var)
    return ops.chain(facts, x, residual, weight, bias, bn_weight, bn_bias, shortcut.weight)


def _cast(x, units, shortcut, residual, dtype: torch.dtype) -> tuple[Any, list[Unit], Shortcut, Any]:
    """What autocast casts for a convolution, cast; float64 stays, as there."""

    def cast(t: Any) -> Any:
        eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype not in (torch.float64, dtype)
        return t.to(dtype) if eligible else t

    units = [unit._replace(weight=cast(unit.weight), bias=cast(unit.bias)) for unit in units]
    return cast(x), units, shortcut._replace(weight=cast(shortcut.weight)), cast(residual)


def update_running(buffers: list[Tensor], batch: list[Tensor], momentum: float | Tensor) -> None:
    """buffer = (1 - momentum)*buffer + momentum*batch, in place, for each buffer."""
    batch = [v if v.dtype == buffer.dtype else v.to(buffer.dtype) for buffer, v in zip(buffers, batch, strict=True)]
    with torch.no_grad():
        if isinstance(momentum, Tensor):
            for buffer, value in zip(buffers, batch, strict=True):
                buffer.lerp_(value, momentum.to(buffer.dtype))
        else:
            torch._foreach_lerp_(buffers, batch, momentum)
