"""Blocks, nets and kernels on a CUDA device: times from its events, in and out of a CUDA graph; bytes against a copy.

{schema, date, device, versions, platform, commit, malloc, busy, gpu, copy, blocks: [block], kernels: [kernel],
 nets: [net], capacity: [capacity], compiled: [compiled]}, the last three as cuda_net.py says
busy:   how many cores of the host other work took before, or null; older files lack it
gpu:    name, compute capability, torch's CUDA version
copy:   bytes a second of a large device-to-device copy, read and write counted
block:  {case, errors, seconds: {contender: {median, low, high}}, ratios: {eager, graph: {median, low, high}}}
kernel: {case, kernel, bytes, seconds, of_copy}: bytes are those it must read and write, each once; seconds those of
        `kernel_seconds`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from operator import itemgetter
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fused_preact import backends
from fused_preact.errors import UserError

from . import cuda_net, environment
from .cases import Case, bottlenecks, unit
from .check import pose, verify
from .contenders import Contender, build
from .device import call_of, samples, seconds
from .measure import ratio, spread
from .report import HOST_THREADS, SCHEMA, warn_if_busy

BATCH = 128
ROUNDS, REPEATS = 20, 10
EAGER, FUSED = (Contender(backend, "channels_last", device="cuda") for backend in ("eager", "cuda"))
COPIED = 1 << 30  # bytes
# What the names of the kernels contain, and how often each reads or writes the unit's input and its output.
TRAFFIC = {
    "gradients_kernel": (2, 1),
    "ForwardEpilogue": (1, 1),
    "DgradEpilogue": (2, 1),
    "wgrad": (1, 1),
    "statistics": (1, 0),
    "dx_kernel": (3, 0),
}


def run(console: Console, save: Callable[[dict[str, Any]], None]) -> None:
    """Measures everything and prints it; `save` is given the document whenever there is more in it.

    Raises:
        UserError: there is no CUDA device, or no kernels for it.
        CheckError: a contender is wrong.
    """
    if not torch.cuda.is_available():
        raise UserError("--device: torch finds no CUDA device on this machine")
    if reason := backends.status()["cuda"]:
        raise UserError(f"--device cuda: {reason}")
    document = {"schema": SCHEMA, **environment.describe(), "busy": warn_if_busy(console, HOST_THREADS)}
    document |= {"gpu": _gpu(), "copy": copy_bandwidth()}
    cases = [case for dtype in ("bf16", "fp32") for case in bottlenecks(BATCH, dtype)]
    document["blocks"] = [_block(_only(case)) for case in cases]
    document["kernels"] = [row for case in units() for row in _kernels(case, document["copy"])]
    document |= {"nets": [], "capacity": [], "compiled": []}
    show(document, console)
    save(document)
    for kind, found in cuda_net.run():
        document[kind].append(found)
        save(document)
    cuda_net.show(document, console)


def _only(case: Case) -> Case:
    return replace(case, backends=("cuda", "eager"), layouts=("channels_last",))


def units() -> list[Case]:
    """The three convolutions of a bottleneck of each stage of ResNet-1001, bf16."""
    return [
        _only(Case("Unit", f"{C}->{K}, {R}x{R}, {H}x{H}", unit(C, K, R), (BATCH, C, H, H), "bf16"))
        for M, H in ((16, 32), (32, 16), (64, 8))
        for C, K, R in ((4 * M, M, 1), (M, M, 3), (M, 4 * M, 1))
    ]


def _gpu() -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = (torch.ones(COPIED, dtype=torch.uint8, device="cuda") for _ in range(2))
    (times,) = seconds([lambda: target.copy_(source)], ROUNDS, REPEATS)
    return 2 * COPIED / spread(times).median


def _block(case: Case) -> dict[str, Any]:
    problem = pose(case, device="cuda")
    errors = verify(problem, "cuda")
    calls = {c.backend: call_of(c, problem, build(c, problem)) for c in (EAGER, FUSED)}
    took = samples(calls, ROUNDS, REPEATS)
    return {
        "case": case.name,
        "errors": errors,
        "seconds": {name: asdict(spread(sample)) for name, sample in took.items()},
        "ratios": {
            "eager": asdict(ratio(took["eager"], took["cuda"])),
            "graph": asdict(ratio(took["eager in a graph"], took["cuda in a graph"])),
        },
    }


def minimum_bytes(kernel: str, x: int, y: int) -> int | None:
    """Bytes that a kernel must move for a unit with an input of x bytes and an output of y; None for other kernels."""
    for part, (reads_x, reads_y) in TRAFFIC.items():
        if part in kernel:
            return reads_x * x + reads_y * y
    return None


def kernel_seconds(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Mean seconds of each kernel, by name, from names, beginnings and ends in microseconds.

    Where launches overlap (csrc/cuda/ptx.h), one has begun when its blocks wait for the launch in front: it counts from
    the end of that.
    """
    took: dict[str, list[float]] = {}
    before = 0.0
    for name, begin, end in sorted(kernels, key=itemgetter(1, 2)):
        took.setdefault(name, []).append((end - max(begin, before)) / 1e6)
        before = end
    return {name: fmean(times) for name, times in took.items()}


