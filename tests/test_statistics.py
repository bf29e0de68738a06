"""statistics and the epilogues that supply the rows of a batch norm: what is theirs beyond the shared suite."""

import pytest
import torch

from cases import BACKENDS
from fused_preact import bn_relu_conv2d


@pytest.fixture(params=[name for name in BACKENDS if name in ("cpu", "triton")])
def backend(request: pytest.FixtureRequest) -> str:
    """Those that add up in more digits than the rows have."""
    return request.param


def test_a_mean_is_rounded_without_moving_its_channel(backend):
    """Of thousands of deviations, it is rounded by a part of one, by which all of the channel would be off."""
    torch.manual_seed(0)
    x = 3000 + torch.rand(4, 8, 5, 6)
    x = x.to(memory_format=torch.channels_last)
    gamma, beta = torch.rand(8) + 0.5, torch.full((8,), 8.0)  # ReLU cuts nothing off
    y = bn_relu_conv2d(x, torch.eye(8)[..., None, None], gamma, beta, training=True, backend=backend)
    z = torch.nn.functional.batch_norm(x.double(), None, None, gamma.double(), beta.double(), True)
    assert (y - z).abs().max() <= 4 * torch.finfo(torch.float32).eps * z.abs().max()


def test_an_infinite_scale_makes_no_nan(isa):
    """Where variance and eps are zero: what is above the mean is infinite, and what is below is cut off."""
    x, one, zero = torch.tensor([-1.0, 2.0, -3.0, 4.0]).view(4, 1, 1, 1), torch.ones(1), torch.zeros(1)
    y = bn_relu_conv2d(x, one.view(1, 1, 1, 1), one, zero, zero, zero, eps=0.0, backend="cpu")
    assert y.flatten().tolist() == [0, torch.inf, 0, torch.inf]


def test_an_infinite_gamma_makes_no_nan(backend):
    """Of a mean that is a float nothing is lost: what is above it is infinite, and what is below is cut off."""
    x, gamma = torch.tensor([-1.0, 1.0, -1.0, 1.0]).view(4, 1, 1, 1), torch.full((1,), torch.inf)
    y = bn_relu_conv2d(x, torch.ones(1, 1, 1, 1), gamma, torch.ones(1), training=True, backend=backend)
    assert y.flatten().tolist() == [0, torch.inf, 0, torch.inf]


@pytest.mark.parametrize("mean", [torch.inf, -torch.inf])
def test_an_infinite_running_mean_makes_no_nan(backend, mean):
    """Nothing of it is lost where it is rounded: all of its channel is infinitely far below it, or above."""
    x, one = torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1), torch.ones(1)
    y = bn_relu_conv2d(x, one.view(1, 1, 1, 1), one, one, torch.full((1,), mean), one, backend=backend)
    assert y.flatten().tolist() == [max(-mean, 0)] * 2
