"""The tile of each kernel call: from the measured table of the device where it has the call, else by one rule.

SHIPPED lists a few tiles for each architecture and element size, the largest first; tests/test_triton_compile.py
compiles every one.
The rule takes the largest tile that is no wider than the channels and gives every multiprocessor a program (PROGRAMS),
else the smallest. It is a rule, not a measurement; `fused-preact tune` measures the list for the models' shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import tables
from ..kernels import Conv
from .launch import Config

PROGRAMS = 128  # about the multiprocessors of a large GPU

_AMPERE = {
    2: (Config(128, 128, 32, 8, 3), Config(128, 64, 32, 4, 3), Config(64, 64, 32, 4, 3), Config(64, 32, 32, 4, 3)),
    4: (Config(64, 64, 16, 8, 3), Config(64, 32, 16, 4, 2)),
    8: (Config(32, 32, 16, 4, 2),),
}
# With three stages the first one spills: in exact products on SM 9.0 (Triton 3.8), in wgrad on SM 12.0 (Triton 3.7).
_FOUR_STAGES = {4: (Config(64, 64, 16, 8, 4), _AMPERE[4][1])}
SHIPPED: dict[str, dict[int, tuple[Config, ...]]] = {
    # Triton multiplies without tensor cores there, and larger tiles spill.
    "sm75": dict.fromkeys((2, 4, 8), (Config(32, 32, 16, 4, 2),)),
    # With three stages the third one spills in dgrad (Triton 3.6).
    "sm80": _AMPERE | {2: (*_AMPERE[2][:2], Config(64, 64, 32, 4, 4), _AMPERE[2][3])},
    "sm90": _AMPERE
    | _FOUR_STAGES
    | {2: (Config(128, 128, 32, 8, 4), Config(128, 64, 32, 4, 3), Config(64, 64, 64, 4, 3))},
    "sm100": _AMPERE | {2: (Config(128, 128, 64, 8, 3), Config(128, 64, 32, 4, 3), Config(64, 64, 64, 4, 2))},
    # With more stages the second of these, and that of float64, spill there.
    "sm120": _AMPERE
    | _FOUR_STAGES
    | {2: (_AMPERE[2][0], Config(128, 64, 32, 4, 2), *_AMPERE[2][2:]), 8: (Config(32, 32, 16, 4, 1),)},
    "hip": _AMPERE | {2: (Config(128, 128, 32, 8, 2), Config(64, 64, 32, 4, 2))},
    # A call of the interpreter costs the same for any tile: few and large ones.
    "interpreter": dict.fromkeys((2, 4, 8), (Config(128, 32, 64, 4, 1),)),
}

asked: set[str] = set()
"""Keys of the calls of this process."""
trial: dict[str, Config] = {}
"""What comes before table and rule while `fused-preact tune` measures."""


def architecture(device: torch.device) -> str:
    """Key of SHIPPED for a device: the newest that is not newer than it."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "hip"
    major, _ = torch.cuda.get_device_capability(device)
    known = {7: "sm75", 8: "sm80", 9: "sm90", 10: "sm100", 12: "sm120"}
    return known[max((first for first in known if first <= major), default=7)]


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[Config, ...]:
    """The tiles that can serve tensors of dtype on a device."""
    return SHIPPED[architecture(device)][dtype.itemsize]


def rule(tiles: Sequence[Config], rows: int, columns: int) -> Config:
    """The tile for a product of rows x columns without a measurement."""
    for config in tiles:
        programs = triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns)
        if config.columns <= triton.next_power_of_2(columns) and programs >= PROGRAMS:
            return config
    return tiles[-1]


def configuration(kernel: str, x: Tensor, conv: Conv, weight: Tensor, rows: int, columns: int) -> Config:
    """The tile of one call, a product of rows x columns: that of the nearest batch that was measured, or the rule's."""
    (N, *image), dtype = x.shape, str(x.dtype).removeprefix("torch.")
    key = f"{kernel} {dtype} {'x'.join(map(str, image))} {tables.convolution_key(conv, weight.shape)}"
    asked.add(key)
    measured = trial.get(key) or tables.tile(x.device, key, N)
    return Config(*measured) if measured else rule(candidates(x.device, x.dtype), rows, columns)
