"""dweight[k, r, s, c] = sum over pixels of dy*a, and dbias[k] = sum of dy.

An implicit GEMM for each tap (r, s): rows are channels K, columns channels C, and the summed index runs over the pixels
of y. dy is [N, P, Q, K], x [N, H, W, C], the filter's gradient [K, R, S, C].

Few tiles and many pixels: the pixels are split into parts, and a program makes one tile of one tap from one part. It
forms dy and the activation while it reads them, in chunks of DEPTH pixels. The parts are kept in the accumulation type
and `reduce` adds them in order, so results are the same bits in every run. How many parts there are depends on the
shape and its tile alone.

Bytes: g (with its x) once for each tap and column of tiles, x once for each tap and row of tiles, mostly from L2, for
programs that share their pixels run side by side; the parts once out and in.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..kernels import Activation, Conv, Gradient, accumulation_type
from . import launch
from .configurations import configuration
from .tile import load_activation, load_gradient, multiply, narrow, split

PROGRAMS = 512  # parts are made until there are so many programs: a few for each multiprocessor of any GPU
LEAST = 8  # chunks in a part, at the least
REDUCE = launch.Config(rows=1, columns=256, depth=0, warps=4, stages=1)


@triton.jit
def correlate(
    g, behind, behind_norm, slope, offset, x, norm, parts, bias_parts,
    pixels, part, H, W, C, P, Q, K, pad_h, pad_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one tap from one part of ``part`` pixels. Grid: tiles of K, of C, and taps together; parts.

    bias_parts may be None; the programs of the first tap and the first columns fill it.
    """
    down, across = tl.cdiv(K, ROWS), tl.cdiv(C, COLUMNS)
    column = tl.program_id(0) // down
    k = (tl.program_id(0) % down) * ROWS + tl.arange(0, ROWS)
    c = (column % across) * COLUMNS + tl.arange(0, COLUMNS)
    tap = column // across
    r, s = tap // S, tap % S
    index = tl.program_id(1).to(tl.int64)
    begin = index * part
    acc = tl.zeros([ROWS, COLUMNS], ACC)
    sums = tl.zeros([ROWS], ACC)
    for start in range(0, part, DEPTH):
        m = (begin + start).to(INDEX) + tl.arange(0, DEPTH)
        image, p, q = split(m, Q, P)
        h, w = p * STRIDE_H - pad_h + r, q * STRIDE_W - pad_w + s
        valid = m < pixels
        dy = narrow(load_gradient(g, behind, behind_norm, slope, offset, m * K, k, K, valid, ACC), g.dtype.element_ty)
        inside = valid & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        a = load_activation(x, norm, ((image * H + h) * W + w) * C, c, C, inside)
        acc = multiply(tl.trans(dy), a, acc, PRECISION)
        if bias_parts is not None:
            sums += tl.sum(dy.to(ACC), 0)
    to = index * K * (R * S * C) + (k[:, None].to(tl.int64) * (R * S) + tap) * C + c[None, :]
    tl.store(parts + to, acc, mask=(k < K)[:, None] & (c < C)[None, :])
    if bias_parts is not None:  # noqa: SIM102, for this is decided when the kernel is compiled
        if column == 0:
            tl.store(bias_parts + index * K + k, sums, mask=k < K)


@triton.jit
def reduce(parts, out, count, size, COLUMNS: tl.constexpr):
    """out[i] = sum of parts[:, i] in order, in float64. Grid: tiles of COLUMNS elements."""
    i = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([COLUMNS], tl.float64)
    for part in range(count):
        acc += tl.load(parts + part * size + i, mask=i < size, other=0.0).to(tl.float64)
    tl.store(out + i, narrow(acc.to(parts.dtype.element_ty), out.dtype.element_ty), mask=i < size)


def _reduced(parts: Tensor, out: Tensor) -> Tensor:
    grid = (triton.cdiv(out.numel(), REDUCE.columns),)
    launch.run(reduce, grid, REDUCE, parts, out, parts.size(0), out.numel())
    return out


def wgrad(conv: Conv, dy: Gradient, x: Activation, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient of ``weight``, and of the bias where it is wanted; as `fused_preact.reference.wgrad`."""
    (_, C, H, W), (N, K, P, Q) = x.x.shape, dy.g.shape
    _, _, R, S = weight.shape
    pixels = N * P * Q
    config = configuration("wgrad", x.x, conv, weight, K, C)
    tiles = triton.cdiv(K, config.rows) * triton.cdiv(C, config.columns) * R * S
    chunks = triton.cdiv(pixels, config.depth)
    count = max(1, min(triton.cdiv(PROGRAMS, tiles), chunks // LEAST))
    part = triton.cdiv(chunks, count) * config.depth
    accumulation = accumulation_type(x.x.dtype)
    parts = x.x.new_empty(count, weight.numel(), dtype=accumulation)
    bias_parts = x.x.new_empty(count, K, dtype=accumulation) if bias else None
    launch.run(
        correlate, (tiles, count), config,
        *launch.gradient(dy), x.x, x.norm, parts, bias_parts,
        pixels, part, H, W, C, P, Q, K, *conv.padding,
        R=R, S=S, STRIDE_H=conv.stride_h, STRIDE_W=conv.stride_w, INDEX=launch.index_type(x.x, dy.g),
    )  # fmt: skip
    dweight = _reduced(parts, launch.empty_nhwc(weight.shape, weight))
    return dweight, None if bias_parts is None else _reduced(bias_parts, weight.new_empty(K))
