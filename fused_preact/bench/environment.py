"""What a result depends on beside the code: processor, versions, commit, threads and malloc."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fused_preact
from fused_preact import _extension, tables

TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc keeps freed memory, so that a step does not fault its pages in again."""

_MALLOC_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
_STAT = Path("/proc/stat")


def malloc() -> dict[str, Any]:
    """The malloc setting of this process: `setting` is default, tuned or custom, and the variables that make it so."""
    variables = {name: value for name, value in os.environ.items() if name.startswith(_MALLOC_VARIABLES)}
    names = {(): "default", tuple(sorted(TUNED_MALLOC.items())): "tuned"}
    return {"setting": names.get(tuple(sorted(variables.items())), "custom"), "variables": variables}


def cpu() -> dict[str, Any]:
    """Processor, cores this process may use, threads, vector ISAs, and its bf16 instructions (from /proc/cpuinfo)."""
    fields = tables.cpuinfo()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "model": tables.model(fields),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "isa": None if _extension.unavailable else _extension.instruction_sets().chosen,
        "bf16_instructions": [flag for flag in _BF16_FLAGS if flag in flags],
    }


def watch() -> Callable[[], float | None]:
    """Watches the cores of this process; the result tells how many of them other work has kept busy since then.

    On average; None where the system does not tell. What a virtual machine's host takes is other work, too.
    """
    start, before = time.perf_counter(), _others()

    def others() -> float | None:
        if before is None:
            return None
        seconds, rounding = time.perf_counter() - start, len(os.sched_getaffinity(0)) / os.sysconf("SC_CLK_TCK")
        return max(_others() - before - rounding, 0.0) / seconds

    return others


def busy(seconds: float = 0.5) -> float | None:
    """How many cores of this process other work keeps busy now: watched for so long, in which this process waits."""
    others = watch()
    time.sleep(seconds)
    return others()


def _others() -> float | None:
    """Seconds that the cores of this process have ever worked, but for its own; None where the system does not tell."""
    if not _STAT.exists():
        return None
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = (line.split() for line in _STAT.read_text().splitlines())
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = sum(sum(map(int, (*n[:3], *n[5:8]))) for name, *n in lines if name in cores)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def commit() -> dict[str, Any] | None:
    """Commit of the checkout that holds the package, and whether tracked files differ from it; None outside of git."""
    root = Path(fused_preact.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError) as error:
        return {"hash": None, "dirty": None, "error": str(error)}


def date() -> str:
    """The time, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of Python, torch and this package."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_preact": fused_preact.__version__,
    }


def describe() -> dict[str, Any]:
    """All of it, as one JSON object."""
    return {
        "date": date(),
        "device": cpu(),
        "versions": versions(),
        "platform": platform.platform(),
        "commit": commit(),
        "malloc": malloc(),
    }
