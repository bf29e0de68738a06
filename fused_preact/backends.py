"""Which backend serves a call, and why: names, limits, the choice of ``backend="auto"``, and records of choices."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import _extension, tables, tracing
from .checks import one_of
from .kernels import Conv

# Read here, for torch.compile traces the choice of a backend; the variable is Triton's own.
_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class Problem(NamedTuple):
    """What a choice depends on."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]  # of x
    convolutions: tuple[tuple[Conv, tuple[int, ...]], ...]  # geometry, weight shape
    format: str = "channels_last"  # memory format of x, or "contiguous"
    inference: bool = False  # no batch statistics, and no backward
    saves_memory: bool = False  # "lean", "min" or memory_efficient was asked for
    transformed: bool = False  # within a transform of torch.func, a forward-mode derivative or torch.jit.trace
    rounded: bool = False  # x is of another type than dtype, and is not kept as it is


# What "auto" gives to the CUDA kernels: multiply-adds an image of the heaviest convolution. On an H200, in 16 bits and
# channels_last, blocks of 2 million took less time than eager, and those of 38 million more.
_MOST_CUDA_PRODUCTS = 1 << 23


def _no_cpu(problem: Problem) -> str | None:
    if _extension.unavailable is not None:
        return _extension.unavailable
    if problem.device.type != "cpu":
        return f"it runs on the CPU, not on {problem.device}"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"it computes in float32, bfloat16 and float64, not in {problem.dtype}"
    return None


def _no_cuda(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"it runs on CUDA devices, not on {problem.device}"
    reason = cuda_unavailable(problem.device)
    if reason is not None:
        return reason
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, bfloat16 and float16, not in {problem.dtype}"
    return None


def _auto_no_cuda(problem: Problem) -> str | None:
    if problem.dtype.itemsize != 2 or problem.format != "channels_last":
        return f"it is meant for 16-bit channels_last, not {problem.format} {problem.dtype}"
    for convolution in problem.convolutions:
        reason = _not_taken(*convolution)
        if reason is not None:
            return f"{reason}, and would run torch's own convolution"
    if len(problem.convolutions) < 2:
        return "one convolution by itself does not pay for the call"
    _, _, H, W = problem.shape
    most = max(math.prod(shape) * H * W for _, shape in problem.convolutions)
    if most > _MOST_CUDA_PRODUCTS:
        return f"it is meant for up to {_MOST_CUDA_PRODUCTS} products an image, not {most}"
    return None


def cuda_unavailable(device: torch.device | None = None) -> str | None:
    """Why the CUDA kernels do not serve a device, or any device; None where they do."""
    if _extension.unavailable is not None:
        return _extension.unavailable
    if not _extension.cuda_architectures:
        return "the CUDA kernels were left out: install again where nvcc is, or with FUSED_PREACT_CUDA=1"
    if torch.version.hip is not None:  # whose devices are called cuda, too
        return f"torch {torch.__version__} is one for AMD's GPUs"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} has no CUDA device on this machine"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more, as from 2020 on"
    return None


@tracing.constant  # Dynamo of torch 2.11 does not trace the switch
def allows_tf32() -> bool:
    """Whether torch's own switches let convolutions of float32 multiply in TF32; compiled code keeps the answer."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def _grouped(conv: Conv) -> str | None:
    if conv.groups != 1 or conv.dilation != (1, 1):
        return f"it has no groups and no dilation (groups={conv.groups}, dilation={conv.dilation})"
    return None


def _not_taken(conv: Conv, weight: tuple[int, ...]) -> str | None:
    """Why `cpu` and `cuda` leave a convolution to torch, as csrc/convolution.cpp says; None where it is a kernel's."""
    _, _, R, S = weight
    if (R, S) not in ((1, 1), (3, 3)):
        return f"it has filters of 1x1 and 3x3, not {R}x{S}"
    if conv.stride not in ((1, 1), (2, 2)):
        return f"it has strides of 1 and 2, not {conv.stride}"
    return _grouped(conv)


def _auto_no_cpu(problem: Problem) -> str | None:
    reasons = [_not_taken(*convolution) for convolution in problem.convolutions]
    if None in reasons:  # what a block gains by its other convolutions is measured: docs/design.md, "Which backend"
        return None
    return f"{reasons[0]}, and would run torch's own convolution"


def _no_triton(problem: Problem) -> str | None:
    reason = _triton_unavailable()
    if reason is not None:
        return reason
    if problem.device.type != ("cpu" if _INTERPRETED else "cuda"):
        return f"it runs on GPUs, not on {problem.device}"
    return next(filter(None, (_grouped(conv) for conv, _ in problem.convolutions)), None)


