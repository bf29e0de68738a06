import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from fused_preact.bench import measure


def test_spread_is_median_and_quantiles():
    """The figures of every table: median, and the quantiles 0.2 and 0.8."""
    assert measure.spread([5.0, 1.0, 4.0, 2.0, 3.0, 0.0]) == measure.Spread(2.5, 1.0, 4.0)


def test_ratio_is_taken_pair_by_pair():
    """A slow moment that meets both contenders leaves the ratio of its round alone."""
    assert measure.ratio([2.0, 200.0, 4.0], [1.0, 100.0, 2.0]) == measure.Spread(2.0, 2.0, 2.0)
    assert measure.ratio([1.0, 9.0, 2.0], [1.0, 3.0, 4.0]).median == 1.0


def test_ratio_refuses_unpaired_samples():
    """Samples of different lengths have no pairs."""
    with pytest.raises(ValueError, match="shorter"):
        measure.ratio([1.0, 2.0], [1.0])


def recording(log, name):
    return measure.Step(
        prepare=lambda: log.append(f"{name} prepare"),
        forward=lambda: log.append(f"{name} forward") or torch.ones(()),
        backward=lambda out: log.append(f"{name} backward"),
    )


def test_alternate_takes_turns():
    """A B A B, two warm-ups each, every run prepared; no more rounds than allowed however cheap they are."""
    log = []
    times = measure.alternate([recording(log, "a"), recording(log, "b")], budget=60.0, rounds=(1, 3))
    turn = [f"{name} {phase}" for name in "ab" for phase in ("prepare", "forward", "backward")]
    assert log == turn * 5
    assert [len(t.total) for t in times] == [3, 3]
    assert all(0 <= f <= t for sample in times for f, t in zip(sample.forward, sample.total, strict=True))


def test_a_time_ends_when_the_device_has_finished(monkeypatch):
    """A launch alone takes next to nothing: forward's share ends with forward's kernels, the rest with backward's."""
    now, queued = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def wait():
        now[0] += sum(queued)
        queued.clear()

    step = measure.Step(lambda: None, lambda: queued.append(1.0), lambda _: queued.append(2.0), wait)
    assert step.run() == (1.0, 3.0)


def test_how_many_rounds_fit_is_told_by_the_second_warm_up(monkeypatch):
    """The first takes as long as a process, a compiler or a cache of the system needs."""
    now, costs = [0.0], itertools.chain([60.0], itertools.repeat(1.0))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def forward():
        now[0] += next(costs)
        return torch.ones(())

    (times,) = measure.alternate([measure.Step(lambda: None, forward, lambda _: None)], budget=10.0, rounds=(2, 50))
    assert times.total == (1.0,) * 10


def test_alternate_keeps_to_the_fewest_rounds_without_budget():
    """A slow contender is still measured often enough for a spread."""
    times = measure.alternate([recording([], "a")], budget=0.0, rounds=(4, 9))
    assert len(times[0].total) == 4


def test_alternate_leaves_the_garbage_collector_as_it_was():
    """Collection stops while the clock runs, and comes back even when a contender fails."""
    seen = []

    def fail(_):
        seen.append(gc.isenabled())
        if len(seen) == 3:
            raise RuntimeError("boom")

    step = measure.Step(lambda: None, lambda: torch.ones(()), fail)
    with pytest.raises(RuntimeError, match="boom"):
        measure.alternate([step], budget=0.0, rounds=(1, 1))
    assert seen == [True, True, False]
    assert gc.isenabled()


def test_a_garbage_collector_that_is_off_stays_off():
    """Whoever turned it off wants it so afterwards."""
    gc.disable()
    try:
        measure.alternate([measure.Step(lambda: None, lambda: None, lambda _: None)], budget=0.0, rounds=(1, 1))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_saved_bytes_counts_a_storage_once_and_whole():
    """x is saved twice by x*x and once more as a slice: one storage of 4 x 100 bytes."""
    x = torch.randn(100, requires_grad=True)
    assert measure.saved_bytes(lambda: (x * x).sum() + (x[:10] * x[:10]).sum(), nn.Module()) == 400


def test_saved_bytes_leaves_nothing_behind():
    """The graph goes, also where a function keeps its own output: a deep net's would fill the memory."""
    memory = np.zeros(5, dtype=np.float32)
    alive = weakref.ref(memory)

    def forward(given: list[np.ndarray]) -> torch.Tensor:
        y = torch.from_numpy(given.pop())
        return y.add_(torch.ones(5, requires_grad=True)).exp_()

    given = [memory]
    del memory
    assert measure.saved_bytes(lambda: forward(given), nn.Module()) == 20
    gc.collect()
    assert alive() is None


def test_saved_bytes_leaves_parameters_out():
    """A linear layer keeps its input (3 x 8 floats), not its weight."""
    layer = nn.Linear(8, 5)
    assert measure.saved_bytes(lambda: layer(torch.ones(3, 8, requires_grad=True)), layer) == 3 * 8 * 4


def test_saved_bytes_of_eager_batch_norm_relu_conv():
    """Eager keeps the batch norm's input and the ReLU's output, and two statistics a channel."""
    unit = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 1, bias=False))
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    assert measure.saved_bytes(lambda: unit(x), unit) == 2 * x.nbytes + 2 * 4 * 4
