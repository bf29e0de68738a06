"""What was measured on a device: the best backend of each call, and tiles for the Triton kernels.

`fused-preact tune` writes one JSON file a device into the user's cache folder; a file of the same name in the
package's folder ``measured`` is what this version was shipped with, and counts where the user's has nothing. The file:

    {"device": name, "date": ..., "versions": {...},
     "calls": {key of a call: {"best": backend, "seconds": {backend: median of forward + backward}}},
     "tiles": {key of a kernel call: [rows, columns, depth, warps, stages]}}
"""

from __future__ import annotations

import functools
import json
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


@functools.cache
def device_name(kind: str, index: int | None = None) -> str | None:
    """Name of a device that a table is for; None where there is none of that kind."""
    if kind == "cpu":
        info = Path("/proc/cpuinfo")
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
        return found.group(1) if found else platform.processor() or platform.machine()
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(index)
    return None


def file_name(device: str) -> str:
    """Name of the file of a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@functools.cache
def load(device: str | None) -> dict[str, Any]:
    """The tables of a device, the user's over the shipped; empty where there are none."""
    merged: dict[str, Any] = {"calls": {}, "tiles": {}}
    for place in (SHIPPED, folder()):
        path = place / file_name(device or "")
        if path.exists():
            document = json.loads(path.read_text())
            for part in merged:
                merged[part] |= document.get(part, {})
    return merged


def save(document: dict[str, Any], path: Path | None = None) -> Path:
    """Write the table of ``document["device"]``, over what the file has, and let it count from here on."""
    path = path or folder() / file_name(document["device"])
    before = json.loads(path.read_text()) if path.exists() else {}
    parts = {part: before.get(part, {}) | document[part] for part in ("calls", "tiles")}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(document | parts, indent=1) + "\n")
    fresh.replace(path)
    load.cache_clear()
    return path


def call_key(problem: Any) -> str:
    """Key of a call: dtype, memory format, shape of x, and each convolution as its geometry and filter."""
    shape = "x".join(map(str, problem.shape))
    convolutions = (",".join(map(str, (*conv, *weight))) for conv, weight in problem.convolutions)
    return " ".join([str(problem.dtype).removeprefix("torch."), problem.format, shape, *convolutions])


def best(problem: Any) -> str | None:
    """The backend that was fastest at a call on this device, or None where it was not measured."""
    return _best(problem.device, call_key(problem))


@torch.compiler.assume_constant_result  # a file is read here
def _best(kind: str, key: str) -> str | None:
    found = load(device_name(kind))["calls"].get(key)
    return None if found is None else found["best"]


def tile(device: torch.device, key: str) -> list[int] | None:
    """The measured tile of a Triton kernel call, or None."""
    return load(device_name(device.type, device.index))["tiles"].get(key)
