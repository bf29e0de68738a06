"""Where the CUDA toolkit is, for tests that compile with it."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path


@functools.cache
def home() -> Path | None:
    """Folder of the toolkit whose nvcc is on PATH, which may be a link or a script; None without one."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    result = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True, check=False)
    return Path(re.search(r"^#\$ _HERE_=(.+)$", result.stderr, re.MULTILINE)[1]).parent


def include() -> Path:
    """Folder of the CUDA headers."""
    return home() / "include"


NO_NVCC = "there is no nvcc on PATH: the CUDA toolkit is needed for its headers and its compiler"
