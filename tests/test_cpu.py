"""csrc/cpu: the borders at which the kernels cut their work, where small shapes have none."""

import pytest
import torch
from torch.testing import assert_close

from cases import Case, Layer, Sample, assert_as_close_as_eager, eager, fused, point
from fused_preact import bn_relu_conv2d

pytestmark = pytest.mark.usefixtures("isa")

SHAPES = [
    # Groups of several tiles, whose sums go on from tile to tile.
    Case("more-tiles-than-groups", (1, 3, 131, 133), (point(4), point(3))),
    Case("more-pixels-than-groups", (2, 16, 47, 46), (point(8),)),
    Case("many-pixels", (2, 16, 33, 31), (Layer(12),), bias=True),
    Case("quads-in-tiles", (2, 16, 34, 30), (Layer(16),), bias=True),
    Case("more-groups-of-wgrad-than-of-dgrad", (64, 4, 8, 8), (Layer(4, padding=(0, 0)),), bias=True),
    Case("classes-of-several-tiles", (1, 3, 65, 65), (Layer(5, stride=(2, 2)),), bias=True),
    Case("more-groups-of-a-later-class", (300, 4, 7, 7), (Layer(8, stride=(2, 2), padding=(0, 0)),), bias=True),
    Case("classes-of-no-row", (4, 12, 1, 5), (Layer(20, stride=(2, 2)),), bias=True),
    Case("classes-of-no-column", (4, 12, 5, 1), (point(20, stride=(2, 2)),), bias=True),
    # Images whose pixels come by position: in several tiles, and nearly as large as the step between them.
    Case("small-images-in-several-tiles", (75, 5, 4, 4), (Layer(7),), bias=True),
    Case("small-images-of-ten-lines", (8, 10, 4, 4), (Layer(7),)),
    # A panel of channels that begins behind the first; sums of pairs that are cut in the middle of one.
    Case("more-channels-than-a-panel", (2, 16, 5, 5), (Layer(128), point(8))),
    Case("long-runs-of-pairs", (2, 146, 5, 5), (Layer(16),)),
    Case("strided-rows-of-much-padding", (1, 2, 8, 300), (Layer(4, stride=(2, 2), padding=(3, 3)),)),
    # Rows of which a part makes a tile.
    Case("parts-of-long-rows", (1, 40, 3, 1031), (Layer(48),), bias=True),
    Case("padding-that-is-wider-than-a-tile", (1, 2, 3, 10), (Layer(4, padding=(1, 700)),), bias=True),
    Case("parts-of-long-strided-rows", (2, 8, 3, 2101), (Layer(6, stride=(2, 2)),)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.id)
def test_no_error_is_more_than_twice_eager_s(case, dtype):
    """At every border that a kernel cuts its work at."""
    assert_as_close_as_eager(case, "cpu", dtype)


def arguments(sample: Sample) -> list:
    """Those of the operator for one block of units without a shortcut."""
    weight, bias, gamma, beta, mean, var, training, eps, conv = (list(c) for c in zip(*sample.units, strict=True))
    geometry = [number for c in conv for number in c]
    norms = gamma, beta, mean, var, [], training, eps
    return [sample.x, None, weight, bias, *norms, geometry, [len(weight)], [0], sample.x.dtype, 0, False]


@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (9, 4, 4, 4)], ids=["rows", "positions"])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (2, 3)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("stride", [(1, 2), (2, 1), (3, 2)], ids=lambda stride: f"stride {stride[0]}, {stride[1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_strides_may_differ(dtype, stride, size, shape):
    """By rows and by columns, as a caller of the operators may have them."""
    layer = Layer(8, size, stride, (size[0] // 2, size[1] // 2))
    sample = Case("strides", shape, (layer,), bias=True).draw(0, dtype)
    exact = eager(sample.to(torch.float64))
    with torch.no_grad():
        x, _, weight, bias, *_, training, _, geometry, units, shortcut, _, memory, tf32 = given = arguments(sample)
        y, kept, rows = torch.ops.fused_preact.forward(*given)
        facts = training, geometry, units, shortcut, dtype, memory, tf32
        dx, [dweight], [dbias], [dgamma], [dbeta], _ = torch.ops.fused_preact.backward(
            sample.dy, x, None, kept, rows, weight, bias, [], *facts, [True] * 4
        )
    found = {"y": y, "dx": dx, "dW1": dweight, "dbias1": dbias, "dgamma1": dgamma, "dbeta1": dbeta}
    for name, value in found.items():
        error = (value.double() - exact[name]).norm() / exact[name].norm()
        assert error <= (2e-2 if dtype == torch.bfloat16 else 1e-4), name


def test_sums_over_pixels_are_not_kept_in_float():
    """The mean of y and gradients are exact where float32 holds the sums of 32 of their integers, and of no more."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randint(2**18, 2**19, (1, 16, 16, 16), generator=generator).float()
    h[:, :, 0, :8] = 2**18
    one, zero, filters = torch.ones(16), torch.zeros(16), torch.eye(16)[..., None, None]
    norms = [[t] * 2 for t in (filters, one, zero, zero, one)]
    weight, gamma, beta, mean, var = norms
    geometry, eps = [1, 1, 0, 0, 1, 1, 1], 2.0**-60
    facts = [eps] * 2, geometry * 2, [2], [0], torch.float32, 0, False
    _, _, rows = torch.ops.fused_preact.forward(h, None, weight, [], gamma, beta, mean, var, [], [False, True], *facts)
    assert torch.equal(rows[1][0], h.double().mean((0, 2, 3)).float())
    facts = [False], geometry, [1], [0], torch.float32, 0, False
    x = torch.ones_like(h)  # which dgamma multiplies them by
    _, _, *sums, _ = torch.ops.fused_preact.backward(
        h, x, None, [], rows[:1], weight[:1], [zero], [], *facts, [True] * 4
    )
    for [found] in sums:
        assert torch.equal(found, h.double().sum((0, 2, 3)).float())


def test_sums_of_statistics_are_not_kept_in_float():
    """The same of the mean of x, whose sums are about that of its first pixels."""
    x = torch.randint(2**19, (1, 16, 16, 16), generator=torch.Generator().manual_seed(0)).float()
    x[:, :, 0, :8] = 0
    given = arguments(Case("statistics", tuple(x.shape), (point(8),), bias=True).draw(0))
    _, _, [rows] = torch.ops.fused_preact.forward(x, *given[1:])
    assert torch.equal(rows[0], x.double().mean((0, 2, 3)).float())


@pytest.mark.parametrize("K", [1024, 1030], ids=["lines", "parts of lines"])
def test_a_result_past_the_cache_by_position(K):
    """Of images so small that pixels come by position, and so many channels that y is streamed if they fill lines."""
    x, weight = torch.randn(32, 4, 4, 4), torch.randn(K, 4, 3, 3)
    x = x.contiguous(memory_format=torch.channels_last)
    norm = torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4)
    y = bn_relu_conv2d(x, weight, *norm, padding=1, backend="cpu")
    assert y.nbytes >= 2 << 20
    assert_close(y, torch.conv2d(x.relu(), weight, padding=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, 0.3), (torch.float32, 1000.0)], ids=["bf16", "fp32"])
def test_statistics_are_those_of_what_is_stored(dtype, bias):
    """Of values that were rounded, if they are bf16; and of a mean that is large beside the deviation."""
    sample = Case("two", (2, 16, 9, 8), (Layer(24), point(8)), bias=True).draw(0, dtype)
    sample.units[0].bias.fill_(bias)
    _, [h], [_, rows] = torch.ops.fused_preact.forward(*arguments(sample))
    var, mean = torch.var_mean(h.double(), (0, 2, 3))
    assert_close(rows[0].double(), mean, rtol=1e-6, atol=1e-6)
    assert_close(rows[2].double(), var, rtol=1e-4, atol=0)


def test_dbeta_is_the_sum_of_dz_as_stored():
    """So that what dbeta takes away from dz in dx cancels. Here dx is dz."""
    x = torch.randn(2, 16, 9, 8).bfloat16().requires_grad_()
    weight, beta = torch.randn(24, 16, 3, 3).bfloat16(), torch.full((16,), 0.5, requires_grad=True)
    one = torch.ones(16)
    y = bn_relu_conv2d(x, weight, one, beta, 0 * one, one, eps=2.0**-60, padding=1, backend="cpu")
    dx, dbeta = torch.autograd.grad(y, [x, beta], torch.randn_like(y))
    assert_close(dbeta.double(), dx.double().sum((0, 2, 3)), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # of float32 sums are rounded, and so alike
def test_more_threads_than_have_a_share_of_their_own(dtype):
    """Jobs are dealt out in up to 64 shares: threads beyond take of those of others, and no bit differs."""
    sample = Case("shares", (2, 16, 64, 64), (Layer(16),), bias=True).draw(0, dtype, "nchw")
    alone = fused(sample, "cpu")
    torch.set_num_threads(100)
    try:
        together = fused(sample, "cpu")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(together[name], alone[name]) for name in alone)


def test_no_sum_of_a_bias_begins_with_what_memory_held():
    """The columns of dW come in parts here, each with sums of its own, where an earlier call left its own."""
    sample = Case("parts", (1, 70, 8, 8), (point(66),), bias=True).draw(0)
    x, _, weight, bias, *_, training, _, geometry, units, shortcut, dtype, memory, tf32 = arguments(sample)
    facts = training, geometry, units, shortcut, dtype, memory, tf32
    for _ in range(2):
        _, _, [dbias], *_ = torch.ops.fused_preact.backward(
            sample.dy, x, None, [], [torch.ones(5, 70)], weight, bias, [], *facts, [False, True, True, False]
        )
        assert_close(dbias, sample.dy.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_large_filters_are_converted_whole():
    """Filters of another type than the convolutions', together of more values than one job converts."""
    sample = Case("large", (2, 40, 4, 4), (Layer(64), Layer(64), point(24)), bias=True).draw(0)
    given = arguments(sample)
    given[0], given[3], given[-3] = sample.x.bfloat16(), [b.bfloat16() for b in given[3]], torch.bfloat16
    results = torch.ops.fused_preact.forward(*given)
    given[2] = [w.bfloat16() for w in given[2]]
    again = torch.ops.fused_preact.forward(*given)
    assert all(map(torch.equal, *map(torch.utils._pytree.tree_leaves, (results, again))))


def test_any_nan_of_a_filter_stays_one():
    """Whatever its bits are: rounded as those of a number they would be an infinity's, or zero's."""
    given = arguments(Case("nan", (1, 1, 2, 2), (point(2),), bias=True).draw(0, torch.bfloat16))
    given[2] = [torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32).view(2, 1, 1, 1)]
    assert torch.ops.fused_preact.forward(*given)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_filters_of_any_type_and_layout(dtype):
    """They are converted to the type of the stage, from slices of larger tensors too."""
    given = arguments(Case("any", (2, 8, 4, 4), (Layer(20), point(6)), bias=True).draw(0))
    exact = given[2] = [w.to(dtype).float() for w in given[2]]
    expected, *_ = torch.ops.fused_preact.forward(*given)
    for change in lambda w: w.to(dtype), lambda w: torch.stack([w.to(dtype)] * 2, -1)[..., 1]:
        given[2] = [change(w) for w in exact]
        assert torch.equal(torch.ops.fused_preact.forward(*given)[0], expected)


def test_an_odd_image_is_paired_with_nothing_that_memory_held():
    """By position: what the last pair lacks is zero, not an image of the call before, whose NaN a zero would keep."""

    def call(images: int, value: float) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full((images, 64, 4, 4), value, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        weight = torch.ones(16, 64, 3, 3, dtype=torch.bfloat16, requires_grad=True)
        rows = torch.ones(64), torch.zeros(64), torch.zeros(64), torch.ones(64)
        return bn_relu_conv2d(x, weight, *rows, padding=1, backend="cpu"), weight

    odd, weight = call(7, 1.0)
    even, _ = call(8, float("nan"))
    even.sum().backward()
    odd.sum().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_other_image(layout):
    """Of a batch whose images are dense, each by itself."""
    given = arguments(Case("images", (4, 8, 5, 4), (Layer(6),), bias=True).draw(0))
    given[0] = given[0].contiguous(memory_format=layout)[::2]
    result, *_ = torch.ops.fused_preact.forward(*given)
    given[0] = given[0].clone()
    assert torch.equal(result, torch.ops.fused_preact.forward(*given)[0])
