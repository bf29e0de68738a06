"""What every fused call does: checks, autocast, choice of a backend, once for calls that differ in the numbers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks, ops, tables
from .kernels import memory_format
from .schedule import MEMORY, SHORTCUTS
from .units import Block


class Plan(NamedTuple):
    """What is known of a call before its tensors are read; the same for every call with the same shapes and types."""

    asked: str
    problem: backends.Problem
    backend: str
    cast: torch.dtype | None  # autocast's, where it is on
    stream: torch.dtype  # of what runs from block to block
    missing: list[int] | None  # the channels that each unit reads, where a tensor is to be made in the place of None
    facts: ops.Facts

    def choice(self, where: Any) -> backends.Choice:
        """The backend and why, as `explain` tells; ``where`` is a name, or the module that calls."""
        return backends.describe(where, self.asked, self.problem)

    def record(self, where: Any) -> None:
        """Note the choice for `explain`."""
        if backends.is_recording():
            backends.record(self.choice(where))


def call_key(name: str, x: Tensor) -> tuple[Any, ...]:
    """What a plan depends on beside the layers, for an argument: the tensor, and what it is called in.

    Last come whether float32 is multiplied as TF32, whether a backward may follow, whether a transform is at work, and
    the dtype of autocast or None.
    """
    checks.tensor(name, x)
    cast = torch.get_autocast_dtype(x.device.type) if backends.autocasts(x) else None
    order = memory_format(x) if x.dim() == 4 and x.layout == torch.strided else x.layout
    tf32 = x.is_cuda and backends.allows_tf32()
    return x.shape, x.dtype, x.device, order, tf32, torch.is_grad_enabled(), backends.is_transforming(), cast


def make_plan(
    x: Tensor,
    blocks: Sequence[Block],
    residual: Tensor | None = None,
    backend: str = "auto",
    memory: str = "fast",
    in_parts: bool = False,
) -> Plan:
    """Check the arguments of a stage and choose its backend; ``in_parts``: parts are to be kept in the place of x.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    *_, tf32, grad, transformed, cast = call_key("x", x)
    given = x
    if cast is not None:
        with torch.no_grad():
            x, residual = _cast(x, cast), _cast(residual, cast)
            blocks = [_cast_block(block, cast) for block in blocks]
    checks.call(x, blocks, residual)
    units = [unit for block in blocks for unit in block.units]
    layers = [layer for block in blocks for layer in (*block.units, block.shortcut) if layer.conv is not None]
    convolutions = tuple((layer.conv, tuple(layer.weight.shape)) for layer in layers)
    layout = "channels_last" if memory_format(x) == torch.channels_last else "contiguous"
    training = [unit.batch for unit in units]
    inference = not grad and not any(training)
    rounded = memory == "fast" and given.dtype != x.dtype  # which comes before what is kept of it
    saves = (memory != "fast" or (in_parts and not rounded)) and not (inference or transformed)
    shape = tuple(x.shape)
    problem = backends.Problem(x.device, x.dtype, shape, convolutions, layout, inference, saves, transformed, rounded)
    half = given.dtype in (torch.bfloat16, torch.float16)
    stream = x.dtype if memory == "fast" else torch.float32 if half else given.dtype
    missing = None
    if any(t is None for tensors in ops.Arguments.of(blocks) for t in tensors):
        missing = [unit.weight.size(1) * unit.conv.groups for unit in units]
    facts = ops.Facts(
        training,
        [float(unit.eps) for unit in units],
        [number for conv, _ in convolutions for number in conv],
        [len(block.units) for block in blocks],
        [SHORTCUTS.index(block.shortcut.kind) for block in blocks],
        x.dtype,
        MEMORY.index(memory),
        tf32,
    )
    return Plan(backend, problem, backends.choose(backend, problem), cast, stream, missing, facts)


class Plans(dict[Any, Plan]):
    """Plans by what they were made for: a call is checked once for arguments that differ in the numbers only."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def find(self, key: tuple[Any, ...], make: Callable[[], Plan]) -> Plan:
        """The plan of ``key``, made where there is none; made each time where shapes are not numbers."""
        if torch.compiler.is_compiling():
            return make()
        key = (tables.version(), torch.get_num_threads(), *key)
        try:
            plan = self.get(key)
        except TypeError:  # a size that a tracer made a symbol of
            return make()
        if plan is None:
            if len(self) >= self._most:
                self.clear()
            plan = self[key] = make()
        return plan


def execute(
    plan: Plan, x: Tensor, given: ops.Arguments, residual: Tensor | None = None, parts: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Run a stage by its plan: (y, rows), with rows[i] the [5, C] rows of batch norm i.

    y has the dtype that the plain layers would give it, but under autocast that of a stream kept in float32. ``parts``,
    if any, are kept for backward in the place of x, which they make when they are joined along the channels.
    """
    checks.constant(given.running_mean, given.running_var)
    stream = x if x.dtype == plan.stream else x.to(plan.stream)
    tensors = given if plan.missing is None else given.filled(stream, plan.missing)
    if plan.cast is None:
        y, rows = ops.stage(plan.backend, plan.facts, stream, residual, tensors, parts)
        return (y, rows) if y.dtype == x.dtype else (y.to(x.dtype), rows)
    with torch.autocast(x.device.type, enabled=False):
        return ops.stage(plan.backend, plan.facts, stream, _cast(residual, plan.cast), tensors, parts)


def _cast(t: Any, dtype: torch.dtype) -> Any:
    """What autocast casts for a convolution, cast; float64 stays, as there."""
    eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
    return t.to(dtype) if eligible else t


def _cast_block(block: Block, dtype: torch.dtype) -> Block:
    """A block as autocast would see its convolutions; the operators cast the weights themselves."""
    units = [unit._replace(weight=_cast(unit.weight, dtype), bias=_cast(unit.bias, dtype)) for unit in block.units]
    weight, bias = _cast(block.shortcut.weight, dtype), _cast(block.shortcut.bias, dtype)
    return block._replace(units=units, shortcut=block.shortcut._replace(weight=weight, bias=bias))
