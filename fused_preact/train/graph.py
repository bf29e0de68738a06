"""A training step in a CUDA graph: one launch by the host in place of thousands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Function = Callable[..., Sequence[Tensor]]
WARM_UP = 3  # calls before the recording: what is set up on first use, is set up then


class Tape(Protocol):
    """What records a function of tensors, for `Recorded`."""

    def warm_up(self, function: Function, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Call the function before a recording."""

    def record(self, function: Function, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Callable[[], None]]:
        """Its outputs, and what fills them from the inputs' memory, each time anew; nothing is computed yet."""


class CudaGraph:
    """Records into a `torch.cuda.CUDAGraph`, on a stream beside the current one, as torch's documentation asks for.

    On the device of the inputs, where there are any, else on the current one.
    """

    def warm_up(self, function: Function, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Call the function on that stream."""
        with _device(inputs):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                outputs = function(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            for tensor in outputs:
                tensor.record_stream(torch.cuda.current_stream())
            return outputs

    def record(self, function: Function, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Callable[[], None]]:
        """The outputs, in the memory of the graph, and its replay."""
        with _device(inputs):
            graph = torch.cuda.CUDAGraph()
            # A stream of this device: torch's own for captures is one for all devices.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                outputs = function(*inputs)
            return outputs, graph.replay


def _device(inputs: Sequence[Tensor]) -> torch.cuda.device:
    return torch.cuda.device(inputs[0].device if inputs else None)


class Recorded:
    """A function of tensors that always have the same shapes, called as it is at first, then recorded and replayed.

    The function must not need the host (no `item`, no branch on a value), and whatever it reads or changes besides its
    arguments (parameters, running statistics, momenta, the learning rate) must stay in the same memory from the
    recording on. It changes that once a call, whichever way a call runs.
    """

    def __init__(self, function: Function, tape: Tape) -> None:
        self._function, self._tape = function, tape
        self._inputs: Sequence[Tensor] = ()
        self._outputs: Sequence[Tensor] = ()
        self._replay: Callable[[], None] | None = None
        self._calls = 0

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The function's outputs, in memory of their own.

        Raises:
            ValueError: an input has not the shape that it was recorded with.
        """
        self._calls += 1
        if self._calls <= WARM_UP:
            return list(self._tape.warm_up(self._function, inputs))
        if self._replay is None:
            self._inputs = [torch.empty_like(tensor) for tensor in inputs]
            self._outputs, self._replay = self._tape.record(self._function, self._inputs)
        for static, given in zip(self._inputs, inputs, strict=True):
            if static.shape != given.shape:
                raise ValueError(f"inputs must keep the shape {tuple(static.shape)}, got {tuple(given.shape)}")
            static.copy_(given)
        self._replay()
        return [output.clone() for output in self._outputs]
