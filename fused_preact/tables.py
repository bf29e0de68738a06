"""What was measured on a device: the best backend of each call, and tiles for the Triton kernels.

`fused-preact tune` writes one JSON file a device into the user's cache folder; a file of the same name in the
package's folder ``measured`` is what this version was shipped with, and counts where the user's has nothing. The file:

    {"device": name, "date": ..., "versions": {...},
     "calls": {key of a call: {N: {"best": backend, "seconds": {backend: median of forward (and backward)}}}},
     "tiles": {key of a kernel call: [rows, columns, depth, warps, stages]}}
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

SHIPPED = Path(__file__).with_name("measured")


def folder() -> Path:
    """Where the user's tables are: ``fused_preact`` in the cache folder of the platform (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_preact"


def device_name(kind: str, index: int | None = None) -> str | None:
    """Name of a device that a table is for, of a CPU with torch's threads; None where there is none of that kind."""
    if kind == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    return _gpu(index) if kind == "cuda" else None


@functools.cache
def _gpu(index: int | None) -> str | None:
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else None


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    return _name_in(info.read_text() if info.exists() else "")


def _name_in(cpuinfo: str) -> str:
    keys = "model name|cpu family|model|CPU implementer|CPU part"
    found = dict(re.findall(rf"^({keys})\s*:\s*(.+)$", cpuinfo, re.MULTILINE))
    name = found.pop("model name", None) or platform.processor() or platform.machine()
    # Virtual machines often give processors of many generations one name, and an Arm processor has none.
    return ", ".join([name, *(f"{key} {value}" for key, value in found.items())])


def file_name(device: str) -> str:
    """Name of the file of a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@functools.cache
def load(device: str | None) -> dict[str, Any]:
    """The tables of a device, the user's over the shipped; empty where there are none."""
    name = file_name(device or "")
    return _over(_read(SHIPPED / name), _read(folder() / name))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"calls": {}, "tiles": {}}


def _over(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Both documents in one: where both have a value, that of ``after``."""
    calls = {
        key: before["calls"].get(key, {}) | after["calls"].get(key, {}) for key in before["calls"] | after["calls"]
    }
    return before | after | {"calls": calls, "tiles": before["tiles"] | after["tiles"]}


def save(document: dict[str, Any], path: Path | None = None) -> Path:
    """Write the table of ``document["device"]``, over what the file has, and let it count from here on."""
    path = path or folder() / file_name(document["device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(_over(_read(path), document), indent=1) + "\n")
    fresh.replace(path)
    load.cache_clear()
    return path


def call_key(problem: Any) -> str:
    """Key of a call: what for, dtype, memory format, C, H and W of x, and how often each geometry and filter occurs."""
    shape = "x".join(map(str, problem.shape[1:]))
    counts: dict[str, int] = {}
    for conv, weight in problem.convolutions:
        text = ",".join(map(str, (*conv, *weight)))
        counts[text] = counts.get(text, 0) + 1
    convolutions = (f"{count}*{text}" for text, count in counts.items())
    purpose = ["inference"] if problem.inference else []
    return " ".join([*purpose, str(problem.dtype).removeprefix("torch."), problem.format, shape, *convolutions])


def best(problem: Any) -> str | None:
    """The backend that was fastest at a call on this device, at the nearest N; None where it was not measured."""
    return _best(problem.device, call_key(problem), str(problem.shape[0]))


@torch.compiler.assume_constant_result  # a file is read here
def _best(kind: str, key: str, N: str) -> str | None:
    found = load(device_name(kind))["calls"].get(key)
    if not found:
        return None
    nearest = min(found, key=lambda measured: abs(math.log(int(measured) / max(int(N), 1))))
    return found[nearest]["best"]


def tile(device: torch.device, key: str) -> list[int] | None:
    """The measured tile of a Triton kernel call, or None."""
    return load(device_name(device.type, device.index))["tiles"].get(key)
