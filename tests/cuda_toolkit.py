"""The CUDA toolkit that tests compile with, and the tools that read what it makes."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_NVCC = "no CUDA toolkit: the extension is built without one (no nvcc on PATH, or FUSED_PREACT_CUDA=0)"


@functools.cache
def home() -> Path | None:
    """Folder of the toolkit that the extension is built with; None without one."""
    sys.path.append(str(ROOT / "build_backend"))
    toolkit = importlib.import_module("nvcc").find()
    return None if toolkit is None else toolkit.home


def required_home() -> Path:
    """The same, for who cannot go on without; SystemExit says so in one sentence."""
    if (folder := home()) is None:
        raise SystemExit(NO_NVCC)
    return folder


def tool(name: str) -> Path:
    """Program of the package nvidia-cuda-<name>, which brings it alone."""
    files = importlib.metadata.files(f"nvidia-cuda-{name}")
    return Path(next(file for file in files if file.name == name).locate())
