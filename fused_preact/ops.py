"""The operators of ``torch.ops.fused_preact``, their fake kernels, and the autograd node of a stage.

``forward`` and ``backward`` are implemented in C++ (csrc/ops.cpp); ``reference_forward``, ``library_forward``,
``triton_forward`` and their backward are `schedule` over a table in Python. All pairs have one signature, which
docs/design.md explains. `stage` is what the rest of the package calls.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _extension, backends, schedule
from .kernels import accumulation_type, memory_format
from .units import Block

# No strings: torch's stable conversion of a string argument leaks it.
FORWARD = (
    "(Tensor x, Tensor? residual, Tensor[] weight, Tensor[] bias, Tensor[] bn_weight, Tensor[] bn_bias, "
    "Tensor[] running_mean, Tensor[] running_var, Tensor[] shortcut_weight, bool[] training, float[] eps, "
    "int[] geometry, int[] units, int[] shortcut, ScalarType dtype, int memory, bool tf32) "
    "-> (Tensor y, Tensor[] kept, Tensor[] rows)"
)
BACKWARD = (
    "(Tensor dy, Tensor x, Tensor? y, Tensor[] kept, Tensor[] rows, Tensor[] weight, Tensor[] bias, "
    "Tensor[] shortcut_weight, bool[] training, int[] geometry, int[] units, int[] shortcut, ScalarType dtype, "
    "int memory, bool tf32, bool[] needs) -> (Tensor dx, Tensor[] dweight, Tensor[] dbias, Tensor[] dbn_weight, "
    "Tensor[] dbn_bias, Tensor[] dshortcut_weight)"
)
TABLES = {"reference": ".reference", "library": ".library", "triton": ".triton.table"}
OPERATORS: dict[str, tuple[Any, Any]] = {}
"""Forward and backward of each backend that is built."""

_library = torch.library.Library("fused_preact", "FRAGMENT")


def table(backend: str) -> Any:
    """The kernels of a backend in Python: a module that is imported only here, for Triton may be missing."""
    return importlib.import_module(TABLES[backend], __package__)


def _over(backend: str, run: Callable[..., Any], *args: Any) -> Any:
    return run(table(backend), *args)


class Arguments(NamedTuple):
    """The tensors of a stage as the operators take them: lists by unit, and the weights of projections."""

    weight: list[Tensor]
    bias: list[Tensor | None]  # empty where no unit has one
    bn_weight: list[Tensor | None]
    bn_bias: list[Tensor | None]
    running_mean: list[Tensor | None]  # empty where no unit reads it
    running_var: list[Tensor | None]
    shortcut_weight: list[Tensor]

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> Arguments:
        """Those of blocks; where a shortcut has a bias, a sum has a graph behind it."""
        units = [unit for block in blocks for unit in block.with_one_bias()]
        weight, bias, bn_weight, bn_bias, *running = map(list, zip(*(unit[:6] for unit in units), strict=True))
        if all(b is None for b in bias):
            bias = []
        if all(unit.batch for unit in units):
            running = [], []
        projections = [block.shortcut.weight for block in blocks if block.shortcut.weight is not None]
        return cls(weight, bias, bn_weight, bn_bias, *running, projections)

    def filled(self, x: Tensor, channels: Sequence[int]) -> Arguments:
        """With tensors like x, of so many channels for each unit, in the place of None."""
        weight, bias, bn_weight, bn_bias, *running, projections = self
        bn_weight = [x.new_ones(C) if t is None else t for t, C in zip(bn_weight, channels, strict=True)]
        bn_bias = [x.new_zeros(C) if t is None else t for t, C in zip(bn_bias, channels, strict=True)]
        bias = [x.new_zeros(weight[i].size(0)) if t is None else t for i, t in enumerate(bias)]
        # Those of training units are not read.
        running = ([bn_weight[i] if t is None else t for i, t in enumerate(ts)] for ts in running)
        return Arguments(weight, bias, bn_weight, bn_bias, *running, projections)

    def parameters(self) -> tuple[Tensor, ...]:
        """Those that may have a gradient, in the order in which backward gives them."""
        return *self.weight, *self.bias, *self.bn_weight, *self.bn_bias, *self.shortcut_weight


class Facts(NamedTuple):
    """What an operator is told beside its tensors, in the order of its arguments."""

    training: list[bool]
    eps: list[float]
    geometry: list[int]
    units: list[int]  # of each block
    shortcut: list[int]  # of each block, its index in schedule.SHORTCUTS
    dtype: torch.dtype
    memory: int  # index in schedule.MEMORY
    tf32: bool  # multiply float32 as TF32; heard by `cuda` alone, for the tables in Python hear torch's switch

    def of_backward(self) -> tuple[Any, ...]:
        """Those that backward is told: all but eps."""
        return self.training, *self[2:]

    def stage(self, weight: Sequence[Tensor], shortcut_weight: Sequence[Tensor]) -> schedule.Stage:
        """The stage, of weights of any type."""
        return schedule.Stage(
            self.dtype, schedule.MEMORY[self.memory],
            schedule.chains(weight, shortcut_weight, self.geometry, self.units, self.shortcut), self.training, [],
        )  # fmt: skip


def _fake_forward(x, residual, weight, bias, bn_weight, bn_bias, running_mean, running_var, shortcut_weight, *facts):
    stage = Facts(*facts).stage(weight, shortcut_weight)
    shape, kept, rows = x.shape, [], []

    def activation(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return x.new_empty(shape, dtype=dtype).to(memory_format=torch.channels_last)

    for k, block in enumerate(stage.blocks):
        if k > 0 and stage.keeps_input(k):
            kept.append(activation(shape, x.dtype))
        for i in range(block.units):
            rows.append(x.new_empty((5, shape[1]), dtype=accumulation_type(stage.dtype)))
            shape = block.conv[i].output_shape(shape, block.weight[i].shape)
            if i < block.units - 1 and stage.keeps_hidden(k, i):
                kept.append(activation(shape, stage.dtype))
    return x.new_empty(shape).to(memory_format=memory_format(x)), kept, rows


def _fake_backward(dy, x, y, kept, rows, weight, bias, shortcut_weight, *facts):
    needs = iter(facts[-1])

    def like(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.empty_like(t) if next(needs) else t.new_empty(0) for t in tensors]

    dx = x.new_empty(x.shape).to(memory_format=memory_format(x)) if next(needs) else x.new_empty(0)
    dweight, dbias, sizes = like(weight), like(bias), [row.size(1) if next(needs) else 0 for row in rows]
    dbn_weight, dbn_bias = ([row.new_empty(n) for row, n in zip(rows, sizes, strict=True)] for _ in range(2))
    return dx, dweight, dbias, dbn_weight, dbn_bias, like(shortcut_weight)


def _save(ctx, backend: str, facts: Facts, arguments: Arguments, x, y, kept, rows, parts=()) -> None:
    """Keep for backward x or its parts, what ``memory`` says, the rows and the parameters; y where it is read."""
    weight, bias, *_, shortcut_weight = arguments
    y = y if facts.memory > 0 and facts.stage(weight, shortcut_weight).needs_y() else None
    lists = parts or [x], [y], kept, rows, weight, bias, shortcut_weight
    ctx.save_for_backward(*itertools.chain(*lists))
    ctx.counts = [len(tensors) for tensors in lists]
    ctx.backend, ctx.facts, ctx.stream = backend, facts, x.dtype


def _cut(flat: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """Lists of so many values each."""
    values = iter(flat)
    return [list(itertools.islice(values, count)) for count in counts]


def _call_backward(ctx, saved: Sequence[Tensor], dy: Tensor, need_x: bool, wanted: Sequence[list[bool]]):
    """What the operator returns, for what is wanted of weights, biases, gammas, betas and projections.

    Those of gamma and beta are in the accumulation type: autograd casts them where the parameters are of another.
    """
    parts, [y], *lists = _cut(saved, ctx.counts)
    x = (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).to(ctx.stream)
    weight, bias, gamma, beta, shortcut = wanted
    norm = [either or other for either, other in zip(gamma, beta, strict=True)]
    _, operator = OPERATORS[ctx.backend]
    needs = [need_x, *weight, *bias, *norm, *shortcut]
    if not backends.autocasts(x):
        return operator(dy, x, y, *lists, *ctx.facts.of_backward(), needs)
    with torch.autocast(x.device.type, enabled=False):  # what forward did not keep is made again in its own type
        return operator(dy, x, y, *lists, *ctx.facts.of_backward(), needs)


class _Once(torch.autograd.Function):
    """Gradients as they are, which refuse to be differentiated.

    The first ``count`` tensors are what they depend on: autograd runs a node where one of these leads to what it is
    asked about, and would take a gradient that leads nowhere for a constant.
    """

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor):
        grads = tensors[count:]
        ctx.mark_dirty(*grads)  # not views, so that they may be changed in place as any gradient may
        return grads

    @staticmethod
    def backward(ctx, *grads):
        _twice(ctx)


def _needed(ctx) -> list[bool]:
    """Which gradients of x, the residual and the flat tensors this backward is to make.

    ``needs_input_grad`` says which tensors require one, also where `torch.autograd.grad` or ``backward(inputs=...)``
    asks for a few, as an attack does that wants the gradient of the images alone.
    """
    needs = ctx.needs_input_grad[5:]
    if torch.compiler.is_compiling():
        return [*needs]
    nodes = [node for node, _ in ctx.next_functions]  # of the inputs that are tensors
    if len(nodes) < len(needs):
        nodes.insert(1, None)  # no residual
    return [need and _is_asked_for(node) for need, node in zip(needs, nodes, strict=True)]


def _is_asked_for(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that torch.autograd.grad was asked about, to which no gradient is added up
        return True


class _Stage(torch.autograd.Function):
    """The stage as one node of flat tensors: n weights, the biases, n gammas, n betas, the projections' weights.

    ``found`` is a list that the rows are added to, and ``parts`` what is kept in the place of x.
    """

    @staticmethod
    def forward(ctx, backend: str, facts: Facts, arguments: Arguments, found, parts, x, residual, *_flat: Tensor):
        forward, _ = OPERATORS[backend]
        with torch._C._AutoDispatchBelowAutograd():  # this node is the operator's autograd
            y, kept, rows = forward(x, residual, *arguments, *facts)
        _save(ctx, backend, facts, arguments, x, y, kept, rows, parts)
        # Not by save_for_backward: to change beta in place before backward is no error with plain layers.
        ctx.norms = *arguments.bn_weight, *arguments.bn_bias
        ctx.set_materialize_grads(False)  # where none arrives none leaves: an optimizer decays what has one of zeros
        found += rows
        return y

    @staticmethod
    def backward(ctx, dy: Tensor | None):
        *_, n, biases, projections = ctx.counts
        need_x, need_residual, *flat = _needed(ctx)
        if dy is None:
            return *[None] * 7, *[None] * len(flat)
        wanted = _cut(flat, (n, biases, n, n, projections))
        saved = ctx.saved_tensors  # with autograd: a checkpoint's forward, which makes them again, may need it
        with torch._C._AutoDispatchBelowAutograd():
            dx, *made = _call_backward(ctx, saved, dy, need_x, wanted)
        parameters = [*itertools.chain(*made)]
        if torch.is_grad_enabled():  # create_graph=True
            leads = [t for t in (dy, *saved, *ctx.norms) if t is not None and t.requires_grad]
            dx, *parameters = _Once.apply(len(leads), *leads, dx, *parameters)
        tensors = dx if need_x else None, dy if need_residual else None, *_only(parameters, flat)
        return *[None] * 5, *tensors


def _setup_context(backend: str, ctx, inputs, output) -> None:
    x, _, *rest = inputs
    count = len(Arguments._fields)
    _save(ctx, backend, Facts(*rest[count:]), Arguments(*rest[:count]), x, *output)


def _formula(ctx, dy: Tensor, _kept, _rows):
    """Gradients of the operators' arguments, for what traces the operator itself, as torch.compile does."""
    need_x, need_residual, *parameters, mean, var, shortcut = ctx.needs_input_grad[:9]
    wanted = [*parameters, shortcut]
    dx, *made = _call_backward(ctx, ctx.saved_tensors, dy, need_x, wanted)
    *grads, dshortcut = map(_only, made, wanted)
    tensors = dx if need_x else None, dy if need_residual else None, *grads
    return *tensors, [None] * len(mean), [None] * len(var), dshortcut, *[None] * len(Facts._fields)