def _auto_no_triton(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return "it is meant for GPUs, not for the interpreter"
    return "it has not been measured to be faster than eager"


def _triton_unavailable() -> str | None:
    if not _INSTALLED:
        return "Triton is not installed: run `pip install triton`"
    if not (torch.cuda.is_available() or _INTERPRETED):
        return "it needs a GPU, and torch finds none"
    return None


def _no_library(problem: Problem) -> str | None:
    if problem.device.type not in ("cpu", "cuda"):
        return f"it knows the CPU and CUDA, not {problem.device}"
    return None


def _nothing(_problem: Problem) -> str | None:
    return None


# What keeps "auto" from a backend besides, where nothing was measured.
_AUTO_OBSTACLES: dict[str, Callable[[Problem], str | None]] = {
    "cpu": _auto_no_cpu,
    "cuda": _auto_no_cuda,
    "triton": _auto_no_triton,
}
# What keeps a backend from a problem, in the order in which "auto" tries them. "auto" promises never to be slower than
# eager, and library pays for the activations that it does not keep by computing them again: it must be asked for. But a
# memory mode that was asked for goes before speed.
_OBSTACLES: dict[str, Callable[[Problem], str | None]] = {
    "cpu": _no_cpu,
    "cuda": _no_cuda,
    "triton": _no_triton,
    "eager": _nothing,
    "library": _no_library,
    "reference": _nothing,
}
FUSED = tuple(name for name in _OBSTACLES if name != "eager")
NAMES = ("auto", *FUSED, "eager")


def status() -> dict[str, str | None]:
    """Name of each backend -> None where it can be used on this machine, else the reason why not."""
    known = {"cpu": _extension.unavailable, "cuda": cuda_unavailable(), "triton": _triton_unavailable()}
    return dict.fromkeys(FUSED) | known


def obstacle(name: str, problem: Problem, by_rule: bool = False) -> str | None:
    """Why a backend cannot serve a problem, or, ``by_rule``, why "auto" passes it over; None where neither is so."""
    if problem.transformed and name != "eager":
        return "it knows no transforms of torch.func, no forward-mode derivatives and no torch.jit.trace"
    reason = _OBSTACLES[name](problem)
    if reason is not None or not by_rule:
        return reason
    if problem.rounded and name != "eager":
        return f"autocast would have it round x to {problem.dtype} in front of the batch norm; ask for it by name"
    if problem.saves_memory:
        return (
            "it keeps all that its layers keep, and a mode that keeps less was asked for" if name == "eager" else None
        )
    reason = _AUTO_OBSTACLES[name](problem) if name in _AUTO_OBSTACLES else None
    return reason and f"{reason}; ask for it by name"


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of x; meta is asked about in vain."""
    device = "cpu" if x.is_cpu else x.device.type  # which puts a string together, by C++'s streams
    return device != "meta" and torch.is_autocast_enabled(device)


def is_transforming() -> bool:
    """Whether a call is seen by more than autograd's backward, which alone fused calls know how to serve."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (not torch.compiler.is_compiling() and torch.jit.is_tracing())
    )


@tracing.constant  # what torch.compile compiles, Dynamo of torch 2.11 takes for exported
def is_exporting() -> bool:
    """Whether `torch.export` makes a program of the call."""
    return torch.compiler.is_exporting()


def _measured(problem: Problem) -> str | None:
    """The backend that was measured fastest on this device, where it can serve here and this version knows it."""
    best = None if problem.rounded or problem.transformed else tables.best(problem)
    if best not in _OBSTACLES or (best == "eager" and problem.saves_memory):
        return None
    return best if obstacle(best, problem) is None else None


def choose(backend: str, problem: Problem) -> str:
    """Name of the backend that serves the problem.

    Raises:
        ValueError: there is no backend of that name, or it cannot serve this problem.
    """
    one_of("backend", backend, NAMES)
    if backend == "auto" and is_exporting():
        return "eager"  # an exported program is for those who know torch's operators alone, as ONNX does
    if backend == "auto":
        by_rule = (name for name in _OBSTACLES if obstacle(name, problem, by_rule=True) is None)
        return _measured(problem) or next(by_rule)
    reason = obstacle(backend, problem)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot serve this call: {reason}; use backend='auto'")
    return backend


class Choice(NamedTuple):
    """The backend that serves one call, and why the others do not; ``where`` is a name, or the module that calls.

    ``apart``: why a block of a stage runs by itself, where that is not for its layers.
    """

    where: Any
    backend: str
    others: dict[str, str]
    problem: Problem | None = None
    apart: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.backend}"]
        if self.apart is not None:
            lines.append(f"    apart from its stage: {self.apart}")
        lines += [f"    not {name}: {reason}" for name, reason in self.others.items()]
        return "\n".join(lines)


def describe(where: Any, backend: str, problem: Problem) -> Choice:
    """The choice for a problem, with its reasons."""
    chosen, by_rule, preferred = choose(backend, problem), False, f"backend={backend!r} was asked for"
    if backend == "auto":
        by_rule = _measured(problem) is None
        preferred = f"{chosen} comes first" if by_rule else f"{chosen} was measured fastest"
    others = {name: obstacle(name, problem, by_rule) or preferred for name in _OBSTACLES if name != chosen}
    return Choice(where, chosen, others, problem)


# Each thread has its own: what another one runs meanwhile is no part of the call that is explained.
_records: ContextVar[tuple[list[Choice], ...]] = ContextVar("records", default=())


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """Collect the choices of the calls that this thread makes inside; compiled code tells none."""
    record: list[Choice] = []
    before = _records.set((*_records.get(), record))
    try:
        yield record
    finally:
        _records.reset(before)


def is_recording() -> bool:
    """Whether choices are being collected."""
    # In this order: Dynamo does not trace a ContextVar.
    return not torch.compiler.is_compiling() and bool(_records.get())


def record(choice: Choice) -> None:
    """Add a choice to the records that are being made."""
    for choices in _records.get():
        choices.append(choice)


@contextlib.contextmanager
def apart(reason: str | None) -> Iterator[None]:
    """Note with the choices of the calls made inside why, if told, their stage does not make them."""
    before = [(choices, len(choices)) for choices in _records.get()]
    yield
    for choices, count in before:
        choices[count:] = [choice._replace(apart=choice.apart or reason) for choice in choices[count:]]
