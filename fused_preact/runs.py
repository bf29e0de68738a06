"""Units that run as one autograd node, gathered once and again when something about their layers changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import checks
from .functional import Arguments, Plan, call_key, execute, make_plan
from .layers import Layers, RunningUpdate, Watch, running_updates, update


class Run(NamedTuple):
    """All that the calls of one node have in common. It names the layers, not the modules that own them."""

    backend: str
    running: list[RunningUpdate]
    blocks: list[checks.Block]
    arguments: Arguments
    plans: dict[tuple[Any, ...], Plan]

    @classmethod
    def of(cls, backend: str, run: Sequence[Layers]) -> Run:
        """That of the layers of consecutive blocks."""
        blocks = [layers.block() for layers in run]
        running = running_updates(pair for layers in run for pair in layers.pairs)
        return cls(backend, running, blocks, Arguments.of(blocks), {})

    def __call__(self, where: Any, x: Tensor, residual: Tensor | None = None, memory: str = "fast") -> Tensor | None:
        """Run as one node and update the running statistics once; None where ``auto`` prefers the plain layers.

        ``where`` is the module that `explain` is to name.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        plan = self.plan(x, residual, memory)
        plan.record(where)
        if plan.backend == "eager":
            return None
        y, rows = execute(plan, x, self.arguments, residual)
        update(self.running, rows)
        return y

    def plan(self, x: Tensor, residual: Tensor | None, memory: str) -> Plan:
        """The plan of a call, checked once for arguments that differ in the numbers only."""
        key = memory, call_key("x", x), residual if residual is None else call_key("residual", residual)
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = make_plan(x, self.blocks, residual, self.backend, memory)
        return plan


# What was made of each module, and what it was made from. Not in the module itself, which is copied and pickled; and
# neither may hold the module, or that would never be freed.
_known: WeakKeyDictionary[nn.Module, tuple[Watch, Any]] = WeakKeyDictionary()


def remembered(module: nn.Module, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, made again only when something that a fused call reads of the module changed."""
    if torch.compiler.is_compiling():
        return make()
    known = _known.get(module)
    if known is None or not known[0].holds():
        known = _known[module] = Watch(module), make()
    return known[1]
