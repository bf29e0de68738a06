"""Somebody's net with its pre-activation blocks fused: the same layers under the same names, run by other blocks."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from . import backends, trial
from .blocks import Branch, PreActBlock, PreActBottleneck, ResidualBlock
from .checks import one_of
from .dense import RETURNS, DenseLayer, Transition
from .layers import Layers, Pair
from .models import FirstPreActBlock
from .modules import Fused
from .stage import MEMORY, PreActStage
from .watch import has_own_forward, hooked

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_KINDS: dict[int, tuple[type[ResidualBlock], ...]] = {1: (), 2: (PreActBlock, FirstPreActBlock), 3: (PreActBottleneck,)}
_RESIDUAL = 0
_DROP_RATES = ("drop_rate", "droprate", "dropRate")  # as dense layers name it


def fuse(net: nn.Module, memory: str = "fast", backend: str = "auto") -> nn.Module:
    """Exchange the pre-activation blocks of a net for fused ones, and each nn.Sequential of nothing else for a stage.

    A block is any module whose layers are bn, conv (, bn, conv (, bn, conv)), of whatever names, and at most one more
    convolution, and which computes of them what `PreActBlock`, `PreActBottleneck` or `models.FirstPreActBlock` does, or
    of up to two pairs what `DenseLayer` or `Transition` does, or no more than the pairs: that, and all gradients, is
    tried with copies, in training and in eval mode, on random parameters and images in float64. The fused blocks hold
    the layers themselves: parameters (also those that an optimizer has), keys, settings, modes and hooks of these stay.
    Batch norms that activate, too, as timm's, become plain ones of the same tensors.

    Args:
        net: the net, changed in place; a block or an nn.Sequential of blocks, too.
        memory: of the stages, see `PreActStage`; with another than "fast", each `DenseLayer` is ``memory_efficient``.
            Other blocks that are in no stage keep what "fast" keeps.
        backend: of the blocks, one of `backends.NAMES`.

    Returns:
        net, or what it is exchanged for where it is a block or a sequence of blocks itself.

    Raises:
        TypeError: net is no module.
        ValueError: it has no such block; there is no such mode or backend, or a stage of its blocks has not the mode.

    Warns:
        UserWarning: modules of such layers have hooks, are compiled or compute something else: they stay as they are.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a module, got {type(net).__name__}")
    one_of("memory", memory, MEMORY)
    one_of("backend", backend, backends.NAMES)
    exchange = _Exchange(memory, backend)
    result = exchange.all_of(net)
    if not exchange.made:
        raise ValueError(
            "net must have a block of batch norm, ReLU and convolution in this order, one to three times, "
            f"not fused yet; got a {type(net).__name__} without any{exchange.left()}"
        )
    exchange.apply()
    if exchange.left():
        warnings.warn("fuse leaves blocks as they are" + exchange.left(), stacklevel=2)
    return result


class _Left(NamedTuple):
    """Why what has these layers is no block, and how much of what it computes the nearest of blocks does."""

    reason: str
    layers: set[nn.Module]
    nearest: int = -1


class _Exchange:
    """What is to be put where. Nothing changes in the net before `apply`."""

    def __init__(self, memory: str, backend: str) -> None:
        self.memory, self.backend = memory, backend
        self.made: dict[nn.Module, nn.Module] = {}  # a module that the net has in two places is exchanged once
        self._left: dict[str, _Left] = {}  # by name
        self._fused: set[nn.Module] = set()  # the layers of what is
        self._changes: list[tuple[nn.Module, str, nn.Module]] = []

    def all_of(self, net: nn.Module) -> nn.Module:
        """What a net is exchanged for, itself where that is what is inside of it.

        Residual blocks come first, then what is nothing but units, of two before of one: the branch of a block may be a
        module of its own, and so may each unit of it.
        """
        for dense in (_RESIDUAL, 2, 1):
            self._changes = []
            result = self._of(net, dense)
        return result

    def _of(self, module: nn.Module, dense: int, name: str = "") -> nn.Module:
        """What a module is exchanged for, itself where nothing is. What is inside of it comes first.

        ``dense``: what is looked for, see `_candidates`.
        """
        if module in self.made or isinstance(module, (Fused, PreActStage, torch.jit.ScriptModule)):
            return self.made.get(module, module)
        if _is_wrapper(module):
            if any(_layers(inner) is not None for inner in module.modules()):
                self._left[name] = _Left(_COMPILED, set(module.modules()))
            return module
        children = {}
        for key, child in module._modules.items():
            children[key] = None if child is None else self._of(child, dense, f"{name}.{key}" if name else key)
        changes = [(module, key, child) for key, child in children.items() if child is not module._modules[key]]
        if type(module) is nn.Sequential and children and all(isinstance(c, ResidualBlock) for c in children.values()):
            new = module if _why_called(module) else PreActStage(OrderedDict(children), memory=self.memory)
        else:
            new = module if changes else self._block(module, dense, name) or module
        if new is module:
            self._changes += changes
        else:
            new.training = module.training
            self.made[module] = new
        return new

    def apply(self) -> None:
        """Put everything in its place."""
        for module, key, new in self._changes:
            module._modules[key] = new

    def left(self) -> str:
        """What stays as it is though it has the layers of a block, by the reason; empty where there is nothing.

        A block may be inside of it, or it inside of a block.
        """
        innermost: dict[frozenset[nn.Module], str] = {}  # which is noted before what it is in
        for name, left in self._left.items():
            innermost.setdefault(frozenset(left.layers), name)
        by_reason: dict[str, list[str]] = {}
        for name in innermost.values():
            left = self._left[name]
            plain = left.layers - self._fused
            if plain and not any(plain <= other.layers < left.layers for other in self._left.values()):
                by_reason.setdefault(left.reason, []).append(name or "net")
        return "".join(f"; {', '.join(names)}: {reason}" for reason, names in by_reason.items())

    def _block(self, old: nn.Module, dense: int, name: str) -> Branch | None:
        layers = _layers(old)
        candidates = [] if layers is None else list(_candidates(old, layers, dense))
        if not candidates:
            return None
        try:
            block = _block_of(old, layers, candidates)
        except _NoBlockError as error:
            left = _Left(str(error), layers.all(), error.nearest)
            self._left[name] = max(self._left.get(name, left), left, key=lambda some: some.nearest)
            return None
        block.backend = self.backend
        if isinstance(block, DenseLayer):
            repeats = any(getattr(old, flag, False) is True for flag in trial.REPEATING)
            block.memory_efficient = self.memory != "fast" or repeats
        self._fused |= layers.all()
        return block


