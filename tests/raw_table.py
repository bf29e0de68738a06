"""The table of csrc/kernels.h as a table like `fused_preact.reference`, wherever its functions and their memory are."""

from __future__ import annotations

import itertools
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_preact import reference
from fused_preact.kernels import Activation, Affine, Conv, Gradient, accumulation_type

TABLE = (
    "forward", "dgrad", "wgrad", "statistics", "running", "dx", "gradients", "convert", "permute", "join", "move",
    "activate", "activate_backward",
)  # fmt: skip
NAMES = (*TABLE[:6], "join")  # those of TABLE, the functions of struct Kernels, that a table in Python has
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # enum Dtype
NORM_ROWS, GRAD_ROWS = 5, 2


def stand_in(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend that a table of kernels serves until the test is over; it must then have been called."""
    called = []

    def function(name: str) -> Any:
        return lambda *arguments: called.append(name) or getattr(kernels, name)(*arguments)

    for name in NAMES:
        monkeypatch.setattr(reference, name, function(name))
    yield "reference"
    assert "forward" in called


class RawTable(ABC):
    """Takes tensors in any memory and gives new ones; what a kernel leaves unwritten is NaN.

    A subclass says where the functions find their arguments, and calls them.
    """

    @abstractmethod
    def call(self, name: str, *arguments: int) -> None:
        """Call a function of the table with numbers and addresses, in the order of csrc/kernels.h, and a workspace."""

    @abstractmethod
    def clear(self) -> None:
        """Forget what has been placed: a new call begins."""

    @abstractmethod
    def place(self, tensor: Tensor) -> Tensor:
        """Copy of a tensor, of the same strides, where the functions find it."""

    @abstractmethod
    def place_words(self, *words: int) -> int:
        """Address of a struct of 64-bit words."""

    @abstractmethod
    def address(self, placed: Tensor | None) -> int:
        """Address of a tensor that `place` gave; null for None."""

    def dtype(self, dtype: torch.dtype) -> int:
        """The number that the functions know a type by."""
        return DTYPES.index(dtype)

    def _place(self, tensor: Tensor | None) -> int:
        """Address of a copy; of activations as NHWC."""
        if tensor is None:
            return 0
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        return self.address(self.place(tensor.contiguous(memory_format=layout)))

    def _result(self, like: Tensor) -> Tensor:
        return self.place(torch.full_like(like, torch.nan))

    def _conv(self, conv: Conv, x: Tensor, weight: Tensor) -> int:
        N, C, H, W = x.shape
        K, _, R, S = weight.shape
        P, Q = conv.output_shape(x.shape, weight.shape)[2:]
        return self.place_words(N, H, W, C, P, Q, K, R, S, *conv.stride, *conv.padding)

    def _activation(self, a: Activation) -> int:
        return self.place_words(self._place(a.x), self._place(a.norm))

    def _gradient(self, dy: Gradient) -> int:
        if dy.norm is None:
            return self.place_words(self._place(dy.g), 0, 0, 0)
        # With running statistics slope and offset are 0, and the kernels get no rows of them.
        rows = torch.stack([*dy.grad[2:]])
        grad = rows if rows.any() else None
        return self.place_words(*(self._place(t) for t in (dy.g, dy.x, dy.norm, grad)))

    def _filter(self, placed: Tensor) -> int:
        return self.place_words(self.address(placed), *placed.stride())

    def _affine(self, affine: Affine | None) -> int:
        if affine is None:
            return self.place_words(0, 0, 0)
        (eps,) = struct.unpack("q", struct.pack("d", affine.eps))
        return self.place_words(self._place(affine.gamma), self._place(affine.beta), eps)

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
        self.clear()
        shape = conv.output_shape(x.x.shape, weight.shape)
        y = self._result(x.x.new_empty(shape).contiguous(memory_format=torch.channels_last))
        rows = self._rows(NORM_ROWS, y, y.size(1)) if following is not None else None
        self.call(
            "forward",
            self._conv(conv, x.x, weight),
            self.dtype(y.dtype),
            self._activation(x),
            self._filter(self.place(weight)),
            self._place(bias),
            self._place(residual),
            self.address(y),
            self._affine(following),
            self.address(rows),
        )
        return y.clone(), None if rows is None else rows.clone()

    def dgrad(
        self, conv: Conv, dy: Gradient, weight: Tensor, x: Activation, add: Tensor | None, batch: bool
    ) -> Gradient:
        return self._dgrad("dgrad", conv, dy, weight, x, add, batch)

    def gradients(
        self, conv: Conv, dy: Gradient, weight: Tensor, x: Activation, add: Tensor | None, batch: bool
    ) -> tuple[Gradient, Tensor, Tensor]:
        """dgrad and wgrad in one call: dz, dweight, dbias."""
        results = torch.empty_like(weight), weight.new_empty(weight.size(0))

        def place() -> list[int]:
            nonlocal results
            results = tuple(map(self._result, results))
            return [self._filter(results[0]), self.address(results[1])]

        dz = self._dgrad("gradients", conv, dy, weight, x, add, batch, place)
        return dz, *(result.clone() for result in results)

    def _dgrad(self, name, conv, dy, weight, x, add, batch, place_more: Callable[[], list[int]] = list) -> Gradient:
        self.clear()
        dz = self._result(x.x.contiguous(memory_format=torch.channels_last))
        dgamma, dbeta = (self._rows(1, dz, dz.size(1)) for _ in range(2))
        rows = self._rows(GRAD_ROWS, dz, dz.size(1))
        if not batch:
            rows.zero_()
        self.call(
            name,
            self._conv(conv, x.x, weight),
            self.dtype(dz.dtype),
            self._gradient(dy),
            self._filter(self.place(weight)),
            self._activation(x),
            self._place(add),
            self.address(dz),
            self.place_words(self.address(dgamma), self.address(dbeta), self.address(rows if batch else None)),
            *place_more(),
        )
        if x.norm is None:
            return Gradient(dz.clone())
        return Gradient(dz.clone(), x.x, x.norm, [row.clone() for row in (*dgamma, *dbeta, *rows)])

    def wgrad(
        self, conv: Conv, dy: Gradient, x: Activation, weight: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        self.clear()
        dweight = self._result(weight)
        dbias = self._result(weight.new_empty(weight.size(0))) if bias else None
        self.call(
            "wgrad",
            self._conv(conv, x.x, weight),
            self.dtype(weight.dtype),
            self._gradient(dy),
            self._activation(x),
            self._filter(dweight),
            self.address(dbias),
        )
        return dweight.clone(), None if dbias is None else dbias.clone()

    def convert(self, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Copies of tensors, all of one type, in another."""
        self.clear()
        results = [self._result(tensor.to(dtype)) for tensor in tensors]
        words = [
            word
            for tensor, result in zip(tensors, results, strict=True)
            for word in (self._place(tensor), self.address(result), tensor.numel())
        ]
        types = self.dtype(tensors[0].dtype), self.dtype(dtype)
        self.call("convert", *types, self.place_words(*words), len(tensors))
        return [result.clone() for result in results]

    def permute(self, matrices: Tensor) -> Tensor:
        """Each of the matrices [N, rows, columns] transposed."""
        self.clear()
        N, rows, columns = matrices.shape
        to = self._result(matrices.new_empty(N, columns, rows))
        self.call("permute", matrices.itemsize, N, rows, columns, self._place(matrices), self.address(to))
        return to.clone()

    def join(
        self, stream: Tensor, branch: Gradient, subtract: bool, narrow: bool, following: Affine | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The stream after a block, the same as its branch is stored, and the rows of the batch norm that reads it."""
        self.clear()
        joined, C = self._result(stream.contiguous(memory_format=torch.channels_last)), stream.size(1)
        narrowed = self._result(joined.to(branch.g.dtype)) if narrow or following is not None else None
        rows = self._rows(NORM_ROWS, branch.g, C) if following is not None else None
        self.call(
            "join",
            self.dtype(branch.g.dtype),
            stream.numel() // C,
            C,
            self._place(stream),
            self._gradient(branch),
            int(subtract),
            self.address(joined),
            self.address(narrowed),
            self._affine(following),
            self.address(rows),
        )
        return tuple(None if t is None else t.clone() for t in (joined, narrowed, rows))

    def move(self, mean, var, counts, rows, units: list[int], momentum: float | None) -> None:
        """As `fused_preact.running.update`."""
        self.clear()
        placed: dict[int, tuple[Tensor, Tensor]] = {}

        def address(t: Tensor) -> int:
            whole = t if t._base is None else t._base  # with what lies between the values of t
            return self.address(placed.setdefault(id(whole), (whole, self.place(whole)))[1])

        words = []
        for m, v, count, unit in itertools.zip_longest(mean, var, counts, units):
            own = [0] * 8
            if m is not None:
                types = [self.dtype(t.dtype) for t in (m, v, rows[unit])]
                own = [address(m), address(v), m.stride(0), v.stride(0), address(rows[unit]), 0]
                own += [m.numel() | types[0] << 32, types[1] | types[2] << 32]
            if count is not None:
                own[5] = address(count)
            words += own
        weight = 0 if momentum is None else self.place_words(*struct.unpack("q", struct.pack("d", momentum)))
        self.call("move", self.place_words(*words), len(words) // 8, weight)
        for whole, copy in placed.values():
            whole.copy_(copy)

    def statistics(self, x: Tensor, affine: Affine) -> Tensor:
        self.clear()
        C = x.size(1)
        rows = self._rows(NORM_ROWS, x, C)
        self.call(
            "statistics",
            self.dtype(x.dtype),
            x.numel() // C,
            C,
            self._place(x),
            self._affine(affine),
            self.address(rows),
        )
        return rows.clone()

    def activate(self, x: Activation) -> Tensor:
        """a of x."""
        self.clear()
        a = self._result(x.x.contiguous(memory_format=torch.channels_last))
        arguments = self._activation(x), self.address(a)
        self.call("activate", self.dtype(a.dtype), a.numel() // a.size(1), a.size(1), *arguments)
        return a.clone()

    def activate_backward(self, da: Tensor, x: Activation, batch: bool) -> tuple[Tensor, Tensor, Tensor]:
        """dx, which takes the place of da, dgamma and dbeta."""
        self.clear()
        dx = self.place(da.contiguous(memory_format=torch.channels_last))
        C = dx.size(1)
        dgamma, dbeta = (self._rows(1, dx, C) for _ in range(2))
        rows = self._rows(GRAD_ROWS, dx, C) if batch else None
        self.call(
            "activate_backward",
            self.dtype(dx.dtype),
            dx.numel() // C,
            C,
            self.address(dx),
            self._activation(x),
            self.address(dx),
            self.place_words(self.address(dgamma), self.address(dbeta), self.address(rows)),
        )
        return dx.clone(), dgamma[0].clone(), dbeta[0].clone()

    def running(self, mean: Tensor, variance: Tensor, affine: Affine) -> Tensor:
        self.clear()
        rows = self._rows(NORM_ROWS, mean, len(mean))
        arguments = self._place(mean), self._place(variance), self._affine(affine), self.address(rows)
        self.call("running", self.dtype(mean.dtype), len(mean), *arguments)
        return rows.clone()

    def dx(self, dy: Gradient, add: Tensor | None) -> Tensor:
        self.clear()
        result = self._result(dy.g.contiguous(memory_format=torch.channels_last))
        C = result.size(1)
        arguments = self._gradient(dy), self._place(add), self.address(result)
        self.call("dx", self.dtype(result.dtype), result.numel() // C, C, *arguments)
        return result.clone()
