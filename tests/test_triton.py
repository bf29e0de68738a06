"""The Triton kernels beyond the shared suite: many tiles, levels of partial sums, tiles, tables."""

import pytest

pytest.importorskip("triton")
import torch
import triton

from cases import (
    BY_ID,
    PYTHON_BACKENDS,
    assert_as_close_as_eager,
    assert_exact_on_integers,
    assert_no_worse,
    errors,
    fused,
)
from fused_preact import PreActBlock, backends, kernels, ops, reference, tables, tune
from fused_preact.bench.measure import Step, Times
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["stride-2-1x1", "wide-padding", "many-pixels"])
def test_sums_of_integers_are_exact(name, dtype):
    """In every type a product left out or taken twice shows, over many tiles and over the parts of wgrad, too."""
    assert_exact_on_integers(BY_ID[name], ops.table("triton"), dtype)


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


def test_the_rule_takes_a_smaller_tile_for_few_channels_and_few_pixels():
    """Large products get the first tile; one that would leave multiprocessors idle, or columns empty, a smaller one."""
    tiles = configurations.SHIPPED["sm80"][2]
    assert configurations.rule(tiles, 128 * 32 * 32, 512) == tiles[0]
    assert configurations.rule(tiles, 128 * 32 * 32, 48).columns == 64
    assert configurations.rule(tiles, 16, 16) == tiles[-1]


def test_a_tile_that_was_measured_serves_later_calls(folder, monkeypatch):
    """Each kernel call is timed with each tile of the list; calls read the fastest in the table, at any batch."""
    fast, last = Config(64, 32, 16, 4, 1), Config(32, 32, 16, 4, 1)
    monkeypatch.setattr(configurations, "candidates", lambda *args: (fast, last))
    monkeypatch.setattr(configurations, "trial", {})
    x, weight, conv = torch.empty(8, 16, 4, 4), torch.empty(16, 16, 3, 3), kernels.Conv(1, 1, 1, 1, 1, 1, 1)

    def call(N=8):
        return configurations.configuration("forward", x[:N], conv, weight, 16, 16)

    def alternate(steps, *_):
        return [Times((1.0,), (1.0 if steps[0].forward() == fast else 2.0,))]

    monkeypatch.setattr(tune, "_step", lambda *_: Step(lambda: None, call, lambda _: None))
    monkeypatch.setattr(tune, "alternate", alternate)
    problem = backends.Problem(x.device, x.dtype, x.shape, ())
    tiles = tune._tiles(problem, torch.nn.Identity(), 1.0)
    configurations.trial.clear()
    assert call() == last
    tables.save({"device": tables.device_name("cpu"), "calls": {}, "tiles": tiles})
    assert call() == call(N=1) == fast


def test_every_architecture_ships_every_type():
    """There is a tile for each element size, at least 16 in every direction, as tensor cores need."""
    for sizes in configurations.SHIPPED.values():
        assert set(sizes) == {2, 4, 8}
        for tiles in sizes.values():
            assert all(min(tile[:3]) >= 16 for tile in tiles)


@interpreted
@pytest.mark.parametrize("name", ["odd", "stride-2", "bottleneck-stride-2"])
def test_wide_offsets_reach_the_same_values(name, monkeypatch):
    """What a tensor of 2**30 elements takes, 64-bit offsets, changes no bit."""
    expected = fused(BY_ID[name].draw(0), "triton")
    monkeypatch.setattr(launch, "index_type", lambda *tensors: triton.language.int64)
    results = fused(BY_ID[name].draw(0), "triton")
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_offsets_are_wide_where_a_tensor_is_large():
    """Tensors of 2**30 elements and more are addressed in 64 bits."""
    large = torch.empty(2**30, device="meta")
    assert launch.index_type(large) == triton.language.int64
    assert launch.index_type(torch.empty(4)) == triton.language.int32


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