class _NoBlockError(Exception):
    """Why a module of the layers of a block is none; ``nearest`` is that of `_Left`."""

    def __init__(self, reason: str, nearest: int = -1) -> None:
        super().__init__(reason)
        self.nearest = nearest


_Candidate = tuple[type[Branch], str, dict[str, Any]]  # class, shortcut and settings
_COMPILED = "it is compiled: fuse it before that"
_WALKED = "it is a plain nn.Sequential, which the module that has it may go through itself: give it a class of its own"


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module is what torch.compile returned, which goes on to call what it was made of."""
    return "_orig_mod" in module._modules


def _why_called(module: nn.Module) -> str | None:
    """Why nothing can take the place of a module, or None."""
    if _is_wrapper(module) or module._compiled_call_impl is not None:
        return _COMPILED
    if hooked(module) or has_own_forward(module):
        return "it has hooks or a forward of its own, which run only when it is called"
    return None


def _block_of(old: nn.Module, layers: Layers, candidates: Iterable[_Candidate]) -> Branch:
    """That of the candidates which computes of these layers what ``old`` does, its layers plain.

    Raises:
        _NoBlockError: none does, or it cannot be tried.
    """
    reasons = (_why_called(module) for module in old.modules() if module not in layers.all())
    if reason := next(filter(None, reasons), None):
        raise _NoBlockError(reason)
    if len(inspect.signature(old.forward).parameters) != 1:
        raise _NoBlockError("its forward takes more than x")
    channels, takes_x = layers.pairs[0].bn.num_features, True
    try:
        theirs = trial.outputs(old, channels)
    except Exception as error:  # it is somebody else's code, which may raise anything
        theirs, takes_x = trial.outputs_if_any(old, channels, 1), False
        if theirs is None:
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise _NoBlockError(f"a copy of it that is tried raises {said}") from error
    nearest = -1
    for kind, shortcut, settings in candidates:
        block = _built(kind, old, layers._replace(shortcut=shortcut), settings)
        ours = trial.outputs_if_any(block, channels)
        if ours is None or list(old.state_dict()) != list(block.state_dict()):
            continue
        agreeing = trial.agreement(theirs, ours)
        if agreeing < len(theirs):
            if not settings.get("drop_rate"):  # a block that drops elsewhere is to be told that it drops
                nearest = max(nearest, agreeing)
            continue
        nearest = agreeing
        if type(old) is nn.Sequential and not isinstance(block, ResidualBlock):
            raise _NoBlockError(_WALKED, nearest)
        if _takes_the_same(block, old, channels, takes_x):
            return block
    how = "" if nearest < 0 else f": it {trial.difference(theirs, nearest)}"
    raise _NoBlockError(f"of the layers of a block {type(old).__name__} computes something else{how}", nearest)


def _built(kind: type[Branch], old: nn.Module, layers: Layers, settings: dict[str, Any]) -> Branch:
    """A block of this kind of the layers of ``old``, which run plain."""
    try:
        return kind.of(layers, _children(old, layers), "eager", **settings)
    except KeyError as error:  # nn.Module's
        said = f"no child of a {kind.__name__} can have the name of one of its own: {error.args[0]}"
        raise _NoBlockError(said) from error


def _takes_the_same(block: Branch, old: nn.Module, channels: int, takes_x: bool) -> bool:
    """Whether a block that makes of images what ``old`` does also takes them as that does: whole, or in parts, too.

    ``takes_x``: ``old`` takes them whole.
    """
    several = trial.takes_several(old)
    if isinstance(block, ResidualBlock):
        return takes_x and not several
    of_parts = trial.outputs_if_any(old, channels, 2)
    if of_parts is None:
        return not several
    return trial.alike(of_parts, trial.outputs_if_any(block, channels, 2) or [])


def _candidates(old: nn.Module, layers: Layers, dense: int) -> Iterator[_Candidate]:
    """What a module of these layers may be: residual blocks, or of so many units a branch, or what DenseNets have."""
    if layers.container is None and len(layers.pairs) == dense:
        yield Branch, "none", {}
        rates = [rate for name in _DROP_RATES if isinstance(rate := getattr(old, name, None), float)]
        for rate, returns in itertools.product(dict.fromkeys((*rates, 0.0)), RETURNS):
            yield DenseLayer, "none", {"drop_rate": rate, "memory_efficient": False, "returns": returns}
        if dense == 1:
            yield Transition, "none", {}
    if dense == _RESIDUAL:
        shortcuts = ("identity",) if layers.container is None else ("activated", "raw")
        for kind, shortcut in itertools.product(_KINDS[len(layers.pairs)], shortcuts):
            yield kind, shortcut, {}


def _layers(old: nn.Module) -> Layers | None:
    """The layers of a module that may be a block, with the shortcut "identity"; None where it cannot be one."""
    if type(old).forward is nn.Module.forward:  # a box that nothing calls, as an nn.ModuleList
        return None
    pairs: list[Pair] = []
    norm, across = None, None
    for name, layer in [("", old)] if old._parameters or old._buffers else _leaves(old):
        if norm is None and isinstance(layer, _NORMS):
            norm = name, layer
        elif norm is not None and isinstance(layer, nn.Conv2d):
            pairs.append(Pair(*norm, name, layer))
            norm = None
        elif across is None and isinstance(layer, nn.Conv2d):
            across = name, layer
        else:
            return None
        if len(pairs) > max(_KINDS):
            return None
    if norm is not None or len(pairs) not in _KINDS or (across is not None and across[0].count(".") > 1):
        return None
    if across is not None and any(path.startswith(across[0].partition(".")[0] + ".") for path in _paths(pairs)):
        return None  # the shortcut's box is to hold nothing else
    layers = Layers(pairs, "identity", *_shortcut(across), _boxes(old, pairs))
    conv, C, K = layers.projection(), pairs[0].conv.in_channels, pairs[-1].conv.out_channels
    fits = (len(pairs) < 3 or C == K) if conv is None else (conv.in_channels, conv.out_channels) == (C, K)
    return layers if fits else None


def _shortcut(across: tuple[str, nn.Module] | None) -> tuple[str, nn.Module | None]:
    """Name and module of a shortcut's convolution as `ResidualBlock` has it: itself, or in an nn.Sequential."""
    if across is None:
        return "shortcut", None
    (name, _, key), conv = across[0].partition("."), across[1]
    return name, nn.Sequential(OrderedDict({key: conv})).train(conv.training) if key else conv


