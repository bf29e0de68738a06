"""The operators of ``torch.ops.fused_preact``, their fake kernels, and the autograd node of a stage.

``forward`` and ``backward`` are written in C++ (csrc/ops.cpp); ``reference_forward``, ``library_forward``,
``triton_forward`` and their backward are `schedule` over a table in Python. All pairs have one signature, which
docs/design.md explains. `stage` is what the rest of the package calls.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _extension, library, reference, schedule
from .schedule import accumulation_type

FORWARD = (
    "(Tensor x, Tensor? residual, Tensor[] weight, Tensor[] bias, Tensor[] bn_weight, Tensor[] bn_bias, "
    "Tensor[] running_mean, Tensor[] running_var, Tensor[] shortcut_weight, bool[] training, float[] eps, "
    "int[] geometry, int[] units, int[] shortcut, ScalarType dtype, int memory, bool tf32) "
    "-> (Tensor, Tensor[], Tensor[])"
)
BACKWARD = (
    "(Tensor dy, Tensor x, Tensor? y, Tensor[] kept, Tensor[] rows, Tensor[] weight, Tensor[] bias, "
    "Tensor[] shortcut_weight, bool[] training, int[] geometry, int[] units, int[] shortcut, ScalarType dtype, "
    "int memory, bool tf32, bool[] needs) -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])"
)
TABLES: dict[str, Any] = {"reference": reference, "library": library, "triton": ".triton.table"}

_library = torch.library.Library("fused_preact", "FRAGMENT")


def table(backend: str) -> Any:
    """The kernels of a backend in Python; a module given by its name is imported here, for Triton may be missing."""
    kernels = TABLES[backend]
    return importlib.import_module(kernels, __package__) if isinstance(kernels, str) else kernels


def _over(backend: str, run: Callable[..., Any], *args: Any) -> Any:
    return run(table(backend), *args)


@dataclass(slots=True)
class Facts:
    """What an operator is told beside the tensors that can have a gradient."""

    backend: str
    training: list[bool]
    eps: list[float]
    geometry: list[int]
    units: list[int]  # of each block
    shortcut: list[int]  # of each block, its index in schedule.SHORTCUTS
    dtype: torch.dtype
    memory: int  # index in schedule.MEMORY
    tf32: bool  # multiply float32 as TF32; heard by `cuda` alone, for the tables in Python hear torch's switch
    running_mean: list[Tensor] = field(default_factory=list)
    running_var: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)  # left here by the eager node

    def stage(self, weight: Sequence[Tensor], shortcut_weight: Sequence[Tensor]) -> schedule.Stage:
        """The stage, of weights of any type."""
        return schedule.Stage(
            self.dtype, schedule.MEMORY[self.memory],
            schedule.chains(weight, shortcut_weight, self.geometry, self.units, self.shortcut), self.training, [],
        )  # fmt: skip


def _fake_forward(x, residual, weight, bias, bn_weight, bn_bias, running_mean, running_var, shortcut_weight, *facts):
    stage = Facts("", *facts).stage(weight, shortcut_weight)
    shape, kept, rows = x.shape, [], []

    def activation(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return x.new_empty(shape, dtype=dtype).to(memory_format=torch.channels_last)

    for k, block in enumerate(stage.blocks):
        if k > 0 and stage.keeps_input(k):
            kept.append(activation(shape, x.dtype))
        for i in range(block.units):
            rows.append(x.new_empty((5, shape[1]), dtype=schedule.accumulation_type(stage.dtype)))
            shape = block.conv[i].output_shape(shape, block.weight[i].shape)
            if i < block.units - 1 and stage.keeps_hidden(block, i):
                kept.append(activation(shape, stage.dtype))
    return x.new_empty(shape).to(memory_format=schedule.memory_format(x)), kept, rows


def _fake_backward(dy, x, y, kept, rows, weight, bias, shortcut_weight, *facts):
    needs = iter(facts[-1])

    def like(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.empty_like(t) if next(needs) else t.new_empty(0) for t in tensors]

    dx = x.new_empty(x.shape).to(memory_format=schedule.memory_format(x)) if next(needs) else x.new_empty(0)
    dweight, dbias, sizes = like(weight), like(bias), [row.size(1) if next(needs) else 0 for row in rows]
    dbn_weight, dbn_bias = ([row.new_empty(n) for row, n in zip(rows, sizes, strict=True)] for _ in range(2))
    return dx, dweight, dbias, dbn_weight, dbn_bias, like(shortcut_weight)


def _operators(backend: str) -> tuple[Any, Any]:
    ops, prefix = torch.ops.fused_preact, f"{backend}_" if backend in TABLES else ""
    return getattr(ops, f"{prefix}forward").default, getattr(ops, f"{prefix}backward").default


def _call_forward(facts: Facts, x, residual, weight, bias, bn_weight, bn_bias, shortcut_weight):
    operator, _ = _operators(facts.backend)
    tensors = x, residual, weight, bias, bn_weight, bn_bias, facts.running_mean, facts.running_var, shortcut_weight
    rest = facts.training, facts.eps, facts.geometry, facts.units, facts.shortcut, facts.dtype, facts.memory
    return operator(*tensors, *rest, facts.tf32)


def _save(ctx, facts: Facts, x, y, kept, rows, weight, bias, shortcut_weight, bn_weight, bn_bias) -> None:
    """Keep for backward x, what ``memory`` says, five rows a batch norm and the parameters; y where it is read."""
    y = y if facts.memory > 0 and facts.stage(weight, shortcut_weight).needs_y() else None
    ctx.save_for_backward(x, y, *kept, *rows, *weight, *bias, *shortcut_weight)
    ctx.counts = len(kept), len(rows), len(weight), len(bias), len(shortcut_weight)
    ctx.facts = facts.training, facts.geometry, facts.units, facts.shortcut, facts.dtype, facts.memory, facts.tf32
    ctx.backend = facts.backend
    dtypes = [[t.dtype for t in parameters] for parameters in (bn_weight, bn_bias)]
    ctx.casts = dtypes if {*dtypes[0], *dtypes[1]} != {accumulation_type(facts.dtype)} else None


def _call_backward(ctx, saved: Sequence[Tensor], dy: Tensor, needs: list[bool]):
    """Gradients in lists like the arguments that they are of; ``needs`` is the operator's."""
    x, y, *flat = saved
    lists, begin = [], 0
    for count in ctx.counts:
        lists.append(flat[begin : begin + count])
        begin += count
    _, operator = _operators(ctx.backend)
    results = operator(dy, x, y, *lists, *ctx.facts, needs)
    if ctx.casts is not None:
        for grads, dtypes in zip(results[3:5], ctx.casts, strict=True):
            grads[:] = (grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))
    return results


