"""The unit as a module, and what the fused modules share: the way down to plain layers, and the running statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import backends, checks
from .checks import Shortcut, Unit
from .functional import execute, make_plan, update_running
from .schedule import MEAN, VARIANCE


class Pair(NamedTuple):
    """The two layers of a unit, and the names by which its module knows them."""

    bn_name: str
    bn: nn.Module
    conv_name: str
    conv: nn.Module


class Fused(nn.Module):
    """A module whose children bn, conv, ... run as one autograd node.

    Where a child cannot be fused (it has hooks, or it is another kind of layer), or with ``backend="eager"``, the
    children run one after the other as plain layers; `fused_preact.explain` says so.
    """

    def __init__(self, backend: str) -> None:
        super().__init__()
        backends.check_name(backend)
        self.backend = backend

    def dispatch(
        self,
        pairs: Sequence[Pair],
        x: Tensor,
        eager: Callable[[bool], Tensor],
        shortcut: str = "none",
        container: tuple[str, nn.Module] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Run ``pairs`` as one node and update the running statistics once, or else call ``eager``.

        ``eager`` computes the same by the layers themselves, and is told whether ReLU and addition may overwrite what a
        layer returned. ``container`` is the name and the nn.Sequential of the shortcut's convolution, if it has one.
        """
        reason = self.obstacle(pairs, container)
        if reason is not None:
            if backends.is_recording():
                backends.record(backends.Choice(self, "eager", dict.fromkeys(backends.FUSED, reason)))
            return eager(all(overwritable(pair.bn) and overwritable(pair.conv) for pair in pairs))
        units = [_unit(pair.bn, pair.conv) for pair in pairs]
        across = Shortcut(shortcut)
        if container is not None:
            projection = container[1]._modules["0"]
            across = Shortcut(shortcut, projection._parameters["weight"], conv_geometry(projection))
        plan = make_plan(x, units, across, residual, self.backend)
        plan.record(self)
        if plan.backend == "eager":
            return eager(True)
        y, rows = execute(plan, x, units, across, residual)
        _update(pairs, rows)
        return y

    def obstacle(self, pairs: Sequence[Pair], container: tuple[str, nn.Module] | None = None) -> str | None:
        """Why the children run as plain layers, or None where they are fused."""
        if self.backend == "eager":
            return "backend='eager' was asked for"
        if nn_module._has_any_global_hook():
            return "a global module hook is set, which runs for every layer"
        for bn_name, bn, conv_name, conv in pairs:
            reason = _obstacle(bn_name, bn, nn.BatchNorm2d) or _obstacle(conv_name, conv, nn.Conv2d)
            if reason is not None:
                return reason
        if container is None:
            return None
        name, box = container
        if type(box) is not nn.Sequential or len(box._modules) != 1:
            return f"{name} is not an nn.Sequential of one convolution"
        reason = _obstacle(name, box, nn.Sequential) or _obstacle(f"{name}.0", box[0], nn.Conv2d)
        if reason is None and box[0].bias is not None:
            return f"{name}.0 has a bias"
        return reason

    def extra_repr(self) -> str:
        """The backend, where it is not the default."""
        return "" if self.backend == "auto" else f"backend={self.backend!r}"


def _hooked(child: nn.Module) -> bool:
    s = child.__dict__
    return bool(s["_forward_hooks"] or s["_forward_pre_hooks"] or s["_backward_hooks"] or s["_backward_pre_hooks"])


def _obstacle(name: str, child: nn.Module, kind: type[nn.Module]) -> str | None:
    if type(child) is not kind:
        return f"{name} is of type {type(child).__name__}, not a plain nn.{kind.__name__}"
    if _hooked(child):
        return f"{name} has hooks, which run only when the layer itself is called"
    if kind is nn.Conv2d and child.padding_mode != "zeros":
        return f"{name} has padding_mode={child.padding_mode!r}, not 'zeros'"
    if kind is nn.Conv2d and child.padding == "same" and checks.lopsided(child.dilation, child.kernel_size):
        return f"{name} has padding='same' with a filter of {child.kernel_size}, which pads one side more"
    return None


