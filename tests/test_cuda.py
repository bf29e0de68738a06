"""The CUDA kernels on an emulated device: the unchanged csrc/cuda/*.cu, run by the same cases as every other backend.

The emulated kernels stand in for a table of kernels that is written in Python. Where a test draws a case several times,
each draw runs in another schedule: an order of threads and blocks, and a time of copies (tests/emulation/emulation.h).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import cuda_toolkit
from cases import (
    BY_ID,
    CHAINS,
    LARGE,
    UNITS,
    Case,
    Layer,
    Results,
    Sample,
    assert_exact_on_integers,
    assert_no_worse,
    eager,
    errors,
    fused,
    point,
)
from fused_preact import reference
from fused_preact.kernels import Activation, Affine, Gradient
from raw_table import stand_in

# Tests that are written once: pytest runs them here too, with the fixtures of this file.
from test_functional import test_statistics_of_what_is_not_finite  # noqa: F401  (run by pytest)
from test_join import (  # noqa: F401  (run by pytest)
    narrow,
    test_a_branch_joins_a_stream_of_float32,
    test_a_gradient_joins_a_stream_of_float32_as_it_is_formed,
    test_a_stage_is_its_blocks_one_by_one,
)
from test_ops import (  # noqa: F401  (run by pytest)
    poisoned,
    test_integers_are_exact,
    test_layouts_give_the_same_bits,
    test_two_runs_agree_to_the_bit,
)
from test_running import (  # noqa: F401  (run by pytest)
    test_an_average_without_a_count_stays,
    test_buffers_move_towards_the_batch,
    test_buffers_of_any_stride,
    test_buffers_of_several_types,
    test_counts_alone,
    test_it_is_what_batch_norm_does,
    test_many_batch_norms,
    test_what_is_infinite_stays_so,
)
from test_statistics import (  # noqa: F401  (run by pytest)
    test_a_mean_is_rounded_without_moving_its_channel,
    test_an_infinite_running_mean_makes_no_nan,
)
from tf32 import PRODUCTS, eager_tf32

pytestmark = pytest.mark.skipif(cuda_toolkit.home() is None, reason=cuda_toolkit.NO_NVCC)

SCHEDULES = 8
MOST_TENSORS = 12  # that a call has: dgrad, of a unit that is neither the first nor the last
CASES = [*UNITS, *CHAINS, *LARGE]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.fixture
def kernels(emulated: Any) -> Any:
    """Those that the shared tests are of."""
    return emulated


@pytest.fixture
def backend(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend, which the emulated kernels serve."""
    yield from stand_in(kernels, monkeypatch)


@pytest.fixture
def update(kernels: Any) -> Any:
    """What moves running statistics."""
    return kernels.move


@functools.cache
def eager_errors(case: Case, product: str) -> dict[str, float]:
    return errors(case, PRODUCTS[product], eager_tf32 if product == "tf32" else eager)


def assert_as_close_as_eager(case: Case, product: str, kernels: Any) -> None:
    """The rule of `cases.assert_as_close_as_eager`; each draw in the next schedule, on 1 to 3 multiprocessors."""
    numbers = iter(range(SCHEDULES))

    def run(sample: Sample) -> Results:
        number = next(numbers)
        kernels.use_schedule(number, multiprocessors=1 + number % 3)
        return fused(sample, "reference")

    dtype = PRODUCTS[product]
    assert_no_worse(errors(case, dtype, run, SCHEDULES), eager_errors(case, product), dtype)


@each_case
def test_as_close_to_float64_as_plain_layers(case: Case, product: str, kernels: Any, backend: str) -> None:
    """Every kernel, in whole pieces and in tails, in one block and in many, has at most twice eager's error."""
    assert_as_close_as_eager(case, product, kernels)


def test_a_large_mean_keeps_its_digits(kernels: Any, backend: str) -> None:
    """Statistics whose squares would cancel."""
    assert_as_close_as_eager(replace(BY_ID["35-channels-1x1"], mean=1000.0), "fp32", kernels)


