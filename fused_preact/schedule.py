"""Forward and backward of a run of blocks, each a chain of BN-ReLU-Conv units, over a table of kernels.

A table is a module with the functions ``forward``, ``dgrad``, ``wgrad``, ``statistics``, ``running``, ``dx`` and
``join``: `reference` and `library` are two. csrc/schedule.cpp is the same text for the tables that are written in C++;
docs/design.md states both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .kernels import Activation, Affine, Conv, Gradient, accumulation_type, memory_format

SHORTCUTS = ("none", "identity", "activated", "raw")  # in the order of their codes
MEMORY = ("fast", "lean", "min", "none")  # likewise; "none" where there is no backward
REPEATING = 32
"""In mode "fast" each 32nd block, if it has several hidden tensors, does not keep the first: docs/memory.md.

csrc/schedule.h has the same number.
"""


@dataclass(slots=True)
class Chain:
    """One block: its units from ``first`` on, and a shortcut whose convolution, if it is one, is the last of all."""

    first: int
    units: int
    shortcut: str
    conv: list[Conv]
    weight: list[Tensor]

    @property
    def projects(self) -> bool:
        """Whether the shortcut is a convolution."""
        return len(self.conv) > self.units


def chains(weight, shortcut_weight, geometry, units, shortcut) -> list[Chain]:
    """The blocks that the operators' arguments of these names describe."""
    blocks, first = [], 0
    numbers, projections = iter(geometry), iter(shortcut_weight)
    for count, kind in zip(units, (SHORTCUTS[code] for code in shortcut), strict=True):
        weights = list(weight[first : first + count])
        if kind in ("activated", "raw"):
            weights.append(next(projections))
        convs = [Conv(*islice(numbers, len(Conv._fields))) for _ in weights]
        blocks.append(Chain(first, count, kind, convs, weights))
        first += count
    return blocks


