"""Blocks and kernels on a CUDA device: times from device events, in and out of a CUDA graph; bandwidth against a copy.

{schema, date, device, versions, platform, commit, malloc, gpu, copy, blocks: [block], kernels: [kernel]}
gpu:    name, compute capability, torch's CUDA version
copy:   bytes a second of a large device-to-device copy, read and write counted
block:  {case, errors, seconds: {contender: {median, low, high}}, ratios: {eager, graph: {median, low, high}}}
kernel: {case, kernel, bytes, seconds, of_copy}: bytes are those it must read and write, each once
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fused_preact.errors import UserError

from . import environment
from .cases import Case, bottlenecks, make_unit
from .check import pose, verify
from .contenders import Contender, Problem, build, step
from .measure import ratio, spread
from .report import SCHEMA

BATCH = 128
ROUNDS, REPEATS = 20, 10
EAGER, FUSED = (Contender(backend, "channels_last", device="cuda") for backend in ("eager", "cuda"))
COPIED = 1 << 30  # bytes
# What the names of the kernels contain, and how often each reads or writes the unit's input and its output.
TRAFFIC = {
    "ForwardEpilogue": (1, 1),
    "DgradEpilogue": (2, 1),
    "wgrad": (1, 1),
    "statistics": (1, 0),
    "dx_kernel": (3, 0),
}


def run(console: Console) -> dict[str, Any]:
    """Measures everything, prints it, and returns the document.

    Raises:
        UserError: there is no CUDA device.
        CheckError: a contender is wrong.
    """
    if not torch.cuda.is_available():
        raise UserError("--device: torch finds no CUDA device on this machine")
    document = {"schema": SCHEMA, **environment.describe(), "gpu": _gpu(), "copy": copy_bandwidth()}
    cases = [case for dtype in ("bf16", "fp32") for case in bottlenecks(BATCH, dtype)]
    document["blocks"] = [_block(_only(case)) for case in cases]
    document["kernels"] = [row for case in units() for row in _kernels(case, document["copy"])]
    show(document, console)
    return document


def _only(case: Case) -> Case:
    return Case(case.group, case.label, case.make, case.shape, case.dtype, False, ("cuda", "eager"), ("channels_last",))


def units() -> list[Case]:
    """The three convolutions of a bottleneck of each stage of ResNet-1001, bf16."""
    return [
        _only(Case("Unit", f"{C}->{K}, {R}x{R}, {H}x{H}", partial(make_unit, C, K, R, 1), (BATCH, C, H, H), "bf16"))
        for M, H in ((16, 32), (32, 16), (64, 8))
        for C, K, R in ((4 * M, M, 1), (M, M, 3), (M, 4 * M, 1))
    ]


def _gpu() -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}


def seconds(runs: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Seconds of each run, in alternation: REPEATS calls between two events of the device, ROUNDS times."""
    for call in runs:
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2 * ROUNDS)] for _ in runs]
    for i in range(ROUNDS):
        for call, marks in zip(runs, events, strict=True):
            marks[2 * i].record()
            for _ in range(REPEATS):
                call()
            marks[2 * i + 1].record()
    torch.cuda.synchronize()
    return [[a.elapsed_time(b) / 1e3 / REPEATS for a, b in zip(m[::2], m[1::2], strict=True)] for m in events]


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = (torch.ones(COPIED, dtype=torch.uint8, device="cuda") for _ in range(2))
    (times,) = seconds([lambda: target.copy_(source)])
    return 2 * COPIED / spread(times).median


def _step(contender: Contender, problem: Problem) -> Callable[[], None]:
    trial = step(contender, problem, build(contender, problem))

    def call() -> None:
        trial.prepare()
        trial.backward(trial.forward())

    return call


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """A function that replays what `call` launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _block(case: Case) -> dict[str, Any]:
    problem = pose(case)
    errors = verify(problem, "cuda")
    calls = {c.backend: _step(c, problem) for c in (EAGER, FUSED)}
    runs = {**calls, **{f"{name} in a graph": captured(call) for name, call in calls.items()}}
    samples = dict(zip(runs, seconds(list(runs.values())), strict=True))
    return {
        "case": case.name,
        "errors": errors,
        "seconds": {name: asdict(spread(sample)) for name, sample in samples.items()},
        "ratios": {
            "eager": asdict(ratio(samples["eager"], samples["cuda"])),
            "graph": asdict(ratio(samples["eager in a graph"], samples["cuda in a graph"])),
        },
    }


def minimum_bytes(kernel: str, x: int, y: int) -> int | None:
    """Bytes that a kernel must move for a unit with an input of x bytes and an output of y; None for other kernels."""
    for part, (reads_x, reads_y) in TRAFFIC.items():
        if part in kernel:
            return reads_x * x + reads_y * y
    return None


def _kernels(case: Case, copy: float) -> list[dict[str, Any]]:
    """Each kernel of a unit's forward and backward, over inputs that together are larger than the cache."""
    problem = pose(case)
    module: nn.Module = build(FUSED, problem)
    N, C, H, W = case.shape
    x_bytes, y_bytes = 2 * N * C * H * W, 2 * problem.target.numel()
    copies = 1 + 4 * torch.cuda.get_device_properties(0).L2_cache_size // x_bytes
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
        for _ in range(ROUNDS):
            sweep()
        torch.cuda.synchronize()
    rows = []
    for event in profile.key_averages():
        moved = minimum_bytes(event.key, x_bytes, y_bytes)
        if moved is not None:
            took = event.device_time_total / event.count / 1e6
            rows.append(
                {
                    "case": case.name,
                    "kernel": event.key,
                    "bytes": moved,
                    "seconds": took,
                    "of_copy": moved / took / copy,
                }
            )
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