class _Once(torch.autograd.Function):
    """Gradients as they are, which refuse to be differentiated: whatever they depend on, ``anchor`` has a gradient."""

    @staticmethod
    def forward(ctx, anchor: Tensor, *grads: Tensor):
        ctx.mark_dirty(*grads)  # not views, so that they may be changed in place as any gradient may
        return grads

    @staticmethod
    def backward(ctx, *grads):
        _twice(ctx)


class _Stage(torch.autograd.Function):
    """The stage as one node of flat tensors: n weights, n gammas, n betas, the projections' weights, the biases."""

    @staticmethod
    def forward(ctx, facts: Facts, x: Tensor, residual: Tensor | None, projections: int, *flat: Tensor):
        n = len(facts.training)
        weight, bn_weight, bn_bias = flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n]
        shortcut_weight, bias = flat[3 * n : 3 * n + projections], flat[3 * n + projections :]
        with torch._C._AutoDispatchBelowAutograd():  # this node is the operator's autograd
            y, kept, rows = _call_forward(facts, x, residual, weight, bias, bn_weight, bn_bias, shortcut_weight)
        _save(ctx, facts, x, y, kept, rows, weight, bias, shortcut_weight, bn_weight, bn_bias)
        facts.rows = rows
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        _, need_x, need_residual, _, *flat = ctx.needs_input_grad
        _, n, _, _, projections = ctx.counts
        weight, gamma, beta, bias = flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], flat[3 * n + projections :]
        bn = [either or other for either, other in zip(gamma, beta, strict=True)]
        needs = [need_x, *weight, *bias, *bn, *flat[3 * n : 3 * n + projections]]
        saved = ctx.saved_tensors  # with autograd: a checkpoint's forward, which makes them again, may need it
        with torch._C._AutoDispatchBelowAutograd():
            dx, dweight, dbias, dgamma, dbeta, dshortcut = _call_backward(ctx, saved, dy, needs)
        parameters = *dweight, *dgamma, *dbeta, *dshortcut, *dbias
        if torch.is_grad_enabled():  # create_graph=True
            dx, *parameters = _Once.apply(dx.new_empty(0).requires_grad_(), dx, *parameters)
        return (
            None,
            dx if need_x else None,
            dy if need_residual else None,
            None,
            *(grad if need else None for grad, need in zip(parameters, flat, strict=True)),
        )


