"""What a call is made of: units, and blocks of units with a shortcut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .kernels import Conv


class Unit(NamedTuple):
    """One BN-ReLU-Conv unit. ``batch``: whether it normalises by batch statistics."""

    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batch: bool
    eps: float
    conv: Conv


class Shortcut(NamedTuple):
    """Shortcut of a block: one of schedule.SHORTCUTS, and of its convolution, if any, weight, geometry, name, bias."""

    kind: str = "none"
    weight: Tensor | None = None
    conv: Conv | None = None
    name: str = ""
    bias: Tensor | None = None


class Block(NamedTuple):
    """A chain of units and its shortcut; the function is one of a single unit.

    ``names`` are those of the batch norm and the convolution of each unit, for messages; the function has none.
    """

    units: list[Unit]
    shortcut: Shortcut = Shortcut()
    names: Sequence[tuple[str, str]] = ()

    def trains(self) -> bool:
        """Whether a parameter requires a gradient."""
        parameters = [*(t for unit in self.units for t in unit[:4]), self.shortcut.weight, self.shortcut.bias]
        return any(t is not None and t.requires_grad for t in parameters)

    def with_one_bias(self) -> list[Unit]:
        """The units, the last with the shortcut's bias in its own: both are added to the same output."""
        *units, last = self.units
        across = self.shortcut.bias
        if across is None:
            return self.units
        return [*units, last._replace(bias=across if last.bias is None else last.bias + across)]