@dataclass(slots=True)
class Stage:
    """A run of blocks. Convolutions compute in ``dtype``; the stream from block to block has the dtype of x.

    ``bias`` is empty or has one for each unit; ``memory`` is one of MEMORY.
    """

    dtype: torch.dtype
    memory: str
    blocks: list[Chain]
    training: Sequence[bool]
    bias: list[Tensor]

    @classmethod
    def parse(cls, weight, bias, shortcut_weight, training, geometry, units, shortcut, dtype, memory) -> Stage:
        """The stage that the operators' arguments of these names describe."""
        weight, shortcut_weight, bias = ([t.to(dtype) for t in ts] for ts in (weight, shortcut_weight, bias))
        blocks = chains(weight, shortcut_weight, geometry, units, shortcut)
        return cls(dtype, MEMORY[memory], blocks, training, bias)

    def keeps_input(self, block: int) -> bool:
        """Whether a later block's input is kept; else it is the block's output minus its branch."""
        chain = self.blocks[block]
        return self.memory == "fast" or (self.memory != "none" and (chain.shortcut != "identity" or chain.units < 2))

    def keeps_hidden(self, block: int, unit: int) -> bool:
        """Whether the output of a unit that is not its block's last is kept; else it is computed again."""
        units = self.blocks[block].units
        if self.memory == "fast":
            return block % REPEATING != REPEATING - 1 or unit > 0 or units < 3
        return self.memory == "lean" or (self.memory == "min" and unit == units - 2)

    def needs_y(self) -> bool:
        """Whether backward reads what forward returned."""
        return len(self.blocks) > 1 and not self.keeps_input(len(self.blocks) - 1)

    def bias_of(self, unit: int) -> Tensor | None:
        """Bias of a unit, if it has one."""
        return self.bias[unit] if self.bias else None


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _Forward:
    def __init__(self, kernels, stage, bn_weight, bn_bias, running_mean, running_var, eps) -> None:
        dtype = accumulation_type(stage.dtype)
        self.kernels, self.stage = kernels, stage
        self.affine = [Affine(g.to(dtype), b.to(dtype), e) for g, b, e in zip(bn_weight, bn_bias, eps, strict=True)]
        self.running = [t.to(dtype) for t in running_mean], [t.to(dtype) for t in running_var]
        self.kept: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.narrowed: Tensor | None = None  # the stream in the type of the convolutions

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        stream = x
        for k in range(len(self.stage.blocks)):
            if k > 0 and self.stage.keeps_input(k):
                self.kept.append(stream)
            stream = self.block(k, stream, residual)
        return stream

    def block(self, k: int, stream: Tensor, residual: Tensor | None) -> Tensor:
        stage, dtype, chain = self.stage, self.stage.dtype, self.stage.blocks[k]
        x = stream.to(dtype) if self.narrowed is None else self.narrowed
        # The batch norm in front has its rows from the block before, unless there is none that read the same values.
        if len(self.rows) == chain.first:
            self.rows.append(self.norm_rows(chain.first, x))
        a = Activation(x, self.rows[chain.first])
        across = residual
        if chain.shortcut == "identity":
            across = stream
        elif chain.shortcut != "none":
            source = a if chain.shortcut == "activated" else Activation(x, None)
            across, _ = self.kernels.forward(chain.conv[-1], source, chain.weight[-1], None, None, None)
        # A stream of another type than the convolutions' is joined apart.
        apart = across is not None and across.dtype != dtype
        h = x
        for i in range(chain.units):
            last, unit = i == chain.units - 1, chain.first + i
            if i > 0:
                a = Activation(h, self.rows[unit])
            following = None if last and apart else self.affine_after(unit)
            added = across if last and not apart else None
            h, rows = self.kernels.forward(chain.conv[i], a, chain.weight[i], stage.bias_of(unit), added, following)
            if rows is not None:
                self.rows.append(rows)
            elif not last:
                self.rows.append(self.norm_rows(unit + 1, h))
            if not last and stage.keeps_hidden(k, i):
                self.kept.append(h)
        is_last = k + 1 == len(stage.blocks)
        if not apart:
            self.narrowed = None if is_last else h
            return h.to(stream.dtype)
        following = self.affine_after(chain.first + chain.units - 1)
        stream, self.narrowed, rows = self.kernels.join(across, Gradient(h), False, not is_last, following)
        if rows is not None:
            self.rows.append(rows)
        return stream

    def affine_after(self, unit: int) -> Affine | None:
        """The batch norm that reads what a unit gives, where it uses batch statistics."""
        return self.affine[unit + 1] if unit + 1 < len(self.affine) and self.stage.training[unit + 1] else None

    def norm_rows(self, unit: int, x: Tensor) -> Tensor:
        if self.stage.training[unit]:
            return self.kernels.statistics(x, self.affine[unit])
        mean, var = self.running
        return self.kernels.running(mean[unit], var[unit], self.affine[unit])


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
    shortcut_weight: Sequence[Tensor],
    training: Sequence[bool],
    eps: Sequence[float],
    geometry: Sequence[int],
    units: Sequence[int],
    shortcut: Sequence[int],
    dtype: torch.dtype,
    memory: int,
    _tf32: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(y, kept, rows) of the stage; see docs/design.md for the arguments."""
    stage = Stage.parse(weight, bias, shortcut_weight, training, geometry, units, shortcut, dtype, memory)
    run = _Forward(kernels, stage, bn_weight, bn_bias, running_mean, running_var, eps)
    y = run.run(_dense(x), residual)
    return y.contiguous(memory_format=memory_format(x)), run.kept, run.rows


@dataclass(slots=True)
class Needs:
    """Which gradients are wanted: of x, by unit of the weights, biases and batch norms, by block of the projections."""

    x: bool
    weight: Sequence[bool]
    bias: Sequence[bool]
    bn: Sequence[bool]
    shortcut: Sequence[bool]

    @classmethod
    def parse(cls, needs: Sequence[bool], stage: Stage) -> Needs:
        """The operators' ``needs``, which tell of those alone that have a bias or a projection."""
        n, values = len(stage.training), iter(needs)
        x, weight, bias, bn = next(values), *(list(islice(values, size)) for size in (n, len(stage.bias), n))
        return cls(x, weight, bias or [False] * n, bn, [chain.projects and next(values) for chain in stage.blocks])


