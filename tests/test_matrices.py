"""Products of bf16 in matrices, where the processor has AMX, and what its other instruction sets make of the same.

Where it has none, test_avx512.py shows on an emulated one that their results are right.
"""

import pytest
import torch

from fused_preact import bn_relu_conv2d

CHANNEL = 3


def gradients(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """y, dx and dW of one unit, 3x3, whose batch norm keeps x."""
    ones, zeros = torch.ones(x.size(1)), torch.zeros(x.size(1))
    x.requires_grad_()
    weight.requires_grad_()
    y = bn_relu_conv2d(x, weight, ones, zeros, zeros, ones, padding=1, backend="cpu")
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def bf16(*shape: int) -> torch.Tensor:
    return torch.rand(shape).bfloat16()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize(("N", "size"), [(2, (9, 20)), (17, (4, 4))], ids=["rows", "positions"])
def test_what_is_not_finite_reaches_its_readers_alone(value, N, size, isa):
    """In blocks that begin in each other, and in a grid whose rows end in padding: in dW it stays in its channel."""
    x, weight = bf16(N, 16, *size), bf16(24, 16, 3, 3)
    x[1, CHANNEL, 0, size[1] - 1] = value
    y, _, dweight = gradients(x, weight, bf16(N, 24, *size))
    reads = torch.zeros_like(y, dtype=torch.bool)
    reads[1, :, :2, -2:] = True
    assert torch.equal(y.isfinite(), ~reads)
    channels = torch.arange(16) != CHANNEL
    assert dweight[:, channels].isfinite().all()
    assert not dweight[:, CHANNEL, 1, 1].isfinite().any()

    dy = bf16(N, 24, *size)
    dy[1, CHANNEL, 0, 0] = value
    _, dx, dweight = gradients(bf16(N, 16, *size), weight.detach(), dy)
    reads = torch.zeros_like(dx, dtype=torch.bool)
    reads[1, :, :2, :2] = True
    assert torch.equal(dx.isfinite(), ~reads)
    assert dweight[torch.arange(24) != CHANNEL].isfinite().all()


@pytest.mark.parametrize(
    ("channels", "size", "taken"),
    [
        (16, (5, 7), True),
        (12, (5, 7), True),
        (15, (5, 7), True),
        (17, (5, 7), False),
        (34, (5, 7), False),
        (16, (1, 40), False),  # three rows and more of the grid for one of pixels
    ],
    ids=str,
)
def test_what_wgrad_makes_of_matrices(channels, size, taken, isa):
    """A multiple of four to sixteen channels: what a row reads behind its end is multiplied by zeros, not left out."""
    x = bf16(2, channels, *size)
    x[0, CHANNEL, 0, -1] = torch.inf
    _, _, dweight = gradients(x, bf16(16, channels, 3, 3), bf16(2, 16, *size))
    # Of the last pixel of a row the first tap is read by no output.
    assert dweight[:, CHANNEL, 0, 0].isnan().all() == (taken and isa == "amx_bf16")
