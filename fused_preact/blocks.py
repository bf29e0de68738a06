"""Pre-activation residual blocks, each one autograd node; signatures and state_dict keys are kuangliu/pytorch-cifar's.

He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", 2016, arXiv 1603.05027, figure 1(b).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .checks import one_of
from .layers import Layers, Pair, add, normalize
from .modules import Fused


class Block(Fused):
    """Units bn1-conv1, bn2-conv2, ... and a shortcut, which has a 1x1 convolution only where the shape changes.

    Args:
        in_planes: channels of x.
        planes: width; the block has planes*expansion channels out.
        stride: of the block.
        stride_on: which convolution has the stride: "3x3", or "first", a bottleneck's first 1x1 (resnet-1k-layers).
        shortcut_input: what the shortcut's convolution reads: "activated", relu(bn1(x)), as in the paper, or "raw", x.
        shortcut_name: name of that convolution's container in the state_dict, "shortcut" or "downsample".
        backend: one of `backends.NAMES`; "eager" is the plain layers.

    Raises:
        ValueError: one of the last four is none of those named.
    """

    expansion = 1

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int = 1,
        *,
        stride_on: str = "3x3",
        shortcut_input: str = "activated",
        shortcut_name: str = "shortcut",
        backend: str = "auto",
    ) -> None:
        super().__init__(backend)
        one_of("stride_on", stride_on, ("3x3", "first"))
        one_of("shortcut_input", shortcut_input, ("activated", "raw"))
        one_of("shortcut_name", shortcut_name, ("shortcut", "downsample"))
        self.shortcut_input, self.shortcut_name = shortcut_input, shortcut_name
        channels = in_planes
        layout = self._layout(planes, stride, stride_on)
        for i, (width, size, step) in enumerate(layout, start=1):
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels))
            self.add_module(f"conv{i}", nn.Conv2d(channels, width, size, step, padding=size // 2, bias=False))
            channels = width
        if stride != 1 or in_planes != channels:
            self.add_module(shortcut_name, nn.Sequential(nn.Conv2d(in_planes, channels, 1, stride, bias=False)))
        self._names = [(f"bn{i}", f"conv{i}") for i in range(1, len(layout) + 1)]

    @staticmethod
    def _layout(planes: int, stride: int, stride_on: str) -> list[tuple[int, int, int]]:
        """(channels out, filter size, stride) of each convolution."""
        raise NotImplementedError

    @property
    def units(self) -> int:
        """Number of convolutions of the branch."""
        return len(self._names)

    def layers(self) -> Layers:
        """The units' layers, in order, and the shortcut."""
        children = self._modules
        pairs = [Pair(bn, children[bn], conv, children[conv]) for bn, conv in self._names]
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


def _documented(summary: str | None) -> str | None:
    """The summary of a block's class with what holds of all blocks; None where Python left docstrings out."""
    return summary and summary + "\n" + Block.__doc__.partition("\n")[2]


class PreActBlock(Block):
    """Basic block: 3x3, 3x3. ``PreActBlock(in_planes, planes, stride=1, ...)``; the first 3x3 has the stride."""

    __doc__ = _documented(__doc__)

    @staticmethod
    def _layout(planes: int, stride: int, stride_on: str) -> list[tuple[int, int, int]]:
        return [(planes, 3, stride), (planes, 3, 1)]


class PreActBottleneck(Block):
    """Bottleneck: 1x1, 3x3, 1x1, four times ``planes`` out. ``PreActBottleneck(in_planes, planes, stride=1, ...)``."""

    __doc__ = _documented(__doc__)
    expansion = 4

    @staticmethod
    def _layout(planes: int, stride: int, stride_on: str) -> list[tuple[int, int, int]]:
        first, second = (stride, 1) if stride_on == "first" else (1, stride)
        return [(planes, 1, first), (planes, 3, second), (4 * planes, 1, 1)]
