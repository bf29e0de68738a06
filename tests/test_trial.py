"""Trials of modules with copies: what they tell apart, and what they leave as it is."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from fused_preact import trial


def unit(*between: nn.Module) -> nn.Sequential:
    """A batch norm, what is between, and a convolution."""
    return nn.Sequential(nn.BatchNorm2d(4), *between, nn.Conv2d(4, 4, 1))


class Joined(nn.Module):
    """Takes a list of features."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = unit(nn.ReLU())

    def forward(self, xs):
        assert isinstance(xs, list)
        return self.unit(torch.cat(xs, 1))


def test_a_trial_repeats_itself_and_moves_nothing():
    """The same copy gives the same outputs; the module and the generators of random numbers stay as they were."""
    module = unit(nn.ReLU())
    before = {name: t.clone() for name, t in module.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, second = trial.outputs(module, 4), trial.outputs(module, 4)
    assert trial.alike(first, second)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert all(t.grad is None for t in module.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


@pytest.mark.parametrize(
    "between", [[], [nn.ReLU6()], [nn.LeakyReLU(1e-3)], [nn.ReLU(), nn.Dropout(1e-6)]], ids=lambda b: str(b)[:12]
)
def test_what_is_between_the_layers_is_told(between):
    """No activation, another one, and one behind which something is dropped now and then."""
    assert not trial.alike(trial.outputs(unit(*between), 4), trial.outputs(unit(nn.ReLU()), 4))
    assert trial.alike(trial.outputs(unit(nn.Threshold(0, 0)), 4), trial.outputs(unit(nn.ReLU()), 4))


class Halved(nn.ReLU):
    """A half of it in eval mode."""

    def forward(self, x):
        return super().forward(x) / (1 if self.training else 2)


class Detached(nn.ReLU):
    """It passes no gradient."""

    def forward(self, x):
        return super().forward(x).detach()


class Calibrated(nn.ReLU):
    """Its factor is still one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(1), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.factor


@pytest.mark.parametrize(
    ("between", "how"),
    [
        (nn.Dropout(0.5), "draws random numbers in training"),
        (nn.ReLU6(), "gives another result in training"),
        (Calibrated(), "gives another result in training"),
        (Detached(), "has other gradients in training"),
        (Halved(), "gives another result in eval"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_first_difference_is_named(between, how):
    """Of training before eval, and of what is drawn before the result and the gradients."""
    theirs, ours = trial.outputs(unit(between), 4), trial.outputs(unit(nn.ReLU()), 4)
    agreeing = trial.agreement(theirs, ours)
    assert trial.difference(theirs, agreeing) == how
    assert trial.agreement(theirs, ours[:-1]) == -1


def test_what_cannot_be_called_has_no_outputs():
    """Other channels, or a tensor in the place of parts of it."""
    assert trial.outputs_if_any(unit(), 5) is None
    assert trial.outputs_if_any(Joined(), 4) is None
    with pytest.raises(AssertionError):
        trial.outputs(Joined(), 4)


def test_parts_are_those_of_the_image():
    """What joins them computes of them what it computes of the whole."""
    theirs = trial.outputs(Joined(), 4, parts=2)
    assert trial.alike(theirs, trial.outputs(nn.Sequential(unit(nn.ReLU())), 4))
    assert not trial.alike(theirs, [*theirs, theirs[-1]])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_trial_has_gradients_wherever_it_is_made(mode):
    """Whoever fuses a net for inference may have turned them off."""
    block = unit(nn.ReLU())
    expected = trial.outputs(block, 4)
    with mode():
        found = trial.outputs(block, 4)
    assert trial.alike(expected, found)
