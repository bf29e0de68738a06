"""What was measured on a device: the best backend of each call, and tiles for the Triton kernels.

`fused-preact tune` writes one JSON file a device into the user's cache folder; a file of the same name in the
package's folder ``measured`` is what this version was shipped with, and counts where the user's has nothing. What the
user measured with another version of the package does not count: its kernels were others. The file:

    {"device": name, "date": ..., "versions": {...},
     "calls": {key of a call: {N: {"best": backend, "seconds": {backend: median of forward (and backward)}}}},
     "tiles": {key of a kernel call: {N: [rows, columns, depth, warps, stages]}}}
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import tracing
from ._version import __version__
from .errors import UserError
from .files import write_json

SHIPPED = Path(__file__).with_name("measured")

_version = 0


def version() -> int:
    """A number that changes when a table does."""
    return _version


def folder() -> Path:
    """Where the user's tables are: ``fused_preact`` in the cache folder of the platform (XDG_CACHE_HOME).

    Raises:
        RuntimeError: the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_preact"


def device_name(kind: str, index: int | None = None) -> str | None:
    """Name of a device that a table is for, of a CPU with torch's threads; None where there is none of that kind."""
    if kind == "cpu":
        return f"{_processor(cpuinfo())}, {torch.get_num_threads()} threads"
    if kind != "cuda" or not torch.cuda.is_available():
        return None
    return _gpu(torch.cuda.current_device() if index is None else index)


