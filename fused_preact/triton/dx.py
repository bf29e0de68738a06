"""dx = dy + add, with dy = scale*g + slope*(x - mean) + offset, scale*g or g: the gradient that leaves the chain.

`combine` is what `join` runs, too. Elementwise over [pixels, C]; a program takes one tile of ROWS pixels by COLUMNS
channels. Bytes: each tensor once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels import Gradient
from . import launch
from .tile import load_gradient, narrow

CONFIG = launch.Config(rows=64, columns=64, depth=0, warps=4, stages=1)


@triton.jit
def combine(
    g, x, norm, slope, offset, add, out, narrowed, pixels, C, SUBTRACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """One tile of out = add + dy, or minus it, and of the same in the type of narrowed. Grid: tiles of pixels, of C.

    g to offset are what `launch.gradient` gives; add, of any type, and narrowed may be None.
    """
    m = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = (m < pixels)[:, None] & (c < C)[None, :]
    at = m[:, None] * C + c[None, :]
    v = load_gradient(g, x, norm, slope, offset, m * C, c, C, m < pixels, ACC)
    if SUBTRACT:
        v = -v
    if add is not None:
        v += tl.load(add + at, mask=within, other=0.0).to(ACC)
    tl.store(out + at, narrow(v, out.dtype.element_ty), mask=within)
    if narrowed is not None:
        tl.store(narrowed + at, narrow(v, narrowed.dtype.element_ty), mask=within)


def launch_combine(
    dy: Gradient, add: Tensor | None, out: Tensor, narrowed: Tensor | None = None, subtract: bool = False
) -> None:
    """Fill out and narrowed, dense NHWC."""
    N, C, H, W = out.shape
    grid = triton.cdiv(N * H * W, CONFIG.rows), triton.cdiv(C, CONFIG.columns)
    args = *launch.gradient(dy), add, out, narrowed, N * H * W, C
    launch.run(combine, grid, CONFIG, *args, SUBTRACT=subtract, INDEX=launch.index_type(out))


def dx(dy: Gradient, add: Tensor | None) -> Tensor:
    """Gradient [N, C, H, W] of the chain's input; as `fused_preact.reference.dx`."""
    if dy.norm is None and add is None:
        return dy.g
    out = torch.empty_like(dy.g)
    launch_combine(dy, add, out)
    return out
