"""What a module computes, found out with a copy: so two modules of the same layers can be told apart."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .watch import bare

REPEATING = ("memory_efficient", "grad_checkpointing", "efficient")
"""Attributes of a dense layer, torchvision's, timm's or gpleiss', that have it repeat a part of forward in backward."""


def outputs(module: nn.Module, channels: int, parts: int = 0) -> list[Any]:
    """What a copy of the module, of random parameters, makes of random images, with gradients, in training and in eval.

    With the parameters that it has, a last layer that begins with zeros would hide what comes before it, and nothing
    would be as large as what ReLU6 cuts off.

    Args:
        module: takes images of so many channels, or, where ``parts`` is not 0, a list of so many parts of the channels;
            the parts themselves where it `takes_several`.
        channels: of the images.
        parts: see module.

    Raises:
        Exception: whatever the module raises.
    """
    with torch.inference_mode(False), torch.enable_grad(), _own_random_numbers():
        module, generator = copy.deepcopy(module).to_empty(device="cpu").double(), torch.Generator().manual_seed(0)
        for child in module.modules():
            bare(child)
        for name in REPEATING:  # in backward, which moves the statistics twice
            if hasattr(module, name):
                setattr(module, name, False)
        for _, t in sorted(module.named_parameters()):
            t.data.normal_(std=10 / math.sqrt(math.prod(t.shape[1:])), generator=generator)
        for _, t in sorted(module.named_buffers()):
            t.uniform_(0.5, 1.5, generator=generator) if t.is_floating_point() else t.fill_(1)
        # Two sizes, one of them odd: what pools or pads may see no difference in one.
        large, small = (
            torch.randn(2, channels, *size, dtype=torch.float64, device="cpu", generator=generator)
            for size in ((9, 12), (8, 6))
        )
        return [*_response(module.train(), large, parts), *_response(module.eval(), small, parts)]


def outputs_if_any(module: nn.Module, channels: int, parts: int = 0) -> list[Any] | None:
    """`outputs`, or None of layers that do not follow each other, or of what takes more than x, or no parts of it."""
    try:
        return outputs(module, channels, parts)
    except Exception:  # it may be somebody else's code, which may raise anything
        return None


def agreement(theirs: list[Any], ours: list[Any]) -> int:
    """How many of two modules' `outputs`, from the first on, are the same but for rounding; -1: one has more."""
    if len(theirs) != len(ours):
        return -1
    return next((i for i, pair in enumerate(zip(theirs, ours, strict=True)) if not _close(*pair)), len(theirs))


def alike(theirs: list[Any], ours: list[Any]) -> bool:
    """Whether two modules' `outputs` are the same but for rounding."""
    return agreement(theirs, ours) == len(theirs)


def difference(theirs: list[Any], agreeing: int) -> str:
    """What a module does otherwise of whose outputs so many agree, as a sentence goes on after its name."""
    if agreeing == len(theirs):
        return "takes parts of x in another way"
    mode, i = divmod(agreeing, len(theirs) // 2)
    what = "draws random numbers", "gives another result", "has other gradients"
    return f"{what[min(i, 2)]} in {('training', 'eval')[mode]}"


def takes_several(module: nn.Module) -> bool:
    """Whether a module takes any number of tensors, one by one."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Whatever is drawn inside, the generators of torch's CPU, Python and NumPy go on as if nothing had been."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _drawn() -> tuple[Any, ...]:
    """Where these generators are: what drops a branch in a few calls of a hundred shows in no result of one call."""
    _, keys, *others = np.random.get_state()
    return bytes(torch.default_generator.get_state().numpy()), random.getstate(), bytes(keys), others


def _response(module: nn.Module, x: Tensor, parts: int) -> list[Any]:
    """What the module makes of x, or of a list of so many parts of x, and the gradients of its squares."""
    # Of what is dropped, on the CPU: generators of other devices go on as they were.
    torch.default_generator.manual_seed(0), random.seed(0), np.random.seed(0)
    leaves = [x.requires_grad_(), *(t.requires_grad_() for _, t in sorted(module.named_parameters()))]
    given = list(x.clone().tensor_split(parts, 1)) if parts else x.clone()
    y = module(*given) if parts and takes_several(module) else module(given)
    if not isinstance(y, Tensor):
        return [y]
    return [_drawn(), y.detach(), *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)]


def _close(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, tuple):
        return theirs == ours
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    return bool((theirs - ours).abs().max() <= 1e-9 * ours.abs().max())
