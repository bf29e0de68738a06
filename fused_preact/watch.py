"""What can change of modules between two calls, and how to hear of it: the layers' own dictionaries, classes, hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from operator import attrgetter, contains, eq, is_, itemgetter
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.parameter import is_lazy

from . import tracing

PARAMETERS = ("weight", "bias")
"""Names of the parameters of batch norms and convolutions."""
MEMBERS = ("_modules", "_parameters", "_buffers")
"""Names of the dictionaries in which a module has its members."""
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
_read_members, _read_hooks = itemgetter(*MEMBERS), itemgetter(*_HOOKS)


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
        plain = any(name in state for state in self._states for name in PARAMETERS)
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
    """What computes all layers: the methods of `_METHODS`, and the functions that are called, that of ReLU too."""
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


def has_own_forward(child: nn.Module) -> bool:
    """Whether the module's forward, or what that calls, is not that of its class."""
    return any(name in child.__dict__ for name in _OWN_METHODS)
