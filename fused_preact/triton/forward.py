"""y = conv(relu(bn(x)), weight) + bias + residual, with the moments of y for the batch norm that reads it.

An implicit GEMM: rows are the pixels of y, columns its channels K, and the summed index runs over the R*S taps of the
filter and within each over the channels C. x is [N, H, W, C], y and residual [N, P, Q, K], the filter [K, R, S, C].

A program makes one tile of y. For each tap and chunk of DEPTH channels it gathers the pixels that the tap meets,
normalises them in float32, puts zeros where the tap falls on the padding, rounds to the storage type and multiplies.
Programs that share their pixels have neighbouring numbers, so that x comes from the cache for all but the first.

Bytes: x once for each column of tiles, the filter once for each row of tiles (both mostly from L2), residual and y
once, and 2*K values of moments a tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..kernels import Activation, Affine, Conv
from . import launch
from .configurations import configuration
from .statistics import rows_of
from .tile import load_activation, multiply, narrow, split, store_moments


@triton.jit
def convolve(
    x, norm, weight, bias, residual, y, partial,
    pixels, H, W, C, P, Q, K, pad_h, pad_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y; norm, bias, residual and partial may be None. Grid: tiles of pixels times tiles of channels."""
    across = tl.cdiv(K, COLUMNS)
    tile = tl.program_id(0) // across
    k = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    m = tile.to(INDEX) * ROWS + tl.arange(0, ROWS)
    image, p, q = split(m, Q, P)
    top, left = p * STRIDE_H - pad_h, q * STRIDE_W - pad_w
    corner = ((image * H + top) * W + left) * C
    filters = k.to(INDEX) * (R * S * C)
    chunks = tl.cdiv(C, DEPTH)
    acc = tl.zeros([ROWS, COLUMNS], ACC)
    for i in range(R * S * chunks):
        tap = i // chunks
        r, s = tap // S, tap % S
        h, w = top + r, left + s
        c = (i % chunks) * DEPTH + tl.arange(0, DEPTH)
        inside = (m < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        a = load_activation(x, norm, corner + (r * W + s) * C, c, C, inside)
        within = (c < C)[:, None] & (k < K)[None, :]
        b = tl.load(weight + (filters + tap * C)[None, :] + c[:, None], mask=within, other=0.0)
        acc = multiply(a, b, acc, PRECISION)
    valid = m < pixels
    at = m[:, None] * K + k[None, :]
    within = valid[:, None] & (k < K)[None, :]
    if bias is not None:
        acc += tl.load(bias + k, mask=k < K, other=0.0).to(ACC)[None, :]
    if residual is not None:
        acc += tl.load(residual + at, mask=within, other=0.0).to(ACC)
    stored = narrow(acc, y.dtype.element_ty)
    tl.store(y + at, stored, mask=within)
    if partial is not None:
        store_moments(partial, tile, stored.to(ACC), valid, k, K)


def forward(
    conv: Conv, x: Activation, weight: Tensor, bias: Tensor | None, residual: Tensor | None, following: Affine | None
) -> tuple[Tensor, Tensor | None]:
    """y [N, K, P, Q], and the rows [5, K] of the batch norm ``following``; as `fused_preact.reference.forward`."""
    weight, residual = launch.nhwc(weight), launch.nhwc(residual)
    shape = N, K, P, Q = conv.output_shape(x.x.shape, weight.shape)
    y = launch.empty_nhwc(shape, x.x)
    _, C, R, S = weight.shape
    pixels = N * P * Q
    config = configuration("forward", x.x, conv, weight, pixels, K)
    tiles = triton.cdiv(pixels, config.rows)
    partial = launch.partials(tiles, K, x.x) if following is not None else None
    launch.run(
        convolve, (tiles * triton.cdiv(K, config.columns),), config,
        x.x, x.norm, weight, launch.vector(bias), residual, y, partial,
        pixels, *x.x.shape[2:], C, P, Q, K, *conv.padding,
        R=R, S=S, STRIDE_H=conv.stride_h, STRIDE_W=conv.stride_w, INDEX=launch.index_type(x.x, y, weight),
    )  # fmt: skip
    return y, None if partial is None else rows_of(partial, config.rows, pixels, following)
