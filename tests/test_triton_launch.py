"""How the Triton kernels are called, which no GPU is needed for: tiles, offsets, types of products, options."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

pytest.importorskip("triton")
import torch
import triton

from fused_preact import backends, kernels, ops, tables, tune
from fused_preact.bench.measure import Step, Times
from fused_preact.triton import configurations, launch
from fused_preact.triton.launch import Config


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
    configurations.trial.update(dict.fromkeys(configurations.asked, last))
    assert call() == last


def test_every_architecture_ships_every_type():
    """There is a tile for each element size, at least 16 in every direction, as tensor cores need."""
    for sizes in configurations.SHIPPED.values():
        assert set(sizes) == {2, 4, 8}
        for tiles in sizes.values():
            assert all(min(tile[:3]) >= 16 for tile in tiles)


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


def test_a_launch_is_as_its_tile_says(monkeypatch):
    """A kernel is given the constants that it names, and the compiler the warps and stages of the tile."""
    monkeypatch.setattr(launch, "precision", lambda _: "tf32")
    kernel, x = MagicMock(arg_names=["x", "n", "ROWS", "DEPTH", "ACC", "PRECISION"]), torch.empty(4)
    launch.run(kernel, (0, 3), Config(16, 32, 64, 4, 2), x, 5)
    launch.run(kernel, (2, 3), Config(16, 32, 64, 4, 2), x, 5, UNKNOWN=1)
    kernel.__getitem__.assert_called_once_with((2, 3))
    constants = {"ROWS": 16, "DEPTH": 64, "ACC": triton.language.float32, "PRECISION": "tf32"}
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
    assert configurations.candidates(device, torch.bfloat16) is configurations.SHIPPED[name][2]
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
