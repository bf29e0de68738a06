"""Somebody's DenseNet with its layers fused."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from foreign import Joining, Listed, Reversed
from fused_preact import DenseLayer, Transition, fuse
from test_exchange import step


class DenseNet(nn.Module):
    """Three layers of somebody's dense block, which read a list of features, and a transition."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleDict({f"denselayer{i + 1}": Listed(8 + 4 * i, 4, **options) for i in range(3)})
        layers = nn.BatchNorm2d(20), nn.ReLU(inplace=True), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2)
        self.transition = nn.Sequential(OrderedDict(zip(("norm", "relu", "conv", "pool"), layers, strict=True)))
        self.double()

    def forward(self, x):
        parts = [self.stem(x)]
        for layer in self.layers.values():
            parts.append(layer(parts))
        return self.transition(torch.cat(parts, 1)).mean((2, 3))


@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_a_fused_densenet_is_the_net_it_was(memory, memory_efficient):
    """What it saved it goes on to save; but for that torchvision's layers then move their statistics twice."""
    net = DenseNet(memory_efficient=memory_efficient)
    plain = copy.deepcopy(net)
    for layer in plain.layers.values():
        layer.memory_efficient = False
    parameters = list(net.parameters())
    assert fuse(net, memory, "library") is net
    assert {type(layer) for layer in net.layers.values()} == {DenseLayer}
    assert type(net.transition) is Transition
    assert {layer.memory_efficient for layer in net.layers.values()} == {memory_efficient or memory != "fast"}
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    ours, theirs = step(net), step(plain)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert_close(ours[key], value, rtol=1e-9, atol=1e-10, msg=key)


@pytest.mark.parametrize("before", [False, True])
def test_dense_layers_that_give_x_too(before):
    """In either order; a sequence of them is no stage, which is of residual blocks."""
    net = nn.Sequential(Joining(6, 4, before), Joining(10, 4, before))
    plain, x = copy.deepcopy(net), torch.randn(2, 6, 5, 5)
    assert fuse(net) is net
    assert [layer.returns for layer in net] == ["x+new" if before else "new+x"] * 2
    assert_close(net(x), plain(x))


def test_a_dense_layer_that_joins_its_features_in_another_way():
    """A single tensor does not show it."""
    with pytest.raises(ValueError, match=r"; net: of the layers of a block Reversed computes something else"):
        fuse(Reversed(8, 4))
