"""The kernels of the built extension for AVX-512, on an emulated CPU, as a table like `fused_preact.reference`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from torch import Tensor

from raw_table import TABLE, RawTable

from .emulator import Emulator

NAMESPACE = "_ZN12fused_preact3cpu"  # mangled
SCRATCH_ALIGNMENT = 64


class EmulatedKernels(RawTable):
    """Raises EmulationError where a kernel touches memory that it was not given."""

    threads = 3  # that the kernels are told of: into so many ranges a parallel loop is cut

    def __init__(self, binary: Path, isa: str) -> None:
        self.cpu = Emulator(binary)
        self.cpu.replace(self.cpu.symbol(f"{NAMESPACE}12parallel_forE"), self._parallel_for)
        self.cpu.replace(self.cpu.symbol(f"{NAMESPACE}11num_threadsE"), lambda *_: self.threads)
        self.cpu.replace(self.cpu.symbol(f"{NAMESPACE}14thread_scratchE"), lambda size, *_: self._scratch(size))
        self._take = self.cpu.add_function(lambda workspace, size, *_: self._scratch(size))
        table = self.cpu.call(self.cpu.symbol(f"{NAMESPACE}{len(isa)}{isa}7kernelsE"))
        self._functions = dict(zip(TABLE, self.cpu.read_words(table, len(TABLE)), strict=True))

    def close(self) -> None:
        """Frees the emulated CPU."""
        self.cpu.close()

    def _parallel_for(self, n: int, body: int, context: int, *_: int) -> None:
        cuts = [n * i // self.threads for i in range(self.threads + 1)]
        # Last to first: no range may build on another.
        for begin, end in reversed(list(pairwise(cuts))):
            if begin < end:
                self.cpu.call(body, context, begin, end)

    def _scratch(self, size: int) -> int:
        return self.cpu.allocate(size, SCRATCH_ALIGNMENT)

    def call(self, name: str, *arguments: int) -> None:
        workspace = self.cpu.place_words(self.cpu.place_words(self._take))
        self.cpu.call(self._functions[name], *arguments, workspace)

    def clear(self) -> None:
        self.cpu.clear()

    def place(self, tensor: Tensor) -> Tensor:
        return self.cpu.place(tensor)

    def place_words(self, *words: int) -> int:
        return self.cpu.place_words(*words)

    def address(self, placed: Tensor | None) -> int:
        return self.cpu.address(placed)
