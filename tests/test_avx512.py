"""The AVX-512 kernels of the built extension on an emulated CPU: machines without AVX-512 test them too.

The emulated kernels stand in for a table of kernels that is written in Python.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from cases import BY_ID, CHAINS, QUADS, UNITS, Case, assert_as_close_as_eager, assert_exact_on_integers, errors, fused
from fused_preact import _extension, reference
from fused_preact.kernels import Activation, Affine, Gradient
from raw_table import stand_in

# Tests that are written once: pytest runs them here too, with the fixtures of this file.
from test_activate import (  # noqa: F401  (run by pytest)
    test_it_is_the_formula,
    test_relu_is_flat_at_zero_and_keeps_nan,
)
from test_join import (  # noqa: F401  (run by pytest)
    test_a_branch_joins_a_stream_of_float32,
    test_a_gradient_joins_a_stream_of_float32_as_it_is_formed,
)

pytestmark = [
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64"), reason="AVX-512 kernels are built for x86-64 only"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("bochscpu") is None,
        reason="the emulated CPU is not here: pip install -e '.[emulator]'",
    ),
]


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Those of an instruction set, avx512 where the test names none."""
    from avx512.kernels import EmulatedKernels  # needs what the emulator extra installs

    isa = getattr(request, "param", "avx512")
    if isa not in _extension.instruction_sets().built:
        pytest.skip(f"the compiler of this build does not know {isa}")
    emulated = EmulatedKernels(_extension.BINARY, isa)
    yield emulated
    emulated.close()


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each type that the kernels have."""
    return request.param


@pytest.fixture
def narrow() -> torch.dtype:
    """The type of 16 bits that the kernels have."""
    return torch.bfloat16


@pytest.fixture
def backend(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend, which the emulated kernels serve."""
    yield from stand_in(kernels, monkeypatch)


each_case = pytest.mark.parametrize("case", [*UNITS, *QUADS, *CHAINS], ids=lambda case: case.id)


# The instruction sets differ in products of bf16 alone.
each_product = pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        ("avx512", torch.float32),
        ("avx512", torch.bfloat16),
        ("avx512_bf16", torch.bfloat16),
        ("amx_bf16", torch.bfloat16),
    ],
    ids=["fp32", "bf16", "bf16-pairs", "bf16-matrices"],
    indirect=["kernels"],
)


