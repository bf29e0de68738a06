"""The gate: no figure is reported of a contender whose answers are wrong.

The error of y, dx and the parameters' gradients, against the eager module in float64, may be at most twice the error
of eager torch in the contender's own dtype. A ReLU whose input is nearly zero would spoil the comparison: rounding
decides its mask, and one flipped mask outweighs all rounding. So `pose` moves each beta a little, into a gap between
the values of its channel.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import DTYPES, Case
from .contenders import Contender, Problem, autocast, build, contenders, place

FACTOR = 2.0
NET_BATCH = 2
_NEIGHBOURS = 16


class CheckError(Exception):
    """A contender's error exceeds its limit."""


def pose(case: Case, seed: int = 0, device: str = "cpu") -> Problem:
    """Input, target and parameters of a case, from a seed, with no ReLU input close to zero in float64.

    device: where the zeros are looked for.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return _pose(case, device)


def _pose(case: Case, device: str) -> Problem:
    reference = case.make(backend="eager").train()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
    x = torch.randn(case.shape).to(torch.float32 if case.net else DTYPES[case.dtype])
    reference.double().to(device)
    y = _separate(reference, x.double().to(device))
    target = torch.randint(y.shape[1], (len(y),)) if case.net else torch.randn(y.shape).to(DTYPES[case.dtype])
    return Problem(case, x, target, reference.float().state_dict())


def widen(problem: Problem, case: Case) -> Problem:
    """The problem of a net at the batch of `case`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.shape, generator=generator)
    target = torch.randint(int(problem.target.max()) + 1, (len(x),), generator=generator)
    return Problem(case, x, target, problem.state)


@torch.no_grad()
def _separate(module: nn.Module, x: Tensor) -> Tensor:
    """Shifts each beta to where zero lies in the widest of the gaps nearest to it; returns module(x)."""

    def shift(norm: nn.BatchNorm2d, _: tuple[Tensor, ...], z: Tensor) -> Tensor:
        values = z.transpose(0, 1).flatten(1).sort().values
        gaps, middles = values.diff(), (values[:, 1:] + values[:, :-1]) / 2
        near = middles.abs().topk(min(_NEIGHBOURS, middles.shape[1]), largest=False).indices
        widest = near.gather(1, gaps.gather(1, near).argmax(1, keepdim=True))
        offset = -middles.gather(1, widest).squeeze(1)
        norm.bias += offset
        return z + offset[:, None, None]

    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [norm.register_forward_hook(shift) for norm in norms]
    y = module(x)
    for handle in handles:
        handle.remove()
    for norm in norms:
        norm.reset_running_stats()
    return y


def _answers(contender: Contender, problem: Problem, dtype: torch.dtype | None = None) -> dict[str, list[Tensor]]:
    """y, dx, dW and dbn (gamma and beta) of one step, as float64; computed in `dtype`, or as the case says."""
    module = build(contender, problem)
    x = place(problem.x, contender)
    if dtype is not None:
        module, x = module.to(dtype), x.to(dtype)
    x.requires_grad_()
    target = problem.target.to(contender.device)
    with autocast(contender.device, DTYPES[problem.case.dtype] if dtype is None else torch.float32):
        y = module(x)
        loss = F.cross_entropy(y, target) if problem.case.net else None
    if loss is None:
        y.backward(target.to(y.dtype))
    else:
        loss.backward()
    gradients = [p.grad for p in module.parameters()]
    found = {
        "y": [y.detach()],
        "dx": [x.grad],
        "dW": [g for g in gradients if g.dim() > 1],
        "dbn": [g for g in gradients if g.dim() == 1],
    }
    return {kind: [t.double() for t in tensors] for kind, tensors in found.items()}


def error(tensors: Iterable[Tensor], reference: Iterable[Tensor]) -> float:
    """Root mean square over the tensors of |t - reference| / |reference| (Euclidean norms)."""
    squares = [((t - r).norm() / r.norm()).item() ** 2 for t, r in zip(tensors, reference, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


def verify(problem: Problem, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Errors of each contender against float64: name -> {y, dx, dW, dbn: relative error}.

    Raises:
        CheckError: an error is over twice the greatest of the eager contenders, or not finite.
    """
    entrants = contenders(problem.case, device=device)
    truth = _answers(next(c for c in entrants if c.backend == "eager"), problem, torch.float64)
    errors: dict[str, dict[str, float]] = {}
    for contender in entrants:
        answers = _answers(contender, problem)
        errors[contender.name] = {kind: error(answers[kind], truth[kind]) for kind in truth}
    eager = [errors[c.name] for c in entrants if c.backend == "eager"]
    for contender in entrants:
        for kind in truth:
            limit = FACTOR * max(e[kind] for e in eager)
            found = errors[contender.name][kind]
            if not found <= limit:
                raise CheckError(
                    f"{problem.case.name}: the error of {kind} of {contender.name} against float64 is {found:.2e}, "
                    f"more than {FACTOR:g} times eager's own ({limit / FACTOR:.2e})"
                )
    return errors
