"""How time and memory are taken: contenders in alternation, medians with spread, ratios pair by pair.

A drift of the machine (its clock, its caches) then meets the contenders alike, and a ratio is made of times that lie
next to each other. Other work on the same cores does not: eager has many short parallel loops, each of which waits for
the slowest thread, so it loses more than what is fused. `environment.watch` tells of such work.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

LOW, HIGH = 0.2, 0.8


@dataclass(frozen=True)
class Spread:
    """Median of a sample, and the quantiles 0.2 and 0.8."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Step:
    """One forward and backward.

    Args:
        prepare: untimed, before each run: drops the gradients of the run before.
        forward: returns what backward differentiates.
        backward: takes what forward returned; for a net, also the optimizer's update.
        wait: returns when the device has finished.
    """

    prepare: Callable[[], None]
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], None]
    wait: Callable[[], None] = lambda: None

    def run(self) -> tuple[float, float]:
        """Seconds of forward, and of forward with backward."""
        self.prepare()
        start = time.perf_counter()
        out = self.forward()
        self.wait()
        middle = time.perf_counter()
        self.backward(out)
        self.wait()
        return middle - start, time.perf_counter() - start


@dataclass(frozen=True)
class Times:
    """Seconds of each round: forward alone, and forward with backward."""

    forward: tuple[float, ...]
    total: tuple[float, ...]


def spread(sample: Sequence[float]) -> Spread:
    """Median and quantiles 0.2 and 0.8 (linear interpolation)."""
    low, median, high = np.quantile(np.asarray(sample, dtype=np.float64), (LOW, 0.5, HIGH))
    return Spread(float(median), float(low), float(high))


def ratio(baseline: Sequence[float], contender: Sequence[float]) -> Spread:
    """Spread of baseline[i] / contender[i]: above 1 where the contender is faster.

    Raises:
        ValueError: the two samples differ in length, so their entries are no pairs.
    """
    return spread([b / c for b, c in zip(baseline, contender, strict=True)])


def alternate(steps: Sequence[Step], budget: float, rounds: tuple[int, int]) -> list[Times]:
    """Runs the steps in turn (A B A B ...), after two warm-ups each, and returns the times of each.

    Args:
        steps: the contenders.
        budget: seconds for the timed rounds, all contenders together; the second warm-up tells how many fit.
        rounds: fewest and most rounds, whatever the budget.
    """
    for step in steps:
        step.run()  # the first starts threads and makes what torch remembers: it says nothing of the next
    took = sum(step.run()[1] for step in steps)
    count = min(max(int(budget / took), rounds[0]), rounds[1])
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        samples = [[step.run() for step in steps] for _ in range(count)]
    finally:
        if collecting:
            gc.enable()
    return [Times(*map(tuple, zip(*column, strict=True))) for column in zip(*samples, strict=True)]


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that autograd keeps for the backward of forward(): whole storages, each one counted once.

    The storages of the module's own parameters and buffers are left out: they live anyway.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output would hold the graph that holds it, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    total = sum(kept.values())
    del out  # The graph had to live until here: a storage freed early would lend its address to another.
    return total
