"""The memory of the emulated CPU: one block of host memory and, in it, page tables that map its pages to themselves.

A guest address is an offset into the block.
"""

from __future__ import annotations

import mmap

import numpy as np

PAGE = 4096
TABLES = 0x1000  # page tables: one page each of levels 4, 3 and 2, then level 1
PRESENT, WRITABLE = 1, 2


class EmulationError(Exception):
    """The emulated code did what a CPU stops at, as touching unmapped memory, or wrote where it has no business."""


class Memory:
    """Pages of memory, none of which is mapped yet."""

    def __init__(self, pages: int) -> None:
        self.bytes = np.frombuffer(mmap.mmap(-1, pages * PAGE), np.uint8)
        self.host = self.bytes.ctypes.data
        words = self.bytes.view(np.uint64)
        level1 = TABLES + 3 * PAGE
        words[TABLES // 8] = (TABLES + PAGE) | PRESENT | WRITABLE
        words[(TABLES + PAGE) // 8] = (TABLES + 2 * PAGE) | PRESENT | WRITABLE
        for i in range(-(-pages // 512)):
            words[(TABLES + 2 * PAGE) // 8 + i] = (level1 + i * PAGE) | PRESENT | WRITABLE
        self._entries = words[level1 // 8 :][:pages]
        self._mapped = bytearray(pages)

    def map(self, begin: int, end: int) -> None:
        """Maps the pages of [begin, end) to themselves; takes effect at the next run."""
        self._entries[begin // PAGE : end // PAGE] = np.arange(begin, end, PAGE) | PRESENT | WRITABLE
        self._mapped[begin // PAGE : end // PAGE] = bytes([True]) * ((end - begin) // PAGE)

    def unmap(self, begin: int, end: int) -> None:
        """Has the guest stopped where it touches the pages of [begin, end); takes effect at the next run."""
        self._entries[begin // PAGE : end // PAGE] = 0
        self._mapped[begin // PAGE : end // PAGE] = bytes((end - begin) // PAGE)

    def write(self, address: int, data: bytes) -> None:
        self.bytes[address : address + len(data)] = np.frombuffer(data, np.uint8)

    def rows(self, address: int, count: int, size: int, stride: int) -> np.ndarray:
        """View of `count` rows of `size` bytes. EmulationError where the guest could not touch one of them."""
        final = address + (count - 1) * stride
        if not self._is_mapped(min(address, final), max(address, final) + size - 1):
            # All the same, the rows may be where only pages between them are not.
            for row in (address + i * stride for i in range(count)):
                if not self._is_mapped(row, row + size - 1):
                    raise EmulationError(f"touching {row:#x}-{row + size:#x}, where a page is not mapped,")
        return np.ndarray((count, size), np.uint8, self.bytes, address, (stride, 1))

    def _is_mapped(self, first: int, last: int) -> bool:
        """Whether all pages from that of one byte to that of another are."""
        return first >= 0 and last < self.bytes.size and self._mapped.find(False, first // PAGE, last // PAGE + 1) < 0