def _kernels(case: Case, copy: float) -> list[dict[str, Any]]:
    """Each kernel of a unit's forward and backward, over inputs that together are larger than the cache."""
    problem = pose(case, device="cuda")
    module: nn.Module = build(FUSED, problem)
    N, C, H, W = case.shape
    x_bytes, y_bytes = 2 * N * C * H * W, 2 * problem.target.numel()
    copies = 1 + 2 * torch.cuda.get_device_properties(0).L2_cache_size // x_bytes
    inputs = [
        problem.x.to("cuda", memory_format=torch.channels_last, copy=True).requires_grad_() for _ in range(copies)
    ]
    dy = problem.target.to("cuda", memory_format=torch.channels_last)

    def sweep() -> None:
        for x in inputs:
            with torch.autocast("cuda", torch.bfloat16):
                y = module(x)
            y.backward(dy)

    sweep()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(max(ROUNDS // copies, 1)):
            sweep()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = ((event.name, event.time_range.start, event.time_range.end) for event in on_device)
    rows = []
    for name, took in kernel_seconds(spans).items():
        moved = minimum_bytes(name, x_bytes, y_bytes)
        if moved is not None:
            of_copy = moved / took / copy
            rows.append({"case": case.name, "kernel": name, "bytes": moved, "seconds": took, "of_copy": of_copy})
    return rows


def show(document: dict[str, Any], console: Console) -> None:
    """Two tables for people."""
    console.print(f"{document['gpu']['name']}: a copy moves {document['copy'] / 1e9:.0f} GB/s", highlight=False)
    blocks = Table(
        "block, forward and backward", "eager, ms", "fused, ms", "faster", "in a graph: eager", "fused", "faster"
    )
    for block in document["blocks"]:
        ms = {name: f"{1e3 * sample['median']:.3f}" for name, sample in block["seconds"].items()}
        eager, graph = (f"{block['ratios'][name]['median']:.2f}" for name in ("eager", "graph"))
        blocks.add_row(
            block["case"], ms["eager"], ms["cuda"], eager, ms["eager in a graph"], ms["cuda in a graph"], graph
        )
    kernels = Table("kernel", "unit", "us", "GB/s", "of a copy")
    for row in document["kernels"]:
        name = next(part for part in TRAFFIC if part in row["kernel"])
        us, rate = f"{1e6 * row['seconds']:.1f}", f"{row['bytes'] / row['seconds'] / 1e9:.0f}"
        kernels.add_row(name, row["case"], us, rate, f"{100 * row['of_copy']:.0f} %")
    console.print(blocks, kernels)
