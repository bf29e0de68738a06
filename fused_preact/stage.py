"""A run of pre-activation blocks as one autograd node, which may keep less for backward than its blocks would."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from . import backends, schedule
from .blocks import ResidualBlock
from .checks import one_of
from .layers import Layers
from .runs import Run, lasting_state, remembered
from .watch import has_own_forward, hooked

MEMORY = schedule.MEMORY[:-1]  # "none" is of calls without a backward


class PreActStage(nn.Sequential):
    """Blocks one after the other, as in nn.Sequential and with its state_dict keys, run as one autograd node.

    The statistics of a block's output come from the kernel that computes it, and nothing of Python or autograd runs
    between blocks. ``memory`` says what is kept for backward, here for a bottleneck of width C:

    - "fast": the input of every batch norm, but for one of 32 blocks; half of what the plain layers keep.
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
        TypeError: a block is no module.
        ValueError: ``memory`` is none of the three, or is one that a block does not allow.
    """

    def __init__(self, *blocks: nn.Module | OrderedDict[str, nn.Module], memory: str = "fast") -> None:
        super().__init__(*blocks)
        self.memory = memory
        self._check_memory()

    def __getstate__(self) -> dict[str, Any]:
        return lasting_state(self)

    def __getitem__(self, index: int | slice) -> Any:
        """A block, or for a slice a stage of those blocks with the same ``memory``."""
        part = super().__getitem__(index)
        if isinstance(index, slice):
            part.memory = self.memory
        return part

    def __add__(self, other: nn.Sequential) -> PreActStage:
        """A stage of the blocks of both, with the ``memory`` of this one."""
        return PreActStage(*super().__add__(other), memory=self.memory)

    def __mul__(self, times: int) -> PreActStage:
        """A stage of so many times its blocks, which they share, with the same ``memory``."""
        return PreActStage(*super().__mul__(times), memory=self.memory)

    def forward(self, x: Tensor) -> Tensor:
        """y [N, K, P, Q] of x [N, C, H, W].

        y has the dtype of x; under autocast that of its convolutions, or float32 with "lean" and "min".

        Raises:
            TypeError, ValueError: x does not fit, or a block does not allow ``memory``.
        """
        self._check_memory()
        for part in remembered(self, lambda: list(self._parts())):
            x = part.run(x) if isinstance(part, _Alone) else self._fused(part, x)
        return x

    def runs(self) -> list[nn.Module]:
        """What it is a sequence of as it runs: a stage for each run of blocks that is one node, and single blocks."""
        parts = self._parts()
        return [p.module if isinstance(p, _Alone) else PreActStage(*p.blocks, memory=self.memory) for p in parts]

    def extra_repr(self) -> str:
        """The memory mode, where it is not the default."""
        return "" if self.memory == "fast" else f"memory={self.memory!r}"

    def _check_memory(self) -> None:
        one_of("memory", self.memory, MEMORY)
        if self.memory != "min":
            return
        for name, block in self._modules.items():
            if isinstance(block, ResidualBlock) and block._units < 3:
                raise ValueError(
                    f"memory='min' needs blocks of three convolutions or more; block {name} is a "
                    f"{type(block).__name__} of {block._units}, which keeps one tensor with memory='lean' already"
                )

    def _parts(self) -> Iterator[_Alone | _Part]:
        """The blocks in order: runs of those that are one node, and by itself each that cannot be in one."""
        part: list[tuple[ResidualBlock, Layers]] = []
        for name, block in self._modules.items():
            reason = _why_alone(block)
            layers = block._layers()._replace(prefix=f"{name}.") if reason is None else None
            alone = layers is None or block._obstacle(layers) is not None
            if part and (alone or block.backend != part[-1][0].backend):
                yield _Part.of(part)
                part = []
            if alone:
                yield _Alone(block, reason)
            else:
                part.append((block, layers))
        if part:
            yield _Part.of(part)

    def _fused(self, part: _Part, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):  # symbolic tracing, which calls with no tensors
            return part.run_apart(x)
        frozen = part.frozen(x)
        if 0 < frozen < len(part.blocks):  # these would keep what no gradient is made of
            for piece in part.cut(frozen):
                x = self._fused(piece, x)
            return x
        where = self if len(part.blocks) == len(self) else part.blocks[0]
        if backends.is_recording():
            choice = part.run.plan(x, None, self.memory).choice(where)
            if choice.backend == "eager":  # what runs are the blocks, and their choices count
                return part.run_apart(x, part.why_apart(choice))
        y = part.run(where, x, memory=self.memory)
        return part.run_apart(x) if y is None else y


def _why_alone(block: nn.Module) -> str | None:
    """Why a module of a stage runs by itself, its layers apart, or None."""
    if not isinstance(block, ResidualBlock):
        return f"it is of type {type(block).__name__}, no PreActBlock and no PreActBottleneck"
    if type(block).forward is not ResidualBlock.forward or has_own_forward(block):
        return "it has a forward of its own"
    if hooked(block):
        return "it has hooks, which run only when the block itself is called"
    return None if block._compiled_call_impl is None else "it is compiled by itself"


class _Alone(NamedTuple):
    """A module of a stage that runs by itself, and why, where its own choice does not say."""

    module: nn.Module
    reason: str | None

    def run(self, x: Tensor) -> Tensor:
        """What the module makes of x."""
        if not backends.is_recording():
            return self.module(x)
        with backends.apart(self.reason):
            return self.module(x)


class _Part(NamedTuple):
    """Consecutive blocks of a stage that run as one node."""

    blocks: tuple[ResidualBlock, ...]
    layers: tuple[Layers, ...]
    run: Run
    pieces: dict[int, tuple[_Part, _Part]]

    @classmethod
    def of(cls, part: list[tuple[ResidualBlock, Layers]]) -> _Part:
        blocks, layers = zip(*part, strict=True)
        return cls(blocks, layers, Run.of(blocks[0].backend, layers), {})

    def frozen(self, x: Any) -> int:
        """How many blocks come before the first that a gradient leads to, or 0 where all may be needed."""
        if not isinstance(x, Tensor) or x.requires_grad or not torch.is_grad_enabled():
            return 0
        return next((k for k, block in enumerate(self.run.blocks) if block.trains()), len(self.blocks))

    def cut(self, count: int) -> tuple[_Part, _Part]:
        """The first ``count`` blocks, and the others."""
        if count not in self.pieces:
            part = [*zip(self.blocks, self.layers, strict=True)]
            self.pieces[count] = _Part.of(part[:count]), _Part.of(part[count:])
        return self.pieces[count]

    def run_apart(self, x: Tensor, reason: str | None = None) -> Tensor:
        """What the blocks make of x one after the other, for a reason that their own choices do not say."""
        for block in self.blocks:
            x = _Alone(block, reason).run(x)
        return x

    def why_apart(self, choice: backends.Choice) -> str | None:
        """Why the blocks are no node by the choice for all of them; None of a single one, whose own choice says it."""
        if len(self.blocks) == 1:
            return None
        device = choice.problem.device.type
        kernels = device if device in choice.others else "reference"  # those of a device have its name
        return f"{len(self.blocks)} blocks as one node would be plain layers, not {kernels}: {choice.others[kernels]}"
