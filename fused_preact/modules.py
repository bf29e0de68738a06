"""The unit as a module, and what every fused module shares: the step down to plain layers, and the running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import backends, checks
from .checks import Shortcut, Unit
from .functional import run, update_running
from .schedule import MEAN, VARIANCE

_NO_SHORTCUT = Shortcut()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fused(nn.Module):
    """A module whose children bn, conv, ... run as one autograd node.

    Where a child cannot be fused (it has hooks, or it is another kind of layer), or with ``backend="eager"``, the children run one after
    the other as plain layers; `fused_preact.explain` says so.
    """

    def __init__(self, backend: str) -> None:
        super().__init__()
        backends.check_name(backend, ("eager",))
        self.backend = backend

    def pairs(self) -> list[tuple[str, nn.Module, str, nn.Module]]:
        """(name, batch norm, name, convolution) of each unit, in order."""
        raise NotImplementedError

    def others(self) -> list[tuple[str, nn.Module]]:
        """The other children that take part: the shortcut's."""
        return []

    def eager(self, x: Tensor, residual: Tensor | None, inplace: bool) -> Tensor:
        """The same function by plain layers; ``inplace`` where ReLU and addition may overwrite what a layer returned."""
        raise NotImplementedError

    def obstacle(self) -> str | None:
        """Why the children run as plain layers, or None where they are fused."""
        if self.backend == "eager":
            return "backend='eager' was asked for"
        if nn_module._has_any_global_hook():
            return "a global module hook is set, which runs for every layer"
        for bn_name, bn, conv_name, conv in self.pairs():
            reason = _obstacle(bn_name, bn, nn.BatchNorm2d) or _obstacle(conv_name, conv, nn.Conv2d)
            if reason is not None:
                return reason
        for name, child in self.others():
            reason = _obstacle(name, child, nn.Conv2d)
            if reason is not None:
                return reason
        return None

    def step_down(self, reason: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the children as plain layers, and note the reason for `explain`."""
        if backends.is_recording():
            backends.record(backends.Choice(self, "eager", dict.fromkeys(backends.NAMES[1:], reason)))
        # A hook may keep what its layer returned, and a layer of another kind may return its input.
        layers = [child for _, bn, _, conv in self.pairs() for child in (bn, conv)]
        plain = all(type(child) in (nn.BatchNorm2d, nn.Conv2d) and not _hooked(child) for child in layers)
        return self.eager(x, residual, plain and not nn_module._has_any_global_hook())

    def fused(
        self, x: Tensor, shortcut: Shortcut = _NO_SHORTCUT, residual: Tensor | None = None, first: int = 0
    ) -> Tensor:
        """Run the units, from ``first`` on, as one node, and update the running statistics once."""
        pairs = self.pairs()[first:]
        units = [_unit(bn, conv) for _, bn, _, conv in pairs]
        y, rows = run(x, units, shortcut=shortcut, residual=residual, backend=self.backend, where=self)
        _update([bn for _, bn, _, _ in pairs], rows)
        return y

    def extra_repr(self) -> str:
        return "" if self.backend == "auto" else f"backend={self.backend!r}"


def _hooked(child: nn.Module) -> bool:
    state = child.__dict__
    return any(state[hooks] for hooks in _HOOKS)


def _obstacle(name: str, child: nn.Module, kind: type[nn.Module]) -> str | None:
    if type(child) is not kind:
        return f"{name} is a {type(child).__name__}, not a plain nn.{kind.__name__}"
    if _hooked(child):
        return f"{name} has hooks, which only run when the layer itself is called"
    if kind is nn.Conv2d:
        if child.padding_mode != "zeros":
            return f"{name} has padding_mode={child.padding_mode!r}, not 'zeros'"
        if child.padding == "same" and any(d * (r - 1) % 2 for d, r in zip(child.dilation, child.kernel_size, strict=True)):
            return f"{name} has padding='same' with a filter of {child.kernel_size}, which pads one side more than the other"
    return None


def add(y: Tensor, residual: Tensor, inplace: bool) -> Tensor:
    """y + residual, in y where that is allowed."""
    return y.add_(residual) if inplace else y + residual


def conv_geometry(conv: nn.Conv2d) -> checks.Conv:
    """Geometry of a plain convolution layer."""
    if isinstance(conv.padding, str):
        return checks.geometry(conv.stride, conv.padding, conv.dilation, conv.groups, conv.kernel_size)
    return checks.Conv(*conv.stride, *conv.padding, *conv.dilation, conv.groups)


def _unit(bn: nn.BatchNorm2d, conv: nn.Conv2d) -> Unit:
    # The dictionaries are read directly: attribute access of modules costs ten times as much, and this runs for every layer.
    norm, affine, filters = bn._buffers, bn._parameters, conv._parameters
    mean, var = norm["running_mean"], norm["running_var"]
    training = bn.training or (mean is None and var is None)
    return Unit(
        filters["weight"], filters["bias"], affine["weight"], affine["bias"], mean, var, training, bn.eps, conv_geometry(conv)
    )  # fmt: skip


def _update(norms: Sequence[nn.BatchNorm2d], rows: Sequence[Tensor]) -> None:
    """Update the running statistics as nn.BatchNorm2d does, from the rows that the chain made of this batch."""
    counts, plain = [], {}
    for bn, row in zip(norms, rows, strict=True):
        if not (bn.training and bn.track_running_stats):
            continue
        buffers = bn._buffers
        mean, var, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        if count is not None:
            counts.append(count)
        if mean is not None and var is not None:
            values = row.unbind()
            plain.setdefault(bn.momentum, []).append((mean, var, values[MEAN], values[VARIANCE], count))
    if counts:
        torch._foreach_add_(counts, 1)
    for momentum, entries in plain.items():
        if momentum is None:
            for mean, var, m, v, count in entries:
                update_running([mean, var], [m, v], 0.0 if count is None else 1.0 / count)
        else:
            means, variances, m, v, _ = zip(*entries, strict=True)
            update_running([*means, *variances], [*m, *v], momentum)


class BNReLUConv2d(Fused):
    """conv(relu(bn(x))) + residual with the children ``bn`` (nn.BatchNorm2d) and ``conv`` (nn.Conv2d), as one autograd node.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in nn.Conv2d.
        eps, momentum, affine, track_running_stats: as in nn.BatchNorm2d.
        backend: one of `backends.NAMES`, or "eager" for the plain layers.
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
    def from_layers(cls, bn: nn.BatchNorm2d, conv: nn.Conv2d, backend: str = "auto") -> BNReLUConv2d:
        """The unit of two layers that exist already; it holds the layers themselves, not copies.

        Raises:
            TypeError: a layer is not an nn.BatchNorm2d or nn.Conv2d.
            ValueError: the channels of bn are not those that conv reads.
        """
        for name, layer, kind in ("bn", bn, nn.BatchNorm2d), ("conv", conv, nn.Conv2d):
            if not isinstance(layer, (kind, nn.SyncBatchNorm) if name == "bn" else kind):
                raise TypeError(f"{name} must be an nn.{kind.__name__}, got {type(layer).__name__}")
        if bn.num_features != conv.in_channels:
            raise ValueError(f"bn must have the {conv.in_channels} channels that conv reads, got {bn.num_features}")
        unit = cls.__new__(cls)
        Fused.__init__(unit, backend)
        unit.bn, unit.conv, unit.training = bn, conv, conv.training
        return unit

    def pairs(self) -> list[tuple[str, nn.Module, str, nn.Module]]:
        children = self._modules
        return [("bn", children["bn"], "conv", children["conv"])]

    def eager(self, x: Tensor, residual: Tensor | None, inplace: bool) -> Tensor:
        y = self.conv(nn.functional.relu(self.bn(x), inplace))
        return y if residual is None else add(y, residual, inplace)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y [N, K, P, Q] of x [N, C, H, W] and a residual of the shape of y.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        reason = self.obstacle()
        return self.fused(x, residual=residual) if reason is None else self.step_down(reason, x, residual)
