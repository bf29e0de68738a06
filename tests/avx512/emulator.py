"""A CPU with AVX-512 in software (BochsCPU), that runs functions of a shared object on torch tensors.

The CPU has AVX-512 F, BW, DQ and VL; the instructions of avx512_bf16 that kernels use are substituted (bf16.py), those
of amx_bf16 done in Python (amx.py).

Guest memory is one block of host memory: a tensor placed in it is seen by both sides. Each piece of data ends where an
unmapped page begins, so that touching what is behind it stops the emulator, and the memory before it is checked after
each call. Memory that holds nothing yet is filled with bytes 0xFF, which are NaN in every type.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from pathlib import Path

import bochscpu
import bochscpu.cpu
import bochscpu.memory
import numpy as np
import torch

from . import amx, bf16
from .memory import PAGE, TABLES, EmulationError, Memory
from .shared_object import SharedObject

ROUTINES = 0x40000  # behind page tables: machine code of our own
STACK, STACK_TOP = 0x100000, 0x200000
HEAP = STACK_TOP  # pieces of data, each in pages of its own, with an unmapped page behind them
OBJECT = HEAP + (32 << 20)

CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_OSXSAVE = 1 << 5, 1 << 9, 1 << 10, 1 << 18
XCR0_AVX512 = 0xE7  # x87, SSE, AVX, opmask, upper halves of zmm0-15, zmm16-31
MXCSR_DEFAULT = 0x1F80  # round to nearest, every exception masked
CODE_SEGMENT = (0x08, 0x209B)  # selector and attributes: 64-bit code, ring 0
DATA_SEGMENT = (0x10, 0x0C93)
ARGUMENT_REGISTERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
PAGE_FAULT = 14

# In the names of functions whose instructions are replaced.
NAMES_WITH_BF16, NAME_WITH_AMX = ("avx512_bf16", "amx_bf16"), "amx_bf16"

HLT = b"\xf4"
# mov rax, rdi; mov rcx, rdx; rep movsb; ret
MEMCPY = bytes.fromhex("4889f8 4889d1 f3a4 c3")
# mov r8, rdi; mov eax, esi; mov rcx, rdx; rep stosb; mov rax, r8; ret
MEMSET = bytes.fromhex("4989f8 89f0 4889d1 f3aa 4c89c0 c3")

# Does a guest function in Python: takes its (six) integer arguments, returns its result.
Handler = Callable[..., "int | None"]


class Emulator:
    """Runs functions of one shared object. The emulated CPU is the process's only one: keep one of these at a time."""

    def __init__(self, path: Path) -> None:
        shared_object = SharedObject(path)
        pages = -(-(OBJECT + shared_object.size) // PAGE)
        self._memory = Memory(pages)
        self._session = bochscpu.Session()
        for page in range(pages):
            bochscpu.memory.page_insert(page * PAGE, self._memory.host + page * PAGE)
        # Not what is before ROUTINES, a page below the stack, nor the heap.
        for begin, end in ((ROUTINES, STACK), (STACK + PAGE, HEAP), (OBJECT, pages * PAGE)):
            self._memory.map(begin, end)
        self._handlers: dict[int, Handler] = {}
        self._tiles = amx.Tiles(self._memory)
        self._actions: dict[int, tuple[Callable[[amx.CPU], None], int]] = {}  # by address, with the next one's
        self._routines_end = ROUTINES
        self._return_address = self._add_routine(HLT)
        shared_object.load(
            self._memory.bytes, OBJECT, {"memcpy": self._add_routine(MEMCPY), "memset": self._add_routine(MEMSET)}
        )
        self._symbols = [(OBJECT + value, name) for value, name in shared_object.symbols]
        shared_object.close()
        self._spill = self._add_routine(bytes(bf16.SPILL))
        self._replace_instructions()
        self.clear()

    def _add_routine(self, code: bytes) -> int:
        address = self._routines_end
        self._routines_end += -(-len(code) // 16) * 16
        if self._routines_end > STACK:
            raise ValueError(f"no room for {len(code)} more bytes of code")
        self._memory.write(address, code)
        return address

    def _replace_instructions(self) -> None:
        """In the kernels that are built with instructions which the CPU lacks; elsewhere it stops at them."""
        code = self._memory.bytes[OBJECT:].tobytes()
        for offset, instruction in bf16.sites(code):
            name = self._function_at(OBJECT + offset)[1]
            if any(isa in name for isa in NAMES_WITH_BF16):
                self._substitute(OBJECT + offset, instruction)
        for address, instruction in amx.sites(code, OBJECT):
            if NAME_WITH_AMX in self._function_at(address)[1]:
                self._halt_at(address, instruction)

    def _halt_at(self, address: int, instruction: amx.Instruction) -> None:
        self._memory.write(address, HLT)
        self._actions[address] = self._tiles.action(instruction), address + instruction.length

    def _substitute(self, address: int, instruction: bytes) -> None:
        back = address + len(instruction)
        routine = self._add_routine(bf16.substitute(instruction, self._routines_end, self._spill, back))
        self._memory.write(address, bf16.jump(address, routine))

    def read_words(self, address: int, count: int) -> list[int]:
        """`count` 64-bit words from `address` on."""
        return self._memory.bytes[address : address + 8 * count].view(np.uint64).tolist()

    def symbol(self, name: str) -> int:
        """Address of the one symbol that `name` is the beginning of, as a C++ function's is but for its parameters."""
        # A dot is in the names that the compiler gives to parts of functions (.cold).
        found = {full: address for address, full in self._symbols if full.startswith(name) and "." not in full}
        if len(found) != 1:
            raise ValueError(f"expected one symbol that begins with {name}, found {len(found)}: {sorted(found)}")
        return next(iter(found.values()))

    def replace(self, function: int, handler: Handler) -> None:
        """Has `handler` called in place of the guest's function."""
        self._memory.write(function, HLT)
        self._handlers[function] = handler

    def add_function(self, handler: Handler) -> int:
        """Address of a new guest function that calls `handler`."""
        address = self._add_routine(HLT)
        self._handlers[address] = handler
        return address

    def add_code(self, code: bytes) -> int:
        """Address of a new guest function in machine code, with any instructions of avx512_bf16 and amx_bf16."""
        address = self._add_routine(code)
        for offset, instruction in bf16.sites(code):
            self._substitute(address + offset, instruction)
        for at, tile_instruction in amx.sites(code, address):
            self._halt_at(at, tile_instruction)
        return address

    def close(self) -> None:
        """Frees the emulated CPU; needed, because one that outlives the interpreter crashes it at exit."""
        del self._session

    def clear(self) -> None:
        """Frees all data and the stack."""
        self._memory.unmap(HEAP, OBJECT)
        self._heap_end = HEAP
        self._pieces: list[tuple[slice, slice]] = []  # what lies before and behind the data in their pages
        self._stack = STACK_TOP
        self._depth = 0
        self._tiles.release()

    def allocate(self, size: int, alignment: int) -> int:
        """Address of `size` bytes, filled with 0xFF, valid until `clear`."""
        first = self._heap_end
        last = first + -(-size // PAGE) * PAGE
        if last >= OBJECT:
            raise ValueError(f"{size} more bytes do not fit in a heap of {OBJECT - HEAP}")
        self._heap_end = last + PAGE
        self._memory.map(first, last)
        self._memory.bytes[first:last] = 0xFF
        begin = (last - size) // alignment * alignment
        self._pieces.append((slice(first, begin), slice(begin + size, last)))
        return begin

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a dense tensor, with its strides, in the emulator's memory."""
        begin = self.allocate(tensor.nbytes, tensor.element_size())
        flat = torch.from_numpy(self._memory.bytes[begin : begin + tensor.nbytes]).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def place_words(self, *words: int) -> int:
        """Address of 64-bit words: a structure of pointers and integers."""
        return self.address(self.place(torch.tensor(words, dtype=torch.int64)))

    def address(self, tensor: torch.Tensor | None) -> int:
        """Address of a placed tensor; 0 for None."""
        return 0 if tensor is None else tensor.data_ptr() - self._memory.host

    def call(self, function: int, *arguments: int) -> int:
        """Calls function(arguments...), integers and pointers, in the System V convention, and returns rax.

        Tiles must not be configured before or after: other threads' are not, when this is what a handler does on them.
        """
        self._expect_released("at a call")
        outer_stack = self._stack
        in_memory = [self._return_address, *arguments[len(ARGUMENT_REGISTERS) :]]
        state = _entry_state()
        state.rip = function
        state.rsp = outer_stack - 16 * (len(in_memory) // 2) - 8  # rsp + 8 is a multiple of 16 on entry
        self._memory.write(state.rsp, np.array(in_memory, np.uint64).tobytes())
        for register, word in zip(ARGUMENT_REGISTERS, arguments, strict=False):
            setattr(state, register, word)
        self._depth += 1
        while (state := self._run_to_halt(state)).rip != self._return_address:
            self._handle(state)
        self._depth -= 1
        self._stack = outer_stack
        self._expect_released("at the return")
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
        cpu = self._session.cpu
        while True:
            self._session.run([hook])
            if exceptions:
                raise EmulationError(self._describe(*exceptions[0]))
            action, following = self._actions.get(cpu.rip - len(HLT), (None, 0))
            if action is None:
                break
            # Much faster than by way of a state, which does not hold the mask registers either.
            try:
                action(cpu)
            except EmulationError as error:
                raise EmulationError(f"{error} in {self._place(cpu.rip - len(HLT))}") from None
            cpu.rip = following
        state = cpu.state
        state.rip -= len(HLT)
        return state

    def _expect_released(self, when: str) -> None:
        if self._tiles.configured:
            raise EmulationError(f"tiles are configured {when}")

    def _function_at(self, address: int) -> tuple[int, str]:
        """Where the function that holds this address begins, and its name."""
        return self._symbols[bisect.bisect_right(self._symbols, (address, chr(0x10FFFF))) - 1]

    def _describe(self, vector: int, code: int) -> str:
        state = self._session.cpu.state
        touched = f" touching {state.cr2:#x}" if vector == PAGE_FAULT else ""
        return f"CPU exception {vector} (code {code}){touched} in {self._place(state.rip)}"

    def _place(self, address: int) -> str:
        begin, name = self._function_at(address)
        return f"{name} + {address - begin:#x}"

    def _check_surroundings(self) -> None:
        for around in self._pieces:
            for part in around:
                if (self._memory.bytes[part] != 0xFF).any():
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
