"""Checkpoints: written whole or not at all, and read without running what is in them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import replacing

TYPES = {"settings": dict, "dataset": str, "iteration": int, "model": dict, "optimizer": dict, "rng": dict}
FOLDER = 0x10  # of MS-DOS, among the attributes of a zip entry


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to path; whatever interrupts it, path holds either the old checkpoint or the new one.

    Raises:
        UserError: it cannot be written.
    """
    with replacing(path, ".tmp") as file:  # one name, so that a kill leaves one half of a file at most
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `save`, tensors on the CPU: tensors and plain values only (`weights_only`).

    Raises:
        UserError: there is none, or it is damaged or something else.
    """
    try:
        with zipfile.ZipFile(path) as file:  # torch reads the numbers without looking at their checksums
            # It also takes an entry that is marked as a folder for an empty one, and leaves memory as it finds it.
            if file.testzip() is not None or any(entry.external_attr & FOLDER for entry in file.infolist()):
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint; leave out --resume to start a run") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what a damaged file makes its readers raise knows no end
        raise UserError(f"{path}: damaged, or not a checkpoint of fused-preact train") from error
    if not isinstance(state, dict) or set(state) != set(TYPES):
        raise UserError(f"{path}: not a checkpoint of fused-preact train: expected entries {', '.join(sorted(TYPES))}")
    for name, kind in TYPES.items():
        if not isinstance(state[name], kind):
            got = type(state[name]).__name__
            raise UserError(f"{path}: damaged: expected {kind.__name__} for {name}, got {got}; start anew")
    if state["iteration"] < 0:
        raise UserError(f"{path}: damaged: expected an iteration of at least 0, got {state['iteration']}; start anew")
    return state
