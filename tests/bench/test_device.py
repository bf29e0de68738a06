"""Times and memory of a CUDA device, with one that is made up: a clock that calls move on, and bytes that they take."""

import pytest
import torch

from fused_preact.bench import device
from fused_preact.bench.measure import Step


class FakeCuda:
    """The part of torch.cuda that is used: milliseconds, the peak of memory, and its limit."""

    def __init__(self):
        self.now, self.peak, self.share, self.shares = 0.0, 0, 1.0, []

    def Event(self, enable_timing):  # noqa: N802  (torch's name)
        assert enable_timing
        return FakeEvent(self)

    def limit(self, share):
        self.share = share
        self.shares.append(share)

    def take(self, milliseconds=0.0, size=0):
        """What a call does."""
        self.now += milliseconds
        self.peak = max(self.peak, size)
        if size > self.share * 1000:
            raise torch.OutOfMemoryError("CUDA out of memory")


class FakeEvent:
    """A moment of the device."""

    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = self.cuda.now

    def elapsed_time(self, later):
        return later.at - self.at


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda of a device with 1000 bytes."""
    fake = FakeCuda()
    properties = type("Properties", (), {"total_memory": 1000})
    replacements = {
        "Event": fake.Event,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: properties,
        "reset_peak_memory_stats": lambda: setattr(fake, "peak", 0),
        "max_memory_allocated": lambda: fake.peak,
        "set_per_process_memory_fraction": fake.limit,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return fake


def test_seconds_are_those_of_one_call(cuda):
    """In alternation, so many calls between two events, after one of each that is not timed."""
    log = []

    def run(name, milliseconds):
        log.append(name)
        cuda.take(milliseconds if len(log) > 2 else 1000.0)

    found = device.seconds([lambda: run("a", 2.0), lambda: run("b", 6.0)], rounds=3, repeats=2)
    assert found == [[pytest.approx(0.002)] * 3, [pytest.approx(0.006)] * 3]
    assert "".join(log) == "ab" + "aabb" * 3


def test_the_peak_is_that_of_a_call_after_the_first(cuda):
    """What the first call sets up once, and what was there before, is not a step's."""
    sizes = iter([900, 300])
    assert device.peak_bytes(lambda: cuda.take(size=next(sizes))) == 300


def test_what_fits_is_tried(cuda):
    """With torch held to the limit, which is lifted again whatever happens; only want of memory means no."""
    assert device.fits(lambda: cuda.take(size=400), limit=500)
    assert not device.fits(lambda: cuda.take(size=600), limit=500)
    assert device.fits(lambda: cuda.take(size=1000), limit=5000)  # more than the device has

    def fail():
        raise RuntimeError("another error")

    with pytest.raises(RuntimeError, match="another error"):
        device.fits(fail, limit=500)
    assert cuda.shares == [0.5, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5, 1.0]


def test_a_call_is_a_whole_step(monkeypatch):
    """The gradients of the step before are dropped, then forward, then backward of what it gave."""
    log = []
    trial = Step(lambda: log.append("prepare"), lambda: log.append("forward") or 7, log.append)
    monkeypatch.setattr(device, "step", lambda *_: trial)
    assert device.call_of(None, None, None)() == ()
    assert log == ["prepare", "forward", 7]


def test_what_is_captured_was_called_before(monkeypatch):
    """As often as `Recorded` does it: what is set up on first use cannot be captured."""
    log = []

    class Graph:
        def warm_up(self, call, inputs):
            log.append("warm up")

        def record(self, call, inputs):
            return (), lambda: log.append("replay")

    monkeypatch.setattr(device, "CudaGraph", Graph)
    replay = device.captured(lambda: ())
    assert log == ["warm up"] * device.WARM_UP
    replay()
    assert log[-1] == "replay"
