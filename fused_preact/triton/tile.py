"""What the kernels share on the device: rows of batch norm, the two prologues, rounding, moments, the pixels of a tile.

A tile is ROWS pixels by COLUMNS channels. Tensors are dense NHWC; per-channel rows are in the accumulation type ACC.
The kernels address a tensor by ``pixel*channels + channel``, in the type that `launch.index_type` chose.
"""

import triton
import triton.language as tl

from .. import kernels

# Rows of the arrays [5, C] that forward keeps.
MEAN = tl.constexpr(kernels.MEAN)
RSTD = tl.constexpr(kernels.RSTD)
VARIANCE = tl.constexpr(kernels.VARIANCE)
SCALE = tl.constexpr(kernels.SCALE)
SHIFT = tl.constexpr(kernels.SHIFT)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """v rounded to the nearest of dtype; the interpreter's own conversion to bf16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        v = tl.where(v == v, nearest, v)
    return v.to(dtype)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter would multiply their bits as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if PRECISION == "tf32":
        a = nearest_tf32(a)
        b = nearest_tf32(b)
    if a.dtype == tl.float32 and PRECISION == "ieee":
        # Without tensor cores each product would be a rounding of the long sum. Told how many products may share an
        # accumulator, the compiler does not make this the sum of one.
        acc += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1], out_dtype=acc.dtype)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def nearest_tf32(v):
    """v with the ten bits of mantissa that tensor cores read of it rounded to nearest, ties away; they cut off."""
    nearest = (v.to(tl.uint32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    return tl.where(v == v, nearest, v)


@triton.jit
def normalise(x, norm, c, C):
    """z = scale*(x - mean) + shift of x [pixels, len(c)], in the accumulation type; zero beyond C."""
    mean = tl.load(norm + MEAN * C + c, mask=c < C, other=0.0)
    scale = tl.load(norm + SCALE * C + c, mask=c < C, other=0.0)
    shift = tl.load(norm + SHIFT * C + c, mask=c < C, other=0.0)
    return scale[None, :] * (x.to(mean.dtype) - mean[None, :]) + shift[None, :]


@triton.jit
def load_activation(x, norm, at, c, C, inside):
    """a = max(z, 0) of x [pixels, len(c)] at the offsets ``at``, or x where norm is None; zero outside. NaN stays."""
    a = tl.load(x + at[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
    if norm is not None:
        z = normalise(a, norm, c, C)
        a = narrow(tl.where((z <= 0) | (inside[:, None] == 0), 0.0, z), x.dtype.element_ty)
    return a


@triton.jit
def load_gradient(g, x, norm, slope, offset, at, k, K, inside, ACC: tl.constexpr):
    """dy = scale*g + slope*(x - mean) + offset at the offsets ``at``; zero outside. In ACC.

    x, slope and offset are None where dy = scale*g, norm, too, where dy = g.
    """
    within = inside[:, None] & (k < K)[None, :]
    dy = tl.load(g + at[:, None] + k[None, :], mask=within, other=0.0).to(ACC)
    if norm is not None:
        scale = tl.load(norm + SCALE * K + k, mask=k < K, other=0.0)
        dy = scale[None, :] * dy
        if x is not None:
            mean = tl.load(norm + MEAN * K + k, mask=k < K, other=0.0)
            steep = tl.load(slope + k, mask=k < K, other=0.0)
            fixed = tl.load(offset + k, mask=k < K, other=0.0)
            centred = tl.load(x + at[:, None] + k[None, :], mask=within, other=0.0).to(ACC) - mean[None, :]
            dy = dy + steep[None, :] * centred + fixed[None, :]
        dy = tl.where(inside[:, None], dy, 0.0)
    return dy


@triton.jit
def split(m, width, height):
    """(image, row, column) of pixel m of images of height x width."""
    image = m // (width * height)
    rest = m - image * (width * height)
    line = rest // width
    return image, line, rest - line * width


@triton.jit
def store_moments(partial, tile, v, inside, c, C):
    """partial[tile] = (mean, sum of squared deviations) [2, C] of the rows of v that are inside: at least one is."""
    count = tl.sum(inside.to(v.dtype), 0)
    mean = tl.sum(tl.where(inside[:, None], v, 0.0), 0) / count
    deviation = tl.where(inside[:, None], v - mean[None, :], 0.0)
    rest = tl.sum(deviation, 0)  # what rounding left of zero
    squares = tl.sum(deviation * deviation, 0) - rest * rest / count
    # A float32 mean would cost digits of the variance of a channel whose mean is large against its deviation.
    store_pair(partial, tile, mean.to(tl.float64) + (rest / count).to(tl.float64), squares, c, C)


@triton.jit
def store_pair(partial, tile, first, second, c, C):
    """partial[tile] = (first, second), of a float64 array [tiles, 2, C]."""
    to = partial + tile.to(tl.int64) * 2 * C + c
    tl.store(to, first.to(tl.float64), mask=c < C)
    tl.store(to + C, second.to(tl.float64), mask=c < C)


@triton.jit
def load_pairs(partial, tiles, t, c, C):
    """(first, second), each [len(t), len(c)] in float64; zero beyond ``tiles``."""
    at = partial + t.to(tl.int64)[:, None] * 2 * C + c[None, :]
    within = (t < tiles)[:, None] & (c < C)[None, :]
    first = tl.load(at, mask=within, other=0.0)
    return first, tl.load(at + C, mask=within, other=0.0)
