"""What a table of kernels takes and gives; csrc/kernels.h says the same for the tables that are written in C++."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MEAN, RSTD, VARIANCE, SCALE, SHIFT = range(5)  # the rows of a batch norm


class Conv(NamedTuple):
    """Geometry of one convolution, in the order of the operators' ``geometry``."""

    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int

    @property
    def stride(self) -> tuple[int, int]:
        """(vertical, horizontal)."""
        return self[0:2]

    @property
    def padding(self) -> tuple[int, int]:
        """(vertical, horizontal), the same on both sides."""
        return self[2:4]

    @property
    def dilation(self) -> tuple[int, int]:
        """(vertical, horizontal)."""
        return self[4:6]

    def output_shape(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, int, int, int]:
        """Shape [N, K, P, Q] of the convolution of an x of shape [N, C, H, W] by a weight [K, C/groups, R, S]."""
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, _ = self
        P = (x[2] + 2 * pad_h - dilation_h * (weight[2] - 1) - 1) // stride_h + 1
        Q = (x[3] + 2 * pad_w - dilation_w * (weight[3] - 1) - 1) // stride_w + 1
        return x[0], weight[0], P, Q


class Affine(NamedTuple):
    """What turns the moments of a tensor into the rows of the batch norm that reads it; gamma and beta are [C]."""

    gamma: Tensor
    beta: Tensor
    eps: float


@dataclass(slots=True)
class Activation:
    """a = max(z, 0) of x, or x where norm is None; a table may keep a in ``value`` for its next reader."""

    x: Tensor
    norm: Tensor | None  # [5, C]: mean, rstd, unbiased variance, scale, shift
    value: Tensor | None = None


class Gradient(NamedTuple):
    """dy = scale*g + slope*(x - mean) + offset with the rows of the batch norm behind it; g itself where norm is None.

    The rows dgamma and dbeta are there whenever grad is, whether or not a table has formed dy in g already.
    """

    g: Tensor
    x: Tensor | None = None
    norm: Tensor | None = None
    grad: Sequence[Tensor] | None = None  # dgamma, dbeta and, where they are not zero, slope and offset, [C] each


def memory_format(x: Tensor) -> torch.memory_format:
    """Layout that the result of an operator on x has."""
    return torch.channels_last if x.stride(1) == 1 and x.size(1) > 1 else torch.contiguous_format


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """Type of the per-channel rows of tensors of type dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