def _only(grads: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Those that are wanted, None in the place of the others."""
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


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


def _register(backend: str, prefix: str) -> None:
    forward, backward = (f"fused_preact::{prefix}{name}" for name in ("forward", "backward"))
    for name, schema, fake in (forward, FORWARD, _fake_forward), (backward, BACKWARD, _fake_backward):
        _library.define(name.removeprefix("fused_preact::") + schema)
        torch.library.register_fake(name, fake, lib=_library)
    setup = functools.partial(_setup_context, backend)
    torch.library.register_autograd(forward, _formula, setup_context=setup, lib=_library)
    torch.library.register_autograd(backward, _twice, lib=_library)
    for key in "Batched", "FuncTorchBatched":  # is_grads_batched goes by the older vmap, torch.vmap by the other
        _library.impl(backward, _batched, key)
    operators = (getattr(torch.ops.fused_preact, f"{prefix}{name}") for name in ("forward", "backward"))
    OPERATORS[backend] = tuple(operator.default for operator in operators)


for _name in TABLES:
    _register(_name, f"{_name}_")
    for _function in schedule.forward, schedule.backward:
        _over_table = functools.partial(_over, _name, _function)
        _library.impl(f"{_name}_{_function.__name__}", _over_table, "CompositeExplicitAutograd")
if _extension.unavailable is None:  # the binary has the kernels
    _register("cpu", "")
    OPERATORS["cuda"] = OPERATORS["cpu"]  # the dispatcher tells devices apart


def stage(
    backend: str, facts: Facts, x: Tensor, residual: Tensor | None, arguments: Arguments, parts: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Run a stage whose arguments have been checked: (y, rows), of which y carries the gradient.

    Backward keeps ``parts``, if any, in the place of x, which they make when they are joined along the channels; in
    compiled code, whose compiler chooses what is kept, x.
    """
    flat = arguments.parameters()
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *flat))
    if not differentiated:
        facts = facts._replace(memory=schedule.MEMORY.index("none"))
    forward, _ = OPERATORS[backend]
    if torch.compiler.is_compiling():
        y, _, rows = forward(x, residual, *arguments, *facts)
        return y, [row.detach() for row in rows]
    if not differentiated:
        with torch._C._AutoDispatchBelowAutograd():  # no node, for there is nothing to differentiate
            y, _, rows = forward(x, residual, *arguments, *facts)
        return y, rows
    # The generic autograd of an operator with lists of tensors costs ten times what this node does.
    rows = []
    return _Stage.apply(backend, facts, arguments, rows, parts, x, residual, *flat), rows
