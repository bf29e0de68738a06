"""How the kernels are called: dense NHWC tensors, the constants that follow from them, and levels of partial sums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import allows_tf32
from ..kernels import Gradient, accumulation_type


class Config(NamedTuple):
    """A tile of rows x columns, chunks of depth along what is summed, and how a program runs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


GROUP = 128  # tiles that one program merges
MERGE = Config(rows=GROUP, columns=16, depth=0, warps=4, stages=1)
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def run(kernel: Any, grid: tuple[int, ...], config: Config, first: Tensor, *args: Any, **constants: Any) -> None:
    """Launch a kernel on the device and the current stream of its first argument; an empty grid is no launch.

    The constants that a kernel asks for by name are its tile, ACC (what it sums in) and PRECISION (of its products).
    """
    if 0 in grid:
        return
    tile = {"ROWS": config.rows, "COLUMNS": config.columns, "DEPTH": config.depth}
    constants |= tile | {"ACC": _TYPES[accumulation_type(first.dtype)], "PRECISION": precision(first)}
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    # FP fusion is named because triton 3.10 changes its default: forward and backward must round z alike.
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](first, *args, **constants, **options)


def precision(x: Tensor) -> str:
    """How float32 is multiplied: "tf32" where torch's switch for convolutions says so, else exactly ("ieee")."""
    able = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return "tf32" if able and x.dtype == torch.float32 and allows_tf32() else "ieee"


def index_type(*tensors: Tensor) -> tl.dtype:
    """Type of offsets into the tensors: int32 where those of a tile that overhangs the end fit as well."""
    return tl.int64 if max(t.numel() for t in tensors) >= 2**30 else tl.int32


def nhwc(t: Tensor | None) -> Tensor | None:
    """t [N, C, H, W] with its values in the order N, H, W, C; a copy only where they are in another."""
    return None if t is None else t.contiguous(memory_format=torch.channels_last)


def vector(t: Tensor | None) -> Tensor | None:
    """t [C] with its values side by side."""
    return None if t is None else t.contiguous()


def empty_nhwc(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor [N, C, H, W] of the type and on the device of ``like``, in the order N, H, W, C."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def partials(tiles: int, C: int, x: Tensor) -> Tensor:
    """Uninitialised pairs [tiles, 2, C] in float64, on the device of x."""
    return x.new_empty(tiles, 2, C, dtype=torch.float64)


def gradient(dy: Gradient) -> tuple[Tensor | None, ...]:
    """The first arguments of `tile.load_gradient`: g, x, norm, slope, offset, each None where it is no part of dy."""
    if dy.norm is None or len(dy.grad) == 2:
        return dy.g, None, dy.norm, None, None
    return dy.g, dy.x, dy.norm, *dy.grad[2:]


def levels(partial: Tensor) -> Iterator[tuple[Tensor, Tensor | None, tuple[int, int]]]:
    """The launches that bring pairs [tiles, 2, C] to one, GROUP to one at a time: (source, destination, grid).

    The last has no destination: its kernel makes the final rows.
    """
    across = triton.cdiv(partial.size(2), MERGE.columns)
    while partial.size(0) > GROUP:
        merged = partial.new_empty(triton.cdiv(partial.size(0), GROUP), *partial.shape[1:])
        yield partial, merged, (merged.size(0), across)
        partial = merged
    yield partial, None, (1, across)
