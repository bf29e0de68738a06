"""The AMX of the emulated CPU (avx512/amx.py), in machine code: every machine tests it, whatever its kernels are."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_preact import _extension

pytest.importorskip("bochscpu", reason="the emulated CPU is not here: pip install -e '.[emulator]'")

from avx512 import amx
from avx512.emulator import EmulationError, Emulator

CONFIGURE, RELEASE, RETURN = "c4e2784907", "c4e27849c0", "c3"  # ldtilecfg (%rdi)
ZERO_0 = "c4e27b49c0"
LOAD_0, STORE_0 = "c4e27b4b0416", "c4a27a4b0401"  # (%rsi,%rdx), (%rcx,%r8)
MULTIPLY = "c4e26a5cc1"  # tdpbf16ps %tmm2, %tmm1, %tmm0
FULL = (16, 64)


@pytest.fixture(scope="module")
def module_cpu() -> Iterator[Emulator]:
    cpu = Emulator(_extension.BINARY)
    yield cpu
    cpu.close()


@pytest.fixture
def cpu(module_cpu: Emulator) -> Iterator[Emulator]:
    """One that holds no data, and no tiles."""
    yield module_cpu
    module_cpu.clear()


@pytest.mark.skipif(
    "amx_bf16" not in _extension.instruction_sets().built, reason="the compiler of this build does not know AMX"
)
def test_the_kernels_are_of_matrices() -> None:
    """A compiler that does not say that it has AMX would leave pairs of bf16 in their place, with the same results."""
    found = collections.Counter(instruction.name for _, instruction in amx.sites(_extension.BINARY.read_bytes(), 0))
    # Of one or two blocks of rows by one or two columns: nine products, in forward, dgrad and wgrad.
    assert found["tdpbf16ps"] >= 27


def function(cpu: Emulator, *code: str) -> int:
    return cpu.add_code(bytes.fromhex("".join(code)))


def configuration(*shapes: tuple[int, int], palette: int = 1) -> Tensor:
    """Of the first tiles: rows, and bytes in each."""
    data = torch.zeros(64, dtype=torch.uint8)
    data[0] = palette
    for i, (rows, colsb) in enumerate(shapes):
        data[16 + 2 * i], data[48 + i] = colsb, rows
    return data


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 255, shape, dtype=torch.uint8)  # without that of empty memory


def empty(cpu: Emulator, *shape: int) -> Tensor:
    return cpu.place(torch.full(shape, 0xFF, dtype=torch.uint8))


# Machine code of `tileloadd OPERAND, %tmm0`, and where rsi, rdx and r9 lie for rows from address a on with a stride.
OPERANDS = {
    "(%rsi,%rdx)": ("c4e27b4b0416", lambda a, stride: (a, stride, 0)),
    "64(%rsi,%rdx)": ("c4e27b4b441640", lambda a, stride: (a - 64, stride, 0)),
    "-64(%rsi,%rdx)": ("c4e27b4b4416c0", lambda a, stride: (a + 64, stride, 0)),
    "4660(%rsi,%rdx)": ("c4e27b4b841634120000", lambda a, stride: (a - 4660, stride, 0)),
    "(%r9,%rdx)": ("c4c27b4b0411", lambda a, stride: (0, stride, a)),
    "(%rsi,%r9)": ("c4a27b4b040e", lambda a, stride: (a, 0, stride)),
    "(%rsi,%r9,8)": ("c4a27b4b04ce", lambda a, stride: (a, 0, stride // 8)),
}


@pytest.mark.parametrize("stride", [24, 40, 64, 0, -40])
@pytest.mark.parametrize("operand", OPERANDS)
def test_rows_are_loaded_whatever_addresses_them(cpu: Emulator, operand: str, stride: int) -> None:
    load, registers = OPERANDS[operand]
    source = cpu.place(random_bytes(5 * 64))
    begin = -4 * stride if stride < 0 else 0
    result = empty(cpu, 5, 24)
    code = function(cpu, CONFIGURE, load, STORE_0, RELEASE, RETURN)
    rsi, rdx, r9 = (word % 2**64 for word in registers(cpu.address(source) + begin, stride))
    cpu.call(code, cpu.address(cpu.place(configuration((5, 24)))), rsi, rdx, cpu.address(result), 24, r9)
    assert torch.equal(result, torch.stack([source[begin + i * stride :][:24] for i in range(5)]))


@pytest.mark.parametrize("shape", [FULL, (16, 4), (1, 64), (3, 8)], ids=str)
def test_rows_are_stored_and_nothing_else(cpu: Emulator, shape: tuple[int, int]) -> None:
    rows, colsb = shape
    source = cpu.place(random_bytes(rows, colsb))
    result = empty(cpu, 16, 80)
    code = function(cpu, CONFIGURE, LOAD_0, STORE_0, RELEASE, RETURN)
    config = cpu.place(configuration(shape))
    cpu.call(code, *map(cpu.address, (config, source)), colsb, cpu.address(result), 80)
    expected = torch.full_like(result, 0xFF)
    expected[:rows, :colsb] = source
    assert torch.equal(result, expected)


@pytest.mark.parametrize("then", [ZERO_0, CONFIGURE, RELEASE + CONFIGURE], ids=["tilezero", "ldtilecfg", "tilerelease"])
def test_tiles_become_zero(cpu: Emulator, then: str) -> None:
    source, result = cpu.place(random_bytes(*FULL)), empty(cpu, *FULL)
    code = function(cpu, CONFIGURE, LOAD_0, then, STORE_0, RELEASE, RETURN)
    cpu.call(code, *map(cpu.address, (cpu.place(configuration(FULL)), source)), 64, cpu.address(result), 64)
    assert not result.any()


@pytest.mark.parametrize("where", ["code", "stack"])
def test_a_configuration_may_be_in_code_or_on_the_stack(cpu: Emulator, where: str) -> None:
    config = configuration((2, 8))
    rest = LOAD_0 + STORE_0 + RELEASE + RETURN
    from_code, from_stack = "c4e2784905" + f"{len(rest) // 2:02x}000000", "c4e27849442408"  # behind rest; 8(%rsp)
    configure = from_code if where == "code" else from_stack
    code = function(cpu, configure, rest, config.numpy().tobytes().hex())
    source, result = cpu.place(random_bytes(2, 8)), empty(cpu, 2, 8)
    words = config.view(torch.int64).tolist() if where == "stack" else []
    cpu.call(code, 0, cpu.address(source), 8, cpu.address(result), 8, 0, *words)
    assert torch.equal(result, source)


def pairs(b: Tensor) -> Tensor:
    """The matrix as the last factor of tdpbf16ps: two rows side by side in each of its own."""
    return torch.stack([b[0::2], b[1::2]], dim=-1).flatten(1)


def multiply_add(cpu: Emulator, start: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """start + a @ b, by the instruction; a lies in a wider matrix."""
    (M, N), K = start.shape, a.shape[1]
    wide = torch.cat([a, torch.full((M, 3), torch.nan)], 1)
    config, left, right, result = map(
        cpu.place,
        (configuration((M, 4 * N), (M, 2 * K), (K // 2, 4 * N)), wide.bfloat16(), pairs(b).bfloat16(), start),
    )
    load_0, store_0 = "c4a27b4b0401", STORE_0  # (%rcx,%r8)
    load_1, load_2 = "c4a27b4b0c0e", "c4a27b4b1402"  # (%rsi,%r9), (%rdx,%r8)
    code = function(cpu, CONFIGURE, load_0, load_1, load_2, MULTIPLY, store_0, RELEASE, RETURN)
    cpu.call(code, *map(cpu.address, (config, left, right, result)), 4 * N, 2 * (K + 3))
    return result


@pytest.mark.parametrize(("M", "N", "K"), [(16, 16, 32), (5, 16, 32), (16, 3, 32), (16, 16, 2), (1, 1, 6)])
def test_products_of_integers_are_exact(cpu: Emulator, M: int, N: int, K: int) -> None:
    start, a, b = (torch.randint(-64, 64, shape).float() for shape in ((M, N), (M, K), (K, N)))
    assert torch.equal(multiply_add(cpu, start, a, b), start + a @ b)


def test_products_of_infinity_and_nan(cpu: Emulator) -> None:
    start, a, b = torch.ones(4, 3), torch.ones(4, 2), torch.ones(2, 3)
    a[0, 0], a[1, 1], start[3, 0], b[1, 2] = torch.nan, -torch.inf, torch.inf, 0
    expected = start + a[:, :1] * b[:1] + a[:, 1:] * b[1:]
    assert expected.isnan().sum() == 4
    torch.testing.assert_close(multiply_add(cpu, start, a, b), expected, rtol=0, atol=0, equal_nan=True)


def test_mask_registers_and_flags_outlive_the_instructions(cpu: Emulator) -> None:
    set_mask, get_mask = "b834120000" + "c5f892c8", "c5f893c1"  # mov $0x1234,%eax; kmovw %eax,%k1; kmovw %k1,%eax
    compare, increment_if_equal = "4839c0", "7502" + "ffc0"  # cmp %rax,%rax; jne over; inc %eax
    code = function(cpu, set_mask, CONFIGURE, get_mask, compare, ZERO_0, RELEASE, increment_if_equal, RETURN)
    assert cpu.call(code, cpu.address(cpu.place(configuration(FULL)))) == 0x1235


def run(cpu: Emulator, config: Tensor, *code: str) -> Any:
    """With data of a full tile in (%rsi,%rdx) and (%rcx,%r8)."""
    source, result = cpu.place(random_bytes(*FULL)), empty(cpu, *FULL)
    config = cpu.place(config)
    return cpu.call(function(cpu, *code, RETURN), *map(cpu.address, (config, source)), 64, cpu.address(result), 64)


@pytest.mark.parametrize("instruction", [LOAD_0, STORE_0, ZERO_0, MULTIPLY])
def test_no_tile_is_used_before_it_is_configured(cpu: Emulator, instruction: str) -> None:
    with pytest.raises(EmulationError, match="tmm0 is used, which is not configured"):
        run(cpu, configuration(), instruction, RELEASE)
    cpu.clear()
    with pytest.raises(EmulationError, match="tmm0 is used, which is not configured"):
        run(cpu, configuration((0, 0), FULL, FULL), CONFIGURE, instruction, RELEASE)


@pytest.mark.parametrize(
    "config",
    [
        configuration(FULL, palette=0),
        configuration(FULL, palette=2),
        configuration((17, 64)),
        configuration((16, 65)),
        configuration((16, 62)),
        configuration((0, 64)),
        configuration((16, 0)),
        configuration(*[FULL] * 9),
        configuration(FULL).index_fill_(0, torch.tensor([1]), 1),  # start row
    ],
    ids=["palette-0", "palette-2", "17-rows", "65-bytes", "half-a-lane", "no-rows", "no-bytes", "9-tiles", "start-row"],
)
def test_wrong_configurations_are_errors(cpu: Emulator, config: Tensor) -> None:
    with pytest.raises(EmulationError, match="ldtilecfg"):
        run(cpu, config, CONFIGURE, RELEASE)


@pytest.mark.parametrize(
    ("shapes", "multiply"),
    [
        ([(5, 12), (4, 8), (2, 12)], MULTIPLY),
        ([(4, 12), (4, 12), (2, 12)], MULTIPLY),
        ([(4, 12), (4, 8), (2, 16)], MULTIPLY),
        ([(16, 64), (16, 64), (16, 64)], "c4e2725cc1"),  # %tmm1, %tmm1, %tmm0
        ([(16, 64), (16, 64), (16, 64)], "c4e26a5cc0"),  # %tmm2, %tmm0, %tmm0
        ([(16, 64), (16, 64), (16, 64)], "c4e27a5cc1"),  # %tmm0, %tmm1, %tmm0
    ],
)
def test_factors_that_do_not_fit_are_errors(cpu: Emulator, shapes: list[tuple[int, int]], multiply: str) -> None:
    with pytest.raises(EmulationError, match="tdpbf16ps of"):
        run(cpu, configuration(*shapes), CONFIGURE, multiply, RELEASE)


@pytest.mark.parametrize("instruction", [CONFIGURE, LOAD_0, STORE_0], ids=["ldtilecfg", "tileloadd", "tilestored"])
@pytest.mark.parametrize("offset", [1, 2**40, -(2**40)])
def test_touching_what_is_not_mapped_is_caught(cpu: Emulator, instruction: str, offset: int) -> None:
    config = cpu.address(cpu.place(configuration(FULL)))
    data = (cpu.address(empty(cpu, 64 if instruction == CONFIGURE else 16 * 64)) + offset) % 2**64
    get_config, take_data = "4c89cf", "4889f7"  # mov %r9,%rdi; mov %rsi,%rdi
    code = function(cpu, get_config, CONFIGURE, take_data, instruction, RELEASE, RETURN)
    with pytest.raises(EmulationError, match="touching"):
        cpu.call(code, 0, data, 64, data, 64, config)


def test_rows_may_have_unmapped_pages_between_them(cpu: Emulator) -> None:
    """As rows of a matrix have whose rest was not given."""
    source, other, result = (cpu.place(random_bytes(8)) for _ in range(3))
    first, second, to = map(cpu.address, (source, other, result))
    code = function(cpu, CONFIGURE, LOAD_0, STORE_0, RELEASE, RETURN)
    config = cpu.address(cpu.place(configuration((2, 8))))
    cpu.call(code, config, first, second - first, to, 0)
    assert torch.equal(result, other)
    with pytest.raises(EmulationError, match="touching"):
        cpu.call(code, config, first, (second - first) // 2, to, 0)


def test_a_write_before_data_is_caught(cpu: Emulator) -> None:
    with pytest.raises(EmulationError, match="belongs to no data"):
        run(cpu, configuration((2, 8)), CONFIGURE, ZERO_0, "4883e904", STORE_0, RELEASE)  # sub $4,%rcx


def test_tiles_are_to_be_released(cpu: Emulator) -> None:
    with pytest.raises(EmulationError, match="configured at the return"):
        run(cpu, configuration(FULL), CONFIGURE)


def test_other_threads_do_not_get_the_tiles_of_a_caller(cpu: Emulator) -> None:
    """A parallel loop in the emulator is a handler that calls."""
    nothing = function(cpu, RETURN)
    handler = cpu.add_function(lambda *_: cpu.call(nothing))
    call_handler = "48b8" + handler.to_bytes(8, "little").hex() + "ffd0"  # mov $handler,%rax; call *%rax
    run(cpu, configuration(FULL), call_handler, CONFIGURE, RELEASE)
    cpu.clear()
    with pytest.raises(EmulationError, match="configured at a call"):
        run(cpu, configuration(FULL), CONFIGURE, call_handler, RELEASE)
