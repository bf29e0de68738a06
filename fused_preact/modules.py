"""The unit as a module, and what the fused modules share: the way down to plain layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import backends, running
from .checks import one_of
from .layers import Layers, Pair
from .runs import Run, lasting_state, remembered
from .watch import replaced


class _Gathered(NamedTuple):
    """The layers of a fused module, and the run that they make or the reason why they make none."""

    layers: Layers
    reason: str | None
    run: Run | None


class Fused(nn.Module):
    """A module whose children bn, conv, ... run as one autograd node.

    Where a child cannot be fused (it has hooks, or it is another kind of layer), or with ``backend="eager"``, the
    children run one after the other as plain layers; `fused_preact.explain` says so.
    """

    def __init__(self, backend: str) -> None:
        super().__init__()
        one_of("backend", backend, backends.NAMES)
        self.backend = backend

    def __getstate__(self) -> dict[str, Any]:
        return lasting_state(self)

    def _layers(self) -> Layers:
        """The children that are fused, in order."""
        raise NotImplementedError

    def _obstacle(self, layers: Layers) -> str | None:
        """Why the children run as plain layers, or None where they are fused."""
        if self.backend == "eager":
            return "backend='eager' was asked for"
        if nn_module._has_any_global_hook():
            return "a global module hook is set, which runs for every layer"
        if replaced():
            return "what nn.Conv2d, nn.BatchNorm2d, nn.Sequential or ReLU computes was replaced for every layer"
        return layers.obstacle()

    def _dispatch(self, x: Tensor, residual: Tensor | None = None, parts: Sequence[Tensor] = ()) -> Tensor:
        """Run the children as one node and update the running statistics once, or else run them one after the other.

        Backward keeps ``parts``, if any, in the place of x, which they make when they are joined along the channels.
        """
        layers, reason, run = remembered(self, self._gather)
        if run is not None and not isinstance(x, torch.fx.Proxy):  # of symbolic tracing, which calls with no tensors
            y = run(self, x, residual, parts=parts)
            return layers.plain(x, residual, not running.watched()) if y is None else y
        if reason is not None and backends.is_recording():
            backends.record(backends.Choice(self, "eager", dict.fromkeys(backends.FUSED, reason)))
        return layers.plain(x, residual, layers.overwritable())

    def _gather(self) -> _Gathered:
        layers = self._layers()
        reason = self._obstacle(layers)
        return _Gathered(layers, reason, Run.of(self.backend, [layers]) if reason is None else None)

    def extra_repr(self) -> str:
        """The backend, where it is not the default."""
        return "" if self.backend == "auto" else f"backend={self.backend!r}"


class BNReLUConv2d(Fused):
    """conv(relu(bn(x))) + residual, children ``bn`` (nn.BatchNorm2d) and ``conv`` (nn.Conv2d), as one autograd node.

    He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", 2016, arXiv 1603.05027, figure 1(b); batch norm:
    Ioffe, Szegedy, "Batch Normalization", 2015, arXiv 1502.03167.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in nn.Conv2d.
        bias: as in nn.Conv2d, but False by default.
        eps, momentum, affine, track_running_stats: as in nn.BatchNorm2d.
        backend: one of `backends.NAMES`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: nn.BatchNorm2d or nn.Conv2d refuses an argument, or there is no backend of that name.
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
            TypeError: bn is neither an nn.BatchNorm2d nor an nn.SyncBatchNorm, or conv no nn.Conv2d.
            ValueError: bn does not have the channels that conv reads, or there is no backend of that name.
        """
        if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            raise TypeError(f"bn must be an nn.BatchNorm2d or nn.SyncBatchNorm, got {type(bn).__name__}")
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        if bn.num_features != conv.in_channels:
            raise ValueError(f"bn must have the {conv.in_channels} channels that conv reads, got {bn.num_features}")
        unit = cls.__new__(cls)
        Fused.__init__(unit, backend)
        unit.bn, unit.conv, unit.training = bn, conv, conv.training
        return unit

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y [N, K, P, Q] of x [N, C, H, W] and a residual of the shape of y, of the dtype of x where autocast is off.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        return self._dispatch(x, residual)

    def _layers(self) -> Layers:
        """The two children."""
        children = self._modules
        return Layers([Pair("bn", children["bn"], "conv", children["conv"])])
