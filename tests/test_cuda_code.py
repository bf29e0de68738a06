"""The machine code of the CUDA kernels for every architecture, read without a GPU.

The built extension holds its kernels' PTX, for SM 8.0 and, unless it was built without, 9.0; ptxas makes the code of
each architecture from the latest that it has, as build or driver do.
"""

from __future__ import annotations

import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

import cuda_toolkit
from cuda_toolkit import ROOT
from fused_preact import _extension

pytestmark = pytest.mark.skipif(cuda_toolkit.home() is None, reason=cuda_toolkit.NO_NVCC)

ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
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


def disassemble(source: str, architecture: str, folder: Path) -> list[Kernel]:
    """The kernels of a source for an architecture; files are left in the folder."""
    built = ROOT / "build" / "objects" / "cuda" / f"{source}.o"
    run(cuda_toolkit.tool("cuobjdump"), "-xptx", "all", built, cwd=folder)
    number = int(architecture.replace(".", ""))
    made = {int(re.search(r"sm_(\d+)", path.name)[1]): path for path in folder.glob("*.ptx")}
    assert set(made) == {80} | {90 for name in _extension.cuda_architectures if float(name) >= 9}
    ptx = made[max(of for of in made if of <= number)]
    bounds = {
        name: (int(threads), int(blocks or 1))
        for name, threads, blocks in re.findall(
            r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)(?:, \d+)*\s*(?:\.minnctapersm (\d+))?", ptx.read_text()
        )
    }
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
    assert " bytes smem" not in log, "shared memory that is not asked for at the launch"
    return [
        Kernel(name, *bounds[name], int(registers), tuple(map(int, memory)), codes[name])
        for name, *memory, registers in found
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_machine_code(source: str, architecture: str, tmp_path: Path) -> None:
    """No spills, room for the blocks that the design counts on, and the matrix instructions that are meant."""
    overlaps = float(architecture) >= 9 and any(float(name) >= 9 for name in _extension.cuda_architectures)
    for kernel in disassemble(source, architecture, tmp_path):
        assert_registers_are_enough(kernel)
        assert_blocks_fit(kernel)
        assert_instructions(kernel)
        assert_takes_turns(kernel, overlaps)


def assert_registers_are_enough(kernel: Kernel) -> None:
    """Nothing is kept in local memory, which costs the bandwidth that the kernels are about."""
    assert not any(kernel.memory), f"{kernel.name}: stack, spill stores and loads of {kernel.memory} bytes"
    assert not re.search(r"\b(LDL|STL)\b", kernel.code), kernel.name


def assert_blocks_fit(kernel: Kernel) -> None:
    """Registers leave room for the blocks that __launch_bounds__ names."""
    warps, a_warp = kernel.threads // WARP, -(-kernel.registers * WARP // GRANULE) * GRANULE
    assert kernel.blocks * warps * a_warp <= REGISTERS, f"{kernel.name}: {kernel.registers} registers"


def assert_instructions(kernel: Kernel) -> None:
    """Tensor cores multiply in the type that was asked for, and only there; copies bypass the registers.

    Where blocks meet, `arrive` releases and acquires: no fence is stronger.
    """
    assert "MEMBAR.SC" not in kernel.code, kernel.name
    for name, instruction in PRODUCTS.items():
        if name in kernel.name:
            assert instruction in kernel.code, f"{kernel.name}: no {instruction}"
            assert ("HMMA" in kernel.code) == (name != "3Fma"), kernel.name
            assert "LDGSTS" in kernel.code, kernel.name


def before_the_wait(code: str) -> set[str]:
    """The instructions that some way from the entry of a kernel meets before ACQBULK."""
    lines: list[tuple[str, str, str, str]] = []
    labels: dict[str, int] = {}
    line = r"^(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/ +(@\S+ +)?([A-Z]\w+)([^;`]*)(?:`\((\.L_x_\d+)\))?"
    for label, *instruction in re.findall(line, code, re.MULTILINE):
        if label:
            labels[label] = len(lines)
        else:
            lines.append(tuple(instruction))
    met, ahead = set(), [0]
    while ahead:
        at = ahead.pop()
        guard, name, operands, target = lines[at]
        if at in met or name == "ACQBULK":
            continue
        met.add(at)
        assert name not in ("BRX", "JMX"), "a jump to anywhere"
        if target:
            ahead.append(labels[target])
        if guard or name not in ("BRA", "EXIT", "RET") or (name == "BRA" and operands.strip()):
            ahead.append(at + 1)
    return {lines[at][1] for at in met}


def assert_takes_turns(kernel: Kernel, overlaps: bool) -> None:
    """Where launches overlap, a kernel waits for those before, lets the next begin, and touches memory after that."""
    names = re.findall(r"\b(ACQBULK|PREEXIT|LDGSTS|LDG|STG|LD|ST|ATOMG?|REDG?)\b", kernel.code)
    if overlaps:
        assert not before_the_wait(kernel.code) & {"EXIT", *names}, kernel.name
        assert all(then == "PREEXIT" for name, then in pairwise(names) if name == "ACQBULK"), kernel.name
    ways = 2 if "gradients_kernel" in kernel.name else 1  # blocks of dgrad and blocks of wgrad
    assert names.count("ACQBULK") == names.count("PREEXIT") == overlaps * ways, kernel.name
