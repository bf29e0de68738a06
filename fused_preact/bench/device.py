"""Steps on a CUDA device: recorded in a CUDA graph, timed by its events, their memory measured and limited."""

from __future__ import annotations

import gc
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import nn

from fused_preact.train.graph import WARM_UP, CudaGraph

from .contenders import Contender, Problem, step


def call_of(contender: Contender, problem: Problem, module: nn.Module) -> Callable[[], tuple]:
    """A function that runs one step of a module that `build` made."""
    trial = step(contender, problem, module)

    def call() -> tuple:
        trial.prepare()
        trial.backward(trial.forward())
        return ()

    return call


def captured(call: Callable[[], tuple]) -> Callable[[], None]:
    """A function that replays what `call` launches."""
    graph = CudaGraph()
    for _ in range(WARM_UP):
        graph.warm_up(call, ())
    return graph.record(call, ())[1]


def seconds(runs: Sequence[Callable[[], object]], rounds: int, repeats: int) -> list[list[float]]:
    """Seconds of each run, in alternation: `repeats` calls between two events of the device, `rounds` times."""
    for call in runs:
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2 * rounds)] for _ in runs]
    for i in range(rounds):
        for call, marks in zip(runs, events, strict=True):
            marks[2 * i].record()
            for _ in range(repeats):
                call()
            marks[2 * i + 1].record()
    torch.cuda.synchronize()
    return [[a.elapsed_time(b) / 1e3 / repeats for a, b in zip(m[::2], m[1::2], strict=True)] for m in events]


def samples(
    calls: Mapping[str, Callable[[], tuple]], rounds: int, repeats: int, no_graph: Container[str] = ()
) -> dict[str, list[float]]:
    """The `seconds` of each call and, as "... in a graph", of its replay, but for those in ``no_graph``."""
    graphs = {f"{name} in a graph": captured(call) for name, call in calls.items() if name not in no_graph}
    runs = {**calls, **graphs}
    return dict(zip(runs, seconds(list(runs.values()), rounds, repeats), strict=True))


def release() -> None:
    """Give back to the device what nothing holds any more: modules and their hooks refer to each other."""
    gc.collect()
    torch.cuda.empty_cache()


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that torch has given out at a time during the second of two calls."""
    call()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def fits(call: Callable[[], object], limit: int) -> bool:
    """Whether a call runs with torch held to `limit` bytes, where the device has as many."""
    release()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0))
    try:
        call()
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the operators of the binary cannot raise it
        if "out of memory" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True
