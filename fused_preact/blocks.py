"""Pre-activation residual blocks, each one autograd node; signatures and state_dict keys are kuangliu/pytorch-cifar's.

He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", 2016, arXiv 1603.05027, figure 1(b).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import one_of, positive
from .layers import Layers, Pair, add, normalize
from .modules import Fused, check_pair

SHORTCUT_NAMES = ("shortcut", "downsample")


class Block(Fused):
    """Units bn1-conv1, bn2-conv2, ... and a shortcut, which has a 1x1 convolution only where the shape changes.

    Args:
        in_planes: channels of x.
        planes: width; the block has planes*expansion channels out.
        stride: of the block, one integer for both directions.
        shortcut_input: what the shortcut's convolution reads: "activated", relu(bn1(x)), as in the paper, or "raw", x.
        shortcut_name: name of that convolution's container in the state_dict, "shortcut" or "downsample".
        backend: one of `backends.NAMES`; "eager" is the plain layers.
        device, dtype: of the parameters.

    Raises:
        TypeError: in_planes, planes or stride is no integer.
        ValueError: one of these is less than 1, or an option is none of those named.
    """

    expansion = 1
    units: int  # convolutions of the branch

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int = 1,
        *,
        shortcut_input: str = "activated",
        shortcut_name: str = "shortcut",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(backend)
        positive("in_planes", in_planes), positive("planes", planes), positive("stride", stride)
        self._set_shortcut(shortcut_input, shortcut_name)
        channels, like = in_planes, {"device": device, "dtype": dtype}
        for i, (width, size, step) in enumerate(self._layout(planes, stride), start=1):
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels, **like))
            self.add_module(f"conv{i}", nn.Conv2d(channels, width, size, step, padding=size // 2, bias=False, **like))
            channels = width
        if stride != 1 or in_planes != channels:
            projection = nn.Conv2d(in_planes, channels, 1, stride, bias=False, **like)
            self.add_module(shortcut_name, nn.Sequential(projection))

    @classmethod
    def from_block(cls, old: nn.Module, shortcut_input: str = "activated", backend: str = "auto") -> Block:
        """The block of another's layers; it holds the layers themselves, not copies.

        Args:
            old: a module with the children bn1, conv1, bn2, ... of such a block in this order, each an nn.BatchNorm2d
                or nn.SyncBatchNorm and an nn.Conv2d. Its ``shortcut`` or ``downsample`` is an nn.Sequential of one
                convolution; an empty one, nn.Identity, None or neither is the identity. It may have nn.ReLU besides.
                Its forward is not read, and hooks on ``old`` itself stay behind.
            shortcut_input: what ``shortcut`` or ``downsample`` reads in ``old``, as in the constructor.
            backend: one of `backends.NAMES`.

        Raises:
            TypeError: a child of old is missing, one too many, or of another kind.
            ValueError: a child has not the channels of those around it, its identity would read relu(bn1(x)), or an
                option is none of those named.
        """
        children = _children(old, cls.units)
        name = next((name for name in SHORTCUT_NAMES if name in children), None)
        if name is None and shortcut_input == "activated":
            _refuse_activated_identity(old)
        block = cls.__new__(cls)
        Fused.__init__(block, backend)
        block._set_shortcut(shortcut_input, name or "shortcut")
        for key, child in children.items():
            block.add_module(key, child)
        block.training = old.training
        _check_chain(Block.layers(block))  # a subclass may fuse some of them only
        return block

    def _set_shortcut(self, shortcut_input: str, shortcut_name: str) -> None:
        one_of("shortcut_input", shortcut_input, ("activated", "raw"))
        one_of("shortcut_name", shortcut_name, SHORTCUT_NAMES)
        self.shortcut_input, self.shortcut_name = shortcut_input, shortcut_name

    @staticmethod
    def _layout(planes: int, stride: int) -> list[tuple[int, int, int]]:
        """(channels out, filter size, stride) of each convolution."""
        raise NotImplementedError

    def layers(self) -> Layers:
        """The units' layers, in order, and the shortcut."""
        children = self._modules
        pairs = [Pair(bn, children[bn], conv, children[conv]) for bn, conv in _names(self.units)]
        container = children.get(self.shortcut_name)
        kind = "identity" if container is None else self.shortcut_input
        return Layers(pairs, kind, self.shortcut_name, container)

    def forward(self, x: Tensor) -> Tensor:
        """y [N, planes*expansion, P, Q] of x [N, in_planes, H, W], of the dtype of x where autocast is off.

        Raises:
            TypeError, ValueError: x does not fit.
        """
        return self.dispatch(x)

    def plain(self, layers: Layers, x: Tensor, residual: Tensor | None, inplace: bool) -> Tensor:
        """The block by its layers."""
        across = out = x
        for i, (_, bn, _, conv) in enumerate(layers.pairs):
            out = F.relu(normalize(bn, out), inplace)
            if i == 0 and layers.container is not None:
                across = layers.container(out if layers.shortcut == "activated" else x)
            out = conv(out)
        return add(out, across, inplace)


