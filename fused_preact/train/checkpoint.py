"""Checkpoints: written whole or not at all, and read without running what is in them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import replacing

KEYS = {"settings", "dataset", "iteration", "model", "optimizer", "rng"}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to path; whatever interrupts it, path holds either the old checkpoint or the new one.

    Raises UserError if it cannot be written.
    """
    with replacing(path, ".tmp") as file:  # one name, so that a kill leaves one half of a file at most
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `save`, tensors on the CPU: tensors and plain values only (`weights_only`).

    Raises UserError if there is none, or if it is damaged or something else.
    """
    try:
        with zipfile.ZipFile(path) as file:  # torch reads the numbers without looking at their checksums
            if file.testzip() is not None:
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint; leave out --resume to start a run") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what a damaged file makes its readers raise knows no end
        raise UserError(f"{path}: damaged, or not a checkpoint of fused-preact train") from error
    if not isinstance(state, dict) or set(state) != KEYS:
        raise UserError(f"{path}: not a checkpoint of fused-preact train: expected entries {', '.join(sorted(KEYS))}")
    return state
