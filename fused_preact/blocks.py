"""Pre-activation residual blocks, each one autograd node; signatures and keys are those of kuangliu/pytorch-cifar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import one_of, positive
from .layers import Layers, Pair
from .modules import Fused

SHORTCUT_NAMES = ("shortcut", "downsample", "convShortcut")


class Branch(Fused):
    """BN-ReLU-Conv units one after the other, of layers that it knows by their ``_names``."""

    _names: list[tuple[str, str]]
    _boxes: Sequence[str] = ()  # modules that layers are in, where they are no children

    @classmethod
    def of(cls, layers: Layers, children: dict[str, nn.Module], backend: str = "auto", **settings: Any) -> Branch:
        """The module of layers that exist; the names that they come with lead to them from its ``children``."""
        branch = cls.__new__(cls)
        Fused.__init__(branch, backend)
        branch._names = [(pair.bn_name, pair.conv_name) for pair in layers.pairs]
        branch._boxes = [name for name, _ in layers.boxes]
        for name, value in settings.items():
            setattr(branch, name, value)
        for name, child in children.items():
            branch.add_module(name, child)
        return branch

    def forward(self, x: Tensor) -> Tensor:
        """y [N, K, P, Q] of x [N, C, H, W], of the dtype of x where autocast is off.

        Raises:
            TypeError, ValueError: x does not fit.
        """
        return self._dispatch(x)

    def _layers(self) -> Layers:
        """The units' layers, in order."""
        pairs = [Pair(bn, self._layer(bn), conv, self._layer(conv)) for bn, conv in self._names]
        return Layers(pairs, boxes=[(path, self._layer(path)) for path in self._boxes])

    def _layer(self, path: str) -> nn.Module:
        """The module of a path in ``_names`` or ``_boxes``."""
        module = self
        for name in path.split("."):
            module = module._modules[name]
        return module


class ResidualBlock(Branch):
    """Units bn1-conv1, bn2-conv2, ... and a shortcut, which has a 1x1 convolution only where the shape changes.

    He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", 2016, arXiv 1603.05027, figure 1(b).

    Args:
        in_planes: channels of x.
        planes: width; the block has planes*expansion channels out.
        stride: of the block, one integer for both directions.
        shortcut_input: what the shortcut's convolution reads: "activated", relu(bn1(x)), as in the paper, or "raw", x.
        shortcut_name: in the state_dict: "shortcut" or "downsample", of an nn.Sequential of that convolution, or
            "convShortcut", of the convolution itself, as in wide ResNets.
        backend: one of `backends.NAMES`; "eager" is the plain layers.
        device, dtype: of the parameters.

    Raises:
        TypeError: in_planes, planes or stride is no integer.
        ValueError: one of these is less than 1, or an option is none of those named.
    """

    expansion = 1
    _units: int  # convolutions of the branch

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
        in_planes, planes = positive("in_planes", in_planes), positive("planes", planes)
        stride = positive("stride", stride)
        one_of("shortcut_input", shortcut_input, ("activated", "raw"))
        one_of("shortcut_name", shortcut_name, SHORTCUT_NAMES)
        self.shortcut_input, self.shortcut_name = shortcut_input, shortcut_name
        self._names = [(f"bn{i}", f"conv{i}") for i in range(1, self._units + 1)]
        channels, like = in_planes, {"device": device, "dtype": dtype}
        for (bn, conv), (width, size, step) in zip(self._names, self._layout(planes, stride), strict=True):
            self.add_module(bn, nn.BatchNorm2d(channels, **like))
            self.add_module(conv, nn.Conv2d(channels, width, size, step, padding=size // 2, bias=False, **like))
            channels = width
        if stride != 1 or in_planes != channels:
            projection = nn.Conv2d(in_planes, channels, 1, stride, bias=False, **like)
            self.add_module(shortcut_name, projection if shortcut_name == "convShortcut" else nn.Sequential(projection))

    @classmethod
    def of(cls, layers: Layers, children: dict[str, nn.Module], backend: str = "auto") -> ResidualBlock:
        """The block of layers that exist; the names that they come with lead to them from its ``children``."""
        source = "raw" if layers.shortcut == "raw" else "activated"
        return super().of(layers, children, backend, shortcut_name=layers.container_name, shortcut_input=source)

    @staticmethod
    def _layout(planes: int, stride: int) -> list[tuple[int, int, int]]:
        """(channels out, filter size, stride) of each convolution."""
        raise NotImplementedError

    def _layers(self) -> Layers:
        """The units' layers, in order, and the shortcut."""
        container = self._modules.get(self.shortcut_name)
        shortcut = "identity" if container is None else self.shortcut_input
        return super()._layers()._replace(shortcut=shortcut, container_name=self.shortcut_name, container=container)


def _documented(summary: str | None) -> str | None:
    """The summary of a block's class with what holds of all blocks; None where Python left docstrings out."""
    return summary and summary.rstrip() + "\n" + ResidualBlock.__doc__.partition("\n")[2]


class PreActBlock(ResidualBlock):
    """Basic block: 3x3, 3x3. ``PreActBlock(in_planes, planes, stride=1, ...)``; the first 3x3 has the stride."""

    __doc__ = _documented(__doc__)
    _units = 2

    @staticmethod
    def _layout(planes: int, stride: int) -> list[tuple[int, int, int]]:
        return [(planes, 3, stride), (planes, 3, 1)]


class PreActBottleneck(ResidualBlock):
    """Bottleneck: 1x1, 3x3, 1x1, four times ``planes`` out. ``PreActBottleneck(in_planes, planes, stride=1, ...)``.

    ``stride_on`` says which convolution has the stride: "3x3", or "first", the first 1x1 (resnet-1k-layers).
    """

    __doc__ = _documented(__doc__)
    expansion = 4
    _units = 3

    def __init__(self, in_planes: int, planes: int, stride: int = 1, *, stride_on: str = "3x3", **options: Any) -> None:
        one_of("stride_on", stride_on, ("3x3", "first"))
        super().__init__(in_planes, planes, stride, **options)
        if stride_on == "first":
            self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride

    @staticmethod
    def _layout(planes: int, stride: int) -> list[tuple[int, int, int]]:
        return [(planes, 1, 1), (planes, 3, stride), (4 * planes, 1, 1)]
