"""The plain layers of a block: whether they can be fused, and what the fused call reads of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import backends, checks, running, tracing
from .kernels import Conv
from .units import Block, Shortcut, Unit
from .watch import PARAMETERS, has_own_forward, hooked


class Pair(NamedTuple):
    """The two layers of a unit, and the names by which its module knows them."""

    bn_name: str
    bn: nn.Module
    conv_name: str
    conv: nn.Module


class Layers(NamedTuple):
    """The layers of a block. ``container`` is the shortcut's convolution or the nn.Sequential of it, if it has one.

    ``boxes`` are the modules that the others are in, where they are not the block's own children, with what else is in
    there, as a ReLU; these are not called. ``prefix`` is what errors of a call put in front of names.
    """

    pairs: list[Pair]
    shortcut: str = "none"
    container_name: str = ""
    container: nn.Module | None = None
    boxes: Sequence[tuple[str, nn.Module]] = ()
    prefix: str = ""

    def obstacle(self) -> str | None:
        """Why the layers must run one after the other, or None where they can be fused."""
        for bn_name, bn, conv_name, conv in self.pairs:
            reason = _obstacle(bn_name, bn, nn.BatchNorm2d) or _obstacle(conv_name, conv, nn.Conv2d)
            if reason is not None:
                return reason
        for name, box in self.boxes:
            if hooked(box) or has_own_forward(box):
                return f"{name} has hooks or a forward of its own, which run only when it is called"
        name, box = self.container_name, self.container
        if box is None:
            return None
        if type(box) is nn.Sequential:
            if len(box._modules) != 1:
                return f"{name} is not an nn.Sequential of one convolution"
            reason = _obstacle(name, box, nn.Sequential)
            if reason is not None:
                return reason
            name = f"{name}.{next(iter(box._modules))}"
        projection = self.projection()
        return _obstacle(name, projection, nn.Conv2d)

    def projection(self) -> nn.Module | None:
        """The convolution of the shortcut."""
        box = self.container
        return next(iter(box._modules.values())) if type(box) is nn.Sequential else box

    def all(self) -> set[nn.Module]:
        """Batch norms and convolutions, that of the shortcut, too."""
        units = {layer for pair in self.pairs for layer in (pair.bn, pair.conv)}
        return units if self.container is None else units | {self.projection()}

    def block(self) -> Block:
        """What a fused call reads."""
        units = [_unit(pair.bn, pair.conv) for pair in self.pairs]
        names = [(self.prefix + pair.bn_name, self.prefix + pair.conv_name) for pair in self.pairs]
        if self.container is None:
            return Block(units, Shortcut(self.shortcut), names)
        projection, name = self.projection(), self.prefix + self.container_name
        tensors = _parameters(projection)
        shortcut = Shortcut(self.shortcut, tensors["weight"], conv_geometry(projection), name, tensors["bias"])
        return Block(units, shortcut, names)

    def overwritable(self) -> bool:
        """Whether ReLU and addition may overwrite what each of the layers returns."""
        return all(overwritable(pair.bn) and overwritable(pair.conv) for pair in self.pairs)

    def plain(self, x: Tensor, residual: Tensor | None, inplace: bool) -> Tensor:
        """What the layers make of x one after the other, plus the shortcut, or where there is none, the residual.

        ``inplace``: ReLU and addition may overwrite what a layer returned.
        """
        across, y = residual if self.shortcut == "none" else x, x
        for i, (_, bn, _, conv) in enumerate(self.pairs):
            y = F.relu(normalise(bn, y), inplace)
            if i == 0 and self.container is not None:
                across = self.container(y if self.shortcut == "activated" else x)
            y = conv(y)
        if residual is not None and isinstance(y, Tensor):  # not in symbolic tracing, which calls with no tensors
            checks.addend(residual, y.shape)
        return y if across is None else add(y, across, inplace)


# What a fused call reads of a layer, by the dictionary that has it.
_TENSORS = {
    nn.BatchNorm2d: {"_parameters": PARAMETERS, "_buffers": ("running_mean", "running_var", "num_batches_tracked")},
    nn.Conv2d: {"_parameters": PARAMETERS},
    nn.Sequential: {},
}


def _parameters(layer: nn.Module) -> dict[str, Any]:
    """A layer's parameters, and the plain attributes in their place.

    A hypernetwork sets such, and FSDP in a backward: a checkpoint's forward that found no parameters there and ran the
    plain layers would not be the one that it repeats.
    """
    state = layer.__dict__
    plain = {name: state[name] for name in PARAMETERS if name in state}
    return {**state["_parameters"], **plain} if plain else state["_parameters"]


def _obstacle(name: str, child: nn.Module, kind: type[nn.Module]) -> str | None:
    if type(child) is not kind:
        return f"{name} is of type {type(child).__name__}, not a plain nn.{kind.__name__}"
    if hooked(child):
        return f"{name} has hooks, which run only when the layer itself is called"
    if has_own_forward(child):
        return f"{name} has a forward of its own"
    for members, keys in _TENSORS[kind].items():
        attributes = members == "_parameters" and not getattr(child, "_is_replica", False)  # of nn.DataParallel
        tensors = _parameters(child) if attributes else child.__dict__[members]
        for key in keys:
            if key not in tensors:
                return f"{name}.{key} is a plain attribute, neither a parameter nor a buffer"
            if is_traceable_wrapper_subclass(tensors[key]) or has_own_functions(type(tensors[key])):
                return f"{name}.{key} is a {type(tensors[key]).__name__}, not a plain tensor"
    if kind is nn.Conv2d and child.padding_mode != "zeros":
        return f"{name} has padding_mode={child.padding_mode!r}, not 'zeros'"
    if (
        kind is nn.Conv2d
        and child.padding == "same"
        and checks.lopsided(checks.pair("dilation", child.dilation, 1), child.kernel_size)
    ):
        return f"{name} has padding='same' with a filter of {child.kernel_size}, which pads one side more"
    return None


@tracing.constant
def has_own_functions(kind: type) -> bool:
    """Whether a subclass of tensors says itself what torch's functions make of it."""
    return _torch_function(kind) not in _TORCH_FUNCTIONS


