"""Loads an x86-64 shared object into a block of memory, as the dynamic linker would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from elftools.elf.elffile import ELFFile
from elftools.elf.enums import ENUM_RELOC_TYPE_x64 as RELOCATION
from elftools.elf.relocation import RelocationSection

SYMBOL_PLUS_ADDEND = (RELOCATION["R_X86_64_64"], RELOCATION["R_X86_64_GLOB_DAT"], RELOCATION["R_X86_64_JUMP_SLOT"])
BASE_PLUS_ADDEND = RELOCATION["R_X86_64_RELATIVE"]
# Offsets of thread-local variables: left out, there are no threads.
IGNORED = (RELOCATION["R_X86_64_DTPMOD64"], RELOCATION["R_X86_64_DTPOFF64"], RELOCATION["R_X86_64_TPOFF64"])


class SharedObject:
    """A shared object file and its symbols, the hidden ones included. ValueError where it was stripped of them."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("rb")
        self._elf = ELFFile(self._stream)
        self._segments = list(self._elf.iter_segments("PT_LOAD"))
        self.size: int = max(s["p_vaddr"] + s["p_memsz"] for s in self._segments)
        table = self._elf.get_section_by_name(".symtab")
        if table is None:
            raise ValueError(f"{path} has no symbol table: build it without stripping")
        # In order; local functions of several sources may share a name.
        self.symbols: list[tuple[int, str]] = sorted(
            (s["st_value"], s.name)
            for s in table.iter_symbols()
            if s["st_info"]["type"] in ("STT_FUNC", "STT_OBJECT") and s["st_shndx"] != "SHN_UNDEF"
        )

    def load(self, memory: np.ndarray, base: int, external: dict[str, int]) -> None:
        """Copies the segments to `base` and relocates them; symbols from elsewhere are 0, save those in `external`."""
        for segment in self._segments:
            begin = base + segment["p_vaddr"]
            memory[begin : begin + segment["p_filesz"]] = np.frombuffer(segment.data(), np.uint8)
        for section in self._elf.iter_sections():
            if isinstance(section, RelocationSection):
                self._relocate(section, memory[base:], base, external)

    def _relocate(self, section: RelocationSection, memory: np.ndarray, base: int, external: dict[str, int]) -> None:
        symbols = self._elf.get_section(section["sh_link"])
        for relocation in section.iter_relocations():
            kind, at, addend = relocation["r_info_type"], relocation["r_offset"], relocation["r_addend"]
            if kind == BASE_PLUS_ADDEND:
                value = base + addend
            elif kind in SYMBOL_PLUS_ADDEND:
                symbol = symbols.get_symbol(relocation["r_info_sym"])
                defined = symbol["st_shndx"] != "SHN_UNDEF"
                value = base + symbol["st_value"] + addend if defined else external.get(symbol.name, 0)
            elif kind in IGNORED:
                continue
            else:
                raise ValueError(f"relocation of unknown type {kind} at {at:#x}")
            memory[at : at + 8] = np.frombuffer(value.to_bytes(8, "little"), np.uint8)

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()