def _names(units: int) -> list[tuple[str, str]]:
    return [(f"bn{i}", f"conv{i}") for i in range(1, units + 1)]


def _children(old: nn.Module, units: int) -> dict[str, nn.Module]:
    """The children of a block that are its units and the convolution of its shortcut; TypeError where it has more.

    The order tells a block that normalises behind its convolutions, with the same names, from one that does in front.
    """
    if not isinstance(old, nn.Module):
        raise TypeError(f"old must be an nn.Module, got {type(old).__name__}")
    children = {name: child for name, child in old.named_children() if not _is_stateless(child)}
    found = [*children, *old._parameters, *old._buffers]
    boxes = [name for name in found if name in SHORTCUT_NAMES]
    expected = [name for names in _names(units) for name in names]
    if len(boxes) > 1 or [name for name in found if name not in boxes] != expected:
        raise TypeError(
            f"old must have the children {', '.join(expected)} in this order, shortcut or downsample, nn.ReLU and "
            f"nothing else; got {', '.join(found) or 'none'}"
        )
    return children


def _is_stateless(child: nn.Module) -> bool:
    """Whether a child is the activation, or a shortcut that is the identity."""
    return type(child) in (nn.ReLU, nn.Identity) or (type(child) is nn.Sequential and len(child) == 0)


def _refuse_activated_identity(old: nn.Module) -> None:
    """Raise ValueError where the block has a shortcut without layers, which then has relu(bn1(x)) for x."""
    for name in SHORTCUT_NAMES:
        if isinstance(getattr(old, name, None), nn.Module):
            raise ValueError(
                f"shortcut_input must be 'raw' where {name} is the identity of x, got 'activated'; "
                "use models.FirstPreActBlock where it is that of relu(bn1(x))"
            )


def _check_chain(layers: Layers) -> None:
    """Raise TypeError or ValueError unless the layers have the kinds and channels of a block's."""
    pairs, name, box = layers.pairs, layers.container_name, layers.container
    for pair in pairs:
        check_pair(pair)
    for front, back in pairwise(pairs):
        if back.bn.num_features != front.conv.out_channels:
            raise ValueError(
                f"{back.bn_name} must have the {front.conv.out_channels} channels that {front.conv_name} gives, "
                f"got {back.bn.num_features}"
            )
    C, K = pairs[0].conv.in_channels, pairs[-1].conv.out_channels
    if box is None:
        if C != K:
            raise ValueError(f"old must have a shortcut of a convolution from {C} to {K} channels, got the identity")
        return
    if not (isinstance(box, nn.Sequential) and len(box) == 1 and isinstance(box[0], nn.Conv2d)):
        inside = ", ".join(type(child).__name__ for child in box.children())
        raise TypeError(f"{name} must be an nn.Sequential of one nn.Conv2d, got {type(box).__name__}({inside})")
    before, after = box[0].in_channels, box[0].out_channels
    if (before, after) != (C, K):
        raise ValueError(f"{name} must have a convolution from {C} to {K} channels, got {before} to {after}")


def _documented(summary: str | None) -> str | None:
    """The summary of a block's class with what holds of all blocks; None where Python left docstrings out."""
    return summary and summary.rstrip() + "\n" + Block.__doc__.partition("\n")[2]


class PreActBlock(Block):
    """Basic block: 3x3, 3x3. ``PreActBlock(in_planes, planes, stride=1, ...)``; the first 3x3 has the stride."""

    __doc__ = _documented(__doc__)
    units = 2

    @staticmethod
    def _layout(planes: int, stride: int) -> list[tuple[int, int, int]]:
        return [(planes, 3, stride), (planes, 3, 1)]


class PreActBottleneck(Block):
    """Bottleneck: 1x1, 3x3, 1x1, four times ``planes`` out. ``PreActBottleneck(in_planes, planes, stride=1, ...)``.

    ``stride_on`` says which convolution has the stride: "3x3", or "first", the first 1x1 (resnet-1k-layers).
    """

    __doc__ = _documented(__doc__)
    expansion = 4
    units = 3

    def __init__(self, in_planes: int, planes: int, stride: int = 1, *, stride_on: str = "3x3", **options: Any) -> None:
        one_of("stride_on", stride_on, ("3x3", "first"))
        super().__init__(in_planes, planes, stride, **options)
        if stride_on == "first":
            self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride

    @staticmethod
    def _layout(planes: int, stride: int) -> list[tuple[int, int, int]]:
        return [(planes, 1, 1), (planes, 3, stride), (4 * planes, 1, 1)]
