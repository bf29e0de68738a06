"""The Triton kernels beyond the shared suite: many tiles, levels of partial sums, all that need not be square."""

import pytest

pytest.importorskip("triton")
import torch
import triton

from cases import (
    BY_ID,
    PYTHON_BACKENDS,
    Case,
    Layer,
    assert_as_close_as_eager,
    assert_exact_on_integers,
    assert_no_worse,
    errors,
    fused,
)
from fused_preact import PreActBlock, backends, kernels, ops, reference
from fused_preact.triton import configurations, launch, statistics
from fused_preact.triton.launch import Config
from tf32 import eager_tf32

interpreted = pytest.mark.skipif("triton" not in PYTHON_BACKENDS, reason="needs TRITON_INTERPRET=1")


@interpreted
@pytest.mark.parametrize("name", ["odd", "stride-2", "bottleneck-stride-2"])
def test_tiles_that_overhang_in_every_direction(name, monkeypatch):
    """The smallest tiles cut pixels, channels and the summed index into many, none of which divides the shape."""
    for module in ("forward", "dgrad", "wgrad"):
        monkeypatch.setattr(f"fused_preact.triton.{module}.configuration", lambda *args: Config(16, 16, 16, 4, 1))
    assert_as_close_as_eager(BY_ID[name], "triton", torch.float32)


@interpreted
@pytest.mark.parametrize("name", ["odd", "35-channels-1x1", "stride-2", "basic-stride-2", "bottleneck-stride-2"])
def test_fp16(name):
    """float16, which the CPU kernels do not serve, has at most twice eager's error."""
    assert_as_close_as_eager(BY_ID[name], "triton", torch.float16)


@interpreted
@pytest.mark.parametrize("name", ["200-channels", "long-rows-stride-2"])
def test_long_sums_of_float32(name, monkeypatch):
    """Sums in the order of a GPU, with its tile, have at most twice the error of eager's sums in parts."""
    sm90 = configurations.SHIPPED["sm90"][4]
    monkeypatch.setattr(configurations, "candidates", lambda *args: sm90)
    assert_as_close_as_eager(BY_ID[name], "triton", torch.float32)


@interpreted
@pytest.mark.parametrize("name", ["odd", "stride-2-1x1", "bottleneck-stride-2"])
def test_tf32_is_rounded_to_nearest(name, monkeypatch):
    """Tensor cores cut operands off, which has more than twice the error of rounding them, as cuDNN does."""
    monkeypatch.setattr(launch, "precision", lambda x: "tf32")
    case = BY_ID[name]
    ours = errors(case, torch.float32, lambda sample: fused(sample, "triton"))
    assert_no_worse(ours, errors(case, torch.float32, eager_tf32), torch.float32)


@interpreted
@pytest.mark.parametrize("other", [False, True])
def test_each_operand_is_rounded_to_tf32(other, monkeypatch):
    """A value in the middle goes away from zero."""
    monkeypatch.setattr(launch, "precision", lambda x: "tf32")
    x, weight = torch.tensor([1 + 2**-11, 1.0] if other else [1.0, 1 + 2**-11]).view(2, 1, 1, 1, 1)
    conv = kernels.Conv(1, 1, 0, 0, 1, 1, 1)
    y, _ = ops.table("triton").forward(conv, kernels.Activation(x, None), weight, None, None, None)
    assert y.item() == 1 + 2**-10


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["stride-2-1x1", "wide-padding", "many-pixels"])
def test_sums_of_integers_are_exact(name, dtype):
    """In every type a product left out or taken twice shows, over many tiles and over the parts of wgrad, too."""
    assert_exact_on_integers(BY_ID[name], ops.table("triton"), dtype)


# Rows and columns that differ in all they can, and the other way about; 17 chunks of pixels in two parts of wgrad;
# classes of pixels of dgrad that have no pixel.
UNLIKE = [
    Case("unlike", (3, 5, 9, 6), (Layer(6, (2, 3), stride=(3, 2), padding=(1, 2)),)),
    Case("unlike-turned", (3, 5, 6, 9), (Layer(6, (3, 2), stride=(2, 3), padding=(2, 1)),)),
    Case("parts-of-wgrad-that-are-not-alike", (1, 3, 40, 27), (Layer(4, (1, 1), padding=(0, 0)),)),
    Case("one-row-and-stride", (3, 5, 1, 4), (Layer(6, (1, 1), stride=(2, 2), padding=(0, 0)),)),
    Case("one-column-and-stride", (3, 5, 4, 1), (Layer(6, (1, 1), stride=(2, 2), padding=(0, 0)),)),
]


