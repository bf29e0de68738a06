"""A CPU with AVX-512 in software (BochsCPU), that runs functions of a shared object on torch tensors.

The CPU has AVX-512 F, BW, DQ and VL; the instructions of avx512_bf16 that kernels use are substituted (bf16.py).

Guest memory is one block of host memory, mapped flat: a guest address is an offset into it, and a tensor placed in it
is seen by both sides. Each piece of data ends where an unmapped page begins, so that touching what is behind it stops
the emulator, and the memory before it is checked after each call. Memory that holds nothing yet is filled with bytes
0xFF, which are NaN in every type.
"""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Callable
from pathlib import Path

import bochscpu
import bochscpu.cpu
import bochscpu.memory
import numpy as np
import torch

from . import bf16
from .shared_object import SharedObject

PAGE = 4096
TABLES = 0x1000  # page tables: one page each of levels 4, 3 and 2, then level 1
ROUTINES = 0x40000  # machine code of our own
STACK, STACK_TOP = 0x100000, 0x200000
HEAP = STACK_TOP  # pieces of data, each in pages of its own, with an unmapped page behind them
OBJECT = HEAP + (32 << 20)

PRESENT, WRITABLE = 1, 2
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_OSXSAVE = 1 << 5, 1 << 9, 1 << 10, 1 << 18
XCR0_AVX512 = 0xE7  # x87, SSE, AVX, opmask, upper halves of zmm0-15, zmm16-31
MXCSR_DEFAULT = 0x1F80  # round to nearest, every exception masked
CODE_SEGMENT = (0x08, 0x209B)  # selector and attributes: 64-bit code, ring 0
DATA_SEGMENT = (0x10, 0x0C93)
ARGUMENT_REGISTERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
PAGE_FAULT = 14

HLT = b"\xf4"
# mov rax, rdi; mov rcx, rdx; rep movsb; ret
MEMCPY = bytes.fromhex("4889f8 4889d1 f3a4 c3")
# mov r8, rdi; mov eax, esi; mov rcx, rdx; rep stosb; mov rax, r8; ret
MEMSET = bytes.fromhex("4989f8 89f0 4889d1 f3aa 4c89c0 c3")

# Does a guest function in Python: takes its (six) integer arguments, returns its result.
Handler = Callable[..., "int | None"]


class EmulationError(Exception):
    """The emulated code did what a CPU stops at, as touching unmapped memory, or wrote where it has no business."""


