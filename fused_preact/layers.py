"""The plain layers of a block: whether they can be fused, what the fused call reads of them, what it writes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from operator import attrgetter, contains, eq, is_, itemgetter
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import backends, checks, running, tracing
from .checks import Block, Shortcut, Unit


class Pair(NamedTuple):
    """The two layers of a unit, and the names by which its module knows them."""

    bn_name: str
    bn: nn.Module
    conv_name: str
    conv: nn.Module


class Layers(NamedTuple):
    """The layers of a block. ``container`` is the shortcut's convolution or the nn.Sequential of it, if it has one.

    ``boxes`` are the modules that the others are in, where they are not the block's own children, with what else is in
    there, as a ReLU; these are not called.
    """

    pairs: list[Pair]
    shortcut: str = "none"
    container_name: str = ""
    container: nn.Module | None = None
    boxes: Sequence[tuple[str, nn.Module]] = ()

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
        reason = _obstacle(name, projection, nn.Conv2d)
        return f"{name} has a bias" if reason is None and projection.bias is not None else reason

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
        if self.container is None:
            return Block(units, Shortcut(self.shortcut))
        projection = self.projection()
        weight = _parameters(projection)["weight"]
        return Block(units, Shortcut(self.shortcut, weight, conv_geometry(projection)))

    def overwritable(self) -> bool:
        """Whether ReLU and addition may overwrite what each of the layers returns."""
        return all(overwritable(pair.bn) and overwritable(pair.conv) for pair in self.pairs)

    def plain(self, x: Tensor, residual: Tensor | None, inplace: bool) -> Tensor:
        """What the layers make of x one after the other, plus the shortcut, or where there is none, the residual.

        ``inplace``: ReLU and addition may overwrite what a layer returned.
        """
        across, y = residual if self.shortcut == "none" else x, x
        for i, (_, bn, _, conv) in enumerate(self.pairs):
            y = F.relu(normalize(bn, y), inplace)
            if i == 0 and self.container is not None:
                across = self.container(y if self.shortcut == "activated" else x)
            y = conv(y)
        return y if across is None else add(y, across, inplace)


_MEMBERS = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SETTINGS = (
    "training", "backend", "shortcut_input", "shortcut_name", "eps", "momentum", "track_running_stats",
    "stride", "padding", "dilation", "groups", "padding_mode", "_compiled_call_impl",
)  # fmt: skip
# Methods that compute a layer: code puts others on one layer, as for images that are to tile, or on all of a class.
_METHODS = {
    nn.Conv2d: ("forward", "_conv_forward"),
    nn.BatchNorm2d: ("forward", "_check_input_dim"),
    nn.Sequential: ("forward",),
}
_OWN_METHODS = tuple(dict.fromkeys(chain.from_iterable(_METHODS.values())))
_read_members, _read_hooks = itemgetter(*_MEMBERS), itemgetter(*_HOOKS)


class Watch:
    """All that a fused call reads of a module and those inside of it, but the numbers, as it was when this was made.

    It is compared in every call, of a deep net by tens of thousands of facts: so the modules' dictionaries are read
    directly, by functions that are written in C, and no object lives longer than its comparison, or there would be much
    to collect. It holds the children and what is in all of them, so that nothing else can take its place.
    """

    def __init__(self, module: nn.Module) -> None:
        self._children, waiting = [], [module]
        while waiting:
            found = [*filter(_is_plain, waiting.pop().__dict__["_modules"].values())]
            self._children += found
            waiting += found
        # Not the module's own dictionary, which has this: both would be left to the collector of cycles.
        self._states = [child.__dict__ for child in self._children]
        by_names: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for state in self._states:
            by_names.setdefault(_settings_in(state), []).append(state)
        self._own, self._settings = _settings_in(module.__dict__), list(by_names.items())
        members = chain.from_iterable(map(_read_members, self._all_states(module)))
        tensors = [t for values in map(dict.values, members) for t in values if isinstance(t, Tensor)]
        self._tensors = [t for t in tensors if not is_lazy(t)]  # a lazy layer's have no shape yet
        self._filters = [t for t in self._tensors if t.dim() > 1]
        parameters = chain.from_iterable(state["_parameters"].values() for state in self._all_states(module))
        self._parameters = [t for t in parameters if t is not None]
        self._objects, self._values = list(self._find_objects(module)), list(self._find_values(module))

    def holds(self, module: nn.Module) -> bool:
        """Whether nothing has changed in the module, or in a copy that shares all that is compared."""
        try:
            return all(map(is_, self._find_objects(module), self._objects)) and all(
                map(eq, self._find_values(module), self._values)  # last: torch.jit.trace notes that a shape is read
            )
        except (KeyError, RuntimeError, ValueError):  # an attribute was deleted, or arrays have no one answer
            return False

    def may_last(self) -> bool:
        """Whether all of it is the module's: no setting can change in place, and no tensor is there for one call.

        A tensor with a graph behind it, or one that `torch.func.functional_call` put in the place of a parameter, would
        be kept until the next call. Of a plain attribute in such a place no later call would hear.
        """
        settings = (s[name] for names, states in self._settings for s in states for name in names)
        own = all(t.is_leaf for t in self._tensors) and all(isinstance(t, nn.Parameter) for t in self._parameters)
        plain = any(name in state for state in self._states for name in _PARAMETERS)
        return own and not plain and not any(isinstance(value, (list, Tensor)) for value in settings)

    def _all_states(self, module: nn.Module) -> Iterator[dict[str, Any]]:
        return chain((module.__dict__,), self._states)

    def _find_objects(self, module: nn.Module) -> Iterator[Any]:
        """What must be the same object. One more or less of them would put another in the place of the last."""
        members = chain.from_iterable(map(_read_members, self._all_states(module)))
        return chain(
            chain.from_iterable(map(dict.values, members)),
            map(type, self._children),
            map(type, self._tensors),  # torch.utils.swap_tensors exchanges it
            (bool(nn_module._has_any_global_hook()),),
            _methods_and_functions(),
        )

    def _find_values(self, module: nn.Module) -> Iterator[Any]:
        """What must be equal: as many as before."""
        return chain(
            map(module.__dict__.__getitem__, self._own),
            *(map(itemgetter(*names), states) for names, states in self._settings),
            map(any, map(_read_hooks, self._all_states(module))),
            map(len, self._states),
            *(map(contains, self._states, repeat(name)) for name in _OWN_METHODS),
            map(attrgetter("dtype"), self._tensors),  # what .data is set to may be of another type or shape
            map(Tensor.numel, self._tensors),  # of a vector the whole shape
            map(attrgetter("shape"), self._filters),
        )


def _settings_in(state: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in _SETTINGS if name in state)


def _is_plain(child: Any) -> bool:
    """Whether a child's members are in dictionaries; those of scripted modules are not, and they run as they are."""
    return child is not None and isinstance(child.__dict__.get("_modules"), dict)


