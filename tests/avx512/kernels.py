"""The kernels of the built extension for AVX-512, on an emulated CPU, as a table like `fused_preact.reference`."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from fused_preact.schedule import OFFSET, SLOPE, Activation, Affine, Conv, Gradient, accumulation_type

from .emulator import Emulator

NAMESPACE = "_ZN12fused_preact3cpu"  # mangled
TABLE = ("forward", "dgrad", "wgrad", "statistics", "running", "dx")  # struct Kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # enum Dtype
NORM_ROWS, GRAD_ROWS = 5, 4
SCRATCH_ALIGNMENT = 64


class EmulatedKernels:
    """Takes tensors in any memory and gives new ones; what a kernel leaves unwritten is NaN.

    Raises EmulationError where a kernel touches memory that it was not given.
    """

    threads = 3  # that the kernels are told of: into so many ranges a parallel loop is cut

    def __init__(self, binary: Path, isa: str) -> None:
        self._cpu = Emulator(binary)
        self._cpu.replace(self._cpu.symbol(f"{NAMESPACE}12parallel_forE"), self._parallel_for)
        self._cpu.replace(self._cpu.symbol(f"{NAMESPACE}11num_threadsE"), lambda *_: self.threads)
        self._cpu.replace(self._cpu.symbol(f"{NAMESPACE}14thread_scratchE"), lambda size, *_: self._scratch(size))
        self._take = self._cpu.add_function(lambda workspace, size, *_: self._scratch(size))
        table = self._cpu.call(self._cpu.symbol(f"{NAMESPACE}{len(isa)}{isa}7kernelsE"))
        self._functions = dict(zip(TABLE, self._cpu.read_words(table, len(TABLE)), strict=True))

    def close(self) -> None:
        """Frees the emulated CPU."""
        self._cpu.close()

    def _parallel_for(self, n: int, body: int, context: int, *_: int) -> None:
        cuts = [n * i // self.threads for i in range(self.threads + 1)]
        # Last to first: no range may build on another.
        for begin, end in reversed(list(pairwise(cuts))):
            if begin < end:
                self._cpu.call(body, context, begin, end)

    def _scratch(self, size: int) -> int:
        return self._cpu.allocate(size, SCRATCH_ALIGNMENT)

    def _call(self, name: str, *arguments: int) -> None:
        self._cpu.call(self._functions[name], *arguments)

    def _place(self, tensor: Tensor | None) -> int:
        """Address of a copy; of activations as NHWC."""
        if tensor is None:
            return 0
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        return self._cpu.address(self._cpu.place(tensor.contiguous(memory_format=layout)))

    def _result(self, like: Tensor) -> Tensor:
        return self._cpu.place(torch.full_like(like, torch.nan))

    def _workspace(self) -> int:
        return self._cpu.place_words(self._cpu.place_words(self._take))

    def _conv(self, conv: Conv, x: Tensor, weight: Tensor) -> int:
        N, C, H, W = x.shape
        K, _, R, S = weight.shape
        P, Q = conv.output_shape(x.shape, weight.shape)[2:]
        return self._cpu.place_words(N, H, W, C, P, Q, K, R, S, *conv.stride, *conv.padding)

    def _activation(self, a: Activation) -> int:
        return self._cpu.place_words(self._place(a.x), self._place(a.norm))

    def _gradient(self, dy: Gradient) -> int:
        if dy.norm is None:
            return self._cpu.place_words(self._place(dy.g), 0, 0, 0)
        # With running statistics slope and offset are 0, and the kernels get no rows of them.
        grad = dy.grad if dy.grad[SLOPE].any() or dy.grad[OFFSET].any() else None
        return self._cpu.place_words(*(self._place(t) for t in (dy.g, dy.x, dy.norm, grad)))

    def _filter(self, placed: Tensor) -> int:
        return self._cpu.place_words(self._cpu.address(placed), *placed.stride())

    def _affine(self, affine: Affine | None) -> int:
        if affine is None:
            return self._cpu.place_words(0, 0, 0)
        (eps,) = struct.unpack("q", struct.pack("d", affine.eps))
        return self._cpu.place_words(self._place(affine.gamma), self._place(affine.beta), eps)

    def _rows(self, count: int, like: Tensor, channels: int) -> Tensor:
        return self._result(torch.empty(count, channels, dtype=accumulation_type(like.dtype)))

    def forward(
        self,
        conv: Conv,
        x: Activation,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        following: Affine | None,
    ) -> tuple[Tensor, Tensor | None]:
        self._cpu.clear()
        shape = conv.output_shape(x.x.shape, weight.shape)
        y = self._result(x.x.new_empty(shape).contiguous(memory_format=torch.channels_last))
        rows = self._rows(NORM_ROWS, y, y.size(1)) if following is not None else None
        self._call(
            "forward",
            self._conv(conv, x.x, weight),
            DTYPES.index(y.dtype),
            self._activation(x),
            self._filter(self._cpu.place(weight)),
            self._place(bias),
            self._place(residual),
            self._cpu.address(y),
            self._affine(following),
            self._cpu.address(rows),
            self._workspace(),
        )
        return y.clone(), None if rows is None else rows.clone()

    def dgrad(
        self, conv: Conv, dy: Gradient, weight: Tensor, x: Activation, add: Tensor | None, batch: bool
    ) -> Gradient:
        self._cpu.clear()
        dz = self._result(x.x.contiguous(memory_format=torch.channels_last))
        rows = self._rows(GRAD_ROWS, dz, dz.size(1))
        if not batch:
            rows[[SLOPE, OFFSET]] = 0
        self._call(
            "dgrad",
            self._conv(conv, x.x, weight),
            DTYPES.index(dz.dtype),
            self._gradient(dy),
            self._filter(self._cpu.place(weight)),
            self._activation(x),
            self._place(add),
            self._cpu.address(dz),
            self._cpu.address(rows) if x.norm is not None else 0,
            batch,
            self._workspace(),
        )
        return Gradient(dz.clone()) if x.norm is None else Gradient(dz.clone(), x.x, x.norm, rows.clone())

    def wgrad(
        self, conv: Conv, dy: Gradient, x: Activation, weight: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        self._cpu.clear()
        dweight = self._result(weight)
        dbias = self._result(weight.new_empty(weight.size(0))) if bias else None
        self._call(
            "wgrad",
            self._conv(conv, x.x, weight),
            DTYPES.index(weight.dtype),
            self._gradient(dy),
            self._activation(x),
            self._filter(dweight),
            self._cpu.address(dbias),
            self._workspace(),
        )
        return dweight.clone(), None if dbias is None else dbias.clone()

    def statistics(self, x: Tensor, affine: Affine) -> Tensor:
        self._cpu.clear()
        C = x.size(1)
        rows = self._rows(NORM_ROWS, x, C)
        self._call(
            "statistics",
            DTYPES.index(x.dtype),
            x.numel() // C,
            C,
            self._place(x),
            self._affine(affine),
            self._cpu.address(rows),
            self._workspace(),
        )
        return rows.clone()

    def running(self, mean: Tensor, variance: Tensor, affine: Affine) -> Tensor:
        self._cpu.clear()
        rows = self._rows(NORM_ROWS, mean, len(mean))
        arguments = self._place(mean), self._place(variance), self._affine(affine), self._cpu.address(rows)
        self._call("running", DTYPES.index(mean.dtype), len(mean), *arguments)
        return rows.clone()

    def dx(self, dy: Gradient, add: Tensor | None) -> Tensor:
        self._cpu.clear()
        result = self._result(dy.g.contiguous(memory_format=torch.channels_last))
        C = result.size(1)
        arguments = self._gradient(dy), self._place(add), self._cpu.address(result)
        self._call("dx", DTYPES.index(result.dtype), result.numel() // C, C, *arguments)
        return result.clone()
