"""The unit as a function."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from . import checks, running
from .layers import add
from .ops import Arguments
from .plans import Plan, Plans, call_key, execute, make_plan
from .units import Block, Unit


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

    Under autocast x, weight, bias and residual may differ in dtype: what is not float64 is cast to autocast's.

    He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", 2016, arXiv 1603.05027, figure 1(b); batch norm:
    Ioffe, Szegedy, "Batch Normalization", 2015, arXiv 1502.03167.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, of any strides.
        weight: [K, C/groups, R, S], the dtype of x.
        bn_weight, bn_bias: gamma and beta [C], the dtype of x, or float32 where that is not float64; None is one and
            zero.
        running_mean, running_var: [C], of the same dtypes. In training they are updated in place, with ``momentum``,
            where they are given, once, also where a checkpoint repeats the call; else they are what x is normalised by.
        bias: [K], the dtype of x, or None.
        residual: [N, K, P, Q], the dtype of x, or None; added to the result.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; the padding is zeros, after the ReLU.
        training: normalise by the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        backend: one of `backends.NAMES`.

    Returns:
        y [N, K, P, Q], the dtype of x, or under autocast that of its convolutions; channels_last where x is.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """
    checks.flag("training", training)
    momentum, eps = checks.number("momentum", momentum), checks.number("eps", eps)
    conv = checks.geometry(stride, padding, dilation, groups, weight)
    unit = Unit(weight, bias, bn_weight, bn_bias, running_mean, running_var, training, eps, conv)
    plan = _plan_of(unit, x, residual, backend)
    plan.record("bn_relu_conv2d")
    if plan.backend == "eager":
        statistics = running_mean, running_var
        if training and running.recomputing():
            statistics = map(running.copy, statistics)
        z = F.batch_norm(x, *statistics, bn_weight, bn_bias, training, momentum, eps)
        inplace = not running.watched()
        y = F.conv2d(F.relu(z, inplace), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y if residual is None else add(y, residual, inplace)
    y, rows = execute(plan, x, Arguments.of([Block([unit])]), residual)
    if training and running_mean is not None:
        running.update([running_mean], [running_var], [], rows, [0], momentum)
    return y


_plans = Plans(4096)


def _plan_of(unit: Unit, x: Tensor, residual: Tensor | None, backend: str) -> Plan:
    """The plan of a call of `bn_relu_conv2d`."""
    others = (*unit[:6], residual)
    facts = [(t.shape, t.dtype, t.device, t.layout) if isinstance(t, Tensor) else type(t) for t in others]
    key = backend, *call_key("x", x), unit[6:], *facts
    return _plans.find(key, lambda: make_plan(x, [Block([unit])], residual, backend))