def _methods_and_functions() -> list[Callable]:
    """Those, and the functions that the layers call, ReLU too."""
    methods = [getattr(kind, name) for kind, names in _METHODS.items() for name in names]
    return [*methods, F.batch_norm, F.relu, F.conv2d]


_OF_TORCH = _methods_and_functions()


@tracing.constant
def replaced() -> bool:
    """Whether what computes plain layers is another, for all layers, than when this was imported."""
    return _methods_and_functions() != _OF_TORCH


def hooked(child: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    return any(child.__dict__[name] for name in _HOOKS)


def bare(child: nn.Module) -> None:
    """Let calling the module run no more than the forward of its class."""
    for name in _HOOKS:
        child.__dict__[name].clear()
    for name in _OWN_METHODS:
        child.__dict__.pop(name, None)


# What a fused call reads of a layer, by the dictionary that has it.
_PARAMETERS = ("weight", "bias")
_TENSORS = {
    nn.BatchNorm2d: {"_parameters": _PARAMETERS, "_buffers": ("running_mean", "running_var")},
    nn.Conv2d: {"_parameters": _PARAMETERS},
    nn.Sequential: {},
}


def _parameters(layer: nn.Module) -> dict[str, Any]:
    """A layer's parameters, and the plain attributes in their place.

    A hypernetwork sets such, and FSDP in a backward: a checkpoint's forward that found no parameters there and ran the
    plain layers would not be the one that it repeats.
    """
    state = layer.__dict__
    plain = {name: state[name] for name in _PARAMETERS if name in state}
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
    function = getattr(kind, "__torch_function__", None)
    return getattr(function, "__func__", function) not in _TORCH_FUNCTIONS


# Of what is no tensor, of a plain tensor or a subclass without one of its own, and of a parameter.
_TORCH_FUNCTIONS = None, Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__


def has_own_forward(child: nn.Module) -> bool:
    """Whether the module's forward, or what that calls, is not that of its class."""
    return any(name in child.__dict__ for name in _OWN_METHODS)


def normalize(bn: nn.Module, x: Tensor) -> Tensor:
    """What the layer makes of x; its running statistics stay as they are where a checkpoint repeats the call."""
    if not (isinstance(bn, nn.modules.batchnorm._BatchNorm) and running.recomputing()):
        return bn(x)
    before = dict(bn._buffers)
    bn._buffers.update({name: running.copy(t) for name, t in before.items()})
    try:
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


def conv_geometry(conv: nn.Conv2d) -> checks.Conv:
    """Geometry of a plain convolution layer."""
    settings = conv.stride, conv.padding, conv.dilation
    if not all(isinstance(setting, tuple) and len(setting) == 2 for setting in settings):
        return checks.geometry(*settings, conv.groups, _parameters(conv)["weight"])
    return checks.Conv(*conv.stride, *conv.padding, *conv.dilation, conv.groups)


def _unit(bn: nn.BatchNorm2d, conv: nn.Conv2d) -> Unit:
    # The dictionaries are read directly: attributes of modules cost ten times as much, and this runs for every layer.
    buffers, affine, filters = bn._buffers, _parameters(bn), _parameters(conv)
    mean, var = buffers["running_mean"], buffers["running_var"]
    batch = bn.training or (mean is None and var is None)
    geometry = conv_geometry(conv)
    return Unit(
        filters["weight"], filters["bias"], affine["weight"], affine["bias"], mean, var, batch, bn.eps, geometry
    )


class RunningUpdate(NamedTuple):
    """Batch norms whose running statistics are updated together: each layer once, all with one momentum."""

    momentum: float | None  # None, the cumulative average, is of one layer
    counts: list[Tensor]
    units: list[int]  # of which the statistics come
    mean: list[Tensor]
    var: list[Tensor]


def running_updates(pairs: Iterable[Pair]) -> list[RunningUpdate]:
    """What a call of these layers updates, in order: buffers that are met twice take one batch after the other."""
    updates: list[RunningUpdate] = []
    by_momentum: dict[float | None, RunningUpdate] = {}
    seen: set[Tensor] = set()
    for i, (_, bn, _, _) in enumerate(pairs):
        if not (bn.training and bn.track_running_stats):
            continue
        own = [t for t in bn._buffers.values() if t is not None]
        if any(t in seen for t in own):
            by_momentum.clear(), seen.clear()
        seen.update(own)
        if bn.momentum is None or bn.momentum not in by_momentum:
            by_momentum[bn.momentum] = RunningUpdate(bn.momentum, [], [], [], [])
            updates.append(by_momentum[bn.momentum])
        update, buffers = by_momentum[bn.momentum], bn._buffers
        mean, var, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        if count is not None:
            update.counts.append(count)
        if mean is not None:  # then var is there too, or the call is refused
            update.units.append(i)
            update.mean.append(mean)
            update.var.append(var)
    return updates


def update(updates: Iterable[RunningUpdate], rows: Sequence[Tensor]) -> None:
    """Update the running statistics as nn.BatchNorm2d does, from the rows that a fused call made of this batch."""
    for momentum, counts, units, mean, var in updates:
        running.update(mean, var, counts, rows, units, momentum)
