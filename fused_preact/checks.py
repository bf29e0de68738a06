"""The checks of a call, once for every backend. They read shapes, types and devices only, so fake tensors pass too.

Every message names the argument, what was expected and what came. A wrong type is a TypeError, a wrong value a
ValueError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .kernels import Conv, accumulation_type
from .units import Block, Unit

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST = 2**31 - 1  # of a setting; csrc/ops.cpp has the same


def constant(running_mean: Iterable[Tensor | None], running_var: Iterable[Tensor | None]) -> None:
    """Running statistics are data to a batch norm, as to torch's.

    Raises:
        ValueError: gradients are on, and one of them requires one.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*running_mean, *running_var)):
        raise ValueError(
            "running_mean and running_var must not require a gradient, for batch norm makes none for them; use "
            "requires_grad_(False) or torch.no_grad()"
        )


def _is_integer(value: Any) -> bool:
    """Whether value is of a type of integers, as NumPy's are; a bool is none."""
    # The first alone for nearly all, and at a tenth of the time.
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """``value``, of any type of integers, as (vertical, horizontal), each an int of at least ``least``.

    Raises:
        TypeError: value is not an integer or two.
        ValueError: an integer is less than ``least``, or 2^31 or more.
    """
    if _is_integer(value):
        result = (value, value)
    else:
        result = tuple(value) if isinstance(value, (tuple, list)) else ()
        result *= 2 if len(result) == 1 else 1  # as torch takes it
        if len(result) != 2 or not all(_is_integer(v) for v in result):
            raise TypeError(f"{name} must be an integer or a pair of integers, got {value!r}")
    _in_range(name, value, result, least)
    return int(result[0]), int(result[1])


def _in_range(name: str, value: Any, integers: Sequence[int], least: int) -> None:
    if min(integers) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if max(integers) > _MOST:
        raise ValueError(f"{name} must be at most {_MOST}, got {value!r}")


def lopsided(dilation: Sequence[int], filter_size: Sequence[int]) -> bool:
    """Whether padding='same' needs one pixel more on one side than on the other, which only plain layers do."""
    return any(d * (size - 1) % 2 for d, size in zip(dilation, filter_size, strict=True))


