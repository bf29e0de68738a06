"""The operators of the namespace ``torch.ops.fused_preact``, their fake kernels, and the autograd node of a chain.

``forward`` and ``backward`` are written in C++ (csrc/ops.cpp), ``composed_forward`` and ``composed_backward`` in Python, over the
tables `reference` and `library`; both pairs have one signature, which docs/design.md explains. `chain` is what the rest of the
package calls.
"""

from __future__ import annotations

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
    "(Tensor dy, Tensor x, Tensor[] hidden, Tensor[] rows, Tensor[] weight, Tensor? shortcut_weight, bool[] training, "
    "int[] geometry, str shortcut, bool[] needs, str backend) -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor)"
)
TABLES = {"reference": reference, "library": library}

_library = torch.library.Library("fused_preact", "FRAGMENT")
_library.define("composed_forward" + FORWARD)
_library.define("composed_backward" + BACKWARD)


def _composed_forward(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *args, backend = args
    return schedule.forward(TABLES[backend], *args)


def _composed_backward(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    *args, backend = args
    return schedule.backward(TABLES[backend], *args)


def _fake_forward(
    x, residual, weight, bias, bn_weight, bn_bias, running_mean, running_var, shortcut_weight, training, eps, geometry, shortcut,
    backend,
):  # fmt: skip
    n, shapes = len(weight), [x.shape]
    accumulation = schedule.accumulation_type(x.dtype)
    for conv, w in zip(schedule.convolutions(geometry), weight, strict=False):
        shapes.append(conv.output_shape(shapes[-1], w.shape))
    hidden = [x.new_empty(shape).to(memory_format=torch.channels_last) for shape in shapes[1:-1]]
    rows = [x.new_empty((5, shape[1]), dtype=accumulation) for shape in shapes[:n]]
    return x.new_empty(shapes[n]).to(memory_format=schedule.memory_format(x)), hidden, rows


def _fake_backward(dy, x, hidden, rows, weight, shortcut_weight, training, geometry, shortcut, needs, backend):
    need_x, need_weight, need_bias, need_bn, need_shortcut = schedule.split_needs(needs, len(weight))
    dx = x.new_empty(x.shape if need_x else 0)
    dx = dx.to(memory_format=schedule.memory_format(x)) if need_x else dx
    dweight = [torch.empty_like(w) if need else dy.new_empty(0) for w, need in zip(weight, need_weight, strict=True)]
    dbias = [dy.new_empty(w.size(0) if need else 0) for w, need in zip(weight, need_bias, strict=True)]
    dbn_weight, dbn_bias = (
        [r.new_empty(r.size(1) if need else 0) for r, need in zip(rows, need_bn, strict=True)] for _ in range(2)
    )
    dshortcut = torch.empty_like(shortcut_weight) if need_shortcut else dy.new_empty(0)
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
    return operator(
        x, residual, weight, bias, bn_weight, bn_bias, facts.running_mean, facts.running_var, shortcut_weight,
        facts.training, facts.eps, facts.geometry, facts.shortcut, facts.backend,
    )  # fmt: skip


def _save(ctx, facts: Facts, x, hidden, rows, weight, shortcut_weight, bn_weight, bn_bias) -> None:
    """Keep for backward: x, the raw convolution outputs, five rows a batch norm, the weights, and nothing else."""
    ctx.save_for_backward(x, *hidden, *rows, *weight, shortcut_weight)
    ctx.facts = facts.training, facts.geometry, facts.shortcut, facts.backend
    ctx.bn_dtypes = [t.dtype for t in bn_weight], [t.dtype for t in bn_bias]


def _call_backward(ctx, dy: Tensor, needs: list[bool]) -> tuple[Any, ...]:
    x, *saved, shortcut_weight = ctx.saved_tensors
    training, geometry, shortcut, backend = ctx.facts
    n = len(training)
    _, operator = _operators(backend)
    dx, dweight, dbias, *dbn, dshortcut = operator(
        dy, x, saved[: n - 1], saved[n - 1 : 2 * n - 1], saved[2 * n - 1 :], shortcut_weight, training, geometry, shortcut,
        needs, backend,
    )  # fmt: skip
    dbn = [[g.to(dtype) for g, dtype in zip(gs, dtypes, strict=True)] for gs, dtypes in zip(dbn, ctx.bn_dtypes, strict=True)]
    return dx, dweight, dbias, *dbn, dshortcut


class _Chain(torch.autograd.Function):
    """The chain as one node of flat tensors: residual and shortcut weight may be None, then n weights, n gammas, n betas, biases."""

    @staticmethod
    def forward(ctx, facts: Facts, x: Tensor, residual: Tensor | None, shortcut_weight: Tensor | None, *flat: Tensor) -> Tensor:
        n = len(facts.training)
        weight, bn_weight, bn_bias, bias = flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], flat[3 * n :]
        y, hidden, rows = _call_forward(facts, x, residual, weight, bias, bn_weight, bn_bias, shortcut_weight)
        _save(ctx, facts, x, hidden, rows, weight, shortcut_weight, bn_weight, bn_bias)
        facts.rows = rows
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, need_x, need_residual, need_shortcut, *flat = ctx.needs_input_grad
        n = len(ctx.facts[0])
        need_bn = [gamma or beta for gamma, beta in zip(flat[n : 2 * n], flat[2 * n : 3 * n], strict=True)]
        need_bias = flat[3 * n :] or [False] * n
        needs = [need_x, *flat[:n], *need_bias, *need_bn, need_shortcut]
        dx, dweight, dbias, dgamma, dbeta, dshortcut = _call_backward(ctx, dy, needs)
        grads = [*dweight, *dgamma, *dbeta, *dbias][: len(flat)]
        return (
            None,
            dx if need_x else None,
            dy if need_residual else None,
            dshortcut if need_shortcut else None,
            *(grad if need else None for grad, need in zip(grads, flat, strict=True)),
        )


def _setup_context(ctx, inputs, output) -> None:
    (x, residual, weight, bias, bn_weight, bn_bias, running_mean, running_var, shortcut_weight, training, eps, geometry, shortcut,
     backend) = inputs  # fmt: skip
    _, hidden, rows = output
    facts = Facts(training, eps, geometry, shortcut, backend)
    _save(ctx, facts, x, hidden, rows, weight, shortcut_weight, bn_weight, bn_bias)
    ctx.biases, ctx.residual, ctx.running = len(bias), residual is not None, len(running_mean)


def _formula(ctx, dy: Tensor, _hidden, _rows) -> tuple[Any, ...]:
    """Gradients of the operators' arguments, for callers that trace the operator itself (torch.compile, torch.export)."""
    n, has_shortcut = len(ctx.facts[0]), ctx.facts[2] in ("activated", "raw")
    needs = [True] * (n + 1) + [ctx.biases > 0] * n + [True] * n + [has_shortcut]
    dx, dweight, dbias, dgamma, dbeta, dshortcut = _call_backward(ctx, dy, needs)
    return (
        dx, dy.clone() if ctx.residual else None, dweight, dbias[: ctx.biases], dgamma, dbeta, [None] * ctx.running,
        [None] * ctx.running, dshortcut if has_shortcut else None, None, None, None, None, None,
    )  # fmt: skip


def _twice(ctx, *_grads) -> None:
    raise RuntimeError(
        "fused_preact: the fused chain cannot be differentiated twice; for a second derivative use backend='eager' "
        "(the same layers, one after the other) in this module"
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
