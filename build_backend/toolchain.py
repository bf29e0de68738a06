"""Compiles and links the extension: which compiler, which flags for which source, and the ninja file of it all.

Only changed sources are compiled again (ninja reads the headers each one includes). The environment is heard as every
compiler's user knows it: CXX, CXXFLAGS, LDFLAGS, and MAX_JOBS as torch's own extensions do.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import CompileError

from nvcc import Cuda
from torch_location import Torch

HOST_SOURCES = (
    "ops",
    "schedule",
    "launch",
    "running",
    "library",
    "convolution",
    "tensors",
    "cpu/dispatch",
    "cpu/move",
    "cpu/parallel",
    "cpu/pool",
    "cpu/workspace",
)
# Of cpu/ and of cuda/.
KERNEL_SOURCES = ("forward", "dgrad", "wgrad", "gradients", "statistics", "dx", "join", "convert", "activate")
CUDA_SOURCES = (*KERNEL_SOURCES, "move")
CPU_SOURCES = (*KERNEL_SOURCES, "permute", "kernels")

# No -ffast-math: NaN and infinity must come out as torch gives them. Kernels read neither errno nor exception flags.
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=vla")
KERNEL_FLAGS = (
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-psabi",
)
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
X86_FLAGS = {
    "amx_bf16": (*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512_bf16": (*AVX512_FLAGS, "-mavx512bf16"),
    "avx512": AVX512_FLAGS,
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}
# What an assembler older than the compiler may not know.
X86_PROBES = {"amx_bf16": "tdpbf16ps %tmm2, %tmm1, %tmm0", "avx512_bf16": "vdpbf16ps %zmm2, %zmm1, %zmm0"}
TARGET_FLAGS = ("-DTORCH_TARGET_VERSION=0x020b000000000000",)  # the stable ABI of torch 2.11
# Of the shared libraries named on the command line a linker drops those that it thinks unused. Before glibc 2.34
# pthread_atfork is in a library of its own.
LINK_FLAGS = ("-shared", "-pthread", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed")

NOT_LINUX = "fused_preact installs on Linux alone, and this is {}: on Windows it does in WSL, elsewhere in a container."
COMPILER_CACHES = ("ccache", "sccache", "distcc", "icecc")
NO_COMPILER = (
    "fused_preact needs a C++17 compiler to install and found none: install g++ or clang++ "
    "(Debian, Ubuntu: apt-get install g++), or set CXX to the one to use."
)


def instruction_sets() -> list[str]:
    """Instruction sets that the kernels are compiled for on a machine like this, the widest first."""
    return list(X86_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]


def check_system() -> None:
    """CompileError in one sentence where this is not Linux."""
    if sys.platform != "linux":
        raise CompileError(NOT_LINUX.format(sys.platform))


def find_compiler() -> str:
    """Full path (and arguments, where CXX has any) of the C++ compiler; CompileError in one sentence without one."""
    if "CXX" in os.environ:
        command = shlex.split(os.environ["CXX"])
        if not command or shutil.which(command[0]) is None:
            raise CompileError(f"CXX names a C++ compiler that is not there: {os.environ['CXX']!r}")
        return shlex.join(command)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return shlex.quote(path)
    raise CompileError(NO_COMPILER)


def known_to(compiler: str, isas: list[str]) -> list[str]:
    """Those of `isas` that the compiler and its assembler know: old ones serve the others."""

    def knows(isa: str, folder: str) -> bool:
        source = f'void probe() {{ __asm__ volatile("{X86_PROBES.get(isa, "")}"); }}'
        arguments = [*X86_FLAGS.get(isa, ()), "-x", "c++", "-c", "-", "-o", f"{folder}/probe.o"]
        command = [*shlex.split(compiler), *arguments]
        return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0

    with tempfile.TemporaryDirectory() as folder:
        return [isa for isa in isas if isa == "baseline" or knows(isa, folder)]


@dataclass(frozen=True)
class Toolchain:
    """The resolved configuration of one build."""

    torch: Torch
    compiler: str
    sources: Path  # the folder csrc
    objects: Path  # where objects and the ninja file go
    isas: list[str]  # of instruction_sets()
    cuda: Cuda | None = None  # None leaves the CUDA kernels out
    unknown: tuple[str, ...] = ()  # instruction sets that were asked for and that the compiler does not know

    def describe(self) -> str:
        """One line a fact, for the log of the build."""
        version = subprocess.run([*shlex.split(self.compiler), "--version"], capture_output=True, text=True, check=True)
        unknown = ", ".join(self.unknown)
        unknown = unknown and f" (not {unknown}, which this compiler or its assembler is too old for)"
        return "\n".join(
            f"fused_preact: {name:<16} {value}"
            for name, value in {
                "torch": f"{self.torch.version} in {self.torch.folder}",
                "compiler": f"{self.compiler}: {version.stdout.splitlines()[0]}",
                "instruction sets": ", ".join(self.isas) + unknown,
                "CUDA": "left out"
                if self.cuda is None
                else f"{self.cuda.version} in {self.cuda.home}, for {', '.join(self.cuda.architectures)}",
                "objects": self.objects,
            }.items()
        )

    def build(self, binary: Path) -> None:
        """Compiles what changed and links it to `binary`; CompileError where the compiler or the linker fails."""
        import fcntl  # Windows has none, and is to hear NOT_LINUX

        self.objects.mkdir(parents=True, exist_ok=True)
        binary.parent.mkdir(parents=True, exist_ok=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        with (self.objects / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # builds of one checkout for two environments share this folder
            (self.objects / "build.ninja").write_text(self.ninja_file(binary.resolve()))
            if subprocess.run([_find_ninja(), "-C", self.objects, *jobs], check=False).returncode != 0:
                raise CompileError("fused_preact did not compile: the compiler's own message stands above")

    def ninja_file(self, binary: Path) -> str:
        """The text of build.ninja: one edge an object, one for the binary."""
        edges = list(self._compilations())
        libraries = (
            () if self.cuda is None else (f"-L{self.cuda.runtime()}", "-lcudart_static", "-ldl", "-lrt", "-lpthread")
        )
        link = (f"-L{self.torch.folder / 'lib'}", *LINK_FLAGS, *libraries, *shlex.split(os.environ.get("LDFLAGS", "")))
        return "\n".join(
            [
                f"cxx = {_escape(self.compiler)}",
                _compile_rule("compile", "cxx"),
                *self._nvcc_rule(),
                "rule link",
                "  command = $cxx $in $flags -o $out",
                "  description = link $out",
                *(
                    f"build {name}.o: {'cuda' if source.suffix == '.cu' else 'compile'} {_escape_path(source)}\n"
                    f"  flags = {_escape(shlex.join(flags))}"
                    for name, source, flags in edges
                ),
                f"build {_escape_path(binary)}: link {' '.join(f'{name}.o' for name, _, _ in edges)}",
                f"  flags = {_escape(shlex.join(link))}",
                "",
            ]
        )

    def _compilations(self) -> Iterator[tuple[str, Path, tuple[str, ...]]]:
        """(object, source, flags) of every object."""
        common = (*COMMON_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")))
        isas = "-DFUSED_PREACT_ISAS=" + " ".join(f"ISA({isa})" for isa in self.isas)
        host = (*common, *TARGET_FLAGS, isas, "-isystem", str(self.torch.folder / "include"))
        if self.cuda is not None:
            names = " ".join(f"ARCHITECTURE({name})" for name in self.cuda.architectures)
            host += (f"-DFUSED_PREACT_CUDA={names}", "-DUSE_CUDA", "-isystem", str(self.cuda.home / "include"))
            for name in "device", "kernels":
                yield f"host/cuda/{name}", self.sources / "cuda" / f"{name}.cpp", host
            for name in CUDA_SOURCES:
                yield f"cuda/{name}", self.sources / "cuda" / f"{name}.cu", self.cuda.flags()
        for name in HOST_SOURCES:
            yield f"host/{name}", self.sources / f"{name}.cpp", host
        for isa in self.isas:
            own = (*common, *KERNEL_FLAGS, *X86_FLAGS[isa], f"-DFUSED_PREACT_ISA={isa}")
            for name in CPU_SOURCES:
                yield f"{isa}/{name}", self.sources / "cpu" / f"{name}.cpp", own

    def _nvcc_rule(self) -> list[str]:
        if self.cuda is None:
            return []
        # The compiler of the host part is named: nvcc would choose by itself, and knows no cache in front of it.
        compiler = next(word for word in shlex.split(self.compiler) if Path(word).name not in COMPILER_CACHES)
        nvcc = shlex.join([str(self.cuda.home / "bin/nvcc"), "-ccbin", compiler])
        return [f"nvcc = {_escape(nvcc)}", _compile_rule("cuda", "nvcc")]


def _compile_rule(name: str, compiler: str) -> str:
    return (
        f"rule {name}\n  command = ${compiler} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n"
        "  deps = gcc\n  description = compile $out"
    )


def _find_ninja() -> str:
    """The ninja of the build environment, which need not be on PATH."""
    try:
        import ninja
    except ModuleNotFoundError:
        if path := shutil.which("ninja"):
            return path
        raise CompileError("building without isolation needs ninja: pip install ninja") from None
    return str(Path(ninja.BIN_DIR) / "ninja")


def _escape(text: str) -> str:
    return text.replace("$", "$$")


def _escape_path(path: Path) -> str:
    return _escape(str(path)).replace(" ", "$ ").replace(":", "$:")
