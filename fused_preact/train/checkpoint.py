"""Checkpoints: written whole or not at all, and read without running what is in them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError

KEYS = {"settings", "dataset", "iteration", "model", "optimizer", "rng"}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to path; whatever interrupts it, path holds either the old checkpoint or the new one.

    Raises UserError if it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: the checkpoint cannot be written: {error.strerror or error}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `save`, tensors on the CPU: tensors and plain values only (`weights_only`).

    Raises UserError if there is none, or if it is damaged or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint; leave out --resume to start a run") from error
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: damaged, or not a checkpoint of fused-preact train") from error
    if not isinstance(state, dict) or set(state) != KEYS:
        raise UserError(f"{path}: not a checkpoint of fused-preact train: expected entries {', '.join(sorted(KEYS))}")
    return state


def _sync_folder(folder: Path) -> None:
    """Make a rename in folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
