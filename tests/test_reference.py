import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fused_preact import reference
from fused_preact.kernels import Activation, Affine, Conv, Gradient

CONV = Conv(2, 1, 1, 2, 1, 1, 1)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.fixture
def affine() -> Affine:
    return Affine(draw(3), draw(3) + 1, 1e-3)


def test_statistics_are_mean_rstd_and_unbiased_variance(affine):
    """The rows say z = scale*(x - mean) + shift, which is batch norm, and hold the unbiased variance."""
    x = draw(2, 3, 5, 4)
    mean, rstd, variance, scale, shift = rows = reference.statistics(x, affine)
    assert_close(mean, x.mean((0, 2, 3)))
    assert_close(variance, x.var((0, 2, 3), correction=1))
    assert_close(rstd, (x.var((0, 2, 3), correction=0) + 1e-3).rsqrt())
    assert_close(scale, affine.gamma * rstd)
    assert_close(shift, affine.beta)
    z = F.batch_norm(x, None, None, affine.gamma, affine.beta, True, 0.0, affine.eps)
    assert_close(reference._z(Activation(x, rows)), z)


def test_running_statistics_are_used_as_they_are(affine):
    """Given statistics make the rows of eval mode."""
    x, mean, variance = draw(2, 3, 5, 4), draw(3), draw(3).square()
    z = F.batch_norm(x, mean, variance, affine.gamma, affine.beta, False, 0.0, affine.eps)
    rows = reference.running(mean, variance, affine)
    assert_close(reference._z(Activation(x, rows)), z)
    assert_close(rows[2], variance)


@pytest.mark.parametrize("batch", [True, False])
def test_the_kernels_of_backward_are_autograds(affine, batch):
    """dgrad, wgrad and dx, one after the other, are the derivative of forward."""
    x, weight, bias = draw(2, 3, 5, 4).requires_grad_(), draw(4, 3, 3, 3).requires_grad_(), draw(4).requires_grad_()
    gamma, beta = affine.gamma.requires_grad_(), affine.beta.requires_grad_()
    mean, variance = draw(3), draw(3).square() + 0.1
    z = F.batch_norm(x, mean.clone(), variance.clone(), gamma, beta, batch, 0.0, affine.eps)
    y = F.conv2d(z.relu(), weight, bias, CONV.stride, CONV.padding)
    dy, add = torch.randn_like(y), torch.randn_like(x)
    expected = torch.autograd.grad((y * dy).sum() + (z.relu() * add).sum(), [x, weight, bias, gamma, beta])

    with torch.no_grad():
        rows = reference.statistics(x, affine) if batch else reference.running(mean, variance, affine)
        a = Activation(x.detach(), rows)
        assert_close(reference.forward(CONV, a, weight, bias, None, None)[0], y)
        dweight, dbias = reference.wgrad(CONV, Gradient(dy), a, weight, True)
        # Without the sum over the convolution of ``add``: it is a gradient of the activation itself.
        g = reference.dgrad(CONV, Gradient(dy), weight, a, add, batch)
        dgamma, dbeta, *rows = g.grad
        assert_close((reference.dx(g, None), dweight, dbias, dgamma, dbeta), expected)
        assert_close(reference.dx(g, add), expected[0] + add)
        assert len(rows) == (2 if batch else 0)


def test_an_activation_without_a_norm_is_x():
    """The shortcut from the raw input convolves x itself, and its gradient has no mask."""
    x, weight = draw(2, 3, 5, 4).requires_grad_(), draw(4, 3, 3, 3)
    y = F.conv2d(x, weight, None, CONV.stride, CONV.padding)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, dy)
    plain = Activation(x.detach(), None)
    assert_close(reference.forward(CONV, plain, weight, None, None, None)[0], y.detach())
    assert_close(reference.dgrad(CONV, Gradient(dy), weight, plain, None, False).g, expected)
