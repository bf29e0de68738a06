"""The instructions of amx_bf16 for an emulated CPU that lacks them: each is done in Python where the CPU halts at it.

Unlike tdpbf16ps, denormal numbers count, and sums over a row are rounded in an order of numpy's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .encoding import MODRM_OF_REGISTERS, address_length, byte
from .memory import EmulationError, Memory

TILES, ROWS, ROW_BYTES = 8, 16, 64
PALETTE = 1
CONFIGURATION = 64  # bytes: palette, start row, 14 of 0; colsb of 16 tiles, 2 bytes each; rows of 16 tiles, 1 byte each
COLSB_AT, ROWS_AT = 16, 48

LENGTH = 5  # without an address
IN_MEMORY, WITH_SIB = byte(0x38, 0, MODRM_OF_REGISTERS), byte(0x07, 4, MODRM_OF_REGISTERS)
# VEX prefix: map 0F38, no register above tmm7, W0, 128 bits; opcode; registers or an address.
TILES_ALONE, BASE_AND_INDEX = byte(0xFF, 0xE2), byte(0x9F, 0x82)
FORMS = {
    "ldtilecfg": BASE_AND_INDEX + re.escape(b"\x78\x49") + IN_MEMORY,
    "tilerelease": TILES_ALONE + re.escape(b"\x78\x49\xc0"),
    "tilezero": TILES_ALONE + re.escape(b"\x7b\x49") + byte(0xC7, 0xC0),
    "tileloadd": BASE_AND_INDEX + re.escape(b"\x7b\x4b") + WITH_SIB,
    "tilestored": BASE_AND_INDEX + re.escape(b"\x7a\x4b") + WITH_SIB,
    "tdpbf16ps": TILES_ALONE + byte(0xC7, 0x42) + re.escape(b"\x5c") + byte(0xC0, 0xC0),
}
PATTERN = re.compile(b"\xc4(?:%s)" % b"|".join(b"(?P<%s>%s)" % (name.encode(), form) for name, form in FORMS.items()))

REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)))
WORD = (1 << 64) - 1
NO_INDEX = REGISTERS.index("rsp")
CPU = Any  # the running session's cpu, with the registers as attributes


@dataclass(frozen=True)
class Address:
    """base + displacement, and index * scale to be added: once by ldtilecfg, for each row by loads and stores."""

    base: str | None
    index: str | None
    scale: int
    displacement: int  # with the address of the following instruction where that is the base

    def start(self, cpu: CPU) -> int:
        return (getattr(cpu, self.base) if self.base else 0) + self.displacement & WORD

    def whole(self, cpu: CPU) -> int:
        return self.start(cpu) + self.step(cpu) & WORD

    def step(self, cpu: CPU) -> int:
        stride = (getattr(cpu, self.index) if self.index else 0) * self.scale & WORD
        return stride - (stride >> 63 << 64)


@dataclass(frozen=True)
class Instruction:
    name: str
    length: int
    tiles: tuple[int, int, int]  # the fields reg, rm and vvvv, whether or not this instruction uses them as tiles
    address: Address | None


def sites(code: bytes, at: int) -> Iterator[tuple[int, Instruction]]:
    """(address, instruction) of all such instructions in machine code that stands at `at`."""
    for match in re.finditer(PATTERN, code):
        begin = match.start()
        yield at + begin, _decode(match.lastgroup, code[begin : begin + 16], at + begin)


def _decode(name: str, code: bytes, at: int) -> Instruction:
    """The instruction at address `at`, which `code` begins with."""
    _, p0, p1, _, modrm, sib = code[: LENGTH + 1].ljust(LENGTH + 1, b"\0")
    length = LENGTH + address_length(modrm, sib)
    tiles = (modrm >> 3 & 7, modrm & 7, ~p1 >> 3 & 7)
    if modrm >= MODRM_OF_REGISTERS:
        return Instruction(name, length, tiles, None)
    mod, rm, upper = modrm >> 6, modrm & 7, ~p0
    displacement_at = LENGTH + (rm == 4)
    displacement = int.from_bytes(code[displacement_at:length], "little", signed=True)
    base = (sib if rm == 4 else modrm) & 7
    base_register: str | None = REGISTERS[base | (upper >> 5 & 1) << 3]
    if mod == 0 and base == 5:  # no register
        base_register = None
        displacement += 0 if rm == 4 else at + length
    index = (sib >> 3 & 7) | (upper >> 6 & 1) << 3
    index_register = REGISTERS[index] if rm == 4 and index != NO_INDEX else None
    return Instruction(name, length, tiles, Address(base_register, index_register, 1 << (sib >> 6), displacement))


@dataclass
class _Tile:
    """One configured register. What is beyond its shape is 0 at all times, and has no place here."""

    rows: int
    colsb: int
    content: np.ndarray  # its shape in bytes
    floats: np.ndarray  # the same as float32
    lanes: np.ndarray  # and as 32-bit integers
    halves: tuple[np.ndarray, np.ndarray] | None = None  # the bf16 values low and high in each lane, once they are used


class Tiles:
    """The tile registers. EmulationError where the CPU would raise an exception, or an instruction makes no sense."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.release()

    @property
    def configured(self) -> bool:
        return bool(self._tiles)

    def release(self) -> None:
        self._tiles: dict[int, _Tile] = {}

    def action(self, instruction: Instruction) -> Callable[[CPU], None]:
        """Does an instruction, but for going on behind it."""
        reg, rm, vvvv = instruction.tiles
        address = instruction.address
        return {
            "ldtilecfg": lambda cpu: self._configure(address.whole(cpu)),
            "tilerelease": lambda cpu: self.release(),
            "tilezero": lambda cpu: self._zero(reg),
            "tileloadd": lambda cpu: self._load(reg, address.start(cpu), address.step(cpu)),
            "tilestored": lambda cpu: self._store(reg, address.start(cpu), address.step(cpu)),
            "tdpbf16ps": lambda cpu: self._multiply_add(reg, rm, vvvv),
        }[instruction.name]

    def _configure(self, address: int) -> None:
        [data] = self._memory.rows(address, 1, CONFIGURATION, 0)
        all_colsb, all_rows = data[COLSB_AT:ROWS_AT].view(np.uint16), data[ROWS_AT:]
        if data[0] != PALETTE or data[1:COLSB_AT].any() or all_colsb[TILES:].any() or all_rows[TILES:].any():
            raise EmulationError(f"ldtilecfg of other than palette {PALETTE} and 8 tiles: {data.tobytes().hex()}")
        self.release()
        shapes = zip(all_rows.tolist(), all_colsb.tolist(), strict=True)
        self._tiles = {i: _new_tile(i, *shape) for i, shape in enumerate(shapes) if shape != (0, 0)}

    def _tile(self, register: int) -> _Tile:
        tile = self._tiles.get(register)
        if tile is None:
            raise EmulationError(f"tmm{register} is used, which is not configured,")
        return tile

    def _zero(self, register: int) -> None:
        tile = self._tile(register)
        tile.content[:] = 0
        tile.halves = None

    def _load(self, register: int, address: int, stride: int) -> None:
        tile = self._tile(register)
        tile.content[:] = self._memory.rows(address, tile.rows, tile.colsb, stride)
        tile.halves = None

    def _store(self, register: int, address: int, stride: int) -> None:
        tile = self._tile(register)
        self._memory.rows(address, tile.rows, tile.colsb, stride)[:] = tile.content

    def _multiply_add(self, x: int, y: int, z: int) -> None:
        """x += y @ z, where y has pairs of bf16 in its lanes, and each row of z pairs from two rows of a matrix."""
        if len({x, y, z}) < 3:
            raise EmulationError(f"tdpbf16ps of equal registers tmm{x}, tmm{y} and tmm{z}")
        total, left, right = self._tile(x), self._tile(y), self._tile(z)
        fits = total.rows == left.rows and left.colsb == 4 * right.rows and total.colsb == right.colsb
        if not fits:
            shapes = ", ".join(f"{tile.rows}x{tile.colsb}" for tile in (total, left, right))
            raise EmulationError(f"tdpbf16ps of shapes that do not fit (rows x colsb): {shapes}")
        with np.errstate(all="ignore"):
            for a, b in zip(_halves(left), _halves(right), strict=True):
                np.add(total.floats, a @ b, out=total.floats)
        total.halves = None


def _new_tile(register: int, rows: int, colsb: int) -> _Tile:
    if not (0 < rows <= ROWS and 0 < colsb <= ROW_BYTES) or colsb % 4:
        raise EmulationError(f"ldtilecfg of {rows} rows of {colsb} bytes for tmm{register}")
    lanes = np.zeros((rows, colsb // 4), np.uint32)
    return _Tile(rows, colsb, lanes.view(np.uint8), lanes.view(np.float32), lanes)


def _halves(tile: _Tile) -> tuple[np.ndarray, np.ndarray]:
    if tile.halves is None:
        tile.halves = (tile.lanes << 16).view(np.float32), (tile.lanes & 0xFFFF0000).view(np.float32)
    return tile.halves
