"""Somebody's DenseNet with its layers fused."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from foreign import Joining, Listed, Reversed, TimmListed
from fused_preact import DenseLayer, Transition, fuse
from test_exchange import step


class Squeezing(nn.Sequential):
    """A transition as torchvision's, which has a class of its own; a plain nn.Sequential may be one of other layers."""


class DenseNet(nn.Module):
    """Three layers of somebody's dense block, which read a list of features, and a transition."""

    def __init__(self, kind: type = Listed, **options) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleDict({f"denselayer{i + 1}": kind(8 + 4 * i, 4, **options) for i in range(3)})
        layers = nn.BatchNorm2d(20), nn.ReLU(inplace=True), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2)
        self.transition = Squeezing(OrderedDict(zip(("norm", "relu", "conv", "pool"), layers, strict=True)))
        self.double()

    def forward(self, x):
        parts = [self.stem(x)]
        for layer in self.layers.values():
            parts.append(layer(parts))
        return self.transition(torch.cat(parts, 1)).mean((2, 3))


@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("kind", [Listed, TimmListed])
def test_a_fused_densenet_is_the_net_it_was(kind, memory, memory_efficient):
    """What it saved it goes on to save; but for that torchvision's layers then move their statistics twice."""
    net = DenseNet(kind, memory_efficient=memory_efficient)
    plain = copy.deepcopy(net)
    for layer in plain.layers.values():
        layer.repeats = lambda: False
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


@pytest.mark.parametrize("name", ["drop_rate", "droprate", "dropRate"])
def test_dropout_stays_where_it_is(name):
    """It is tried with the same random numbers, so that one in front of the last convolution is not taken for it."""

    class Dropping(Listed):
        inside = False

        def forward(self, x):
            a = self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x)))))
            if self.inside:
                return self.conv2(F.dropout(a, getattr(self, name), self.training))
            return F.dropout(self.conv2(a), getattr(self, name), self.training)

    layer = Dropping(8, 4)
    setattr(layer, name, 0.25)
    fused = fuse(copy.deepcopy(layer))
    assert (type(fused), fused.drop_rate) == (DenseLayer, 0.25)
    x = torch.randn(2, 8, 5, 5)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    assert_close(fused(x), expected)
    layer.inside = True
    with pytest.raises(ValueError, match=r"; net: .* Dropping computes something else: it draws random numbers in tr"):
        fuse(layer)


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(4), nn.AdaptiveAvgPool2d((4, 6)), nn.Upsample(size=8)],
)
def test_a_transition_that_pools_otherwise(pool):
    """One size of images would not tell."""

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv, self.pool = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), pool

        def forward(self, x):
            return self.pool(self.conv(F.relu(self.norm(x))))

    with pytest.raises(ValueError, match=r"; net: of the layers of a block Pooling computes something else"):
        fuse(Pooling())


def test_layers_that_take_features_one_by_one():
    """As those of gpleiss/efficient_densenet_pytorch, whose `efficient` is `memory_efficient`."""

    class Starred(Listed):
        efficient = True

        def forward(self, *parts):
            return super().forward(parts)

    layer, parts = Starred(8, 4), [torch.randn(2, C, 5, 5) for C in (4, 1, 3)]
    fused = fuse(copy.deepcopy(layer))
    assert (type(fused), fused.memory_efficient) == (DenseLayer, True)
    assert_close(fused(*parts), layer(*parts))


@pytest.mark.parametrize("join", [lambda parts: torch.cat(parts[::-1], 1), lambda parts: sum(parts), "".join])
def test_layers_that_make_something_else_of_several_tensors(join):
    """Of one they may make what a dense layer makes, or a residual block."""

    class Starred(Listed):
        adds = False

        def forward(self, *parts):
            x = parts[0] if len(parts) == 1 else join(parts)
            return super().forward(x) + x * self.adds

    layer = Starred(8, 8)
    for layer.adds in False, True:
        with pytest.raises(ValueError, match=r"; net: .* Starred computes something else: it takes parts of x in ano"):
            fuse(layer)


def test_layers_that_take_nothing_but_a_list():
    """As do many copies of torchvision's; its dropout may be of no effect."""

    class Strict(Listed):
        drop_rate = 0.5

        def forward(self, parts):
            assert isinstance(parts, list)
            return super().forward(parts)

    layer, parts = Strict(8, 4), [torch.randn(2, 5, 5, 5), torch.randn(2, 3, 5, 5)]
    fused = fuse(copy.deepcopy(layer))
    assert (type(fused), fused.drop_rate) == (DenseLayer, 0.0)
    assert_close(fused(parts), layer(parts))


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
    with pytest.raises(ValueError, match=r"Reversed computes something else: it takes parts of x in another way"):
        fuse(Reversed(8, 4))
