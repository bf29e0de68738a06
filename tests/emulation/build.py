"""Compiles the Python modules here: `kernels`, over the unchanged csrc/cuda/*.cu, and `planted`, over gemm.cu.

Objects stay in build/emulation, and ninja compiles again what has changed alone. The headers of the CUDA toolkit are
needed, nothing else of it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import io
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import ninja
import pybind11
from ninja.ninja_syntax import Writer, escape_path

import cuda_toolkit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-unused-parameter"]  # #pragma unroll is nvcc's
FLAGS += ["-U_FORTIFY_SOURCE"]  # its longjmp refuses to leave for another stack
SANITIZERS = {"none": [], "address": ["-fsanitize=address"], "thread": ["-fsanitize=thread"]}
# The emulation itself runs on many stacks; it tells the sanitizers of what it does.
OWN_FLAGS = {"none": ["-O3"], "address": ["-O3", "-DEMULATION_ASAN"], "thread": ["-O3", "-DEMULATION_TSAN"]}


def sources(module: str) -> list[Path]:
    """What a module is made of, without the emulation itself."""
    if module == "planted":
        return [HERE / "planted.cpp", HERE / "gemm.cu"]
    cuda = ROOT / "csrc" / "cuda"
    return [HERE / "kernels.cpp", cuda / "kernels.cpp", *sorted(cuda.glob("*.cu"))]


def ninja_file(folder: Path, sanitizer: str) -> str:
    """The text of build.ninja for both modules."""
    text = io.StringIO()
    out = Writer(text, width=1000)
    includes = [f"-I{HERE}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    system = [cuda_toolkit.required_home() / "include", pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*FLAGS, *includes, *(f"-isystem {path}" for path in system)]
    compiler = _compiler()
    out.rule("compile", f"{compiler} $flags -MMD -MF $out.d -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
    out.rule("link", f"{compiler} -shared $in $flags -o $out")
    own = [folder / f"{name}.o" for name in ("emulation", "warp")]
    for target in own:
        variables = {"flags": [*flags, *OWN_FLAGS[sanitizer]]}
        out.build(
            escape_path(str(target)), "compile", escape_path(str(HERE / f"{target.stem}.cpp")), variables=variables
        )
    for module in ("kernels", "planted"):
        objects = [folder / module / f"{source.parent.name}-{source.name}.o" for source in sources(module)]
        for source, target in zip(sources(module), objects, strict=True):
            variables = {"flags": [*flags, *SANITIZERS[sanitizer]]}
            out.build(escape_path(str(target)), "compile", escape_path(str(source)), variables=variables)
        inputs = [escape_path(str(path)) for path in (*objects, *own)]
        out.build(escape_path(str(_binary(folder, module))), "link", inputs, variables={"flags": SANITIZERS[sanitizer]})
    return text.getvalue()


def _compiler() -> str:
    return shutil.which("g++") or "c++"


def _binary(folder: Path, module: str) -> Path:
    return folder / f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"


def build(module: str, sanitizer: str = "none") -> Path:
    """Folder of the compiled module; whoever comes second waits for the first.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    folder = ROOT / "build" / "emulation" / sanitizer
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / "build.ninja"
        text = ninja_file(folder, sanitizer)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder, "-j", "2", _binary(folder, module)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"the emulation's module {module} does not compile:\n{result.stdout}")
    return folder


def load(module: str, sanitizer: str = "none") -> ModuleType:
    """The module, built where it is not up to date."""
    spec = importlib.util.spec_from_file_location(module, _binary(build(module, sanitizer), module))
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def environment(sanitizer: str) -> dict[str, str]:
    """What a Python process needs to load a module built with a sanitizer, and to end at its first report."""
    if sanitizer == "none":
        return {}
    names = {"address": ["libasan.so", "libstdc++.so"], "thread": ["libtsan.so", "libstdc++.so"]}[sanitizer]
    paths = [
        subprocess.run([_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in names
    ]
    return {
        "LD_PRELOAD": ":".join(path.strip() for path in paths),
        "ASAN_OPTIONS": "detect_leaks=0",  # python never frees all it has
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def command(sanitizer: str, arguments: list[str]) -> list[str]:
    """The command line: ThreadSanitizer needs memory to be laid out the same way each time."""
    return ["setarch", "-R", *arguments] if sanitizer == "thread" else arguments