@each_product
@each_case
def test_as_close_to_float64_as_plain_layers(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Every kernel, in whole vectors and in tails, in one tile and in many, has at most twice eager's error."""
    assert_as_close_as_eager(case, backend, dtype)


@each_case
def test_float64_is_plain_layers(backend: str, case: Case) -> None:
    """In float64, which has vectors of half the lanes, all but the last digits are those of plain layers."""
    relative = errors(case, torch.float64, functools.partial(fused, backend=backend), draws=1)
    assert max(relative.values()) < 32 * torch.finfo(torch.float64).eps, relative


def test_a_large_mean_keeps_its_digits(backend: str) -> None:
    """Statistics whose squares would cancel."""
    assert_as_close_as_eager(replace(BY_ID["35-channels-1x1"], mean=1000.0), backend, torch.float32)


@each_product
@pytest.mark.parametrize("case", [*UNITS, *QUADS], ids=lambda case: case.id)
def test_integers_are_exact(kernels: Any, case: Case, dtype: torch.dtype) -> None:
    """A product left out or taken twice cannot hide in a tolerance."""
    assert_exact_on_integers(case, kernels, dtype)


@each_product
@pytest.mark.parametrize("name", ["odd", "many-pixels", "stride-2", "quads-in-tiles"])
def test_gradients_made_together_are_those_made_apart(kernels: Any, name: str, dtype: torch.dtype) -> None:
    """dgrad and wgrad in one call give the bits that each gives alone."""
    sample = BY_ID[name].draw(0, dtype)
    [unit] = sample.units
    a = Activation(sample.x, reference.statistics(sample.x, Affine(unit.bn_weight, unit.bn_bias, unit.eps)))
    dy = Gradient(sample.dy)
    together = kernels.gradients(unit.conv, dy, unit.weight, a, None, True)
    dz = kernels.dgrad(unit.conv, dy, unit.weight, a, None, True)
    apart = dz, *kernels.wgrad(unit.conv, dy, a, unit.weight, True)
    assert all(map(torch.equal, tree_leaves(together), tree_leaves(apart)))


@pytest.mark.parametrize("name", ["many-pixels", "quads-of-many-channels"])
def test_results_do_not_depend_on_threads(
    kernels: Any, backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over pixels are cut by the shape alone."""
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(kernels, "threads", threads)
        results.append(fused(BY_ID[name].draw(), backend))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 35, 70), (2, 130, 16)], ids=str)
def test_matrices_are_transposed_bit_for_bit(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """NCHW and NHWC of each other, in whole squares and in tails: no value is computed with, so any bits are kept."""
    matrices = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    matrices = matrices.repeat(1, 1, dtype.itemsize // 2).view(dtype)
    permuted, expected = (t.flatten().view(torch.int16) for t in (kernels.permute(matrices), matrices.transpose(1, 2)))
    assert torch.equal(permuted, expected)


@pytest.mark.parametrize(("of", "to"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_many_tensors_are_converted_as_torch_converts_each(kernels: Any, of: torch.dtype, to: torch.dtype) -> None:
    """Shorter and longer than a job, which begin and end anywhere in them; halfway values, infinity and NaN too."""
    tensors = [torch.randn(count).to(of) for count in (1, 15, 16, 333, 2**14, 5, 40000)]
    tensors[3][:5] = torch.tensor([torch.nan, torch.inf, 3.4e38, 1 + 2.0**-8, 1 + 3 * 2.0**-8])
    for found, tensor in zip(kernels.convert(tensors, to), tensors, strict=True):
        torch.testing.assert_close(found, tensor.to(to), rtol=0, atol=0, equal_nan=True)


# Machine code of `vdpbf16ps OPERAND, %zmm1, %zmm0`, and where rdi, rsi, r8 and r9 lie before a factor at address z.
OPERANDS = {
    "(%rdi)": ("62f276485207", lambda z: (z, 0, 0, 0)),
    "64(%rdi)": ("62f27648524701", lambda z: (z - 64, 0, 0, 0)),
    "68(%rdi)": ("62f27648528744000000", lambda z: (z - 68, 0, 0, 0)),
    "64(%rdi,%rsi,4)": ("62f276485244b701", lambda z: (z - 76, 3, 0, 0)),
    "(%r8)": ("62d276485200", lambda z: (0, 0, z, 0)),
    "(%rdi,%r9,4)": ("62b2764852048f", lambda z: (z - 12, 0, 0, 3)),
    "%zmm2": ("62f17c481017 62f2764852c2", lambda z: (z, 0, 0, 0)),  # loaded from (%rdi)
}
LOAD_SUM, LOAD_FACTOR, STORE_SUM, RETURN = "62f17c481001", "62f17c48100a", "62f17c481101", "c3"  # (%rcx), (%rdx)


@pytest.mark.parametrize("operand", OPERANDS)
def test_bf16_instructions_are_substituted_whatever_they_read(kernels: Any, operand: str) -> None:
    """The emulator itself: compilers choose how an operand is addressed, and each form has a length of its own."""
    code, registers = OPERANDS[operand]
    pairs, others = torch.randint(-8, 8, (2, 32)).bfloat16()
    start = torch.randint(-8, 8, (16,)).float()
    cpu = kernels.cpu
    z, y, x = (cpu.place(t) for t in (pairs, others, start))
    function = cpu.add_code(bytes.fromhex(LOAD_FACTOR + LOAD_SUM + code + STORE_SUM + RETURN))
    rdi, rsi, r8, r9 = registers(cpu.address(z))
    cpu.call(function, rdi, rsi, cpu.address(y), cpu.address(x), r8, r9)
    assert torch.equal(x, start + (pairs.float() * others.float()).view(16, 2).sum(1))
    cpu.clear()


def test_reading_past_the_end_is_caught(kernels: Any) -> None:
    """The emulator itself: a kernel that is told of more pixels than it is given does not pass."""
    from avx512.emulator import EmulationError

    x = torch.randn(1, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    with pytest.raises(EmulationError, match="touching"):
        kernels.dx(Gradient(x), x[:, :, :1].contiguous(memory_format=torch.channels_last))
