"""Who takes part: a module of one backend in one memory format, and the step that is timed."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_preact import PreActStage

from .cases import DTYPES, LAYOUTS, Case
from .measure import Step
from .plain import Plain, plain

RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class Contender:
    """A backend ("eager", "compiled", or one of fused_preact's) in a memory format, its stages in a memory mode."""

    backend: str
    layout: str
    memory: str = "fast"
    device: str = "cpu"

    @property
    def name(self) -> str:
        """As in the tables: "fused" is what backend="auto" chooses, a mode is named where it is not "fast"."""
        who = "fused" if self.backend == "auto" else self.backend
        return " ".join((who, *((self.memory,) if self.memory != "fast" else ()), self.layout))


@dataclass(frozen=True)
class Problem:
    """Input and target of a case, and the parameters every contender starts from."""

    case: Case
    x: Tensor
    target: Tensor
    state: dict[str, Tensor]


def contenders(case: Case, compiled: bool = False, device: str = "cpu") -> list[Contender]:
    """The contenders of a case; `compiled` adds torch.compile of the eager module, a block at a time."""
    modes = [(b, mode) for b in case.backends for mode in (("fast",) if b == "eager" else case.memory)]
    if compiled and case.compiled:
        modes.append(("compiled", "fast"))
    return [Contender(backend, layout, mode, device) for layout in case.layouts for backend, mode in modes]


def build(contender: Contender, problem: Problem) -> nn.Module:
    """The contender's module, in training mode, with the problem's parameters."""
    ordinary = contender.backend in ("eager", "compiled")
    module = problem.case.make(backend="eager" if ordinary else contender.backend)
    module.load_state_dict(problem.state)
    if ordinary:
        module = plain(module)
    module = module.to(contender.device, memory_format=LAYOUTS[contender.layout]).train()
    for stage in [m for m in module.modules() if isinstance(m, PreActStage)]:
        stage.memory = contender.memory
    if contender.backend == "compiled":
        # Block by block: a deep net takes minutes to trace whole. The code of a block is compiled for each of its
        # shapes, and beyond the limit not at all.
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        for part in [m for m in module.modules() if isinstance(m, Plain)]:
            part.compile(dynamic=False)
    return module


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Autocast to a type other than float32, else a context that does nothing."""
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def place(x: Tensor, contender: Contender) -> Tensor:
    """x in the contender's memory format, on its device."""
    return x.detach().to(contender.device, memory_format=LAYOUTS[contender.layout], copy=True)


def step(contender: Contender, problem: Problem, module: nn.Module) -> Step:
    """What is timed. Blocks: forward, and backward of a random dy. Nets: with loss and SGD update."""
    x, target, dtype = place(problem.x, contender), problem.target, DTYPES[problem.case.dtype]
    if problem.case.net:
        return _net_step(module, x, target.to(contender.device), dtype)
    return block_step(module, x, place(target, contender), dtype)


def block_step(module: nn.Module, x: Tensor, dy: Tensor | None, dtype: torch.dtype) -> Step:
    """Forward of x with autocast to dtype, and backward of dy; where that is None, inference."""
    x.requires_grad_(dy is not None)

    def prepare() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)

    def forward() -> Tensor:
        with autocast(x.device.type, dtype), torch.set_grad_enabled(dy is not None):
            return module(x)

    def backward(y: Tensor) -> None:
        if dy is not None:
            y.backward(dy)

    return Step(prepare, forward, backward)


def _net_step(module: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype) -> Step:
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)

    def forward() -> Tensor:
        with autocast(x.device.type, dtype):
            return F.cross_entropy(module(x), target)

    def backward(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()

    return Step(lambda: optimizer.zero_grad(set_to_none=True), forward, backward)
