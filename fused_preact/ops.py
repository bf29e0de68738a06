"""The operators of ``torch.ops.fused_preact``, their fake kernels, and the autograd node of a chain.

``forward`` and ``backward`` are written in C++ (csrc/ops.cpp), ``composed_forward`` and ``composed_backward`` in
Python, over the tables `reference`, `library` and `triton`; both pairs have one signature, which docs/design.md
explains. `chain` is what the rest of the package calls.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _extension, library, reference, schedule

FORWARD = (
    "(Tensor x, Tensor? residual, Tensor[] weight, Tensor[] bias, Tensor[] bn_weight, Tensor[] bn_bias, "
    "Tensor[] running_mean, Tensor[] running_var, Tensor? shortcut_weight, bool[] training, float[] eps, "
    "int[] geometry, str shortcut, str backend) -> (Tensor, Tensor[], Tensor[])"
)
BACKWARD = (
    "(Tensor dy, Tensor x, Tensor[] hidden, Tensor[] rows, Tensor[] weight, Tensor? shortcut_weight, "
    "bool[] training, int[] geometry, str shortcut, bool[] needs, str backend) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor)"
)
TABLES: dict[str, Any] = {"reference": reference, "library": library, "triton": ".triton.table"}

_library = torch.library.Library("fused_preact", "FRAGMENT")
_library.define("composed_forward" + FORWARD)
_library.define("composed_backward" + BACKWARD)


def table(backend: str) -> Any:
    """The kernels of a composed backend; a module given by its name is imported here, for Triton may be missing."""
    kernels = TABLES[backend]
    return importlib.import_module(kernels, __package__) if isinstance(kernels, str) else kernels


def _composed_forward(*args):
    *args, backend = args
    return schedule.forward(table(backend), *args)


def _composed_backward(*args):
    *args, backend = args
    return schedule.backward(table(backend), *args)


def _fake_forward(x, residual, weight, bias, bn_weight, bn_bias, running_mean, running_var, shortcut_weight, *facts):
    _, _, geometry, _, _ = facts
    n, shapes = len(weight), [x.shape]
    for conv, w in zip(schedule.convolutions(geometry), weight, strict=False):
        shapes.append(conv.output_shape(shapes[-1], w.shape))
    hidden = [x.new_empty(shape).to(memory_format=torch.channels_last) for shape in shapes[1:-1]]
    rows = [x.new_empty((5, shape[1]), dtype=schedule.accumulation_type(x.dtype)) for shape in shapes[:n]]
    return x.new_empty(shapes[n]).to(memory_format=schedule.memory_format(x)), hidden, rows


def _fake_backward(dy, x, hidden, rows, weight, shortcut_weight, training, geometry, shortcut, needs, backend):
    need_x, need_weight, need_bias, need_bn, need_shortcut = schedule.split_needs(needs, len(weight))

    def per_channel(like: list[Tensor], sizes: list[int], need: list[bool]) -> list[Tensor]:
        return [t.new_empty(size if wanted else 0) for t, size, wanted in zip(like, sizes, need, strict=True)]

    none = dy.new_empty
    dx = x.new_empty(x.shape).to(memory_format=schedule.memory_format(x)) if need_x else none(0)
    dweight = [torch.empty_like(w) if wanted else none(0) for w, wanted in zip(weight, need_weight, strict=True)]
    dbias = per_channel(weight, [w.size(0) for w in weight], need_bias)
    dbn_weight, dbn_bias = (per_channel(rows, [r.size(1) for r in rows], need_bn) for _ in range(2))
    dshortcut = torch.empty_like(shortcut_weight) if need_shortcut else none(0)
    return dx, dweight, dbias, dbn_weight, dbn_bias, dshortcut


@dataclass(slots=True)
class Facts:
    """What an operator is told beside the tensors that can have a gradient."""

    training: list[bool]
    eps: list[float]
    geometry: list[int]
    shortcut: str
    backend: str
    running_mean: list[Tensor] = field(default_factory=list)
    running_var: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)  # left here by the eager node


def _operators(backend: str) -> tuple[Any, Any]:
    ops = torch.ops.fused_preact
    if backend in TABLES:
        return ops.composed_forward.default, ops.composed_backward.default
    return ops.forward.default, ops.backward.default


def _call_forward(facts: Facts, x, residual, weight, bias, bn_weight, bn_bias, shortcut_weight):
    operator, _ = _operators(facts.backend)
    tensors = x, residual, weight, bias, bn_weight, bn_bias, facts.running_mean, facts.running_var, shortcut_weight
    return operator(*tensors, facts.training, facts.eps, facts.geometry, facts.shortcut, facts.backend)


def _save(ctx, facts: Facts, x, hidden, rows, weight, shortcut_weight, bn_weight, bn_bias) -> None:
    """Keep for backward: x, the raw convolution outputs, five rows a batch norm, the weights, and nothing else."""
    ctx.save_for_backward(x, *hidden, *rows, *weight, shortcut_weight)
    ctx.facts = facts.training, facts.geometry, facts.shortcut, facts.backend
    ctx.bn_dtypes = [t.dtype for t in bn_weight], [t.dtype for t in bn_bias]


def _call_backward(ctx, dy: Tensor, needs: list[bool]):
    x, *saved, shortcut_weight = ctx.saved_tensors
    training, geometry, shortcut, backend = ctx.facts
    n = len(training)
    _, operator = _operators(backend)
    tensors = dy, x, saved[: n - 1], saved[n - 1 : 2 * n - 1], saved[2 * n - 1 :], shortcut_weight
    dx, dweight, dbias, dgamma, dbeta, dshortcut = operator(*tensors, training, geometry, shortcut, needs, backend)
    for grads, dtypes in zip((dgamma, dbeta), ctx.bn_dtypes, strict=True):
        for i, dtype in enumerate(dtypes):
            if grads[i].dtype != dtype:
                grads[i] = grads[i].to(dtype)
    return dx, dweight, dbias, dgamma, dbeta, dshortcut


class _Chain(torch.autograd.Function):
    """The chain as one node of flat tensors: after the shortcut's weight n weights, n gammas, n betas, the biases."""

    @staticmethod
    def forward(ctx, facts: Facts, x: Tensor, residual: Tensor | None, shortcut_weight: Tensor | None, *flat: Tensor):
        n = len(facts.training)
        weight, bn_weight, bn_bias, bias = flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], flat[3 * n :]
        with torch._C._AutoDispatchBelowAutograd():  # this node is the operator's autograd
            y, hidden, rows = _call_forward(facts, x, residual, weight, bias, bn_weight, bn_bias, shortcut_weight)
        _save(ctx, facts, x, hidden, rows, weight, shortcut_weight, bn_weight, bn_bias)
        facts.rows = rows
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        _, need_x, need_residual, need_shortcut, *flat = ctx.needs_input_grad
        n = len(ctx.facts[0])
        need_bn = [gamma or beta for gamma, beta in zip(flat[n : 2 * n], flat[2 * n : 3 * n], strict=True)]
        needs = [need_x, *flat[:n], *(flat[3 * n :] or [False] * n), *need_bn, need_shortcut]
        if torch.is_grad_enabled():  # create_graph=True: the operator's own autograd refuses a second time
            grads = _call_backward(ctx, dy, needs)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = _call_backward(ctx, dy, needs)
        dx, dweight, dbias, dgamma, dbeta, dshortcut = grads
        return (
            None,
            dx if need_x else None,
            dy if need_residual else None,
            dshortcut if need_shortcut else None,
            *(grad if need else None for grad, need in zip([*dweight, *dgamma, *dbeta, *dbias], flat, strict=False)),
        )


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, bn_weight, bn_bias, running_mean, _, shortcut_weight, *rest = inputs
    _, hidden, rows = output
    _save(ctx, Facts(*rest), x, hidden, rows, weight, shortcut_weight, bn_weight, bn_bias)
    ctx.given = residual is not None, len(bias), len(running_mean), shortcut_weight is not None


