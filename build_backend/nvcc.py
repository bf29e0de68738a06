"""Where the CUDA compiler is, and what the CUDA kernels are compiled for."""

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import CompileError

# Compute capabilities whose machine code goes into the binary; it runs on later ones of the same major version too. The
# driver compiles the PTX that is there too for all others.
ARCHITECTURES = ("8.0", "9.0")
# What PTX is made for: nothing needs more than the oldest, but that launches overlap from 9.0 on (csrc/cuda/ptx.h).
PTX = ("8.0", "9.0")
OLDEST = PTX[0]


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit."""

    home: Path
    version: str  # of nvcc
    architectures: tuple[str, ...]

    def flags(self) -> tuple[str, ...]:
        """Of nvcc: a pass for the oldest PTX and one for each other that an architecture's code is made from."""
        passes = {OLDEST: []}
        for name in self.architectures:
            passes.setdefault(max((ptx for ptx in PTX if float(ptx) <= float(name)), key=float), []).append(name)
        targets = [_gencode(ptx.replace(".", ""), names) for ptx, names in passes.items()]
        return *targets, "-std=c++17", "-O3", "--compiler-options=-fPIC,-fvisibility=hidden"

    def runtime(self) -> Path:
        """Folder of the CUDA runtime library."""
        target = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
        for name in "lib64", "lib", f"targets/{target}-linux/lib":
            if (self.home / name / "libcudart_static.a").exists():
                return self.home / name
        raise CompileError(f"the CUDA toolkit in {self.home} has no libcudart_static.a")


def _gencode(ptx: str, architectures: list[str]) -> str:
    code = [*(f"sm_{name.replace('.', '')}" for name in architectures), f"compute_{ptx}"]
    return f"-gencode=arch=compute_{ptx},code=[{','.join(code)}]"


def find(architectures: tuple[str, ...] = ARCHITECTURES) -> Cuda | None:
    """The toolkit of CUDA_HOME, of PATH, or in /usr/local/cuda; None without one, or with FUSED_PREACT_CUDA=0.

    Raises:
        CompileError: FUSED_PREACT_CUDA=1 and there is none, or its value is another; CUDA_HOME is no toolkit.
    """
    wanted = os.environ.get("FUSED_PREACT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise CompileError(f"FUSED_PREACT_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    if home and not Path(home, "bin/nvcc").exists():
        raise CompileError(
            f"CUDA_HOME: expected the folder of a CUDA toolkit, with bin/nvcc in it, got {home!r}, which has none: "
            "name one that has, or set FUSED_PREACT_CUDA=0 to leave the CUDA kernels out"
        )
    for nvcc in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if nvcc and Path(nvcc).exists():
            return _toolkit(nvcc, architectures)
    if wanted == "1":
        raise CompileError(
            "FUSED_PREACT_CUDA=1, and there is no nvcc: put it on PATH, or set CUDA_HOME to the folder of the toolkit"
        )
    return None


def _toolkit(nvcc: str, architectures: tuple[str, ...]) -> Cuda:
    """The toolkit that an nvcc belongs to, which may be a link or a script: it says itself where it is."""
    plan = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True, check=False).stderr
    here = re.search(r"^#\$ _HERE_=(.+)$", plan, re.MULTILINE)
    release = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if here is None or release is None:
        raise CompileError(f"{nvcc} does not say which CUDA toolkit it belongs to")
    return Cuda(Path(here[1]).parent, release[1], architectures)