def geometry(
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    weight: Tensor,
) -> Conv:
    """Geometry of a convolution from the arguments that torch's conv2d takes.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """
    filters("weight", weight)
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    if padding == "valid":
        pads = (0, 0)
    elif padding == "same":
        if strides != (1, 1):
            raise ValueError(f"padding='same' needs a stride of 1, got stride={stride!r}")
        size = tuple(weight.shape[2:])
        if lopsided(dilations, size):
            raise ValueError(
                f"padding='same' must come out equal on both sides, got a filter of {size} with dilation {dilations}"
            )
        pads = tuple(d * (s - 1) // 2 for d, s in zip(dilations, size, strict=True))
    elif isinstance(padding, str):
        raise ValueError(f"padding must be an integer, a pair, 'same' or 'valid', got {padding!r}")
    else:
        pads = pair("padding", padding, 0)
    return Conv(*strides, *pads, *dilations, positive("groups", groups))


def tensor(name: str, t: Any) -> None:
    """Raise TypeError unless t is a tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")


def positive(name: str, value: Any) -> int:
    """``value``, of any type of integers, as an int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is less than 1, or 2^31 or more.
    """
    if not _is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    _in_range(name, value, (value,), 1)
    return int(value)


def number(name: str, value: Any) -> float:
    """``value``, of any type of real numbers, as a float.

    Raises:
        TypeError: it is not a number.
    """
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def flag(name: str, value: Any) -> None:
    """Raise TypeError unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def one_of(name: str, value: Any, options: Sequence[str]) -> None:
    """Raise ValueError unless value is one of ``options``."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}")


def filters(name: str, weight: Any) -> None:
    """Raise TypeError or ValueError unless weight is a tensor [K, C/groups, R, S]."""
    tensor(name, weight)
    if weight.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions (K, C/groups, R, S), got shape {tuple(weight.shape)}")


def _alike(name: str, t: Any, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    tensor(name, t)
    if t.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise TypeError(f"{name} must be {expected}, as x is {x.dtype}; got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, where x is; got {t.device}")
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}")


def _vector(name: str, t: Any, size: int, what: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    _alike(name, t, x, dtypes)
    if t.dim() != 1 or t.size(0) != size:
        raise ValueError(f"{name} must have shape ({size},), one value per {what}; got {tuple(t.shape)}")


def input_tensor(x: Any) -> None:
    """Raise TypeError or ValueError unless x is a dense floating-point [N, C, H, W] tensor with channels and pixels."""
    tensor("x", x)
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be one of {', '.join(map(str, DTYPES))}; got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got layout {x.layout}")
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (N, C, H, W), got {x.dim()}: shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have at least one channel and one pixel, got shape {tuple(x.shape)}")


def convolution(name: str, weight: Any, conv: Conv, shape: Sequence[int], x: Tensor) -> tuple[int, int, int, int]:
    """Shape of the output of the convolution of an input of ``shape`` by ``weight``, called ``name`` in messages.

    Raises:
        TypeError, ValueError: they do not fit each other, or the geometry is none.
    """
    _alike(name, weight, x, (x.dtype,))
    filters(name, weight)
    layer = name.removesuffix("weight")
    for setting, least in ("stride", 1), ("padding", 0), ("dilation", 1):
        pair(layer + setting, getattr(conv, setting), least)
    positive(layer + "groups", conv.groups)
    K, channels, R, S = weight.shape
    C = shape[1]
    if C % conv.groups or K % conv.groups:
        raise ValueError(
            f"groups must divide the input's {C} and the output's {K} channels of {name}; got groups={conv.groups}"
        )
    if channels * conv.groups != C:
        groups = f" with groups={conv.groups}" if conv.groups > 1 else ""
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} expects an input of {channels * conv.groups} channels{groups}, "
            f"got one of {C}: shape {tuple(shape)}"
        )
    if min(K, R, S) < 1:
        raise ValueError(f"{name} must not be empty, got shape {tuple(weight.shape)}")
    y = conv.output_shape(shape, weight.shape)
    if y[2] < 1 or y[3] < 1:
        raise ValueError(
            f"{name} with a {R}x{S} filter, padding {conv.padding} and dilation {conv.dilation} does not fit an input "
            f"of {shape[2]}x{shape[3]} pixels: the output would have {max(y[2], 0)}x{max(y[3], 0)}"
        )
    return y


def batch_norm(unit: Unit, shape: Sequence[int], x: Tensor, name: Callable[[str], str]) -> None:
    """Check the batch norm of a unit against the shape [N, C, H, W] of its input; ``name`` names its arguments.

    Raises:
        TypeError, ValueError: they do not fit each other.
    """
    C, dtypes = shape[1], (x.dtype, accumulation_type(x.dtype))
    for field in ("bn_weight", "bn_bias", "running_mean", "running_var"):
        t = getattr(unit, field)
        if t is not None:
            _vector(name(field), t, C, "input channel", x, dtypes)
        elif not unit.batch and field.startswith("running"):
            raise ValueError(f"{name(field)} is needed where batch statistics are not used (training=False), got None")
    if (unit.running_mean is None) != (unit.running_var is None):
        missing, given = "running_mean", "running_var"
        if unit.running_var is None:
            missing, given = given, missing
        raise ValueError(f"{name(missing)} is needed where {name(given)} is given, got None")
    if unit.batch and shape[0] * shape[2] * shape[3] < 2:
        where = name("x")
        raise ValueError(f"{where} must have more than one value per channel in training, got shape {tuple(shape)}")
    if unit.eps is None or isinstance(unit.eps, str):  # a layer's may be an array of one number
        raise TypeError(f"{name('eps')} must be a number, got {unit.eps!r}")
    if not unit.eps >= 0 or (unit.batch and unit.eps == 0):
        expected = "must be positive in training" if unit.batch else "must not be negative"
        raise ValueError(f"{name('eps')} {expected}, got {unit.eps}")


def _argument(names: tuple[str, str] | None, first: bool, field: str) -> str:
    """How the argument ``field`` of a unit is called, which reads x where it is the first, else another's output."""
    if names is None or (field == "x" and first):
        return field
    bn, conv = names
    if field in ("weight", "bias"):
        return f"{conv}.{field}"
    return f"the input of {bn}" if field == "x" else f"{bn}.{field.removeprefix('bn_')}"


def _block(x: Tensor, shape: Sequence[int], block: Block, first: bool) -> Sequence[int]:
    """Check one block, the first of a stage or a later one, on an input of ``shape``; its output's shape."""
    across, shortcut, names = shape, block.shortcut, block.names or [None] * len(block.units)
    for i, unit in enumerate(block.units):
        name = functools.partial(_argument, names[i], first and i == 0)
        batch_norm(unit, shape, x, name)
        shape = convolution(name("weight"), unit.weight, unit.conv, shape, x)
        if unit.bias is not None:
            _vector(name("bias"), unit.bias, shape[1], "output channel", x, (x.dtype,))
    if shortcut.kind == "identity" and tuple(across) != tuple(shape):
        what = _argument(names[0], first, "x")
        raise ValueError(f"{what} must have the output's shape {tuple(shape)}, to be added to it; got {tuple(across)}")
    if shortcut.weight is not None:
        result = convolution(f"{shortcut.name}.weight", shortcut.weight, shortcut.conv, across, x)
        if result != tuple(shape):
            raise ValueError(f"{shortcut.name} must give the shape of the output, {tuple(shape)}; it gives {result}")
        if shortcut.bias is not None:
            _vector(f"{shortcut.name}.bias", shortcut.bias, shape[1], "output channel", x, (x.dtype,))
    return shape


def _channels(x: Tensor, first: Unit) -> None:
    """Raise ValueError where all that reads x agrees that x is what does not fit."""
    weight, norm = first.weight, [t for t in first[2:6] if t is not None]
    if not norm or not isinstance(weight, Tensor) or weight.dim() != 4:
        return
    C = weight.size(1) * first.conv.groups
    if x.size(1) != C and all(isinstance(t, Tensor) and t.dim() == 1 and t.size(0) == C for t in norm):
        raise ValueError(f"x must have {C} channels, as its batch norm and convolution have; got {x.size(1)}")


def call(x: Any, blocks: Sequence[Block], residual: Any = None) -> None:
    """Check the arguments of a stage.

    Raises:
        TypeError: an argument is no tensor, or has a type that does not go with that of x.
        ValueError: a shape, a device or a number does not fit.
    """
    input_tensor(x)
    _channels(x, blocks[0].units[0])
    shape: Sequence[int] = x.shape
    for k, block in enumerate(blocks):
        shape = _block(x, shape, block, k == 0)
    if residual is not None:
        _alike("residual", residual, x, (x.dtype,))
        addend(residual, shape)


def addend(residual: Any, shape: Sequence[int]) -> None:
    """Check that ``residual`` can be added to an output of ``shape`` as it is.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape.
    """
    tensor("residual", residual)
    if residual.shape != torch.Size(shape):
        raise ValueError(f"residual must have the shape of the output, {tuple(shape)}; got {tuple(residual.shape)}")