@functools.cache
def _gpu(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def cpuinfo() -> dict[str, str]:
    """What Linux says of the processor, by field; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return _fields(path.read_text() if path.exists() else "")


def _fields(text: str) -> dict[str, str]:
    lines = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def model(fields: dict[str, str]) -> str:
    """Name of the processor that `cpuinfo` is of."""
    return fields.get("model name") or platform.processor() or platform.machine()


def _processor(fields: dict[str, str]) -> str:
    # Virtual machines often give processors of many generations one name, and an Arm processor has none.
    keys = ("cpu family", "model", "CPU implementer", "CPU part")
    return ", ".join([model(fields), *(f"{key} {fields[key]}" for key in keys if fields.get(key))])


def file_name(device: str) -> str:
    """Name of the file of a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@functools.cache
def load(device: str | None) -> dict[str, Any]:
    """The tables of a device, the user's over the shipped; empty where there are none, or none that can be used."""
    name = file_name(device or "")
    shipped = _read(SHIPPED / name)
    try:
        own = folder()
    except RuntimeError:
        return shipped
    return _over(shipped, _own(own / name))


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_MOST_IMAGES = 2**63 - 1  # that a size can say


def _empty() -> dict[str, Any]:
    return {"versions": {}, "calls": {}, "tiles": {}}


def _parse(path: Path) -> dict[str, Any]:
    """The tables in a file, empty where there is none; one of _UNREADABLE is raised where it holds something else."""
    try:
        document = {"versions": {}} | json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return _empty()
    if not isinstance(document["versions"], dict):
        raise ValueError(f"versions: {document['versions']}")
    for part, is_entry in ("calls", lambda call: isinstance(call["best"], str)), ("tiles", _is_tile):
        for N, entry in (item for batches in document[part].values() for item in batches.items()):
            if not 1 <= int(N) <= _MOST_IMAGES or not is_entry(entry):
                raise ValueError(f"{N}: {entry}")
    return document


def _is_tile(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 5 and all(isinstance(n, int) and n > 0 for n in entry)


def _read(path: Path) -> dict[str, Any]:
    """What `_parse` gives, and empty, with a warning, where the file holds something else."""
    try:
        return _parse(path)
    except _UNREADABLE as error:
        warnings.warn(
            f"fused_preact leaves out the measurements in {path}, which cannot be read ({type(error).__name__}: "
            f"{error}); remove the file, and `fused-preact tune` measures again",
            stacklevel=2,
        )
        return _empty()


def _own(path: Path) -> dict[str, Any]:
    """What `_read` gives, and empty, with a warning, where another version of the package measured it."""
    document = _read(path)
    if _is_current(document):
        return document
    warnings.warn(
        f"fused_preact {__version__} leaves out the measurements in {path}, which are of version "
        f"{document['versions'].get('fused_preact', 'unknown')}; `fused-preact tune` measures again",
        stacklevel=2,
    )
    return _empty()


def _is_current(document: dict[str, Any]) -> bool:
    """Whether this version of the package measured what is in a document."""
    nothing = not document["calls"] and not document["tiles"]
    return nothing or document["versions"].get("fused_preact") == __version__


def _over(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Both documents in one: where both have a value, that of ``after``."""
    parts = {}
    for part in "calls", "tiles":
        old, new = before[part], after[part]
        parts[part] = {key: old.get(key, {}) | new.get(key, {}) for key in old | new}
    return before | after | parts


def place(device: str) -> Path:
    """The user's file for the table of a device.

    Raises:
        UserError: the user has no home folder.
    """
    try:
        return folder() / file_name(device)
    except RuntimeError as error:
        raise UserError("--output: expected a file for the table, for the user has no home folder") from error


def existing(path: Path) -> dict[str, Any]:
    """What `save` adds to: the tables in a file, empty where another version of the package measured them.

    Raises:
        UserError: there is another file in its place.
    """
    try:
        document = _parse(path)
    except _UNREADABLE as error:
        raise UserError(f"{path}: holds no table of fused-preact tune, and is not overwritten: remove it") from error
    return document if _is_current(document) else _empty()


def save(document: dict[str, Any], path: Path | None = None) -> Path:
    """Write the table of ``document["device"]``, as of this version, over what `existing` has; it counts from here on.

    Raises:
        UserError: it cannot be written, or there is another file in its place.
    """
    global _version
    path = path or place(document["device"])
    whole = _over(existing(path), document)
    whole["versions"] = whole["versions"] | {"fused_preact": __version__}
    write_json(whole, path)
    load.cache_clear()
    _version += 1
    return path


def call_key(problem: Any) -> str:
    """Key of a call: what for, dtype, memory format, C, H and W of x, and how often each geometry and filter occurs."""
    before, behind = _around_size(problem)
    return f"{before}{problem.shape[2]}x{problem.shape[3]}{behind}"


def _around_size(problem: Any) -> tuple[str, str]:
    """What of the key of a call is in front of H and W, and what is behind."""
    counts: dict[str, int] = {}
    for conv, weight in problem.convolutions:
        text = convolution_key(conv, weight)
        counts[text] = counts.get(text, 0) + 1
    convolutions = [f" {count}*{text}" for text, count in counts.items()]
    purpose, dtype = "inference " if problem.inference else "", str(problem.dtype).removeprefix("torch.")
    return f"{purpose}{dtype} {problem.format} {problem.shape[1]}x", "".join(convolutions)


def convolution_key(conv: Sequence[int], weight: Sequence[int]) -> str:
    """A convolution in the key of a call: its geometry and the shape of its filter."""
    return ",".join([f"{number}" for number in (*conv, *weight)])


def best(problem: Any) -> str | None:
    """The backend that was fastest at a call on this device; None where it was not measured.

    At the nearest N, or for code that is compiled, which is to serve any N, at the largest.
    """
    kind, index = problem.device.type, problem.device.index
    if torch.compiler.is_compiling():
        # Compared, H and W may change from call to call; as part of a key, each of their values would be compiled.
        for H, W, name in _by_size(kind, index, *_around_size(problem)):
            if problem.shape[2] == H and problem.shape[3] == W:
                return name
        return None
    found = load(device_name(kind, index))["calls"].get(call_key(problem))
    return _nearest(found, int(problem.shape[0]))["best"] if found else None


@tracing.constant  # a file is read here
def _by_size(kind: str, index: int | None, before: str, behind: str) -> tuple[tuple[int, int, str], ...]:
    """H and W that calls were measured at whose keys are the same but for these, and the backend that was fastest."""
    calls = load(device_name(kind, index))["calls"]
    sizes = {key: re.fullmatch(rf"{re.escape(before)}(\d+)x(\d+){re.escape(behind)}", key) for key in calls}
    return tuple(
        (int(size[1]), int(size[2]), _nearest(calls[key], None)["best"]) for key, size in sizes.items() if size
    )


def _nearest(batches: dict[str, Any], N: int | None) -> Any:
    """What was measured at the nearest N, by their ratio; at the largest where N is None."""
    distance = {text: -int(text) if N is None else abs(math.log(int(text) / max(N, 1))) for text in batches}
    return batches[min(distance, key=distance.__getitem__)]


def tile(device: torch.device, key: str, N: int) -> list[int] | None:
    """The tile of a Triton kernel call that was measured at the nearest N; None where there is none."""
    found = load(device_name(device.type, device.index))["tiles"].get(key)
    return _nearest(found, N) if found else None
