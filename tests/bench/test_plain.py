"""The baseline: the layers that backend="eager" runs, in modules that do nothing else."""

import copy

import pytest
import torch
from torch import nn

from fused_preact import BNReLUConv2d, DenseLayer, PreActBlock, PreActBottleneck, models
from fused_preact.bench.plain import plain
from fused_preact.modules import Fused
from fused_preact.stage import PreActStage

MODULES = {
    "unit": lambda: BNReLUConv2d(8, 4, 3, 2, 1, backend="eager"),
    "basic": lambda: PreActBlock(8, 8, backend="eager"),
    "basic with a projection": lambda: PreActBlock(8, 12, 2, backend="eager"),
    "bottleneck": lambda: PreActBottleneck(8, 2, backend="eager"),
    "raw": lambda: PreActBottleneck(8, 4, 2, shortcut_input="raw", backend="eager"),
    "first": lambda: models.FirstPreActBlock(8, 8, backend="eager"),
    "dense": lambda: DenseLayer(8, 4, backend="eager"),
    "net": lambda: nn.Sequential(nn.Conv2d(8, 3, 1), models.create("resnet20", width=4, backend="eager")),
}


def test_a_layer_that_is_frozen_stays_so():
    """A batch norm in eval mode within a block that trains is not trained by the baseline."""
    block = PreActBlock(8, 8)
    block.bn1.eval()
    ordinary = plain(block)
    assert (ordinary.training, ordinary.bn1.training, ordinary.bn2.training) == (True, False, True)


@pytest.mark.parametrize("name", MODULES)
def test_it_is_the_eager_module_to_the_bit(name):
    """Results, gradients, running statistics and keys; and nothing fused is left in it."""
    torch.manual_seed(0)
    eager = MODULES[name]().train()
    ordinary = plain(copy.deepcopy(eager))
    assert ordinary.training
    assert not any(isinstance(module, (Fused, PreActStage)) for module in ordinary.modules())
    x = torch.randn(4, 8, 8, 8)
    for module in eager, ordinary:
        module(x).square().sum().backward()
    ours, theirs = (
        [*m.state_dict().items(), *((k, p.grad) for k, p in m.named_parameters())] for m in (ordinary, eager)
    )
    assert [key for key, _ in ours] == [key for key, _ in theirs]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