def _boxes(old: nn.Module, pairs: list[Pair]) -> list[tuple[str, nn.Module]]:
    """The modules that layers are in, with what else is in them: none of these is called."""
    paths = _paths(pairs)
    tops = {path.partition(".")[0] for path in paths}
    return [
        (name, box)
        for name, box in old.named_modules()
        if name.partition(".")[0] in tops and not any(f"{name}.".startswith(f"{path}.") for path in paths)
    ]


def _paths(pairs: list[Pair]) -> list[str]:
    return [path for pair in pairs for path in (pair.bn_name, pair.conv_name)]


def _leaves(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What has tensors inside of a module. Of the rest, ReLU or dropout, tells what the module computes."""
    for name, child in module.named_children():
        if isinstance(child, (*_NORMS, nn.Conv2d)) or child._parameters or child._buffers:
            yield path + name, child
        else:
            yield from _leaves(child, f"{path}{name}.")


def _children(old: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """The children of a block of these layers: those of ``old``, in its order, that have one."""
    found = {path.partition(".")[0]: None for path in _paths(layers.pairs)}
    if layers.container is not None:
        found[layers.container_name] = layers.container
    return {name: found[name] or _plain(child) for name, child in old._modules.items() if name in found}


def _plain(norm: nn.Module) -> nn.Module:
    """A batch norm of the same tensors and settings without the activation that a subclass adds to it, or its name.

    Anything else as it is: a forward of its own may look at more of the batch, or of other processes, than a trial has,
    and hooks are to go on hearing of what is behind the activation.
    """
    kind = type(norm)
    if kind is nn.BatchNorm2d or not issubclass(kind, nn.BatchNorm2d) or hooked(norm):
        return norm
    if kind.forward is not nn.BatchNorm2d.forward and not norm._modules:
        return norm
    plain = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
    plain.__dict__ = norm.__dict__ | {"_modules": {}}
    return plain