@interpreted
@pytest.mark.filterwarnings("error::RuntimeWarning")  # a GPU leaves a division by zero undefined
@pytest.mark.parametrize("case", UNLIKE, ids=lambda case: case.id)
def test_rows_and_columns_are_not_mistaken(case):
    """Filter, stride, padding and image need not be square."""
    assert_exact_on_integers(case, ops.table("triton"), torch.float32)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_infinite_gradient_stays_infinite_with_running_statistics():
    """There dx is scale*dz alone: nothing else of dz or x is multiplied by a slope of zero, which would be NaN."""
    results = []
    for backend in "triton", "eager":
        torch.manual_seed(0)
        block = PreActBlock(4, 6, backend=backend).eval()
        x, dy = torch.randn(1, 4, 5, 3, requires_grad=True), torch.ones(1, 6, 5, 3)
        dy[0, :, 2, 1] = torch.tensor([torch.inf] + [0.0] * 5)
        block(x).backward(dy)
        results.append([x.grad, block.conv1.weight.grad, block.shortcut[0].weight.grad])
    torch.testing.assert_close(*results, equal_nan=True)
    assert results[0][0].isinf().any()


@interpreted
def test_a_gradient_passes_where_z_is_not_a_number():
    """As torch's ReLU has it."""
    results = []
    for backend in "triton", "eager":
        torch.manual_seed(0)
        block = PreActBlock(4, 6, backend=backend).eval()
        x = torch.randn(1, 4, 5, 3)
        x[0, 1, 2, 2] = torch.nan
        y = block(x.requires_grad_())
        results.append(torch.autograd.grad(y, [x, block.bn1.bias], torch.ones_like(y)))
    torch.testing.assert_close(*results, equal_nan=True)
    assert results[0][0].isfinite().all()


@interpreted
def test_rows_that_are_zero_are_absent():
    """With running statistics a gradient has dgamma and dbeta alone, as `kernels.Gradient` promises."""
    conv, rows = kernels.Conv(1, 1, 0, 0, 1, 1, 1), torch.rand(5, 4) + 0.5
    x, g, weight = torch.randn(2, 4, 3, 3), torch.randn(2, 6, 3, 3), torch.randn(6, 4, 1, 1)
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    for batch, count in (True, 4), (False, 2):
        args = conv, kernels.Gradient(g), weight, kernels.Activation(x, rows), None, batch
        ours, expected = (ops.table(name).dgrad(*args) for name in ("triton", "reference"))
        assert len(ours.grad) == len(expected.grad) == count
        torch.testing.assert_close((ours.g, *ours.grad), (expected.g, *expected.grad))
    assert ops.table("triton").dx(kernels.Gradient(g), None) is g  # not even a copy


@interpreted
def test_sums_are_of_what_is_stored():
    """Moments, dgamma and dbeta are of the rounded values, which the next kernels read."""
    conv, table = kernels.Conv(1, 1, 1, 1, 1, 1, 1), ops.table("triton")
    x, g, weight = torch.randn(2, 4, 5, 6), torch.randn(2, 7, 5, 6), torch.randn(7, 4, 3, 3)
    x, g, weight = (t.to(torch.bfloat16, memory_format=torch.channels_last) for t in (x, g, weight))
    norm, affine = torch.rand(5, 4) + 0.5, kernels.Affine(torch.rand(7), torch.randn(7), 1e-5)
    y, rows = table.forward(conv, kernels.Activation(x, None), weight, None, None, affine)
    torch.testing.assert_close(rows, table.statistics(y, affine), rtol=1e-6, atol=1e-6)
    dz, _, _, (dgamma, dbeta, *_) = table.dgrad(
        conv, kernels.Gradient(g), weight, kernels.Activation(x, norm), None, True
    )
    centred = x - norm[kernels.MEAN].view(-1, 1, 1)
    torch.testing.assert_close(dbeta, dz.float().sum((0, 2, 3)), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(dgamma, (dz * centred).sum((0, 2, 3)) * norm[kernels.RSTD], rtol=1e-6, atol=1e-5)


@interpreted
def test_vectors_need_not_be_dense():
    """Every second element of a longer one serves as a bias, a gamma and a beta."""
    x, weight = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last), torch.randn(7, 4, 1, 1)
    results = []
    for stride in 2, 1:
        bias, gamma, beta = (v[::2] if stride == 2 else v[::2].clone() for v in torch.arange(42.0).view(3, 14))
        affine = kernels.Affine(gamma, beta, 1e-5)
        conv, a = kernels.Conv(1, 1, 0, 0, 1, 1, 1), kernels.Activation(x, None)
        results.append(ops.table("triton").forward(conv, a, weight, bias, None, affine))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_statistics_of_many_tiles(mean):
    """More tiles than one launch merges; a mean that is large against the deviation costs no digits."""
    x = (torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0)) + mean).contiguous(
        memory_format=torch.channels_last
    )
    assert x.numel() // 3 > launch.GROUP * statistics.CONFIG.rows
    affine = kernels.Affine(torch.ones(3), torch.zeros(3), 1e-5)
    wide = kernels.Affine(*(t.double() for t in affine[:2]), 1e-5)
    exact = reference.statistics(x.double(), wide)
    exact[kernels.SHIFT] += exact[kernels.SCALE] * (exact[kernels.MEAN].float() - exact[kernels.MEAN])
    torch.testing.assert_close(ops.table("triton").statistics(x, affine).double(), exact, rtol=3e-7, atol=1e-7)