def overwritable(child: nn.Module) -> bool:
    """Whether what a layer returns may be overwritten: it makes a new tensor, and no hook has kept it."""
    return type(child) in (nn.BatchNorm2d, nn.Conv2d) and not _hooked(child) and not nn_module._has_any_global_hook()


def add(y: Tensor, residual: Tensor, inplace: bool) -> Tensor:
    """y + residual, in y where that is allowed."""
    return y.add_(residual) if inplace else y + residual


def conv_geometry(conv: nn.Conv2d) -> checks.Conv:
    """Geometry of a plain convolution layer."""
    if isinstance(conv.padding, str):
        return checks.geometry(conv.stride, conv.padding, conv.dilation, conv.groups, conv.weight)
    return checks.Conv(*conv.stride, *conv.padding, *conv.dilation, conv.groups)


def _unit(bn: nn.BatchNorm2d, conv: nn.Conv2d) -> Unit:
    # The dictionaries are read directly: attributes of modules cost ten times as much, and this runs for every layer.
    buffers, affine, filters = bn._buffers, bn._parameters, conv._parameters
    mean, var = buffers["running_mean"], buffers["running_var"]
    batch = bn.training or (mean is None and var is None)
    geometry = conv_geometry(conv)
    return Unit(
        filters["weight"], filters["bias"], affine["weight"], affine["bias"], mean, var, batch, bn.eps, geometry
    )


def _update(pairs: Sequence[Pair], rows: Sequence[Tensor]) -> None:
    """Update the running statistics as nn.BatchNorm2d does, from the rows that the chain made of this batch."""
    counts: list[Tensor] = []
    kept: dict[float | None, tuple[list[Tensor], list[Tensor]]] = {}
    for (_, bn, _, _), row in zip(pairs, rows, strict=True):
        if not (bn.training and bn.track_running_stats):
            continue
        buffers, momentum = bn._buffers, bn.momentum
        mean, var, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        if count is not None:
            counts.append(count)
        if mean is None or var is None:
            continue
        if momentum is None:  # A cumulative average: 1/count of the count that includes this batch.
            update_running([mean, var], [row[MEAN], row[VARIANCE]], 0.0 if count is None else 1.0 / (count + 1))
        else:
            running, batch = kept.setdefault(momentum, ([], []))
            running += (mean, var)
            batch += (row[MEAN], row[VARIANCE])
    if counts:
        torch._foreach_add_(counts, 1)
    for momentum, (running, batch) in kept.items():
        update_running(running, batch, momentum)


class BNReLUConv2d(Fused):
    """conv(relu(bn(x))) + residual, children ``bn`` (nn.BatchNorm2d) and ``conv`` (nn.Conv2d), as one autograd node.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in nn.Conv2d.
        eps, momentum, affine, track_running_stats: as in nn.BatchNorm2d.
        backend: one of `backends.NAMES`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(backend)
        like = {"device": device, "dtype": dtype}
        self.bn = nn.BatchNorm2d(in_channels, eps, momentum, affine, track_running_stats, **like)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **like)

    @classmethod
    def from_layers(cls, bn: nn.Module, conv: nn.Conv2d, backend: str = "auto") -> BNReLUConv2d:
        """The unit of two layers that exist already; it holds the layers themselves, not copies.

        Raises:
            TypeError: bn is no batch norm, or conv no nn.Conv2d.
            ValueError: bn does not have the channels that conv reads.
        """
        if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
            raise TypeError(f"bn must be an nn.BatchNorm2d, got {type(bn).__name__}")
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        if bn.num_features != conv.in_channels:
            raise ValueError(f"bn must have the {conv.in_channels} channels that conv reads, got {bn.num_features}")
        unit = cls.__new__(cls)
        Fused.__init__(unit, backend)
        unit.bn, unit.conv, unit.training = bn, conv, conv.training
        return unit

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y [N, K, P, Q] of x [N, C, H, W] and a residual of the shape of y.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        children = self._modules
        bn, conv = children["bn"], children["conv"]

        def eager(inplace: bool) -> Tensor:
            y = conv(F.relu(bn(x), inplace))
            return y if residual is None else add(y, residual, inplace)

        return self.dispatch([Pair("bn", bn, "conv", conv)], x, eager, residual=residual)
