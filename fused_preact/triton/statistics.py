"""Batch statistics: (mean, M2) of each tile, merged by Chan's formula in a fixed order into the rows of a batch norm.

`measure` reads a tensor [pixels, C] whose producer could not supply the moments of its tiles; one program takes one
tile of ROWS pixels by COLUMNS channels. Bytes: x once, and 2*C values a tile.

`merge` takes GROUP tiles to one, as often as it must: T tiles take ceil(log_GROUP(T)) launches. The tile t of an array
of tiles holds the ``span`` pixels from t*span on, so counts need not be stored. Merging is in float64 and without
atomics: results are the same bits in every run.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..kernels import Affine
from . import launch
from .launch import GROUP
from .tile import INTERPRETED, MEAN, RSTD, SCALE, SHIFT, VARIANCE, load_pairs, store_moments, store_pair

# The interpreter adds the rows of a tile one after the other, a GPU in pairs: it gets fewer for the same error.
CONFIG = launch.Config(rows=32 if INTERPRETED else 128, columns=64, depth=0, warps=4, stages=1)


@triton.jit
def measure(
    x, partial, pixels, C,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """partial[tile] = moments of one tile of x. Grid: tiles of pixels, tiles of channels."""
    tile = tl.program_id(0)
    m = tile.to(INDEX) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = (m < pixels)[:, None] & (c < C)[None, :]
    v = tl.load(x + m[:, None] * C + c[None, :], mask=within, other=0.0).to(ACC)
    store_moments(partial, tile, v, m < pixels, c, C)


@triton.jit
def merge(
    partial, merged, rows, gamma, beta, tiles, span, pixels, C,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """merged[group] = moments of a group of ROWS tiles; or, where merged is None, the rows of the batch norm.

    Grid: groups (one where merged is None), tiles of channels.
    """
    group = tl.program_id(0)
    t = group * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    means, squares = load_pairs(partial, tiles, t, c, C)
    left = pixels - t.to(tl.int64) * span
    counts = tl.where(left < 0, 0, tl.where(left < span, left, span)).to(tl.float64)
    count = tl.sum(counts, 0)
    mean = tl.sum(means * counts[:, None], 0) / count
    deviation = means - mean[None, :]
    total = tl.sum(squares, 0) + tl.sum(deviation * deviation * counts[:, None], 0)
    if merged is not None:
        store_pair(merged, group, mean, total, c, C)
    else:
        ACC: tl.constexpr = rows.dtype.element_ty
        known = c < C
        rstd = 1.0 / tl.sqrt(total / count + tl.full([1], EPS, tl.float64))
        scale = tl.load(gamma + c, mask=known, other=0.0).to(tl.float64) * rstd
        tl.store(rows + MEAN * C + c, mean.to(ACC), mask=known)
        tl.store(rows + RSTD * C + c, rstd.to(ACC), mask=known)
        tl.store(rows + VARIANCE * C + c, (total / (count - 1.0)).to(ACC), mask=known)
        tl.store(rows + SCALE * C + c, scale.to(ACC), mask=known)
        lost = mean.to(ACC).to(tl.float64) - mean
        shift = tl.load(beta + c, mask=known, other=0.0).to(tl.float64)
        shift = tl.where(lost == 0.0, shift, shift + scale * lost)  # an infinite scale makes no NaN of nothing lost
        tl.store(rows + SHIFT * C + c, shift.to(ACC), mask=known)


def rows_of(partial: Tensor, span: int, pixels: int, affine: Affine) -> Tensor:
    """Rows [5, C] from the moments [tiles, 2, C] of tiles of ``span`` pixels."""
    C = partial.size(2)
    rows, gamma, beta = affine.gamma.new_empty(5, C), launch.vector(affine.gamma), launch.vector(affine.beta)
    for source, merged, grid in launch.levels(partial):
        args = source, merged, rows, gamma, beta, source.size(0), span, pixels, C
        launch.run(merge, grid, launch.MERGE, *args, EPS=affine.eps)
        span *= GROUP
    return rows


def statistics(x: Tensor, affine: Affine) -> Tensor:
    """Rows [5, C] of the batch norm that reads x [N, C, H, W]; as `fused_preact.reference.statistics`."""
    N, C, H, W = x.shape
    pixels = N * H * W
    partial = launch.partials(triton.cdiv(pixels, CONFIG.rows), C, x)
    grid = partial.size(0), triton.cdiv(C, CONFIG.columns)
    launch.run(measure, grid, CONFIG, x, partial, pixels, C, INDEX=launch.index_type(x))
    return rows_of(partial, CONFIG.rows, pixels, affine)
