"""A run of pre-activation blocks as one autograd node, which may keep less for backward than its blocks would."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import backends, checks
from .blocks import Block
from .functional import Arguments, Plan, call_key, execute, make_plan
from .layers import Layers, Pair, fingerprint, hooked, update

MEMORY = ("fast", "lean", "min")


class PreActStage(nn.Sequential):
    """Blocks one after the other, as in nn.Sequential and with its state_dict keys, run as one autograd node.

    The statistics of a block's output come from the kernel that computes it, and nothing of Python or autograd runs
    between blocks. ``memory`` says what is kept for backward, here for a bottleneck of width C:

    - "fast": the input of every convolution before its batch norm; half of what the plain layers keep.
    - "lean": those inside of the blocks only. A block's input is rebuilt from its output, x = y - branch: a sixth.
    - "min": of those the last only; the others are computed again: a twelfth. Not for blocks of two convolutions.

    A block whose shortcut is a convolution keeps its input. "lean" and "min" carry x from block to block in float32,
    also where autocast has the convolutions in bfloat16 or float16: docs/memory.md derives why that is needed.

    Where a block cannot be part of it (it has hooks, or it is another kind of module), that block runs by itself;
    `fused_preact.explain` says so.

    Args:
        blocks: `PreActBlock`, `PreActBottleneck`, or any module [N, C, H, W] -> [N, K, P, Q].
        memory: "fast", "lean" or "min".

    Raises:
        ValueError: ``memory`` is none of the three, or is one that a block does not allow.
    """

    def __init__(self, *blocks: nn.Module | OrderedDict[str, nn.Module], memory: str = "fast") -> None:
        super().__init__(*blocks)
        self.memory = memory
        self._check_memory()

    def __getitem__(self, index: int | slice) -> Any:
        """A block, or for a slice a stage of those blocks with the same ``memory``."""
        part = super().__getitem__(index)
        if isinstance(index, slice):
            part.memory = self.memory
        return part

    def forward(self, x: Tensor) -> Tensor:
        """y [N, K, P, Q] of x [N, C, H, W].

        y has the dtype of x; under autocast that of its convolutions, or float32 with "lean" and "min".

        Raises:
            TypeError, ValueError: x does not fit, or a block does not allow ``memory``.
        """
        self._check_memory()
        for part in self._parts():
            x = part(x) if isinstance(part, nn.Module) else self._fused(part, x)
        return x

    def runs(self) -> list[nn.Module]:
        """What it is a sequence of as it runs: a stage for each run of blocks that is one node, and single blocks."""
        parts = self._parts()
        return [p if isinstance(p, nn.Module) else PreActStage(*p.modules, memory=self.memory) for p in parts]

    def extra_repr(self) -> str:
        """The memory mode, where it is not the default."""
        return "" if self.memory == "fast" else f"memory={self.memory!r}"

    def _check_memory(self) -> None:
        if self.memory not in MEMORY:
            raise ValueError(f"memory must be one of {', '.join(map(repr, MEMORY))}; got {self.memory!r}")
        if self.memory != "min":
            return
        for name, block in self._modules.items():
            if isinstance(block, Block) and block.units < 3:
                raise ValueError(
                    f"memory='min' needs blocks of three convolutions or more; block {name} is a "
                    f"{type(block).__name__} of {block.units}, which keeps one tensor with memory='lean' already"
                )

    def _parts(self) -> list[nn.Module | _Run]:
        """The blocks in order: runs of those that are one node, and by itself each that cannot be in one."""
        if torch.compiler.is_compiling():
            return list(self._cut())
        facts = fingerprint(self)
        known = _parts.get(self)
        if known is None or known[0] != facts:
            known = _parts[self] = facts, list(self._cut())
        return known[1]

    def _cut(self) -> Iterator[nn.Module | _Run]:
        run: list[tuple[Block, Layers]] = []
        for block in self._modules.values():
            layers = block.layers() if type(block).forward is Block.forward else None
            alone = layers is None or hooked(block) or block._compiled_call_impl is not None
            alone = alone or block.obstacle(layers) is not None
            if run and (alone or block.backend != run[-1][0].backend):
                yield _Run.of(run)
                run = []
            if alone:
                yield block
            else:
                run.append((block, layers))
        if run:
            yield _Run.of(run)

    def _fused(self, run: _Run, x: Tensor) -> Tensor:
        plan = run.plan(x, self.memory)
        if plan.backend == "eager":
            for block in run.modules:
                x = block(x)
            return x
        if backends.is_recording():
            plan.record(self if len(run.modules) == len(self) else run.modules[0])
        y, rows = execute(plan, x, run.arguments)
        update(run.pairs, rows)
        return y


class _Run(NamedTuple):
    """Blocks that run as one node, with all that their calls have in common."""

    modules: list[Block]
    pairs: list[Pair]
    blocks: list[checks.Block]
    arguments: Arguments
    plans: dict[tuple[Any, ...], Plan]

    @classmethod
    def of(cls, run: list[tuple[Block, Layers]]) -> _Run:
        blocks = [layers.block() for _, layers in run]
        pairs = [pair for _, layers in run for pair in layers.pairs]
        return cls([block for block, _ in run], pairs, blocks, Arguments.of(blocks), {})

    def plan(self, x: Tensor, memory: str) -> Plan:
        """The plan of a call, checked once for inputs that differ in the numbers only."""
        key = memory, call_key(x)
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = make_plan(x, self.blocks, None, self.modules[0].backend, memory)
        return plan


# What each stage is made of, by its fingerprint. Not in the stage itself, which is copied and pickled.
_parts: WeakKeyDictionary[PreActStage, tuple[list[object], list[nn.Module | _Run]]] = WeakKeyDictionary()
