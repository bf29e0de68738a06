"""Winograd's minimal filtering in the CPU's kernels; the shared suite has the shapes `cases.QUADS` for it."""

import pytest
import torch
from torch.nn.functional import conv2d, unfold
from torch.testing import assert_close

from cases import Case, Layer, assert_as_close_as_eager
from fused_preact import bn_relu_conv2d

PIXEL = (5, 8)  # what is not finite there is read by the outputs of rows 4 to 6, columns 7 to 9


def convolve(x: torch.Tensor, K: int, dy: torch.Tensor | None = None) -> torch.Tensor:
    """y of one unit of K output channels, 3x3, whose batch norm keeps x; or dx where there is a dy."""
    C = x.size(1)
    weight = torch.randn(K, C, 3, 3, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    ones, zeros = torch.ones(C, dtype=x.dtype), torch.zeros(C, dtype=x.dtype)
    x.requires_grad_(dy is not None)
    y = bn_relu_conv2d(x, weight, ones, zeros, zeros, ones, padding=1, backend="cpu")
    return y if dy is None else torch.autograd.grad(y, x, dy)[0]


def outside(values: torch.Tensor) -> torch.Tensor:
    """Those that do not read PIXEL; those that do are not finite."""
    reads = torch.zeros_like(values, dtype=torch.bool)
    reads[..., PIXEL[0] - 1 : PIXEL[0] + 2, PIXEL[1] - 1 : PIXEL[1] + 2] = True
    assert not values[reads].isfinite().any()
    return values[~reads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_reaches_its_readers_alone(value, dtype, isa):
    """Neither the additions of the transforms nor the padding of a strip carry it to another output, or lose it."""
    x = torch.rand(2, 16, 16, 16, dtype=dtype)
    x[(1, 3, *PIXEL)] = value
    y = convolve(x, 24)
    assert y[0].isfinite().all()
    assert outside(y[1]).isfinite().all()
    dy = torch.randn(2, 24, 16, 16, dtype=dtype)
    dy[(1, 3, *PIXEL)] = value
    dx = convolve(torch.rand(2, 16, 16, 16, dtype=dtype), 24, dy)
    assert dx[0].isfinite().all()
    assert outside(dx[1]).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "K", "taken"),
    [
        ((1, 16, 12, 16), 16, True),
        ((1, 16, 12, 14), 16, False),  # 42 quads
        ((1, 15, 16, 16), 16, False),
        ((1, 16, 16, 16), 15, False),
        ((3, 16, 7, 7), 16, True),
        ((2, 16, 7, 7), 16, False),  # 32 quads
        ((48, 16, 2, 2), 16, False),
        ((16, 16, 5, 5), 16, False),
        ((7, 366, 8, 8), 366, False),  # 112 quads of a filter over 8 MiB
        ((8, 366, 8, 8), 366, True),
    ],
    ids=str,
)
def test_what_is_made_of_quads(shape, K, taken, isa):
    """Large layers, not of small images: differences make a NaN of an infinity, which a sum over taps never does.

    The shapes of `cases.QUADS` would test nothing of it if this changed unseen.
    """
    x = torch.rand(shape)
    x[0, 3, 1, 1] = torch.inf
    y = convolve(x, K)
    assert y.isinf().any()
    assert y.isnan().any() == taken


# Its transformed filter, of 2.04 MiB, leaves the second level cache: two tiles of three and two odd images meet it
# position by position, the last of its panels with some lanes.
LARGE_FILTER = Case("quads-of-a-large-filter", (5, 185, 7, 7), (Layer(181),), bias=True, residual=True)


def test_a_filter_that_leaves_the_cache_is_as_close_as_eager(isa):
    """All panels keep their products from position to position, in y, dx and dW."""
    assert_as_close_as_eager(LARGE_FILTER, "cpu", torch.float32)


@pytest.fixture(params=[1, 2, 7])
def threads(request):
    """How many threads torch is set to use for the test."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_filter_that_leaves_the_cache_is_exact_on_integers(threads, dtype, isa):
    """However many parts its panels are cut into, so that each thread has some, no product is lost or taken twice."""
    (N, C, H, W), K = LARGE_FILTER.shape, LARGE_FILTER.layers[0].K
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randint(-3, 4, size, generator=generator).float() for size in [(N, C, H, W), (K, C, 3, 3), (N, K, H, W)]
    )
    ones, zeros = torch.ones(C, dtype=dtype), torch.zeros(C, dtype=dtype)

    def unit(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return bn_relu_conv2d(a, w, ones, zeros, zeros, ones, padding=1, eps=0.0, backend="cpu")

    results = []
    for kind, run in (dtype, unit), (torch.float64, lambda a, w: conv2d(a.relu(), w, padding=1)):
        a, w = x.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
        y = run(a, w)
        results.append([y, *torch.autograd.grad(y, (a, w), dy.to(kind))])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found.double(), expected)


def test_the_last_half_of_a_quad_reads_nothing_behind_x(isa):
    """Of an x that is read in place, by a raw projection: here a larger tensor goes on there, which 0 does not hide."""
    N, C, K, H, W = 2, 16, 16, 17, 15
    larger = torch.full((N + 1, H, W, C), torch.nan).permute(0, 3, 1, 2)
    x, weight = larger[:N], [torch.randn(K, C, 3, 3)]
    x.copy_(torch.randn(x.shape))
    one, geometry = [torch.ones(C)], [1, 1, 0, 0, 1, 1, 1] * 2
    facts = geometry, [1], [3], torch.float32, 0, False
    y, kept, rows = torch.ops.fused_preact.forward(
        x, None, weight, [], one, one, [], [], weight, [True], [1e-5], *facts
    )
    *_, [dweight] = torch.ops.fused_preact.backward(
        torch.ones_like(y), x, None, kept, rows, weight, [], weight, [True], *facts, [False, False, False, True]
    )
    sums = unfold(x, 3).sum((0, 2)).view(C, 3, 3)  # each output has a dy of one
    assert_close(dweight, sums.expand(K, C, 3, 3), rtol=1e-4, atol=1e-3)
