"""Nets on a CUDA device: the time of a step, its peak memory, and ResNet-1001's largest batch that a memory holds.

net:      {case, errors, seconds: {run: {median, low, high}}, ratios: {run: {"eager", "eager in a graph": {median, low,
          high}}}, peak_bytes: {contender: bytes}}
capacity: {gigabytes, batch: {contender: images}}
compiled: {case, seconds, ratios} as of a net, or {case, left_out: str}; the last, since it takes longest

ResNet-1001 takes part with backend "cuda" in each memory mode, the other nets with "auto".

A run is a contender, or that in a CUDA graph. Peaks are of torch's statistics of the memory it has given out, in a step
of a net that is there alone; the largest batch is one that ran with torch held to so many gigabytes (10^9 bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import cases, device
from .cases import Case, resnet1001
from .check import NET_BATCH, pose, verify, widen
from .contenders import Contender, Problem, build
from .measure import ratio, spread

BATCHES = (64, 128)
GIGABYTES = (16, 24, 80)
ROUNDS, REPEATS = 5, 2
BASELINES = ("eager", "eager in a graph")
TRIALS, LESS = 8, 0.04  # of a batch that might fit: so often, by so much less each time


def entrants() -> list[Contender]:
    """Eager, and the fused net in each memory mode."""
    eager = Contender("eager", "channels_last", device="cuda")
    modes = resnet1001(BATCHES[0], "bf16").memory
    return [eager, *(replace(eager, backend="cuda", memory=mode) for mode in modes)]


def others() -> list[Case]:
    """Nets of other shapes: basic blocks of up to 512 and of 640 channels, and bottlenecks on ImageNet's images."""
    large = cases.net("ResNet-200", "resnet200", 64, "bf16")
    return [
        cases.net("PreActResNet-18", "preactresnet18", 128, "bf16"),
        cases.net("WRN-28-10", "wrn28_10", 128, "bf16"),
        replace(large, label=f"{large.label}, 224x224", shape=(64, 3, 224, 224)),
    ]


def name(contender: Contender) -> str:
    """As the document calls it."""
    return contender.backend if contender.backend in ("eager", "compiled") else f"fused {contender.memory}"


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures, and yields ("nets", net), ("capacity", capacity) and ("compiled", compiled) as they come.

    Raises:
        CheckError: a contender is wrong.
    """
    eager, fused, *_ = entrants()
    deep = [replace(resnet1001(batch, "bf16"), backends=(fused.backend, eager.backend)) for batch in BATCHES]
    small = pose(deep[0].at(NET_BATCH), device=eager.device)
    errors = verify(small, eager.device)
    problems = [widen(small, case) for case in deep]
    peaks = []
    for problem in problems:
        peaks.append({name(c): _peak_bytes(c, problem) for c in entrants()})
        yield "nets", {**_times(problem, entrants()), "errors": errors, "peak_bytes": peaks[-1]}
        device.release()
    for case in others():
        few = pose(case.at(NET_BATCH), device=eager.device)
        pair = [eager, replace(eager, backend="auto")]
        found, problem = {"errors": verify(few, eager.device)}, widen(few, case)
        found["peak_bytes"] = {name(contender): _peak_bytes(contender, problem) for contender in pair}
        yield "nets", _times(problem, pair) | found
        device.release()
    for gigabytes in GIGABYTES:
        yield "capacity", {"gigabytes": gigabytes, "batch": _capacity(small, peaks, gigabytes * 10**9)}
    for problem in problems:
        try:
            yield "compiled", _times(problem, [eager, replace(eager, backend="compiled")])
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
            yield "compiled", {"case": problem.case.name, "left_out": str(error).strip().splitlines()[0]}
        device.release()


def _call(contender: Contender, problem: Problem) -> Callable[[], tuple]:
    return device.call_of(contender, problem, build(contender, problem))


def _times(problem: Problem, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Case, seconds and ratios, in and out of a graph; torch.compile has its own, which it is not asked for here."""
    samples = device.samples({name(c): _call(c, problem) for c in contenders}, ROUNDS, REPEATS, no_graph=("compiled",))
    return {
        "case": problem.case.name,
        "seconds": {label: asdict(spread(sample)) for label, sample in samples.items()},
        "ratios": ratios(samples),
    }


def ratios(samples: dict[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """How many times faster each run is than each baseline, pair by pair."""
    return {
        label: {baseline: asdict(ratio(samples[baseline], sample)) for baseline in BASELINES}
        for label, sample in samples.items()
        if label not in BASELINES
    }


def _peak_bytes(contender: Contender, problem: Problem) -> int:
    peak = device.peak_bytes(_call(contender, problem))
    device.release()
    return peak


def _capacity(problem: Problem, peaks: Sequence[dict[str, int]], limit: int) -> dict[str, int]:
    """The largest batch of each contender, with nothing else on the device."""
    found = {}
    for contender in entrants():
        module = build(contender, problem)

        def fits(batch: int, contender: Contender = contender, module: torch.nn.Module = module) -> bool:
            module.zero_grad(set_to_none=True)
            larger = widen(problem, problem.case.at(batch))
            return device.fits(device.call_of(contender, larger, module), limit)

        found[name(contender)] = largest_batch([peak[name(contender)] for peak in peaks], limit, fits)
        del module, fits
        device.release()
    return found


def largest_batch(peaks: Sequence[int], limit: int, fits: Callable[[int], bool]) -> int:
    """The largest batch whose step stays under `limit` bytes: first what `peaks` promise, then less; 0 where none does.

    peaks: bytes at each of BATCHES; the line through them is the promise. fits: whether a batch runs.
    """
    slope = (peaks[1] - peaks[0]) / (BATCHES[1] - BATCHES[0])
    batch = int((limit - peaks[0]) / slope + BATCHES[0])
    for _ in range(TRIALS):
        if batch < 1:
            break
        if fits(batch):
            return batch
        batch -= max(int(LESS * batch), 1)
    return 0


def show(document: dict[str, Any], console: Console) -> None:
    """A table of steps for each net, and one of the largest batches."""
    for net in document["nets"] + document["compiled"]:
        if "left_out" in net:
            console.print(f"{net['case']}: torch.compile: {net['left_out']}", style="yellow", markup=False)
            continue
        table = Table(net["case"], "ms", *(f"{baseline} / this" for baseline in BASELINES), "peak, MiB")
        for label, sample in net["seconds"].items():
            times = [f"{net['ratios'][label][b]['median']:.2f}" if label in net["ratios"] else "" for b in BASELINES]
            peak = net.get("peak_bytes", {}).get(label)
            table.add_row(label, f"{1e3 * sample['median']:.2f}", *times, "" if peak is None else f"{peak / 2**20:.0f}")
        console.print(table)
    table = Table("largest batch in", *(name(contender) for contender in entrants()))
    for row in document["capacity"]:
        table.add_row(f"{row['gigabytes']} GB", *map(str, row["batch"].values()))
    console.print(table)
