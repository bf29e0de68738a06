"""dz = (conv_transpose(dy, weight) + add) * [z > 0], with the sums over pixels that dgamma, dbeta and the next dy need.

An implicit GEMM: rows are pixels of x, columns its channels C, and the summed index runs over the taps that reach a
pixel and within each over the channels K. dy is [N, P, Q, K], x, add and dz [N, H, W, C], the filter [K, R, S, C].

A convolution of stride s splits the pixels of x by (h mod s, w mod s): those of a class are reached by the same taps
r = first, first + s, ..., from neighbouring pixels of dy. So each class is a convolution of stride 1 with a part of
the filter, and nothing is multiplied by zero. A class that no tap reaches still has its ``add``, mask and sums.

A program makes one tile of dz of one class. For each tap and chunk of DEPTH channels it forms dy from two tensors and
four rows while it reads them, rounds it to the storage type and multiplies. The epilogue reads x once, masks, stores
and sums dz and dz*(x - mean) as stored, one pair of values a channel and tile; `total` adds these in a fixed order.

Bytes: g and its x once for each column of tiles and, mostly from L2, the filter once for each row of tiles; x, add, dz
once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels import RSTD as RSTD_ROW
from ..kernels import SCALE as SCALE_ROW
from ..kernels import Activation, Conv, Gradient
from . import launch
from .configurations import configuration
from .tile import MEAN, load_gradient, load_pairs, multiply, narrow, normalise, split, store_pair


@triton.jit
def transposed(
    g, behind, behind_norm, slope, offset, weight, x, norm, add, dz, partial,
    N, H, W, C, P, Q, K, pad_h, pad_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of dz. Grid: tiles of a class times tiles of channels, classes.

    g to offset are what `launch.gradient` gives; norm and partial are None where there is no mask.
    """
    across = tl.cdiv(C, COLUMNS)
    tile = tl.program_id(0) // across
    c = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    first_h, first_w = tl.program_id(1) // STRIDE_W, tl.program_id(1) % STRIDE_W
    high, wide = tl.cdiv(H - first_h, STRIDE_H), tl.cdiv(W - first_w, STRIDE_W)
    m = tile.to(INDEX) * ROWS + tl.arange(0, ROWS)
    image, i, j = split(m, tl.maximum(wide, 1), tl.maximum(high, 1))
    valid = (image < N) & (i < high) & (j < wide)
    first_r, first_s = (first_h + pad_h) % STRIDE_H, (first_w + pad_w) % STRIDE_W
    bottom, right = i + (first_h + pad_h) // STRIDE_H, j + (first_w + pad_w) // STRIDE_W
    corner = ((image * P + bottom) * Q + right) * K
    taps_h = (R - first_r + STRIDE_H - 1) // STRIDE_H
    taps_w = (S - first_s + STRIDE_W - 1) // STRIDE_W
    chunks = tl.cdiv(K, DEPTH)
    acc = tl.zeros([ROWS, COLUMNS], ACC)
    for step in range(taps_h * taps_w * chunks):
        tap = step // chunks
        u, v = tap // taps_w, tap % taps_w
        p, q = bottom - u, right - v
        k = (step % chunks) * DEPTH + tl.arange(0, DEPTH)
        inside = valid & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        at = corner - (u * Q + v) * K
        dy = narrow(load_gradient(g, behind, behind_norm, slope, offset, at, k, K, inside, ACC), g.dtype.element_ty)
        r, s = first_r + u * STRIDE_H, first_s + v * STRIDE_W
        filters = ((k * R + r) * S + s).to(INDEX) * C
        within = (k < K)[:, None] & (c < C)[None, :]
        b = tl.load(weight + filters[:, None] + c[None, :], mask=within, other=0.0)
        acc = multiply(dy, b, acc, PRECISION)
    to = ((image * H + first_h + i * STRIDE_H) * W + first_w + j * STRIDE_W)[:, None] * C + c[None, :]
    within = valid[:, None] & (c < C)[None, :]
    if add is not None:
        acc += tl.load(add + to, mask=within, other=0.0).to(ACC)
    stored = narrow(acc, dz.dtype.element_ty)
    if norm is None:
        tl.store(dz + to, stored, mask=within)
    else:
        place = tl.program_id(1) * (tl.num_programs(0) // across) + tile
        store_masked(stored, dz, x, norm, partial, place, to, within, c, C, ACC)


@triton.jit
def store_masked(v, dz, x, norm, partial, place, to, within, c, C, ACC: tl.constexpr):
    """dz = v * [z > 0] at the offsets ``to``; partial[place] = sums of dz*(x - mean) and of dz."""
    values = tl.load(x + to, mask=within, other=0.0)
    v = tl.where(normalise(values, norm, c, C) <= 0, 0.0, v)
    tl.store(dz + to, v, mask=within)
    masked = v.to(ACC)  # zero beyond the pixels and channels, where dy, add and the filter were read as zeros
    centred = values.to(ACC) - tl.load(norm + MEAN * C + c, mask=c < C, other=0.0)[None, :]
    store_pair(partial, place, tl.sum(masked * centred, 0), tl.sum(masked, 0), c, C)


@triton.jit
def total(
    partial, merged, rstd, scale, dgamma, dbeta, slope, offset, tiles, pixels, C,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """merged[group] = sums of a group of ROWS tiles; or, where merged is None, dgamma, dbeta, slope and offset.

    slope and offset may be None. Grid: groups (one where merged is None), tiles of channels.
    """
    group = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    products, sums = load_pairs(partial, tiles, group * ROWS + tl.arange(0, ROWS), c, C)
    product, plain = tl.sum(products, 0), tl.sum(sums, 0)
    if merged is not None:
        store_pair(merged, group, product, plain, c, C)
    else:
        ACC: tl.constexpr = rstd.dtype.element_ty
        known = c < C
        deviation = tl.load(rstd + c, mask=known, other=0.0).to(tl.float64)
        tl.store(dgamma + c, (product * deviation).to(ACC), mask=known)
        tl.store(dbeta + c, plain.to(ACC), mask=known)
        if slope is not None:
            share = tl.load(scale + c, mask=known, other=0.0).to(tl.float64) / pixels
            tl.store(slope + c, (-share * deviation * deviation * product).to(ACC), mask=known)
            tl.store(offset + c, (-share * plain).to(ACC), mask=known)


def _gradients(partial: Tensor, norm: Tensor, pixels: int, batch: bool) -> Sequence[Tensor]:
    """dgamma, dbeta and with batch statistics slope and offset, [C] each, from the sums [tiles, 2, C]."""
    C = partial.size(2)
    grads = [norm.new_empty(C) for _ in range(4 if batch else 2)]
    rows = grads if batch else [*grads, None, None]
    for source, merged, grid in launch.levels(partial):
        launch.run(
            total, grid, launch.MERGE,
            source, merged, norm[RSTD_ROW], norm[SCALE_ROW], *rows, source.size(0), pixels, C,
        )  # fmt: skip
    return grads


def dgrad(conv: Conv, dy: Gradient, weight: Tensor, x: Activation, add: Tensor | None, batch: bool) -> Gradient:
    """dz [N, C, H, W] with its rows, without either where x.norm is None; as `fused_preact.reference.dgrad`."""
    weight = launch.nhwc(weight)
    (N, C, H, W), (_, K, P, Q) = x.x.shape, dy.g.shape
    _, _, R, S = weight.shape
    dz, classes = torch.empty_like(x.x), conv.stride_h * conv.stride_w
    pixels = N * triton.cdiv(H, conv.stride_h) * triton.cdiv(W, conv.stride_w)  # of the largest class
    config = configuration("dgrad", x.x, conv, weight, pixels, C)
    tiles = triton.cdiv(pixels, config.rows)
    partial = None if x.norm is None else launch.partials(tiles * classes, C, x.x)
    launch.run(
        transposed, (tiles * triton.cdiv(C, config.columns), classes), config,
        *launch.gradient(dy), weight, x.x, x.norm, add, dz, partial,
        N, H, W, C, P, Q, K, *conv.padding,
        R=R, S=S, STRIDE_H=conv.stride_h, STRIDE_W=conv.stride_w, INDEX=launch.index_type(x.x, dy.g, weight),
    )  # fmt: skip
    if partial is None:
        return Gradient(dz)
    return Gradient(dz, x.x, x.norm, _gradients(partial, x.norm, N * H * W, batch))
