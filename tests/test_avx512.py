"""The AVX-512 kernels of the built extension on an emulated CPU: machines without AVX-512 test them too.

The emulated kernels stand in for a table of kernels that is written in Python.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CHAINS, UNITS, Case, eager, errors, fused
from fused_preact import _extension, ops, reference
from fused_preact.schedule import Activation, Gradient

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="AVX-512 kernels are built for x86-64 only"
)


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    from avx512.kernels import EmulatedKernels  # needs what the test extra alone installs

    emulated = EmulatedKernels(_extension.BINARY)
    yield emulated
    emulated.close()


@pytest.fixture
def run(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that gives the results of a sample as `cases.fused` does, of the emulated kernels."""
    monkeypatch.setitem(ops.TABLES, "reference", kernels)
    return functools.partial(fused, backend="reference")


def vanishing(case: Case) -> set[str]:
    """Gradients that are zero but for rounding: of a bias whose effect the next batch norm takes away."""
    return {f"dbias{i}" for i, layer in enumerate(case.layers) if layer.batch}


def check(run: Any, case: Case, dtype: torch.dtype) -> None:
    """The rule: the error of every result against float64 is at most twice that of eager torch."""
    draws = 2
    actual, plain = errors(case, dtype, run, draws), errors(case, dtype, eager, draws)
    for name in sorted(actual.keys() - vanishing(case)):
        # Eager may be right to the last digit by chance, and in float64 it is the oracle itself.
        digit = torch.finfo(torch.float32).eps
        limit = 32 * torch.finfo(dtype).eps if dtype == torch.float64 else max(2 * plain[name], digit)
        assert actual[name] <= limit, f"{name}: error {actual[name]:.2g}, eager's {plain[name]:.2g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"])
@pytest.mark.parametrize("case", [*UNITS, *CHAINS], ids=lambda case: case.id)
def test_as_exact_as_eager(run: Any, case: Case, dtype: torch.dtype) -> None:
    """Every kernel, in whole vectors and in tails, in one tile and in many."""
    check(run, case, dtype)


def test_large_mean_keeps_the_deviation(run: Any) -> None:
    """Statistics whose squares would cancel: a mean of 1000 deviations."""
    check(run, replace(UNITS[2], mean=1000.0), torch.float32)


@pytest.mark.parametrize("case", UNITS, ids=lambda case: case.id)
def test_integers_are_exact(kernels: Any, case: Case) -> None:
    """A product left out or taken twice cannot hide in a tolerance."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        values = torch.randint(-8, 9, shape, generator=generator).float()
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    layer, x = case.layers[0], Activation(integers(*case.shape), None)
    weight, bias = integers(layer.K, case.shape[1], *layer.size), integers(layer.K)
    dy = integers(*layer.conv.output_shape(case.shape, weight.shape))
    for name, arguments in {
        "forward": (layer.conv, x, weight, bias, dy, None),
        "dgrad": (layer.conv, Gradient(dy), weight, x, x.x, False),
        "wgrad": (layer.conv, Gradient(dy), x, weight, True),
    }.items():
        for actual, expected in zip(*(getattr(table, name)(*arguments) for table in (kernels, reference)), strict=True):
            assert (actual is None and expected is None) or torch.equal(actual, expected), name


def test_results_do_not_depend_on_threads(kernels: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over pixels are cut by the shape alone."""
    (case,) = (case for case in UNITS if case.id == "many-pixels")
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(kernels, "threads", threads)
        results.append(run(case.draw()))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_reading_past_the_end_is_caught(kernels: Any) -> None:
    """The emulator itself: a kernel that is told of more pixels than it is given does not pass."""
    from avx512.emulator import EmulationError

    x = torch.randn(1, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    with pytest.raises(EmulationError, match="touching"):
        kernels.dx(Gradient(x), x[:, :, :1].contiguous(memory_format=torch.channels_last))
