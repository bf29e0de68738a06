"""Pre-activation ResNets: those of the paper, PreActResNet-18 to -152 of kuangliu/pytorch-cifar, and wide ones.

He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", 2016, arXiv 1603.05027.
Zagoruyko, Komodakis, "Wide Residual Networks", 2016, arXiv 1605.07146.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import PreActBlock, PreActBottleneck
from .checks import flag, one_of, positive
from .layers import Layers, normalise, overwritable
from .stage import PreActStage


class FirstPreActBlock(PreActBlock):
    """The basic block behind the stem, as the paper's appendix has it: its first activation comes before the split.

    So its shortcut is relu(bn1(x)). A block with a projection has the same from ``shortcut_input="activated"``.

    Raises:
        ValueError: the shape changes, which takes a projection.
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1, **options: Any) -> None:
        if stride != 1 or in_planes != planes:
            raise ValueError(
                f"in_planes and planes must be the same and stride 1, got {in_planes}, {planes} and {stride}: "
                "use PreActBlock, whose shortcut has a convolution"
            )
        super().__init__(in_planes, planes, stride, **options)

    def forward(self, x: Tensor) -> Tensor:
        """y [N, planes, H, W] of x [N, planes, H, W], of the dtype of x where autocast is off.

        Raises:
            TypeError, ValueError: x does not fit.
        """
        bn, conv = map(self._layer, self._names[0])
        a = F.relu(normalise(bn, x), overwritable(bn))
        return self._dispatch(conv(a), a)

    def _layers(self) -> Layers:
        """The second unit."""
        layers = super()._layers()
        return Layers(layers.pairs[1:], boxes=layers.boxes)


