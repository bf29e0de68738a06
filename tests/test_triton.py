"""The Triton kernels beyond the shared suite: many tiles, levels of partial sums, tiles, tables."""

from types import SimpleNamespace
from unittest.mock import MagicMock

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


# Rows and columns that differ in all they can, and the other way about; classes of pixels of dgrad that have no pixel.
UNLIKE = [
    Case("unlike", (3, 5, 9, 6), (Layer(6, (2, 3), stride=(3, 2), padding=(1, 2)),)),
    Case("unlike-turned", (3, 5, 6, 9), (Layer(6, (3, 2), stride=(2, 3), padding=(2, 1)),)),
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


def test_the_rule_takes_a_smaller_tile_for_few_channels_and_few_pixels():
    """Large products get the first tile; one that would leave multiprocessors idle, or columns empty, a smaller one."""
    tiles = configurations.SHIPPED["sm80"][2]
    assert configurations.rule(tiles, 128 * 32 * 32, 512) == tiles[0]
    assert configurations.rule(tiles, 128 * 32 * 32, 48).columns == 64
    assert configurations.rule(tiles, 64 * 128, 2 * 128) == tiles[0]  # with a program for each of 128 multiprocessors
    assert configurations.rule(tiles, 63 * 128, 2 * 128) == tiles[1]
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


@pytest.mark.parametrize(
    ("sides", "index"),
    [((2**15 - 1, 2**15 + 1), triton.language.int32), ((2**15, 2**15), triton.language.int64)],
    ids=["less", "2^30"],
)
@pytest.mark.parametrize("large", ["x", "y", "weight"])
def test_offsets_are_wide_where_a_tensor_is_large(large, sides, index, monkeypatch):
    """A kernel addresses its tensors in 64 bits where any of them has 2**30 elements or more."""
    types = {}
    monkeypatch.setattr(launch, "run", lambda kernel, *_, INDEX=None, **__: types.setdefault(kernel.fn.__name__, INDEX))
    for module in "forward", "dgrad", "wgrad":
        monkeypatch.setattr(f"fused_preact.triton.{module}.configuration", lambda *_: Config(16, 16, 16, 4, 1))
    N, C, K = {"x": (sides[0], sides[1], 1), "y": (sides[0], 1, sides[1]), "weight": (1, *sides)}[large]
    with torch.device("meta"):
        a, g = kernels.Activation(torch.empty(N, C, 1, 1), None), kernels.Gradient(torch.empty(N, K, 1, 1))
        weight, affine = torch.empty(K, C, 1, 1), kernels.Affine(torch.empty(C), torch.empty(C), 1e-5)
    conv, table = kernels.Conv(1, 1, 0, 0, 1, 1, 1), ops.table("triton")
    table.forward(conv, a, weight, None, None, None)
    table.dgrad(conv, g, weight, a, None, False)
    addressing = ["convolve", "transposed"]
    if large != "weight":  # whose gradient is written with 64 bits in any case
        table.wgrad(conv, g, a, weight, False)
        addressing.append("correlate")
    if large == "x":
        table.statistics(a.x, affine)
        table.dx(kernels.Gradient(a.x), a.x)
        addressing += ["measure", "combine"]
    assert {name: types[name] for name in addressing} == dict.fromkeys(addressing, index)


@pytest.mark.parametrize(("image", "parts"), [(32, 57), (8, 32), (2, 2), (1, 1)])
def test_wgrad_has_parts_for_every_multiprocessor(image, parts, monkeypatch):
    """As many as make 512 programs, where there are eight chunks for each."""
    grids = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, *_, **__: grids.append(grid))
    monkeypatch.setattr("fused_preact.triton.wgrad.configuration", lambda *_: Config(64, 64, 32, 4, 3))
    x = torch.empty(128, 64, image, image, device="meta")
    conv, weight = kernels.Conv(1, 1, 1, 1, 1, 1, 1), torch.empty(64, 64, 3, 3, device="meta")
    ops.table("triton").wgrad(conv, kernels.Gradient(x), kernels.Activation(x, None), weight, False)
    assert grids[0] == (9, parts)


def test_a_launch_is_as_its_tile_says():
    """A kernel is given the constants that it names, and the compiler the warps and stages of the tile."""
    kernel, x = MagicMock(arg_names=["x", "n", "ROWS", "DEPTH", "ACC", "PRECISION"]), torch.empty(4)
    launch.run(kernel, (2, 3), Config(16, 32, 64, 4, 2), x, 5, UNKNOWN=1)
    kernel.__getitem__.assert_called_once_with((2, 3))
    constants = {"ROWS": 16, "DEPTH": 64, "ACC": triton.language.float32, "PRECISION": "ieee"}
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    kernel.__getitem__.return_value.assert_called_once_with(x, 5, **constants, **options)


@pytest.mark.parametrize(
    ("capability", "name"),
    [((7, 5), "sm75"), ((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((11, 0), "sm100"), ((12, 1), "sm120")],
    ids=str,
)
def test_the_architecture_of_a_device(capability, name, monkeypatch):
    """Its tiles are those of the newest that is not newer; of AMD's devices, which are called cuda too, their own."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert configurations.architecture(device) == name
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert configurations.architecture(device) == "hip"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "tf32"),
        ({"dtype": torch.float64}, "ieee"),
        ({"capability": (7, 5)}, "ieee"),
        ({"hip": "6.4"}, "ieee"),
        ({"allowed": False}, "ieee"),
        ({"is_cuda": False}, "ieee"),
    ],
    ids=str,
)
def test_float32_is_tf32_where_the_switch_and_the_device_say_so(changed, expected, monkeypatch):
    """And nothing else is."""
    given = {"dtype": torch.float32, "capability": (8, 0), "hip": None, "allowed": True, "is_cuda": True} | changed
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: given["capability"])
    monkeypatch.setattr(torch.version, "hip", given["hip"])
    monkeypatch.setattr(launch, "allows_tf32", lambda: given["allowed"])
    x = SimpleNamespace(device=torch.device("cuda"), dtype=given["dtype"], is_cuda=given["is_cuda"])
    assert launch.precision(x) == expected


def test_every_call_has_a_tile_of_its_own(monkeypatch):
    """By kernel, type, image and convolution; not by batch, of which the nearest that was measured serves."""
    monkeypatch.setattr(configurations, "asked", set())
    conv = kernels.Conv(1, 1, 1, 1, 1, 1, 1)
    call = {"kernel": "forward", "dtype": torch.float32, "shape": (2, 8, 4, 4), "conv": conv, "weight": (16, 8, 3, 3)}
    changes = [
        {"shape": (4, 8, 4, 4)}, {"kernel": "dgrad"}, {"dtype": torch.bfloat16}, {"shape": (2, 9, 4, 4)},
        {"shape": (2, 8, 5, 4)}, {"shape": (2, 8, 4, 5)}, {"conv": conv._replace(pad_w=2)}, {"weight": (17, 8, 3, 3)},
    ]  # fmt: skip
    for change in [{}, *changes]:
        kernel, dtype, shape, conv, weight = (call | change).values()
        configurations.configuration(kernel, torch.empty(shape, dtype=dtype), conv, torch.empty(weight), 16, 16)
    assert len(configurations.asked) == len(changes)


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