@interpreted
def test_statistics_of_more_pixels_than_32_bits_count():
    """Tiles count as many pixels as they have, the last one fewer."""
    span, left = 2**30, 12345
    counts = torch.tensor([span, span, span, left], dtype=torch.float64)
    means, squares = torch.randn(2, 4, 3, dtype=torch.float64)
    pixels, squares = int(counts.sum()), squares.abs() * span
    affine = kernels.Affine(torch.rand(3).double(), torch.randn(3).double(), 1e-5)
    rows = statistics.rows_of(torch.stack((means, squares), 1), span, pixels, affine)
    mean = (counts @ means) / pixels
    total = squares.sum(0) + counts @ (means - mean).square()
    torch.testing.assert_close(rows[kernels.MEAN], mean)
    torch.testing.assert_close(rows[kernels.VARIANCE], total / (pixels - 1))


@interpreted
def test_levels_of_sums(monkeypatch):
    """dgamma and dbeta do not depend on how many launches add them."""
    expected = fused(BY_ID["odd"].draw(0), "triton")
    small = launch.MERGE._replace(rows=2)
    monkeypatch.setattr("fused_preact.triton.launch.GROUP", 2)
    monkeypatch.setattr("fused_preact.triton.statistics.GROUP", 2)
    monkeypatch.setattr("fused_preact.triton.launch.MERGE", small)
    for module in ("forward", "dgrad"):
        monkeypatch.setattr(f"fused_preact.triton.{module}.configuration", lambda *args: Config(16, 16, 16, 4, 1))
    results = fused(BY_ID["odd"].draw(0), "triton")
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@interpreted
@pytest.mark.parametrize("name", ["odd", "stride-2", "bottleneck-stride-2"])
def test_wide_offsets_reach_the_same_values(name, monkeypatch):
    """What a tensor of 2**30 elements takes, 64-bit offsets, changes no bit."""
    expected = fused(BY_ID[name].draw(0), "triton")
    monkeypatch.setattr(launch, "index_type", lambda *tensors: triton.language.int64)
    results = fused(BY_ID[name].draw(0), "triton")
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "shape", "said"),
    [({"groups": 2}, (4, 2, 3, 3), "groups=2"), ({"dilation_w": 3}, (4, 4, 3, 3), r"dilation=\(1, 3\)")],
    ids=["groups", "dilation"],
)
def test_groups_and_dilation_are_refused_by_name(changed, shape, said, monkeypatch):
    """Asked for by name the backend says which of the two it does not have; "auto" takes another."""
    monkeypatch.setattr(backends, "_triton_unavailable", lambda: None)
    device = "cpu" if triton.knobs.runtime.interpret else "cuda"
    plain = kernels.Conv(1, 1, 1, 1, 1, 1, 1)
    problem = backends.Problem(torch.device(device), torch.float32, (1, 4, 4, 4), ((plain, (4, 4, 3, 3)),))
    assert backends.choose("triton", problem) == "triton"
    problem = problem._replace(convolutions=((plain._replace(**changed), shape),))
    with pytest.raises(ValueError, match=f"backend='triton' cannot serve this call: .*{said}"):
        backends.choose("triton", problem)
    assert backends.choose("auto", problem) == "eager"


def test_it_says_why_it_cannot_be_used(monkeypatch):
    """Without Triton, without a GPU, and on a device that is none of the two, the reason is a sentence."""
    problem = backends.Problem(torch.device("meta"), torch.float32, (1, 4, 4, 4), ())
    monkeypatch.setattr(backends, "_INSTALLED", False)
    assert "pip install triton" in backends.status()["triton"]
    monkeypatch.setattr(backends, "_INSTALLED", True)
    monkeypatch.setattr(backends, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in backends.status()["triton"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "not on meta" in backends.obstacle("triton", problem)


def test_the_interpreter_serves_the_cpu_to_those_who_ask(monkeypatch):
    """Else the tests that it is there for would be left out without a word."""
    monkeypatch.setattr(backends, "_INSTALLED", True)
    monkeypatch.setattr(backends, "_INTERPRETED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    problem = backends.Problem(torch.device("cpu"), torch.float32, (1, 4, 4, 4), ())
    assert backends.choose("triton", problem) == "triton"
    assert "not for the interpreter" in backends.obstacle("triton", problem, by_rule=True)
    assert "not on cuda" in backends.obstacle("triton", problem._replace(device=torch.device("cuda")))
