"""Fused training follows eager training as closely as eager follows itself under another number of threads.

A net of 110 layers of ReLU is chaotic: rounding moves a few pre-activations across zero, which moves the float32
gradient of the first step by some percent already, eager's own as much as ours, and each step at rate 0.1 multiplies
the difference by ten and more. No tolerance can be given; the measure is the spread of eager itself, between one thread
and two.

float32, 60 steps: the spread is full-grown after two steps, and from there on the curves differ by chance. The mean of
|fused - eager| over the steps is held to three times that of eager under two thread counts; over two seeds, two
backends and two thread counts the ratio was 0.7 to 1.7. This sees a net that does not train, and no subtle fault.

float64, 10 steps: the spread grows from 1e-15, and with D(t) and F(t) the largest difference up to step t of eager from
itself and of fused from eager, F(t) <= 4 D(t + 2) is asked at every step: at most four times the spread, at most two
steps early. This sees a gradient that is off by a thousandth, in the second step.
"""

import json
import os
import subprocess
import sys
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest


@cache
def curve(backend, threads, steps, dtype, factor=1.0):
    """Losses of curves.py. Its threads wait without spinning, since other tests may keep the cores busy."""
    command = [sys.executable, str(Path(__file__).with_name("curves.py"))]
    arguments = [backend, str(threads), str(steps), dtype, str(factor)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    return json.loads(
        subprocess.run([*command, *arguments], env=environment, check=True, stdout=subprocess.PIPE).stdout
    )


def parting(one, other):
    """Largest difference up to each step."""
    return list(accumulate((abs(a - b) for a, b in zip(one, other, strict=True)), max))


def first_step_outside(fused, eager, eager_again):
    """The first step at which F(t) > 4 D(t + 2), or None."""
    spread, parted = parting(eager, eager_again), parting(fused, eager)
    last = len(spread) - 1
    return next((t for t, distance in enumerate(parted) if not distance <= 4 * spread[min(t + 2, last)]), None)


def difference(one, other):
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def test_sixty_steps_stay_within_the_spread_of_eager():
    """In float32 the loss curve of fused differs from eager's no more than eager's under two thread counts do."""
    eager, again, fused = (curve(*run, 60, "float32") for run in (("eager", 1), ("eager", 2), ("cpu", 1)))
    assert 0 < difference(fused, eager) <= 3 * difference(again, eager)


def test_curves_part_no_sooner_than_those_of_eager():
    """In float64 fused parts from eager no sooner and no further than eager does from itself on two threads."""
    eager, again, fused = (curve(*run, 10, "float64") for run in (("eager", 1), ("eager", 2), ("cpu", 1)))
    assert parting(eager, again)[-1] > 0
    assert first_step_outside(fused, eager, again) is None, (parting(eager, again), parting(fused, eager))


@pytest.mark.parametrize("factor", [-1.0, 1.001], ids=["sign", "a thousandth"])
def test_a_wrong_gradient_leaves_the_spread(factor):
    """With dgamma of the wrong sign, or off by a thousandth, the criterion fails within three steps."""
    eager, again = (curve("eager", threads, 10, "float64") for threads in (1, 2))
    wrong = curve("cpu", 1, 4, "float64", factor)
    assert first_step_outside(wrong, eager[:4], again[:4]) in (0, 1, 2)
