"""activate and activate_backward: batch norm and ReLU by themselves, around convolutions that are torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cases import needs_cpu
from fused_preact import reference
from fused_preact.kernels import MEAN, RSTD, SCALE, SHIFT, Activation, Affine

# [N, C, H, W]: less than a vector, tails, several runs of pixels and groups of them.
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 5), (1, 35, 8, 8), (3, 16, 7, 9), (2, 200, 33, 1), (5, 64, 40, 25)]


class OfUnits:
    """The kernels of a device as its operators call them: in a unit whose convolution is torch's, and the identity."""

    def _arguments(self, x: Activation) -> tuple[list[Tensor], tuple[Any, ...]]:
        C = x.x.size(1)
        geometry = [1, 1, 0, 0, 2, 2, C]  # a dilation, which does nothing here, and a group for each channel
        return [x.x.new_ones(C, 1, 1, 1)], (geometry, [1], [0], x.x.dtype, 0, False)

    def activate(self, x: Activation) -> Tensor:
        weight, facts = self._arguments(x)
        norm = [[x.norm[row]] for row in (SCALE, SHIFT, MEAN)]
        one = [torch.ones_like(x.norm[MEAN])]  # the variance, and with an epsilon of zero rstd
        forward = torch.ops.fused_preact.forward
        return forward(x.x, None, weight, [], *norm, one, [], [False], [0.0], *facts)[0]

    def activate_backward(self, da: Tensor, x: Activation, batch: bool) -> tuple[Tensor, Tensor, Tensor]:
        weight, facts = self._arguments(x)
        backward, needs = torch.ops.fused_preact.backward, [True, False, True]
        dx, _, _, [dgamma], [dbeta], _ = backward(da, x.x, None, [], [x.norm], weight, [], [], [batch], *facts, needs)
        return dx, dgamma, dbeta


@pytest.fixture
def kernels(isa) -> OfUnits:
    """Those of each instruction set."""
    return OfUnits()


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each type that the kernels have."""
    return request.param


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)


def activation(x: Tensor) -> Activation:
    """Of a batch norm whose statistics are not those of x."""
    generator = torch.Generator().manual_seed(1)
    mean, var, gamma, beta = (torch.rand(x.size(1), generator=generator) + low for low in (-0.5, 0.5, 0.5, -0.5))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return Activation(x, reference.running(mean.to(wide), var.to(wide), Affine(gamma.to(wide), beta.to(wide), 1e-5)))


def exactly(a: Activation, da: Tensor, batch: bool) -> tuple[Tensor, ...]:
    """a, dx, dgamma and dbeta in float64, from the formulas of csrc/kernels.h."""
    mean, rstd, scale, shift = (a.norm[row].double().view(1, -1, 1, 1) for row in (MEAN, RSTD, SCALE, SHIFT))
    centered = a.x.double() - mean
    z = centered * scale + shift
    dz = da.double() * (z > 0)
    dbeta, dgamma = dz.sum((0, 2, 3)), (dz * centered * rstd).sum((0, 2, 3))
    dx, m = dz * scale, a.x.numel() // a.x.size(1)
    if batch:
        dx = dx - scale / m * (centered * rstd * dgamma.view(1, -1, 1, 1) + dbeta.view(1, -1, 1, 1))
    return z.relu(), dx, dgamma, dbeta


@needs_cpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [True, False])
def test_it_is_the_formula(kernels, dtype, shape, batch):
    """Every value of every vector, tail and run, of batch statistics and of running ones."""
    x, da = random(shape, dtype, seed=0), random(shape, dtype, seed=2)
    a, few = activation(x), 8 * torch.finfo(dtype).eps
    found = kernels.activate(a), *kernels.activate_backward(da, a, batch)
    for value, exact in zip(found, exactly(a, da, batch), strict=True):
        scale = exact.abs().max().clamp(min=1)
        assert_close(value.double() / scale, exact / scale, rtol=0, atol=few)
    assert found[0].dtype == found[1].dtype == dtype


@needs_cpu
def test_relu_is_flat_at_zero_and_keeps_nan(kernels, dtype):
    """As in torch: no gradient passes where the pre-activation is zero, and one does where it is no number."""
    x = torch.tensor([0.0, -1.0, 1.0, torch.nan]).to(dtype).view(4, 1, 1, 1)
    a = Activation(x, torch.tensor([[0.0], [1.0], [1.0], [1.0], [0.0]], dtype=activation(x).norm.dtype))
    values = kernels.activate(a).flatten()
    assert values[:3].tolist() == [0, 0, 1]
    assert values[3].isnan()
    dx, _, _ = kernels.activate_backward(torch.ones_like(x), a, False)
    assert dx.flatten().tolist() == [0, 0, 1, 1]


@needs_cpu
def test_any_number_of_threads_gives_the_same_bits(kernels, dtype):
    """The groups of a sum depend on the shape alone."""
    shape, threads = SHAPES[-1], torch.get_num_threads()
    a, da, found = activation(random(shape, dtype, seed=0)), random(shape, dtype, seed=2), []
    try:
        for count in 1, 2, 5:
            torch.set_num_threads(count)
            found.append((kernels.activate(a), *kernels.activate_backward(da, a, True)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(value, first) for values in found for value, first in zip(values, found[0], strict=True))