def _torch_function(kind: type) -> Any:
    function = getattr(kind, "__torch_function__", None)
    return getattr(function, "__func__", function)


# Of what is no tensor, of a plain tensor or a subclass without one of its own, and of a parameter.
_TORCH_FUNCTIONS = (None, *map(_torch_function, (Tensor, nn.Parameter)))


# For each batch norm that may move its statistics: a thread that repeats a call puts other buffers in for a while.
_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
os.register_at_fork(after_in_child=_turns.clear)  # where no other thread would give one back


def normalise(bn: nn.Module, x: Tensor) -> Tensor:
    """What the layer makes of x; its running statistics stay as they are where a checkpoint repeats the call."""
    repeated = running.recomputing()
    moves = isinstance(bn, nn.modules.batchnorm._BatchNorm) and (bn.training or repeated)
    if not moves or torch.compiler.is_compiling():
        return bn(x)
    with _turns.setdefault(bn, threading.RLock()):
        if not repeated:
            return bn(x)
        before = dict(bn._buffers)
        try:
            bn._buffers.update({name: running.copy(t) for name, t in before.items()})
            return bn(x)
        finally:
            bn._buffers.update(before)


def overwritable(child: nn.Module) -> bool:
    """Whether what a layer returns may be overwritten: it makes a new tensor, and no hook and no mode has kept it."""
    if type(child) not in (nn.BatchNorm2d, nn.Conv2d) or has_own_forward(child) or running.watched():
        return False
    return not hooked(child) and not nn_module._has_any_global_hook()


def add(y: Tensor, residual: Tensor, inplace: bool) -> Tensor:
    """y + residual in the type of y, and in y where that is allowed: vmap refuses it where it maps the residual alone.

    The type is that of an addition in place also where a hook or a mode forbids it: under autocast they may differ.
    """
    return y.add_(residual) if inplace and not backends.is_transforming() else (y + residual).to(y.dtype)


def conv_geometry(conv: nn.Conv2d) -> Conv:
    """Geometry of a plain convolution layer."""
    settings = conv.stride, conv.padding, conv.dilation
    if not all(isinstance(setting, tuple) and len(setting) == 2 for setting in settings):
        return checks.geometry(*settings, conv.groups, _parameters(conv)["weight"])
    return Conv(*conv.stride, *conv.padding, *conv.dilation, conv.groups)


def _unit(bn: nn.BatchNorm2d, conv: nn.Conv2d) -> Unit:
    # The dictionaries are read directly: attributes of modules cost ten times as much, and this runs for every layer.
    buffers, affine, filters = bn._buffers, _parameters(bn), _parameters(conv)
    mean, var = buffers["running_mean"], buffers["running_var"]
    batch = bn.training or (mean is None and var is None)
    geometry = conv_geometry(conv)
    return Unit(
        filters["weight"], filters["bias"], affine["weight"], affine["bias"], mean, var, batch, bn.eps, geometry
    )