@each_case
def test_every_schedule_gives_the_same_bits(case: Case, product: str, kernels: Any, backend: str) -> None:
    """Nothing depends on which thread or block comes first, nor on when a copy is made."""
    sample = case.draw(0, PRODUCTS[product])
    expected = fused(sample, backend)
    for number in range(1, SCHEDULES):
        kernels.use_schedule(number)
        for name, value in fused(sample, backend).items():
            assert torch.equal(value, expected[name]), (number, name)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("case", [*UNITS, *LARGE], ids=lambda case: case.id)
def test_sums_of_integers_are_exact(case: Case, offset: int, product: str, kernels: Any) -> None:
    """A product left out or taken twice cannot hide in a tolerance; tensors may begin at any element."""
    kernels.offset = offset
    for number in range(SCHEDULES):
        kernels.use_schedule(number)
        assert_exact_on_integers(case, kernels, PRODUCTS[product])


@pytest.mark.parametrize(("C", "size"), [(64, 32), (128, 16), (256, 8)])
def test_shared_memory_leaves_room_for_the_blocks_that_registers_allow(
    C: int, size: int, product: str, kernels: Any
) -> None:
    """On an H100, for the convolutions of ResNet-1001: test_cuda_code.py holds the registers to as many blocks."""
    multiprocessor, block = 228 * 1024, 1024  # bytes that a multiprocessor has, and that each block takes besides
    kernels.use_schedule(0, multiprocessors=1)
    norm = {channels: torch.ones(5, channels) for channels in (C, C // 4)}
    for before, after, layer in ((C, C // 4, point(C // 4)), (C // 4, C // 4, Layer(C // 4)), (C // 4, C, point(C))):
        x, y = (torch.zeros(2, channels, size, size // 2, dtype=PRODUCTS[product]) for channels in (before, after))
        weight = torch.zeros(after, before, *layer.size, dtype=PRODUCTS[product])
        a, grad = Activation(x, norm[before]), [torch.ones(after) for _ in range(4)]
        dy = Gradient(y, y, norm[after], grad)
        kernels.forward(layer.conv, a, weight, None, None, Affine(torch.ones(after), torch.ones(after), 1e-5))
        found = {"forward": (4 if after <= 16 else 3, kernels.latest_shared())}
        kernels.dgrad(layer.conv, dy, weight, a, None, True)
        found["dgrad"] = (4 if before <= 16 else 3, kernels.latest_shared())
        kernels.wgrad(layer.conv, dy, a, weight, False)
        found["wgrad"] = (3, kernels.latest_shared())
        for name, (blocks, shared) in found.items():
            assert blocks * (shared + block) <= multiprocessor, (name, before, after, blocks, shared)


@pytest.mark.parametrize("name", ["64-channels", "stride-2-1x1", "bottleneck"])
def test_tensors_may_begin_at_any_element(name: str, product: str, kernels: Any, backend: str) -> None:
    """Narrow reads and writes of what is not aligned make the same numbers."""
    sample = BY_ID[name].draw(0, PRODUCTS[product])
    aligned = fused(sample, backend)
    kernels.offset = 1
    for name, value in fused(sample, backend).items():
        assert torch.equal(value, aligned[name]), name


def test_relu_is_flat_at_zero(product: str, kernels: Any) -> None:
    """As in torch: where the pre-activation is zero, as with a gamma and a beta of zero, no gradient passes."""
    x, norm = torch.zeros(1, 8, 4, 3, dtype=PRODUCTS[product]), torch.tensor([[0.0], [1.0], [1.0], [1.0], [0.0]])
    dy, weight = Gradient(torch.ones_like(x)), torch.ones(8, 8, 1, 1, dtype=x.dtype)
    dz = kernels.dgrad(point(8).conv, dy, weight, Activation(x, norm.expand(5, 8).contiguous()), None, True)
    assert not any(value.any() for value in (dz.g, *dz.grad))


def test_the_gradient_of_a_bias_in_front_of_a_batch_norm_vanishes(product: str, kernels: Any, backend: str) -> None:
    """Sums over dy as it is formed from three terms, which cancel: no relative error measures that."""
    results = fused(BY_ID["basic-residual"].draw(0, PRODUCTS[product]), backend)
    assert results["dbias1"].abs().max() <= 1e-4 * results["dbias2"].abs().max()


@pytest.mark.parametrize("mean", [float("inf"), float("-inf")])
def test_a_gradient_behind_running_statistics_asks_for_no_mean(mean: float, product: str, kernels: Any) -> None:
    """It is scale*dz, of a channel too whose mean is infinite, for all who form it."""
    x, g = (torch.randint(-2, 3, (2, 16, 3, 5)).to(PRODUCTS[product]) for _ in range(2))
    norm = torch.tensor([mean, 1.0, 1.0, 2.0, 0.0])[:, None].expand(5, 16).contiguous()
    dy, weight = Gradient(g, x, norm, list(torch.zeros(4, 16))), torch.ones(16, 16, 1, 1, dtype=x.dtype)
    a, formed = Activation(x, None), Gradient(2 * g)
    assert torch.equal(kernels.dx(dy, None), formed.g)
    found = kernels.gradients(point(16).conv, dy, weight, a, None, False)
    dz = reference.dgrad(point(16).conv, formed, weight, a, None, False).g
    expected = dz, *reference.wgrad(point(16).conv, formed, a, weight, True)
    assert all(map(torch.equal, (found[0].g, *found[1:]), expected))


def test_sums_are_of_what_is_stored(product: str, kernels: Any) -> None:
    """Batch statistics are those of the rounded y, and the sums of a gradient those of the rounded dz."""
    dtype, generator = PRODUCTS[product], torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 16, 9, 7, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(16, 16, 1, 1, generator=generator).to(dtype)
    norm = reference.statistics(x, Affine(torch.ones(16), torch.zeros(16), 1e-5))
    y, rows = kernels.forward(
        point(16).conv, Activation(x, norm), weight, None, None, Affine(torch.ones(16), torch.zeros(16), 1e-5)
    )
    torch.testing.assert_close(rows[0].double(), y.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    dz = kernels.dgrad(point(16).conv, Gradient(dy), weight, Activation(x, norm), None, True)
    torch.testing.assert_close(dz.grad[1].double(), dz.g.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["bottleneck", "bottleneck-wider"])
def test_one_tensor_alone_may_begin_at_any_element(name: str, product: str, kernels: Any, backend: str) -> None:
    """No tensor is read or written in pieces because the others of a call may be: `add` is one of dx, or of dgrad."""
    sample = BY_ID[name].draw(0, PRODUCTS[product])
    aligned = fused(sample, backend)
    kernels.offset = 1
    for kernels.alone in range(MOST_TENSORS):
        for result, value in fused(sample, backend).items():
            assert torch.equal(value, aligned[result]), (kernels.alone, result)


# Multiprocessors of the launch of both, of dgrad and of wgrad, with which all cut the pixels into the same groups.
# Many leave every tile a group of its own. Of few, one launch gives each half of three blocks a multiprocessor; alone
# dgrad has four, of up to 16 channels, and wgrad three.
MANY, FEW = (1000, 1000, 1000), (8, 3, 4)


@pytest.mark.parametrize("case", [*UNITS, *LARGE], ids=lambda case: case.id)
def test_gradients_made_together_are_those_made_apart(case: Case, product: str, kernels: Any) -> None:
    """dgrad and wgrad in one launch, in any order of their blocks, give the bits that each gives of the same groups."""
    sample = case.draw(0, PRODUCTS[product])
    [unit] = sample.units
    a = Activation(sample.x, reference.statistics(sample.x, Affine(unit.bn_weight, unit.bn_bias, unit.eps)))
    dy = Gradient(sample.dy)
    few = (8, 8, 8) if PRODUCTS[product].itemsize == 4 else FEW  # float32 takes two launches
    for number in range(SCHEDULES):
        of_both, of_dgrad, of_wgrad = few if number % 2 and sample.x.size(1) <= 16 else MANY
        kernels.use_schedule(number, multiprocessors=of_both)
        together = kernels.gradients(unit.conv, dy, unit.weight, a, None, True)
        kernels.use_schedule(number, multiprocessors=of_dgrad)
        dz = kernels.dgrad(unit.conv, dy, unit.weight, a, None, True)
        kernels.use_schedule(number, multiprocessors=of_wgrad)
        apart = dz, *kernels.wgrad(unit.conv, dy, a, unit.weight, True)
        assert all(map(torch.equal, tree_leaves(together), tree_leaves(apart))), number


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("of", "to"), [*itertools.permutations((torch.float32, torch.bfloat16, torch.float16), 2)])
def test_many_tensors_are_converted_as_torch_converts_each(
    of: torch.dtype, to: torch.dtype, offset: int, kernels: Any
) -> None:
    """More tensors than a launch takes, shorter and longer than what a block does."""
    kernels.offset = offset
    tensors = [torch.randn(1 + (317 * i) % 2500).to(of) for i in range(130)]
    tensors[3][0], tensors[4][0], tensors[5][0] = torch.nan, torch.inf, 1e38
    for found, tensor in zip(kernels.convert(tensors, to), tensors, strict=True):
        torch.testing.assert_close(found, tensor.to(to), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(3, 17, 16), (2, 9, 33), (5, 6, 6), (9, 1, 1)], ids=str)
@pytest.mark.parametrize("K", [16, 64])
def test_statistics_of_an_output_keep_the_digits_of_a_large_mean(shape: tuple[int, ...], K: int, kernels: Any) -> None:
    """Whichever pixels of a tile lie outside, in runs of one tile and of many; a lane adds up 64 distances at most."""
    N, H, W = shape
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(N, channels, H, W, generator=generator) for channels in (8, K))
    weight, affine = torch.randn(K, 8, 3, 3, generator=generator), Affine(torch.ones(K), torch.zeros(K), 1e-5)
    for number in range(SCHEDULES):
        kernels.use_schedule(number, multiprocessors=1 + 5 * (number % 2))
        y, rows = kernels.forward(Layer(K).conv, Activation(x, None), weight, None, residual + 3000, affine)
        variance, mean = torch.var_mean(y.double(), (0, 2, 3))
        torch.testing.assert_close(rows[0].double(), mean, rtol=2**-23, atol=0)
        torch.testing.assert_close(rows[2].double(), variance, rtol=64 * 2**-24, atol=0)


def test_a_join_that_no_kernel_makes_is_refused(kernels: Any) -> None:
    """Nothing is joined unformed, and nothing left unwritten."""
    x, affine = torch.randn(1, 8, 2, 3), Affine(torch.ones(8), torch.zeros(8), 1e-5)
    norm, grad = reference.statistics(x, affine), list(torch.ones(4, 8))
    with pytest.raises(RuntimeError, match="join: expected a branch without a norm where next_rows is not null"):
        kernels.join(x, Gradient(x.bfloat16(), x.bfloat16(), norm, grad), False, True, affine)
    with pytest.raises(RuntimeError, match="join: expected a branch of 16 bits"):
        kernels.join(x, Gradient(x), False, False, None)


def test_groups_in_teams_are_each_added_once(kernels: Any) -> None:
    """Of 70 groups each kernel makes teams of nine, the last of seven; of few, runs in which lanes store sums twice."""
    groups, C, identity = 70, 4, torch.eye(4)[:, :, None, None]
    generator = torch.Generator().manual_seed(0)

    def integers(pixels: int) -> torch.Tensor:
        return torch.randint(-1, 2, (1, C, groups, pixels), generator=generator).float()

    x, dy, long = integers(128), integers(128), integers(2048)  # pixels of a group of the others, and of statistics
    affine = Affine(torch.ones(C), torch.zeros(C), 1e-5)
    norm = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])[:, None].expand(5, C).contiguous()
    arguments = {
        "forward": (point(C).conv, Activation(x, None), identity, None, None, affine),
        "dgrad": (point(C).conv, Gradient(dy), identity, Activation(x, norm), None, True),
        "wgrad": (point(C).conv, Gradient(dy), Activation(x, None), identity, True),
        "statistics": (long, affine),
    }
    for number in range(SCHEDULES):
        kernels.use_schedule(number, multiprocessors=1 if number % 2 else 1000)
        for name, given in arguments.items():
            found, expected = (tree_leaves(getattr(table, name)(*given)) for table in (kernels, reference))
            for value, exact in zip(found, expected, strict=True):
                torch.testing.assert_close(value, exact, rtol=2**-20, atol=1e-6, msg=f"{name} in schedule {number}")
