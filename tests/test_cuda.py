"""The CUDA kernels on an emulated device: the unchanged csrc/cuda/*.cu, run by the same cases as every other backend.

The emulated kernels stand in for a table of kernels that is written in Python. Where a test draws a case several times,
each draw runs in another schedule: an order of threads and blocks, and a time of copies (tests/emulation/emulation.h).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cuda_toolkit
from cases import (
    CHAINS,
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
from fused_preact import ops
from test_ops import (  # noqa: F401  (with the fixture `backend` of this file)
    poisoned,
    test_integers_are_exact,
    test_layouts_give_the_same_bits,
    test_two_runs_agree_to_the_bit,
)

pytestmark = pytest.mark.skipif(cuda_toolkit.home() is None, reason=cuda_toolkit.NO_NVCC)

PRODUCTS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = 8
# More channels than one block has, rows longer than a tile, and more tiles than blocks.
LARGE = [
    Case("200-channels", (1, 200, 5, 6), (Layer(130),), bias=True),
    Case("200-channels-1x1", (2, 200, 5, 6), (point(72),), residual=True),
    Case("264-to-8-channels-1x1", (2, 264, 6, 5), (point(8),)),
    Case("long-rows", (1, 8, 3, 150), (Layer(16),)),
    Case("long-rows-stride-2", (1, 9, 5, 141), (Layer(8, stride=(2, 2)),)),
    Case("many-images", (40, 4, 3, 3), (Layer(8),)),
]
CASES = [*UNITS, *CHAINS, *LARGE]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.fixture(scope="session")
def emulated(pytestconfig: pytest.Config) -> Any:
    from emulation.kernels import EmulatedKernels  # needs what the test extra alone installs

    return EmulatedKernels(pytestconfig.getoption("sanitizer"))


@pytest.fixture
def kernels(emulated: Any) -> Iterator[Any]:
    """The emulated kernels, in the first schedule."""
    emulated.tf32, emulated.offset = False, 0
    emulated.use_schedule(0)
    return emulated


@pytest.fixture
def backend(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend, which the emulated kernels serve."""
    monkeypatch.setitem(ops.TABLES, "reference", kernels)
    return "reference"


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest, kernels: Any) -> str:
    """Each way to multiply."""
    kernels.tf32 = request.param == "tf32"
    return request.param


class Tf32Convolution(torch.autograd.Function):
    """conv2d of float32 whose operands, forward and backward, are rounded to ten bits of mantissa, as cuDNN's are."""

    @staticmethod
    def forward(ctx, a, weight, *geometry):
        operands = _tf32(a), _tf32(weight)
        ctx.save_for_backward(*operands)
        ctx.geometry = geometry
        return torch.ops.aten.convolution(*operands, None, *geometry)

    @staticmethod
    def backward(ctx, dy):
        mask = [True, True, False]
        da, dweight, _ = torch.ops.aten.convolution_backward(_tf32(dy), *ctx.saved_tensors, None, *ctx.geometry, mask)
        return da, dweight, *[None] * len(ctx.geometry)


def _tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _tf32_conv2d(a, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    y = Tf32Convolution.apply(a, weight, stride, padding, dilation, False, (0, 0), groups)
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def eager_tf32(sample: Sample) -> Results:
    """Plain layers with torch's switch for TF32 on, which it has for CUDA alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", _tf32_conv2d)
        return eager(sample)


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
    case = next(case for case in UNITS if case.id == "35-channels-1x1")
    assert_as_close_as_eager(replace(case, mean=1000.0), "fp32", kernels)


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


@pytest.mark.parametrize("name", ["64-channels", "stride-2-1x1", "bottleneck"])
def test_tensors_may_begin_at_any_element(name: str, product: str, kernels: Any, backend: str) -> None:
    """Narrow reads and writes of what is not aligned make the same numbers."""
    sample = next(case for case in CASES if case.id == name).draw(0, PRODUCTS[product])
    aligned = fused(sample, backend)
    kernels.offset = 1
    for name, value in fused(sample, backend).items():
        assert torch.equal(value, aligned[name]), name
