"""The kernels of csrc/cuda on the emulated device, as a table like `fused_preact.reference`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from raw_table import DTYPES, RawTable

from . import build

TF32 = len(DTYPES)  # behind them in enum Dtype
GUARD = 256  # bytes on both sides of a tensor
NAN = 0xFF  # bytes of it are NaN in every type
ORDERS, COPIES = ("forward", "reverse", "random", "greedy"), ("lazy", "eager")
SCHEDULES = tuple(itertools.product(ORDERS, COPIES))


class EmulatedKernels(RawTable):
    """Raises EmulationError where a kernel breaks a rule of emulation.h, or writes around a tensor.

    Args:
        sanitizer: "none", "address" or "thread": how the module is built.

    Attributes:
        tf32: whether float32 is multiplied in tf32.
        offset: elements by which tensors are off an aligned address.
        alone: the number, in a call, of the only tensor that is; None: all are.
    """

    tf32 = False
    offset = 0
    alone: int | None = None

    def __init__(self, sanitizer: str = "none") -> None:
        self._module: Any = build.load("kernels", sanitizer)
        # AddressSanitizer has guards of its own, and sees reads too.
        self._guard = 0 if sanitizer == "address" else GUARD
        self._tensors: list[tuple[Tensor, int, int]] = []  # memory with guards, where the tensor begins and ends
        self._words: list[Tensor] = []
        self.use_schedule(0)

    def use_schedule(self, number: int, multiprocessors: int = 2) -> None:
        """Take the schedule of a number: each 8 in a row have every order of threads with both times of copying."""
        threads, copies = SCHEDULES[number % len(SCHEDULES)]
        module = self._module
        order = getattr(module.Order, threads)
        module.set_schedule(order, order, getattr(module.Copies, copies), number, multiprocessors)

    def call(self, name: str, *arguments: int) -> None:
        self._module.call(name, arguments)
        for memory, begin, end in self._tensors:
            if not ((memory[:begin] == NAN).all() and (memory[end:] == NAN).all()):
                raise self._module.EmulationError(f"{name} wrote in front of or behind a tensor")

    def latest_shared(self) -> int:
        """Bytes of shared memory that each block of the latest launch had."""
        return self._module.latest_shared()

    def latest_copies(self) -> int:
        """Pieces that the latest launch copied to shared memory without waiting."""
        return self._module.latest_copies()

    def clear(self) -> None:
        self._tensors.clear()
        self._words.clear()

    def place(self, tensor: Tensor) -> Tensor:
        bytes_ = tensor.numel() * tensor.element_size()
        offset = self.offset if self.alone in (None, len(self._tensors)) else 0
        begin = self._guard + offset * tensor.element_size()
        memory = torch.full((begin + bytes_ + self._guard,), NAN, dtype=torch.uint8)
        self._tensors.append((memory, begin, begin + bytes_))
        flat = memory[begin : begin + bytes_].view(tensor.dtype)
        return flat.as_strided(tensor.shape, torch.empty_like(tensor).stride()).copy_(tensor)

    def place_words(self, *words: int) -> int:
        self._words.append(torch.tensor(words, dtype=torch.int64))
        return self._words[-1].data_ptr()

    def address(self, placed: Tensor | None) -> int:
        return 0 if placed is None else placed.data_ptr()

    def dtype(self, dtype: torch.dtype) -> int:
        return TF32 if self.tf32 and dtype == torch.float32 else super().dtype(dtype)
