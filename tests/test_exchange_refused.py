"""What `fuse` must not take for a block of this package, though in one call the two agree."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from foreign import Cifar, Timm
from fused_preact import PreActBlock, explain, fuse
from test_exchange import Chain

DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "python": random.random,
    "numpy": np.random.random,
}


def states():
    return torch.get_rng_state().tolist(), random.getstate(), [*np.random.get_state()[1]], np.random.get_state()[2]


def test_what_is_compiled_without_a_block_is_not_spoken_of(recwarn):
    """Nothing of it could be fused."""
    head = torch.compile(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), backend="eager")
    net = fuse(nn.Sequential(Cifar(8, 8, False), head))
    assert isinstance(net[0], PreActBlock)
    assert not recwarn.list


def test_an_empty_sequence_is_no_stage():
    """Many nets have one for the identity."""
    net = fuse(nn.Sequential(Cifar(8, 8, False), nn.Sequential()))
    assert [type(module) for module in net] == [PreActBlock, nn.Sequential]


def test_blocks_of_somebody_are_no_stage():
    """Only a plain nn.Sequential does nothing but call them in order."""

    class Doubling(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * 2

    for box in Doubling, lambda block: nn.ModuleList([block]):
        net = nn.Sequential(box(Cifar(8, 8, False)))
        before = type(net[0])
        fuse(net)
        assert (type(net[0]), type(net[0][0])) == (before, PreActBlock)


def test_a_block_that_gives_more_than_a_tensor():
    """It is tried all the same."""

    class Paired(Cifar):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match=r"; net: of the layers of a block Paired computes something else$"):
        fuse(Paired(8, 8, False))


@pytest.mark.parametrize("source", DRAWS)
def test_a_branch_that_is_dropped_now_and_then(source):
    """Stochastic depth that leaves out no branch while it is tried is found all the same, and uses up no numbers."""

    class Dropped(Cifar):
        def forward(self, x):
            return x if self.training and DRAWS[source]() < 1e-9 else super().forward(x)

    net = nn.Sequential(nn.Conv2d(3, 8, 3), Dropped(8, 8, False))
    before = states()
    with pytest.raises(ValueError, match="Dropped computes something else: it draws random numbers in training"):
        fuse(net)
    assert states() == before
    assert isinstance(fuse(nn.Sequential(nn.Conv2d(3, 8, 3), Cifar(8, 8, False)))[1], PreActBlock)


def test_a_block_with_a_forward_of_its_own():
    """A trial of it would run that of its class."""
    block = Cifar(8, 8, False)
    block.forward = lambda x: 2 * Cifar.forward(block, x)
    with pytest.raises(ValueError, match="; net: it has hooks or a forward of its own, which run only when"):
        fuse(block)


@pytest.mark.parametrize("name", ["norm1", "norm2"])
def test_hooks_of_a_batch_norm_that_activates(name):
    """They hear of what is behind its activation, and may change that: such a block runs as plain layers."""
    block, x, heard = Timm(8, 8, False).double(), torch.randn(2, 8, 6, 6, dtype=torch.float64), []
    norm = block.get_submodule(name)
    norm.register_forward_hook(lambda _module, _inputs, y: heard.append(y) or y + 1)
    expected = block(x)
    block.zero_grad()
    fused = fuse(block)
    torch.testing.assert_close(fused(x), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(*heard)
    [choice] = explain(fused, x)
    assert choice.backend == "eager"
    assert f"{name} is of type Normed" in choice.others["library"]


def test_a_batch_norm_with_a_forward_of_its_own():
    """One that normalises four images at a time, or over processes, gives what a plain one does in a trial of two."""

    class Ghost(nn.BatchNorm2d):
        def forward(self, x):
            parts = x.split(4) if self.training else [x]
            return torch.cat([super(Ghost, self).forward(part) for part in parts])

    class Renamed(nn.BatchNorm2d):
        pass

    x = torch.randn(16, 8, 6, 6, dtype=torch.float64)
    for norm, fuses in (Ghost, False), (Renamed, True):
        block = Cifar(8, 8, False).double()
        block.bn1, block.bn2 = norm(8).double(), norm(8).double()
        expected = block(x)
        fused = fuse(block)
        torch.testing.assert_close(fused(x), expected, rtol=1e-9, atol=1e-9)
        assert (explain(fused, x)[0].backend != "eager") == fuses


def test_what_is_in_something_of_the_same_layers_is_told_of_once():
    """By the name of what is innermost."""
    with pytest.raises(ValueError, match=r"without any; 0.0: [^;]*in training$"):
        fuse(nn.Sequential(nn.Sequential(Chain(2, nn.SiLU)), nn.Flatten()))
