"""`explain`: the choices of a call, told without making it."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from .backends import Choice, recording
from .functional import bn_relu_conv2d
from .layers import has_own_functions
from .watch import MEMBERS


class Explanation(tuple[Choice, ...]):
    """The choices of one call, in the order in which it makes them; ``str`` of it is meant to be read."""

    def __str__(self) -> str:
        if not self:
            return "no fused call is made here"
        merged: dict[tuple[str, str | None, tuple[tuple[str, str], ...]], list[str]] = {}
        for choice in self:
            merged.setdefault((choice.backend, choice.apart, tuple(choice.others.items())), []).append(choice.where)
        texts = []
        for (backend, apart, others), places in merged.items():
            if len(places) > 4:
                places = [f"{places[0]}, {places[1]}, ... {places[-1]} ({len(places)} calls)"]
            where = ", ".join(places)
            texts.append(str(Choice(where, backend, dict(others), apart=apart)))
        return "\n".join(texts)


def _place(where: Any, names: dict[Any, str]) -> str:
    return where if isinstance(where, str) else names.get(where) or type(where).__name__


def _fakes(names: dict[torch.nn.Module, str], mode: FakeTensorMode) -> dict[str, torch.Tensor]:
    """Fake tensors for the parameters and buffers of modules, those of each module once, wherever else it is."""
    fakes = {}
    for module, prefix in names.items():
        for members in module.named_parameters, module.named_buffers:
            for name, t in members(prefix, recurse=False, remove_duplicate=False):
                if has_own_functions(type(t)):  # which a fake one would not have
                    continue
                fakes[name] = mode.from_tensor(t)
                if t.dim() == 0 and not t.requires_grad:  # a count, which nn.BatchNorm2d reads for averages
                    fakes[name].constant = t.clone()
    return fakes


def _refuse_unmade(target: torch.nn.Module) -> None:
    """Parameters that the first call makes, or makes room for, would be fake ones for ever."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(part, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)) for part in target.modules()):
        raise ValueError("target must not be sharded by torch.distributed.fsdp: explain the net before it is sharded")
    for name, t in (*target.named_parameters(), *target.named_buffers()):
        if is_lazy(t):
            raise ValueError(f"target must have been called once before: {name} is lazy, and has no shape yet")


@contextlib.contextmanager
def _as_before(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Take from modules what the call made their attributes: a mask or a cache of a first call would stay, a fake."""
    members = [module.__dict__ for module in modules]
    members += [part for own in members for name in MEMBERS if isinstance(part := own.get(name), dict)]
    before = [*map(dict, members)]
    try:
        yield
    finally:
        for own, values in zip(members, before, strict=True):
            own.clear()
            own.update(values)


_explaining = threading.RLock()


def explain(target: torch.nn.Module | Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend serves a call, and why the others do not.

    The call ``target(*args, **kwargs)`` is made on fake tensors: nothing is computed, no running statistics change, and
    attributes and buffers that it sets are taken back; what it puts into lists of its own stays, fake.
    Within ``torch.no_grad()`` a net in eval mode is explained as it runs for inference, which may be served otherwise.
    ``target`` is any module, a whole net too, or `bn_relu_conv2d`: ``print(fused_preact.explain(net, images))``. Of
    another function, a method of a module too, it is not known whose statistics the call would change.
    Meanwhile what was compiled runs as it was written, in all threads, and no other thread may call ``target``, whose
    tensors are the fake ones.

    Returns:
        The choices (`backends.Choice`) in the order of the calls: ``where``, ``backend``, and ``others``, the reasons.

    Raises:
        TypeError, ValueError: ``target`` is something else, or what the call itself would raise for its arguments.
        ValueError: what the call does depends on the numbers in a tensor, or parameters are lazy or sharded.
    """
    return torch.compiler.disable(_explain)(target, *args, **kwargs)


def _explain(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
    names: dict[Any, str] = {}
    if isinstance(target, torch.nn.Module):
        names = {module: name for name, module in target.named_modules()}
        _refuse_unmade(target)
        state = _fakes(names, mode)
        # Tied, what is in two places would be exchanged twice, and the second time given back as a fake tensor.
        target = functools.partial(functional_call, target, state, tie_weights=False)
        args, kwargs = (args, kwargs), {}
    elif target is not bn_relu_conv2d:
        raise TypeError(
            f"target must be a module, or bn_relu_conv2d; got a {type(target).__name__}: pass the module that it calls"
        )
    # Code that was compiled takes no fake tensors. The stance is the process's: one call at a time changes it.
    with _explaining, _as_before(names), recording() as choices, mode, torch.compiler.set_stance("force_eager"):
        try:
            target(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                "target must do the same whatever the numbers in its tensors are, for explain calls it with tensors "
                f"that have none; it calls {error.func}: explain the modules in it"
            ) from error
    return Explanation(choice._replace(where=_place(choice.where, names)) for choice in choices)