def _formula(ctx, dy: Tensor, _hidden, _rows):
    """Gradients of the operators' arguments, for what traces the operator itself, as torch.compile does."""
    n, (residual, biases, running, projection) = len(ctx.facts[0]), ctx.given
    needs = [True] * (n + 1) + [biases > 0] * n + [True] * n + [projection]
    dx, dweight, dbias, dgamma, dbeta, dshortcut = _call_backward(ctx, dy, needs)
    tensors = dx, dy.clone() if residual else None, dweight, dbias[:biases], dgamma, dbeta
    constants = [None] * running, [None] * running
    return *tensors, *constants, dshortcut if projection else None, None, None, None, None, None


def _twice(ctx, *_grads) -> None:
    raise RuntimeError(
        "fused_preact: a fused call cannot be differentiated twice; for second derivatives use backend='eager', "
        "the same layers one after the other"
    )


def _register(forward: str, backward: str) -> None:
    for name, fake in (forward, _fake_forward), (backward, _fake_backward):
        torch.library.register_fake(f"fused_preact::{name}", fake, lib=_library)
    torch.library.register_autograd(f"fused_preact::{forward}", _formula, setup_context=_setup_context, lib=_library)
    torch.library.register_autograd(f"fused_preact::{backward}", _twice, lib=_library)


_library.impl("composed_forward", _composed_forward, "CompositeExplicitAutograd")
_library.impl("composed_backward", _composed_backward, "CompositeExplicitAutograd")
_register("composed_forward", "composed_backward")
if _extension.unavailable is None:
    _register("forward", "backward")


def chain(
    facts: Facts,
    x: Tensor,
    residual: Tensor | None,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    bn_weight: Sequence[Tensor],
    bn_bias: Sequence[Tensor],
    shortcut_weight: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Run a chain whose arguments have been checked: (y, rows), of which y carries the gradient."""
    if torch.compiler.is_compiling():
        y, _, rows = _call_forward(facts, x, residual, weight, bias, bn_weight, bn_bias, shortcut_weight)
        return y, [row.detach() for row in rows]
    # The generic autograd of an operator with lists of tensors costs ten times what this node does.
    y = _Chain.apply(facts, x, residual, shortcut_weight, *weight, *bn_weight, *bn_bias, *bias)
    return y, facts.rows
