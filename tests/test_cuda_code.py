"""The machine code of the CUDA kernels for every architecture, read without a GPU.

The built extension holds its kernels' PTX; ptxas makes the code of each architecture from it, as build or driver do.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

import cuda_toolkit
from cuda_toolkit import ROOT

pytestmark = pytest.mark.skipif(cuda_toolkit.home() is None, reason=cuda_toolkit.NO_NVCC)

ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu") if path.stem != "kernels")  # the table
REGISTERS, GRANULE, WARP = 65536, 256, 32  # of a multiprocessor; a warp takes them by so many
# Matrix products by the type in a kernel's name: the shape, and the types, as the disassembler writes them.
PRODUCTS = {
    "MmaHalfI6__half": "HMMA.16816.F32 ",
    "MmaHalfI13__nv_bfloat16": "HMMA.16816.F32.BF16",
    "MmaTf32": "HMMA.1688.F32.TF32",
    "3Fma": "FFMA",
}


class Kernel(NamedTuple):
    name: str  # mangled
    threads: int  # of a block
    blocks: int  # on a multiprocessor, that __launch_bounds__ counts on
    registers: int  # of a thread
    memory: tuple[int, ...]  # bytes of stack frame, spill stores, spill loads
    code: str  # disassembled


def run(*command: object, cwd: Path | None = None) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module", params=list(itertools.product(SOURCES, ARCHITECTURES)), ids="-".join)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """Those of one source for one architecture."""
    source, architecture = request.param
    folder = tmp_path_factory.mktemp(source)
    built = ROOT / "build" / "objects" / "cuda" / f"{source}.o"
    run(cuda_toolkit.tool("cuobjdump"), "-xptx", "all", built, cwd=folder)
    (ptx,) = folder.glob("*.ptx")
    bounds = {
        name: (int(threads), int(blocks or 1))
        for name, threads, blocks in re.findall(
            r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)(?:, \d+)*\s*(?:\.minnctapersm (\d+))?", ptx.read_text()
        )
    }
    number = architecture.replace(".", "")
    log = run(cuda_toolkit.home() / "bin/ptxas", "-O3", "-v", f"-arch=sm_{number}", ptx, "-o", folder / "cubin")
    code = run(cuda_toolkit.tool("nvdisasm"), "-c", folder / "cubin")
    _, *sections = re.split(r"^\s*\.section\s+\.text\.(\w+).*$", code, flags=re.MULTILINE)
    codes = dict(zip(sections[::2], sections[1::2], strict=True))
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        log,
        re.DOTALL,
    )
    assert {name for name, *_ in found} == set(bounds) == set(codes)
    return [
        Kernel(name, *bounds[name], int(registers), tuple(map(int, memory)), codes[name])
        for name, *memory, registers in found
    ]


def test_registers_are_enough(kernels: list[Kernel]) -> None:
    """Nothing is kept in local memory, which costs the bandwidth that the kernels are about."""
    assert [(k.name, k.memory) for k in kernels if any(k.memory) or re.search(r"\b(LDL|STL)\b", k.code)] == []


def test_as_many_blocks_fit_as_the_design_counts_on(kernels: list[Kernel]) -> None:
    """Registers leave room for the blocks that __launch_bounds__ names."""
    for k in kernels:
        warps, a_warp = k.threads // WARP, -(-k.registers * WARP // GRANULE) * GRANULE
        assert k.blocks * warps * a_warp <= REGISTERS, (k.name, k.registers)


def test_the_instructions_meant_are_there(kernels: list[Kernel]) -> None:
    """Tensor cores multiply in the type that was asked for, and only there; copies bypass the registers."""
    for k in kernels:
        for name, instruction in PRODUCTS.items():
            if name not in k.name:
                continue
            assert instruction in k.code, (k.name, instruction)
            assert ("HMMA" in k.code) == (name != "3Fma"), k.name
            assert "LDGSTS" in k.code, k.name
