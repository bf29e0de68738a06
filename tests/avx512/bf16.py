"""The instructions of avx512_bf16 for an emulated CPU that lacks them: each becomes a jump to plain AVX-512 code.

    vdpbf16ps x, y, z:     x += high(y)*high(z);  x += low(y)*low(z)
    vcvtneps2bf16 x, y:    x = y rounded to nearest even

of the two bf16 values in each 32-bit lane, both sums rounded to float. Unlike the instructions, denormal numbers count,
and a NaN is to be one that arithmetic makes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .encoding import MODRM_OF_REGISTERS, address_length, byte

LENGTH = 6  # without an address
SPILL = 3 * 64  # bytes that a substitute needs
JUMP = 0xE9
# EVEX prefix: map 0F38, F3, W0, 512 bits, neither mask nor broadcast; opcode; registers or an address.
PATTERN = re.compile(
    b"\x62" + byte(0x0F, 0x02) + byte(0x87, 0x06) + byte(0xF7, 0x40) + b"[\x52\x72].",
    re.DOTALL,
)
ROUND = 0x72
MAP_0F, MAP_0F38, MAP_0F3A = 1, 2, 3
NO_PREFIX, PREFIX_66, PREFIX_F3 = 0, 1, 2


def sites(code: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset, instruction) of all such instructions in machine code."""
    for match in re.finditer(PATTERN, code):
        begin = match.start()
        yield begin, code[begin : begin + LENGTH + address_length(match[0][-1], code[match.end()])]


def substitute(instruction: bytes, at: int, spill: int, back: int) -> bytes:
    """Code to stand at address `at` for one instruction, that goes on at `back`; spill: address of SPILL free bytes."""
    x, y, z = _registers(instruction)
    rounds, reads_memory = instruction[4] == ROUND, instruction[5] < MODRM_OF_REGISTERS
    if not rounds and (x == y or (x == z and not reads_memory)):
        raise ValueError(f"vdpbf16ps with its sum among its factors: {instruction.hex()}")
    t, u, v, *_ = (register for register in range(6) if register not in (x, y, z))
    code = b""
    for i, register in enumerate((t, u, v)):
        code += _move(0x11, register, spill + 64 * i - (at + len(code)))
    if reads_memory:
        z = v
        code += _load_operand(z, instruction)
    code += _round(x, z, t, u) if rounds else _multiply_pairs(x, y, z, t, u)
    for i, register in enumerate((t, u, v)):
        code += _move(0x10, register, spill + 64 * i - (at + len(code)))
    return code + jump(at + len(code), back)


def _load_operand(to: int, instruction: bytes) -> bytes:
    """vmovups from the address that an instruction reads at, whose displacement counts the same bytes."""
    _, p0, _, _, _, modrm = instruction[:LENGTH]
    if modrm & 0xC7 == 5:
        raise ValueError(f"an address relative to the instruction: {instruction.hex()}")
    load = _evex(0x10, MAP_0F, NO_PREFIX, to, 0, modrm & 7, mod=modrm >> 6)
    index_and_base = 0x60
    return bytes([load[0], load[1] & ~index_and_base | p0 & index_and_base, *load[2:]]) + instruction[LENGTH:]


def _multiply_pairs(x: int, y: int, z: int, t: int, u: int) -> bytes:
    code = _shift(t, y, right=True) + _shift(t, t, right=False)
    code += _shift(u, z, right=True) + _shift(u, u, right=False)
    code += _multiply_add(x, t, u)
    code += _shift(t, y, right=False) + _shift(u, z, right=False)
    return code + _multiply_add(x, t, u)


def _round(x: int, y: int, t: int, u: int) -> bytes:
    """x = (y + (1 << 15) - 1 + the last bit that stays) >> 16 in every lane, as 16 bits."""
    code = _shift(u, y, right=True) + _shift(u, u, right=False, bits=31) + _shift(u, u, right=True, bits=31)
    code += _ones(t) + _shift(t, t, right=True, bits=17)
    code += _add(u, u, t) + _add(u, u, y) + _shift(u, u, right=True)
    return code + _evex(0x33, MAP_0F38, PREFIX_F3, u, 0, x)  # vpmovdw


def jump(at: int, to: int) -> bytes:
    """A jump that stands at address `at`."""
    return bytes([JUMP]) + (to - at - 5).to_bytes(4, "little", signed=True)


def _registers(instruction: bytes) -> tuple[int, int, int]:
    """x, y, z: the fields reg, vvvv and rm, of which the prefix holds the upper bits, inverted."""
    _, p0, p1, p2, _, modrm = instruction[:LENGTH]
    upper = ~p0
    reg = (modrm >> 3 & 7) | (upper >> 7 & 1) << 3 | (upper >> 4 & 1) << 4
    rm = (modrm & 7) | (upper >> 5 & 1) << 3 | (upper >> 6 & 1) << 4
    return reg, (~p1 >> 3 & 15) | (~p2 >> 3 & 1) << 4, rm


def _evex(opcode: int, opcode_map: int, prefix: int, reg: int, vvvv: int, rm: int, mod: int = 3) -> bytes:
    """One 512-bit instruction on registers of 32-bit lanes."""
    p0 = (~reg >> 3 & 1) << 7 | (~rm >> 4 & 1) << 6 | (~rm >> 3 & 1) << 5 | (~reg >> 4 & 1) << 4 | opcode_map
    p1 = (~vvvv & 15) << 3 | 4 | prefix
    p2 = 0x40 | (~vvvv >> 4 & 1) << 3
    return bytes([0x62, p0, p1, p2, opcode, mod << 6 | (reg & 7) << 3 | (rm & 7)])


def _shift(to: int, register: int, right: bool, bits: int = 16) -> bytes:
    """Every lane: vpsrld or vpslld."""
    return _evex(0x72, MAP_0F, PREFIX_66, 2 if right else 6, to, register) + bytes([bits])


def _ones(to: int) -> bytes:
    """vpternlogd: all bits 1."""
    return _evex(0x25, MAP_0F3A, PREFIX_66, to, to, to) + b"\xff"


def _add(to: int, y: int, z: int) -> bytes:
    """vpaddd: to = y + z."""
    return _evex(0xFE, MAP_0F, PREFIX_66, to, y, z)


def _multiply_add(x: int, y: int, z: int) -> bytes:
    """vfmadd231ps: x += y*z."""
    return _evex(0xB8, MAP_0F38, PREFIX_66, x, y, z)


def _move(opcode: int, register: int, distance: int) -> bytes:
    """vmovups to (0x11) or from (0x10) memory, `distance` bytes from the beginning of this instruction."""
    length = LENGTH + 4
    return _evex(opcode, MAP_0F, NO_PREFIX, register, 0, 5, mod=0) + (distance - length).to_bytes(
        4, "little", signed=True
    )