def _setup_context(backend: str, ctx, inputs, output) -> None:
    x, residual, weight, bias, bn_weight, bn_bias, running_mean, _, shortcut_weight, *rest = inputs
    y, kept, rows = output
    _save(ctx, Facts(backend, *rest), x, y, kept, rows, weight, bias, shortcut_weight, bn_weight, bn_bias)
    ctx.given = residual is not None, len(running_mean)


def _formula(ctx, dy: Tensor, _kept, _rows):
    """Gradients of the operators' arguments, for what traces the operator itself, as torch.compile does."""
    residual, running = ctx.given
    _, n, _, biases, projections = ctx.counts
    needs = [True] * (1 + n + biases + n + projections)
    dx, dweight, dbias, dgamma, dbeta, dshortcut = _call_backward(ctx, ctx.saved_tensors, dy, needs)
    tensors = dx, dy.clone() if residual else None, dweight, dbias, dgamma, dbeta
    return *tensors, [None] * running, [None] * running, dshortcut, *[None] * 8


def _twice(ctx, *_grads) -> None:
    raise RuntimeError(
        "fused_preact: a fused call cannot be differentiated twice; for second derivatives use backend='eager', "
        "the same layers one after the other"
    )


def _batched(*_args) -> None:
    raise RuntimeError(
        "fused_preact: a fused call takes one gradient at a time; leave out is_grads_batched=True, vectorize=True or "
        "vmap around its backward, or use backend='eager', the same layers one after the other"
    )


def _register(backend: str) -> None:
    forward, backward = (operator.name() for operator in _operators(backend))
    for name, fake in (forward, _fake_forward), (backward, _fake_backward):
        torch.library.register_fake(name, fake, lib=_library)
    setup = functools.partial(_setup_context, backend)
    torch.library.register_autograd(forward, _formula, setup_context=setup, lib=_library)
    torch.library.register_autograd(backward, _twice, lib=_library)
    for key in "Batched", "FuncTorchBatched":  # is_grads_batched goes by the older vmap, torch.vmap by the other
        _library.impl(backward, _batched, key)


for _name in TABLES:
    for _schema, _function in (FORWARD, schedule.forward), (BACKWARD, schedule.backward):
        _operator = f"{_name}_{_function.__name__}"
        _library.define(_operator + _schema)
        _library.impl(_operator, functools.partial(_over, _name, _function), "CompositeExplicitAutograd")
    _register(_name)
if _extension.unavailable is None:
    _register("cpu")


def stage(
    facts: Facts,
    x: Tensor,
    residual: Tensor | None,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    bn_weight: Sequence[Tensor],
    bn_bias: Sequence[Tensor],
    shortcut_weight: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Run a stage whose arguments have been checked: (y, rows), of which y carries the gradient."""
    flat = *weight, *bn_weight, *bn_bias, *shortcut_weight, *bias
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *flat))):
        facts.memory = schedule.MEMORY.index("none")
    if torch.compiler.is_compiling():
        y, _, rows = _call_forward(facts, x, residual, weight, bias, bn_weight, bn_bias, shortcut_weight)
        return y, [row.detach() for row in rows]
    if facts.memory == schedule.MEMORY.index("none"):
        with torch._C._AutoDispatchBelowAutograd():  # no node, for there is nothing to differentiate
            y, _, rows = _call_forward(facts, x, residual, weight, bias, bn_weight, bn_bias, shortcut_weight)
        return y, rows
    # The generic autograd of an operator with lists of tensors costs ten times what this node does.
    return _Stage.apply(facts, x, residual, len(shortcut_weight), *flat), facts.rows
