"""What the encodings of all vector instructions have in common."""

from __future__ import annotations

import re

MODRM_OF_REGISTERS = 0xC0  # and above; below it, one operand is in memory


def byte(mask: int, value: int, below: int = 256) -> bytes:
    """Pattern of the bytes less than `below` of which the bits in `mask` are `value`."""
    return b"[%s]" % b"".join(re.escape(bytes([byte])) for byte in range(below) if byte & mask == value)


def address_length(modrm: int, following: int) -> int:
    """How many bytes of an address are behind a ModRM byte; `following` is the first that would be one."""
    mod, rm = modrm >> 6, modrm & 7
    if mod == 3:
        return 0
    base_and_index = rm == 4
    base = following & 7 if base_and_index else rm
    return base_and_index + {0: 4 if base == 5 else 0, 1: 1, 2: 4}[mod]