class _Backward:
    def __init__(self, kernels, stage, kept, rows, needs) -> None:
        self.kernels, self.stage, self.rows, self.needs = kernels, stage, rows, needs
        self.kept = [_dense(t) for t in kept]  # a hook of saved tensors may have laid them out anew
        n, empty = len(stage.training), rows[0].new_empty
        self.dweight = [empty(0) for _ in range(n)]
        self.dbias = [empty(0) for _ in stage.bias]
        self.dshortcut = {k: empty(0) for k, chain in enumerate(stage.blocks) if chain.projects}
        self.dbn_weight, self.dbn_bias = [empty(0) for _ in range(n)], [empty(0) for _ in range(n)]
        self.narrowed: Tensor | None = None  # the stream's gradient in the type of the convolutions

    def run(self, dy: Tensor, x: Tensor, y: Tensor | None) -> Tensor:
        for k in reversed(range(len(self.stage.blocks))):
            need_x = self.needs.x or self.wanted_before(k)
            if not need_x and not self.wanted_before(k + 1):
                break
            y, inputs = self.restore(k, x, y)
            dy = self.block(k, dy, inputs, need_x)
        return dy if self.needs.x else self.rows[0].new_empty(0, dtype=x.dtype)

    def wanted_before(self, k: int) -> bool:
        """Whether a parameter of the blocks before block k wants a gradient."""
        blocks, needs = self.stage.blocks, self.needs
        end = blocks[k].first if k < len(blocks) else len(self.stage.training)
        return any(any(flags[:end]) for flags in (needs.weight, needs.bias, needs.bn)) or any(needs.shortcut[:k])

    def restore(self, k: int, x: Tensor, y: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The stream in front of block k, and what each of its units read; y is the stream behind."""
        stage, chain = self.stage, self.stage.blocks[k]
        hidden = [self.kept.pop() if stage.keeps_hidden(k, i) else None for i in reversed(range(chain.units - 1))]
        narrowed = None
        if k > 0:
            x, narrowed = (self.kept.pop(), None) if stage.keeps_input(k) else self.rebuild(chain, y, hidden[0])
        inputs = [x.to(stage.dtype) if narrowed is None else narrowed]
        for i, h in enumerate(reversed(hidden)):
            inputs.append(self.convolve(chain, i, inputs[i]) if h is None else h)
        return x, inputs

    def rebuild(self, chain: Chain, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """x = y - conv(a, W) - bias for the last convolution of a block whose shortcut is the identity.

        Where the convolutions have another type, x in it too.
        """
        branch = self.convolve(chain, chain.units - 1, h)
        if y.dtype == branch.dtype:
            return y - branch, None
        x, narrowed, _ = self.kernels.join(y, Gradient(branch), True, True, None)
        return x, narrowed

    def convolve(self, chain: Chain, i: int, h: Tensor) -> Tensor:
        unit = chain.first + i
        a, bias = Activation(h, self.rows[unit]), self.stage.bias_of(unit)
        return self.kernels.forward(chain.conv[i], a, chain.weight[i], bias, None, None)[0]

    def block(self, k: int, dstream: Tensor, inputs: list[Tensor], need_x: bool) -> Tensor:
        """The gradient of the stream in front of block k from the one behind it, where it is needed."""
        kernels, needs, chain = self.kernels, self.needs, self.stage.blocks[k]
        x, dy = inputs[0], dstream.to(self.stage.dtype) if self.narrowed is None else self.narrowed

        def shortcut_dgrad() -> Tensor:
            return kernels.dgrad(chain.conv[-1], Gradient(dy), chain.weight[-1], Activation(x, None), None, False).g

        def shortcut_wgrad(a: Activation) -> None:
            if needs.shortcut[k]:
                self.dshortcut[k], _ = kernels.wgrad(chain.conv[-1], Gradient(dy), a, chain.weight[-1], False)

        g = Gradient(dy)
        for i in reversed(range(chain.units)):
            wanted, add = need_x or self.wanted_within(chain, i), None
            if i == 0 and chain.shortcut == "activated":
                shortcut_wgrad(Activation(x, self.rows[chain.first]))
                if wanted:
                    add = shortcut_dgrad()
            g = self.unit(chain, i, g, Activation(inputs[i], self.rows[chain.first + i]), add, wanted)
        if chain.shortcut == "raw":
            shortcut_wgrad(Activation(x, None))
        if not need_x:
            return dstream
        identity, apart = chain.shortcut == "identity", dstream.dtype != self.stage.dtype
        if identity and apart:
            dstream, self.narrowed, _ = kernels.join(dstream, g, False, k > 0, None)
            return dstream
        dx = kernels.dx(g, dy if identity else shortcut_dgrad() if chain.shortcut == "raw" else None)
        self.narrowed = dx if apart and k > 0 else None
        return dx.to(dstream.dtype)

    def wanted_within(self, chain: Chain, i: int) -> bool:
        """Whether a parameter of the chain at or before the batch norm of unit i wants a gradient."""
        unit, needs = chain.first + i, self.needs
        before = slice(chain.first, unit)
        return needs.bn[unit] or any(any(flags[before]) for flags in (needs.weight, needs.bias, needs.bn))

    def unit(self, chain: Chain, i: int, dy: Gradient, a: Activation, add: Tensor | None, wanted: bool) -> Gradient:
        """The gradients of a unit's parameters, and, where ``wanted``, that of what its ReLU read."""
        kernels, needs, unit = self.kernels, self.needs, chain.first + i
        conv, weight = chain.conv[i], chain.weight[i]
        if needs.weight[unit] or needs.bias[unit]:
            dweight, dbias = kernels.wgrad(conv, dy, a, weight, needs.bias[unit])
            if needs.weight[unit]:
                self.dweight[unit] = dweight
            if needs.bias[unit]:
                self.dbias[unit] = dbias
        if not wanted:
            return dy
        g = kernels.dgrad(conv, dy, weight, a, add, self.stage.training[unit])
        if needs.bn[unit]:
            self.dbn_weight[unit], self.dbn_bias[unit], *_ = g.grad
        return g


def backward(
    kernels: Any,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    kept: Sequence[Tensor],
    rows: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    shortcut_weight: Sequence[Tensor],
    training: Sequence[bool],
    geometry: Sequence[int],
    units: Sequence[int],
    shortcut: Sequence[int],
    dtype: torch.dtype,
    memory: int,
    _tf32: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """(dx, dweight, dbias, dbn_weight, dbn_bias, dshortcut_weight) of the stage; empty where ``needs`` says no."""
    stage = Stage.parse(weight, bias, shortcut_weight, training, geometry, units, shortcut, dtype, memory)
    run = _Backward(kernels, stage, kept, rows, Needs.parse(needs, stage))
    dx = run.run(_dense(dy), _dense(x), None if y is None else _dense(y))
    if needs[0]:
        dx = dx.contiguous(memory_format=memory_format(x))
    grads = run.dweight, run.dbias, list(run.dshortcut.values())
    dweight, dbias, dshortcut = map(_typed, grads, (weight, bias, shortcut_weight))
    return dx, dweight, dbias, run.dbn_weight, run.dbn_bias, dshortcut


def _typed(grads: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in the type and the strides of what they are the gradient of; those that nobody wants stay empty."""
    return [
        torch.empty_like(p).copy_(grad) if grad.shape == p.shape and grad.stride() != p.stride() else grad.to(p.dtype)
        for grad, p in zip(grads, parameters, strict=True)
    ]
