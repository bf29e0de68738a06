import pytest
import torch
from torch.testing import assert_close

from cases import CHAINS, OTHER_FILTERS, UNITS
from fused_preact import library, reference
from fused_preact.kernels import Activation, Affine, Conv, Gradient

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OTHER_FILTERS + UNITS[1:3] + CHAINS[:1], ids=lambda case: case.id)
def test_kernels_agree_with_the_reference(case, dtype):
    """Kernel by kernel, in every dtype, the library returns what the plain torch calls return."""
    sample = case.draw(0, dtype)
    unit, x = sample.units[0], sample.x
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    close = {"rtol": 1e-9, "atol": 1e-9} if wide == torch.float64 else {"rtol": 3e-2, "atol": 3e-2}
    if dtype == torch.float32:
        close = {"rtol": 1e-4, "atol": 1e-4}
    affine = Affine(unit.bn_weight.to(wide), unit.bn_bias.to(wide), unit.eps)
    rows = library.statistics(x, affine)
    assert_close(rows, reference.statistics(x, affine), rtol=1e-5, atol=1e-6)

    def results(table):
        a = Activation(x, rows)
        y, _ = table.forward(unit.conv, a, unit.weight, unit.bias, None, None)
        dy = Gradient(torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape))
        dweight, _ = table.wgrad(unit.conv, dy, a, unit.weight, False)
        g = table.dgrad(unit.conv, dy, unit.weight, a, None, True)
        return y, dweight, g.grad[0], g.grad[1], table.dx(g, None)

    for ours, theirs in zip(results(library), results(reference), strict=True):
        scale = theirs.abs().max().clamp(min=1e-30)
        assert ours.dtype == theirs.dtype
        assert_close(ours / scale, theirs / scale, **close)


def test_the_activation_is_made_once():
    """wgrad and dgrad of a unit share one recomputed activation."""
    affine = Affine(torch.ones(3), torch.zeros(3), 1e-5)
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1)
    conv, dy = Conv(1, 1, 0, 0, 1, 1, 1), Gradient(torch.randn(2, 5, 4, 4))
    a = Activation(x, library.statistics(x, affine))
    library.wgrad(conv, dy, a, weight, False)
    made = a.value
    library.dgrad(conv, dy, weight, a, None, True)
    assert made is not None
    assert a.value is made
