"""Units that run as one autograd node, gathered once and again when something about their layers changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends, running
from .layers import Layers
from .ops import Arguments
from .plans import Plan, Plans, call_key, execute, make_plan
from .units import Block
from .watch import Watch


class Run(NamedTuple):
    """All that the calls of one node have in common. It names the layers, not the modules that own them."""

    backend: str
    updates: list[running.Update]
    blocks: list[Block]
    arguments: Arguments | None  # None where they are to be made in every call: a sum has a graph behind it
    plans: Plans

    @classmethod
    def of(cls, backend: str, run: Sequence[Layers]) -> Run:
        """That of the layers of consecutive blocks."""
        blocks = [layers.block() for layers in run]
        updates = running.updates(pair.bn for layers in run for pair in layers.pairs)
        fixed = all(block.shortcut.bias is None for block in blocks)
        return cls(backend, updates, blocks, Arguments.of(blocks) if fixed else None, Plans(32))

    def __call__(
        self,
        where: Any,
        x: Tensor,
        residual: Tensor | None = None,
        memory: str = "fast",
        parts: Sequence[Tensor] = (),
    ) -> Tensor | None:
        """Run as one node and update the running statistics once; None where ``auto`` prefers the plain layers.

        ``where`` is the module that `explain` is to name, ``parts`` what is kept in the place of x, see `execute`.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        plan = self.plan(x, residual, memory, len(parts) > 0)
        plan.record(where)
        if plan.backend == "eager":
            return None
        arguments = self.arguments or Arguments.of(self.blocks)
        y, rows = execute(plan, x, arguments, residual, parts)
        for mean, var, counts, units, momentum in self.updates:
            running.update(mean, var, counts, rows, units, momentum)
        return y

    def plan(self, x: Tensor, residual: Tensor | None, memory: str, in_parts: bool = False) -> Plan:
        """The plan of a call, checked once for arguments that differ in the numbers only."""
        key = memory, in_parts, *call_key("x", x), *(() if residual is None else call_key("residual", residual))
        return self.plans.find(key, lambda: make_plan(x, self.blocks, residual, self.backend, memory, in_parts))


# Where a module's own dictionary has what was made of it, with which it is so freed, and what it was made from.
_REMEMBERED = "_remembered"


def remembered(module: nn.Module, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, made again only when something that a fused call reads of the module changed."""
    if torch.compiler.is_compiling() or backends.is_recording():  # `explain` puts fake tensors in, not to be kept
        return make()
    watch, made = module.__dict__.get(_REMEMBERED) or (None, None)
    if watch is None or not watch.holds(module):
        watch, made = Watch(module), make()
        module.__dict__[_REMEMBERED] = (watch, made) if watch.may_last() else None
    return made


def lasting_state(module: nn.Module) -> dict[str, Any]:
    """What of a module is copied and pickled: what nn.Module says, without what is remembered."""
    state = nn.Module.__getstate__(module)
    state.pop(_REMEMBERED, None)
    return state