class Emulator:
    """Runs functions of one shared object. The emulated CPU is the process's only one: keep one of these at a time."""

    def __init__(self, path: Path) -> None:
        shared_object = SharedObject(path)
        pages = -(-(OBJECT + shared_object.size) // PAGE)
        self._memory = np.frombuffer(mmap.mmap(-1, pages * PAGE), np.uint8)
        self._base = self._memory.ctypes.data
        self._session = bochscpu.Session()
        for page in range(pages):
            bochscpu.memory.page_insert(page * PAGE, self._base + page * PAGE)
        self._map_pages(pages)
        self._handlers: dict[int, Handler] = {}
        self._routines_end = ROUTINES
        self._return_address = self._add_routine(HLT)
        shared_object.load(
            self._memory, OBJECT, {"memcpy": self._add_routine(MEMCPY), "memset": self._add_routine(MEMSET)}
        )
        self._symbols = [(OBJECT + value, name) for value, name in shared_object.symbols]
        shared_object.close()
        self._spill = self._add_routine(bytes(bf16.SPILL))
        self._substitute_bf16()
        self.clear()

    def _map_pages(self, pages: int) -> None:
        """Maps every page to itself, save those before ROUTINES, one below the stack, and the heap."""
        words = self._memory.view(np.uint64)
        level1 = TABLES + 3 * PAGE
        words[TABLES // 8] = (TABLES + PAGE) | PRESENT | WRITABLE
        words[(TABLES + PAGE) // 8] = (TABLES + 2 * PAGE) | PRESENT | WRITABLE
        for i in range(-(-pages // 512)):
            words[(TABLES + 2 * PAGE) // 8 + i] = (level1 + i * PAGE) | PRESENT | WRITABLE
        self._entries = words[level1 // 8 :][:pages]
        self._map(ROUTINES, STACK)
        self._map(STACK + PAGE, HEAP)
        self._map(OBJECT, pages * PAGE)

    def _map(self, begin: int, end: int, flags: int = PRESENT | WRITABLE) -> None:
        """Maps the pages of [begin, end) to themselves; takes effect at the next run. Without flags: unmaps them."""
        self._entries[begin // PAGE : end // PAGE] = np.arange(begin, end, PAGE) | flags

    def _add_routine(self, code: bytes) -> int:
        address = self._routines_end
        self._routines_end += -(-len(code) // 16) * 16
        if self._routines_end > STACK:
            raise ValueError(f"no room for {len(code)} more bytes of code")
        self._write(address, code)
        return address

    def _write(self, address: int, data: bytes) -> None:
        self._memory[address : address + len(data)] = np.frombuffer(data, np.uint8)

    def _substitute_bf16(self) -> None:
        for offset, instruction in bf16.sites(self._memory[OBJECT:].tobytes()):
            if "avx512_bf16" in self._function_at(OBJECT + offset)[1]:
                self._substitute(OBJECT + offset, instruction)

    def _substitute(self, address: int, instruction: bytes) -> None:
        back = address + len(instruction)
        routine = self._add_routine(bf16.substitute(instruction, self._routines_end, self._spill, back))
        self._write(address, bf16.jump(address, routine))

    def read_words(self, address: int, count: int) -> list[int]:
        """`count` 64-bit words from `address` on."""
        return self._memory[address : address + 8 * count].view(np.uint64).tolist()

    def symbol(self, name: str) -> int:
        """Address of the one symbol that `name` is the beginning of, as a C++ function's is but for its parameters."""
        # A dot is in the names that the compiler gives to parts of functions (.cold).
        found = {full: address for address, full in self._symbols if full.startswith(name) and "." not in full}
        if len(found) != 1:
            raise ValueError(f"expected one symbol that begins with {name}, found {len(found)}: {sorted(found)}")
        return next(iter(found.values()))

    def replace(self, function: int, handler: Handler) -> None:
        """Has `handler` called in place of the guest's function."""
        self._write(function, HLT)
        self._handlers[function] = handler

    def add_function(self, handler: Handler) -> int:
        """Address of a new guest function that calls `handler`."""
        address = self._add_routine(HLT)
        self._handlers[address] = handler
        return address

    def add_code(self, code: bytes) -> int:
        """Address of a new guest function in machine code, whose instructions of avx512_bf16 are substituted."""
        address = self._add_routine(code)
        for offset, instruction in bf16.sites(code):
            self._substitute(address + offset, instruction)
        return address

    def close(self) -> None:
        """Frees the emulated CPU; needed, because one that outlives the interpreter crashes it at exit."""
        del self._session

    def clear(self) -> None:
        """Frees all data and the stack."""
        self._map(HEAP, OBJECT, flags=0)
        self._heap_end = HEAP
        self._pieces: list[tuple[slice, slice]] = []  # what lies before and behind the data in their pages
        self._stack = STACK_TOP
        self._depth = 0

    def allocate(self, size: int, alignment: int) -> int:
        """Address of `size` bytes, filled with 0xFF, valid until `clear`."""
        first = self._heap_end
        last = first + -(-size // PAGE) * PAGE
        if last >= OBJECT:
            raise ValueError(f"{size} more bytes do not fit in a heap of {OBJECT - HEAP}")
        self._heap_end = last + PAGE
        self._map(first, last)
        self._memory[first:last] = 0xFF
        begin = (last - size) // alignment * alignment
        self._pieces.append((slice(first, begin), slice(begin + size, last)))
        return begin

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a dense tensor, with its strides, in the emulator's memory."""
        begin = self.allocate(tensor.nbytes, tensor.element_size())
        flat = torch.from_numpy(self._memory[begin : begin + tensor.nbytes]).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def place_words(self, *words: int) -> int:
        """Address of 64-bit words: a structure of pointers and integers."""
        return self.address(self.place(torch.tensor(words, dtype=torch.int64)))

    def address(self, tensor: torch.Tensor | None) -> int:
        """Address of a placed tensor; 0 for None."""
        return 0 if tensor is None else tensor.data_ptr() - self._base

    def call(self, function: int, *arguments: int) -> int:
        """Calls function(arguments...), integers and pointers, in the System V convention, and returns rax."""
        outer_stack = self._stack
        in_memory = [self._return_address, *arguments[len(ARGUMENT_REGISTERS) :]]
        state = _entry_state()
        state.rip = function
        state.rsp = outer_stack - 16 * (len(in_memory) // 2) - 8  # rsp + 8 is a multiple of 16 on entry
        self._write(state.rsp, np.array(in_memory, np.uint64).tobytes())
        for register, word in zip(ARGUMENT_REGISTERS, arguments, strict=False):
            setattr(state, register, word)
        self._depth += 1
        while (state := self._run_to_halt(state)).rip != self._return_address:
            self._handle(state)
        self._depth -= 1
        self._stack = outer_stack
        if self._depth == 0:
            self._check_surroundings()
        return state.rax

    def _handle(self, state: bochscpu.State) -> None:
        """Does the function that `state` is at the beginning of, and returns from it."""
        self._stack = state.rsp // 16 * 16
        result = self._handlers[state.rip](*(getattr(state, register) for register in ARGUMENT_REGISTERS))
        state.rax = result or 0
        (state.rip,) = self.read_words(state.rsp, 1)
        state.rsp += 8

    def _run_to_halt(self, state: bochscpu.State) -> bochscpu.State:
        """Runs until a hlt, and returns the state at it."""
        exceptions = []

        def on_exception(session: bochscpu.Session, cpu: int, vector: int, code: int) -> None:
            exceptions.append((vector, code))
            session.stop()

        # The hook lives no longer than the run, for it could keep the session alive (see close).
        hook = bochscpu.Hook()
        hook.exception = on_exception
        hook.hlt = lambda session, cpu: session.stop()
        self._session.cpu.state = state
        self._session.run([hook])
        if exceptions:
            raise EmulationError(self._describe(*exceptions[0]))
        state = self._session.cpu.state
        state.rip -= len(HLT)
        return state

    def _function_at(self, address: int) -> tuple[int, str]:
        """Where the function that holds this address begins, and its name."""
        return self._symbols[bisect.bisect_right(self._symbols, (address, chr(0x10FFFF))) - 1]

    def _describe(self, vector: int, code: int) -> str:
        state = self._session.cpu.state
        address, name = self._function_at(state.rip)
        touched = f" touching {state.cr2:#x}" if vector == PAGE_FAULT else ""
        return f"CPU exception {vector} (code {code}){touched} in {name} + {state.rip - address:#x}"

    def _check_surroundings(self) -> None:
        for around in self._pieces:
            for part in around:
                if (self._memory[part] != 0xFF).any():
                    raise EmulationError(f"a write to {part.start:#x}-{part.stop:#x}, which belongs to no data")


def _entry_state() -> bochscpu.State:
    state = bochscpu.State()
    bochscpu.cpu.set_long_mode(state)
    state.cr3 = TABLES
    state.cr4 = state.cr4 | CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE
    state.xcr0 = XCR0_AVX512
    state.mxcsr, state.mxcsr_mask = MXCSR_DEFAULT, 0xFFFF
    state.cs = _segment(*CODE_SEGMENT)
    for name in ("ss", "ds", "es", "fs", "gs"):
        setattr(state, name, _segment(*DATA_SEGMENT))
    return state


def _segment(selector: int, attributes: int) -> bochscpu.Segment:
    segment = bochscpu.Segment()
    segment.present, segment.selector, segment.attr = True, selector, attributes
    segment.base, segment.limit = 0, 0xFFFF_FFFF
    return segment
