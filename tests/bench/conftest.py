"""Tiny cases, and a broken backend to be caught."""

from functools import partial

import pytest

from fused_preact import PreActBlock, models
from fused_preact.bench.cases import Case


@pytest.fixture
def block():
    """A basic block of 8 channels."""
    return Case("Tiny", "block", partial(PreActBlock, 8, 8), (4, 8, 8, 8), goals={"fast": {"saved_bytes": 1.5}})


@pytest.fixture
def small_net():
    """A training step of ResNet-20 on two images."""
    return Case("Tiny", "net", partial(models.create, "resnet20"), (2, 3, 8, 8), net=True, layouts=("channels_last",))


@pytest.fixture
def broken(monkeypatch):
    """Every fused block is off by one part in ten thousand."""
    forward = PreActBlock.forward

    def wrong(self, x):
        y = forward(self, x)
        return y if self.backend == "eager" else y * 1.0001

    monkeypatch.setattr(PreActBlock, "forward", wrong)