class PreActResNet(nn.Module):
    """``conv1``, stages ``layer1``, ``layer2``, ... of pre-activation blocks, mean over the pixels, ``linear``.

    With the defaults and four stages, the network and the state_dict keys of kuangliu/pytorch-cifar. It runs
    channels_last inside.

    Args:
        block: `PreActBlock` or `PreActBottleneck`.
        num_blocks: blocks of each stage; stage i has the planes width*2^i and, but for the first, stride 2.
        num_classes: size of the output.
        width: planes of the first stage.
        stem_width: channels of the stem (default: width).
        stem: "cifar", a 3x3 convolution; "imagenet", 7x7 of stride 2 and a 3x3 max-pool of stride 2.
        head_norm: a batch norm ``bn`` and ReLU behind the last stage, as in the paper.
        first_block: block at the very front, where another than ``block`` is wanted.
        memory: what the stages keep for backward, see `PreActStage`.
        device, dtype: of the parameters.
        block_options: keyword arguments for every block, such as shortcut_input, backend and of bottlenecks stride_on.

    Raises:
        TypeError: the blocks have no option of that name, a number is no integer, or ``block`` is no class of blocks.
        ValueError: ``stem`` is none of the two, a number is less than 1, or the blocks or stages refuse an option's
            value.
    """

    def __init__(
        self,
        block: type[PreActBlock] | type[PreActBottleneck],
        num_blocks: Sequence[int],
        num_classes: int = 10,
        *,
        width: int = 64,
        stem_width: int | None = None,
        stem: str = "cifar",
        head_norm: bool = False,
        first_block: type[PreActBlock] | None = None,
        memory: str = "fast",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block_options: Any,
    ) -> None:
        super().__init__()
        one_of("stem", stem, ("cifar", "imagenet"))
        flag("head_norm", head_norm)
        if not (isinstance(block, type) and hasattr(block, "expansion")):
            raise TypeError(f"block must be a class of blocks, such as PreActBlock, got {block!r}")
        if not isinstance(num_blocks, Iterable):
            raise TypeError(f"num_blocks must be integers, one for each stage, got {num_blocks!r}")
        num_blocks = [positive(f"num_blocks[{i}]", count) for i, count in enumerate(num_blocks)]
        num_classes, width = positive("num_classes", num_classes), positive("width", width)
        stem_width = width if stem_width is None else positive("stem_width", stem_width)
        size, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.pool = stem == "imagenet"
        channels, like = stem_width, {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(3, channels, size, stride, padding=size // 2, bias=False, **like)
        self.stages = [f"layer{i + 1}" for i in range(len(num_blocks))]
        for i, (name, count) in enumerate(zip(self.stages, num_blocks, strict=True)):
            blocks = []
            for j in range(count):
                kind = first_block if first_block is not None and i == j == 0 else block
                blocks.append(kind(channels, width << i, 2 if i > 0 and j == 0 else 1, **like, **block_options))
                channels = (width << i) * kind.expansion
            self.add_module(name, PreActStage(*blocks, memory=memory))
        self.bn = nn.BatchNorm2d(channels, **like) if head_norm else None
        self.linear = nn.Linear(channels, num_classes, **like)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # N(0, sqrt(2/(k*k*out))), the paper's initialisation (He et al. 2015, for the backward signal).
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Scores [N, num_classes] of images [N, 3, H, W] of the parameters' dtype.

        Raises:
            TypeError, ValueError, RuntimeError: the images do not fit.
        """
        if not torch._C._are_functorch_transforms_active():  # vmap knows no such layout
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv1(x)
        if self.pool:
            x = F.max_pool2d(x, 3, 2, 1)
        for stage in self.stages:
            x = self._modules[stage](x)
        if self.bn is not None:
            x = F.relu(normalise(self.bn, x), overwritable(self.bn))
        return self.linear(x.mean((2, 3)))


def _paper(depth: int) -> dict[str, Any]:
    """Three stages of n basic blocks (depth 6n+2), or from depth 164 on of n bottlenecks (depth 9n+2)."""
    common = {"width": 16, "head_norm": True}
    if depth < 164:
        return {"block": PreActBlock, "num_blocks": [(depth - 2) // 6] * 3, "first_block": FirstPreActBlock, **common}
    return {"block": PreActBottleneck, "num_blocks": [(depth - 2) // 9] * 3, **common}


def _wide(depth: int, factor: int) -> dict[str, Any]:
    """Three stages of n basic blocks (depth 6n+4), ``factor`` times as wide as the paper's, behind its stem of 16."""
    blocks = [(depth - 4) // 6] * 3
    return {"block": PreActBlock, "num_blocks": blocks, "width": 16 * factor, "stem_width": 16, "head_norm": True}


_MODELS: dict[str, dict[str, Any]] = {
    **{f"resnet{depth}": _paper(depth) for depth in (20, 56, 110, 164, 1001)},
    "resnet200": {"block": PreActBottleneck, "num_blocks": [3, 24, 36, 3], "stem": "imagenet", "head_norm": True},
    "wrn28_10": _wide(28, 10),
    "wrn34_10": _wide(34, 10),
    "preactresnet18": {"block": PreActBlock, "num_blocks": [2, 2, 2, 2]},
    "preactresnet34": {"block": PreActBlock, "num_blocks": [3, 4, 6, 3]},
    "preactresnet50": {"block": PreActBottleneck, "num_blocks": [3, 4, 6, 3]},
    "preactresnet101": {"block": PreActBottleneck, "num_blocks": [3, 4, 23, 3]},
    "preactresnet152": {"block": PreActBottleneck, "num_blocks": [3, 8, 36, 3]},
}


def names() -> list[str]:
    """Names that `create` knows."""
    return list(_MODELS)


def create(name: str, num_classes: int = 10, **options: Any) -> PreActResNet:
    """A network by name: "resnet20" to "resnet1001", "wrn28_10", "preactresnet18", ...; `names` has all.

    Those of the paper are resnet20 to resnet1001 for CIFAR and resnet200 for ImageNet.

    Args:
        name: one of `names`.
        num_classes: size of the output.
        options: keyword arguments of `PreActResNet` and its blocks, such as ``backend="eager"``, ``stem="imagenet"``.

    Raises:
        TypeError: it has no option of that name, or a number is no integer.
        ValueError: there is no network of that name, or it refuses an option's value.
    """
    one_of("name", name, names())
    return PreActResNet(num_classes=num_classes, **{**_MODELS[name], **options})
