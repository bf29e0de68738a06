"""Triton kernels compiled for GPUs that are not there: registers, spills, shared memory and assembly of each."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_preact.triton import dgrad, dx, forward, statistics, wgrad
from fused_preact.triton.configurations import SHIPPED
from fused_preact.triton.launch import MERGE, Config

# Bytes of shared memory that one program may have: CUDA C++ programming guide, "Technical specifications". sm80 stands
# for 8.6 and 8.9 too, which have less. On AMD (CDNA 2, 3 and 4) the local data share of a workgroup; gfx950 has more.
SHARED = {
    "sm75": 64 << 10, "sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "sm120": 99 << 10,
    "gfx90a": 64 << 10, "gfx942": 64 << 10, "gfx950": 64 << 10,
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {2: "bf16", 4: "fp32", 8: "fp64"}
GEMMS = {"forward": forward.convolve, "dgrad": dgrad.transposed, "wgrad": wgrad.correlate}
# Pointers to per-channel rows and partial sums, in the accumulation type; the others are in the storage type.
ROWS = {
    "norm", "behind_norm", "slope", "offset", "parts", "bias_parts", "rows", "gamma", "beta", "rstd", "scale",
    "dgamma", "dbeta",
}  # fmt: skip
WIDE = {"partial", "merged"}  # in float64
STREAM = {"add", "out"}  # in float32 where they join a branch of 16 bits
POINTERS = {"x", "weight", "bias", "residual", "y", "g", "behind", "add", "dz", "out", "narrowed"} | WIDE | ROWS


class Binary(NamedTuple):
    """What a compilation gave."""

    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    assembly: str  # PTX, or AMD's


def is_amd(architecture: str) -> bool:
    return architecture.startswith("gfx")


def cases() -> list[tuple[str, str, str, Config]]:
    """(architecture, type, kernel, tile) of every shipped tile."""
    found = []
    for architecture in SHARED:
        for size, tiles in SHIPPED["hip" if is_amd(architecture) else architecture].items():
            # bf16 and fp16 differ in the name of one instruction; SM 7.5 has fp16 only.
            name = "fp16" if architecture == "sm75" and size == 2 else TYPES[size]
            exact = ("fp32-exact",) if name == "fp32" and architecture.startswith("sm") else ()
            found += [
                (architecture, kind, kernel, tile) for kind in (name, *exact) for tile in tiles for kernel in GEMMS
            ]
    return found


def compiled(
    architecture: str, kind: str, kernel: str, tile: Config, taps: int = 3, stride: int = 1, index=triton.language.int32
) -> Binary:
    """One of the three products, prologue and epilogue complete, for channels that divide by 16.

    ``kind`` is the storage type: "fp32" is multiplied as TF32 where there is that, "fp32-exact" is not.
    ``index`` is the type of offsets.
    """
    tf32 = kind == "fp32" and architecture != "sm75" and not is_amd(architecture)
    kind = kind.removesuffix("-exact")
    constants = {"R": taps, "S": taps, "STRIDE_H": stride, "STRIDE_W": stride, "PRECISION": "tf32" if tf32 else "ieee"}
    return build(architecture, kind, GEMMS[kernel], tile, INDEX=index, **constants)


def small_kernels() -> list[tuple[str, object, Config, dict]]:
    """The kernels with one tile for all: (name, kernel, tile, constants)."""
    return [
        ("measure", statistics.measure, statistics.CONFIG, {}),
        ("merge", statistics.merge, MERGE, {"EPS": 1e-5}),
        ("total", dgrad.total, MERGE, {}),
        ("total-eval", dgrad.total, MERGE, {"slope": None, "offset": None}),
        ("reduce", wgrad.reduce, wgrad.REDUCE, {}),
        ("combine", dx.combine, dx.CONFIG, {"narrowed": None, "SUBTRACT": False}),
        (
            "combine-eval",
            dx.combine,
            dx.CONFIG,
            {"x": None, "slope": None, "offset": None, "narrowed": None, "SUBTRACT": False},
        ),
        ("combine-join", dx.combine, dx.CONFIG, {"SUBTRACT": True}),
    ]


def build(architecture: str, kind: str, kernel, tile: Config, **constants) -> Binary:
    """Compile a kernel with every optional argument present but those that ``constants`` make None."""
    accumulation = "fp64" if kind == "fp64" else "fp32"
    joins = constants.get("SUBTRACT", False)
    if joins:
        kind = "fp16" if architecture == "sm75" else "bf16"
    dtypes = {"fp32": triton.language.float32, "fp64": triton.language.float64}
    constants = {"INDEX": triton.language.int32, "ACC": dtypes[accumulation], **constants}
    constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name in POINTERS
        wide = name in ROWS or (joins and name in STREAM)
        dtype = "fp64" if name in WIDE else accumulation if wide else kind
        signature[name] = f"*{dtype}" if pointer else "i32"
        if pointer or name in ("C", "K"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    amd = is_amd(architecture)
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[2:]), 32)
    binary = triton.compile(source, target=target, options=options)
    assembly = binary.asm["amdgcn" if amd else "ptx"]
    usage = _of_assembly(assembly) if amd else _of_cubin(binary.asm["cubin"])
    return Binary(*usage, binary.metadata.shared, assembly)


def _of_assembly(text: str) -> tuple[int, int]:
    """Registers and spilled bytes that the metadata at the end of AMD's assembly tells."""
    counts = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
    return int(counts["vgpr_count"]), int(counts["private_segment_fixed_size"])


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes (in STACK or LOCAL) that cuobjdump, which comes with Triton, reads from a binary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], check=True, capture_output=True, text=True)
    counts = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout)}
    return counts["REG"], counts["STACK"] + counts["LOCAL"]
