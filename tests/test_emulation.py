"""The emulation of CUDA: a sound kernel passes in every schedule, and each known bug, planted in it, is caught."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cuda_toolkit

pytestmark = pytest.mark.skipif(cuda_toolkit.home() is None, reason=cuda_toolkit.NO_NVCC)

SHAPE = 70, 40, 72  # M, N, K: tails in each

WRONG = {  # bug -> schedules (threads, copies) of which each shows it as a wrong result
    "no_barrier_after_wait": [("forward", "lazy"), ("reverse", "lazy"), ("random", "lazy"), ("greedy", "lazy")],
    "no_barrier_before_overwrite": [("greedy", "eager")],
    "weak_wait": [("forward", "lazy"), ("reverse", "lazy"), ("random", "lazy"), ("greedy", "lazy")],
    "first_block_sums_up": [("forward", "lazy"), ("forward", "eager")],
}
REPORTED = {  # bug -> the end of the launch, in any schedule
    "little_shared_memory": "wrote past the end of its 3072 bytes of shared memory",
    "divergent_barrier": r"divergent barrier: thread \d+ of block .* is at .*gemm.cu:\d+, others wait at .*gemm.cu:\d+",
    "no_turn": r"a copy before the launches before are over: thread \d+ of block .* at .*gemm.cu:\d+",
}


@pytest.fixture(scope="module")
def planted():
    from emulation import build

    return build.load("planted")


def schedules(module) -> list[tuple]:
    return list(itertools.product(module.Order.__members__, module.Copies.__members__))


def is_right(module, bug: str, threads: str, copies: str, seed: int = 0) -> bool:
    """Whether a kernel with a bug gives what it should in a schedule, on integers, where nothing is rounded."""
    M, N, K = SHAPE
    random = np.random.default_rng(seed)
    a, b = (random.integers(-3, 4, shape).astype(np.float16) for shape in ((M, K), (K, N)))
    module.set_schedule(
        getattr(module.Order, threads), getattr(module.Order, threads), getattr(module.Copies, copies), seed, 1
    )
    c, total = module.multiply(getattr(module.Bug, bug), a.view(np.uint16), b.view(np.uint16))
    return np.array_equal(c, a.astype(np.float32) @ b.astype(np.float32)) and total == c.sum()


def test_a_sound_kernel_passes_in_every_schedule(planted):
    """Copies, matrix loads and products, shuffles, and the merge by the last block are emulated right."""
    for threads, copies in schedules(planted):
        assert all(is_right(planted, "none", threads, copies, seed) for seed in range(4)), (threads, copies)


@pytest.mark.parametrize(
    ("bug", "threads", "copies"), [(bug, *schedule) for bug, found in WRONG.items() for schedule in found]
)
def test_a_race_shows_as_a_wrong_result(planted, bug, threads, copies):
    """The schedules that are there for a kind of bug find it."""
    assert not is_right(planted, bug, threads, copies)


@pytest.mark.parametrize("bug", REPORTED)
def test_what_no_schedule_permits_ends_the_launch(planted, bug):
    """The report says what happened and where."""
    for threads, copies in schedules(planted):
        with pytest.raises(planted.EmulationError, match=REPORTED[bug]):
            is_right(planted, bug, threads, copies)
    assert is_right(planted, "none", "greedy", "eager")


def test_a_kernel_without_copies_waits_too(planted):
    """What it does before the launches in front are over is not seen, so it has to say that they are."""
    planted.idle(True)
    with pytest.raises(planted.EmulationError, match=r"thread \d+ of block .* did not wait for the launches before"):
        planted.idle(False)


# bug -> what the sanitizer calls it. A fence is not needed on one CPU thread, so only ThreadSanitizer misses it.
SANITIZED = {
    ("thread", "none"): None,
    ("thread", "no_barrier_after_wait"): "data race",
    ("thread", "no_barrier_before_overwrite"): "data race",
    ("thread", "no_fence"): "data race",
    ("address", "none"): None,
    ("address", "little_shared_memory"): "use-after-poison",
}


@pytest.mark.parametrize(("sanitizer", "bug"), SANITIZED)
def test_sanitizers_follow_the_fibers(sanitizer, bug):
    """ThreadSanitizer takes each CUDA thread for a thread, AddressSanitizer knows where shared memory ends."""
    from emulation import build

    folder = build.build("planted", sanitizer)
    program = (
        f"import sys; sys.path[:0] = {[str(folder), str(Path(__file__).parent)]!r}\n"
        "import planted, test_emulation as t\n"
        "for threads, copies in t.schedules(planted):\n"
        f"    assert t.is_right(planted, {bug!r}, threads, copies), (threads, copies)"
    )
    expected = SANITIZED[sanitizer, bug]
    result = subprocess.run(
        build.command(sanitizer, [sys.executable, "-c", program]),
        env=os.environ | build.environment(sanitizer),
        capture_output=True,
        text=True,
        check=False,
    )
    if expected is None:
        assert result.returncode == 0, result.stderr
    else:
        assert f"{sanitizer.title()}Sanitizer: {expected}" in result.stderr
