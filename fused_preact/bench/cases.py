"""What is measured: units, blocks and nets with their shapes, and the ratios the project sets itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import torch
from torch import nn

from fused_preact import BNReLUConv2d, DenseLayer, PreActBlock, PreActBottleneck, models

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
USUAL = ("fp32", "bf16")  # what is measured unless more is asked for
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        group: heading it is listed under.
        label: what it is called there; unique in its group, batch and dtype included.
        make: make(backend=name) builds the module.
        shape: (N, C, H, W) of the input.
        dtype: of DTYPES; but for "fp32", of an input under autocast, parameters in fp32.
        net: classifies images: a step is cross entropy, backward and the update by SGD with momentum.
        backends: what takes part; "eager" is the baseline.
        layouts: memory formats of input and parameters, each one a contender.
        memory: modes of the net's stages (see PreActStage), each one a fused contender; blocks have "fast" alone.
        compiled: torch.compile may take part; False where memory would not hold another contender.
        goals: by memory mode, the least ratio of "forward", "total", "saved_bytes", "against_fast" that the fused
            channels_last contender should reach.
    """

    group: str
    label: str
    make: Callable[..., nn.Module]
    shape: tuple[int, int, int, int]
    dtype: str = "fp32"
    net: bool = False
    backends: tuple[str, ...] = ("auto", "eager")
    layouts: tuple[str, ...] = ("channels_last", "NCHW")
    memory: tuple[str, ...] = ("fast",)
    compiled: bool = True
    goals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique among the cases."""
        return f"{self.group}, {self.label}"

    def at(self, batch: int) -> "Case":
        """The same with another number of images."""
        return replace(self, shape=(batch, *self.shape[1:]))


def make_grouped(channels: int, width: int, groups: int, backend: str) -> nn.Module:
    """A PreActBottleneck of another width, whose 3x3 convolution has groups, as in ResNeXt."""
    block = PreActBottleneck(channels, channels // 4, backend=backend)
    block.conv1, block.bn2 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
    block.conv2, block.bn3 = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(width)
    block.conv3 = nn.Conv2d(width, channels, 1, bias=False)
    return block


def unit(channels: int, out_channels: int, kernel: int, stride: int = 1) -> Callable[..., nn.Module]:
    """What makes one BNReLUConv2d, padded to keep the size (at stride 1)."""
    return partial(BNReLUConv2d, channels, out_channels, kernel, stride, kernel // 2)


def block(group: str, make: Callable[..., nn.Module], C: int, H: int, batch: int, dtype: str) -> Case:
    """A block that reads C channels of HxH pixels."""
    return Case(group, f"{C}x{H}x{H}, N={batch}, {dtype}", make, (batch, C, H, H), dtype)


def bottlenecks(batch: int, dtype: str) -> list[Case]:
    """The three stages of ResNet-1001; the middle width is a quarter of the outer."""
    goals = (
        {"fp32": {"forward": 2.5, "total": 2.0}, "bf16": {"total": 1.5}},
        {"fp32": {"forward": 1.9, "total": 1.7}, "bf16": {"total": 1.5}},
        {"fp32": {"forward": 1.5, "total": 1.5}, "bf16": {"total": 1.5}},
    )
    stages = (64, 16, 32), (128, 32, 16), (256, 64, 8)
    cases = [block("ResNet-1001 bottleneck", partial(PreActBottleneck, C, M), C, H, batch, dtype) for C, M, H in stages]
    if batch != 16:
        return cases
    return [replace(case, goals={"fast": goal[dtype]}) for case, goal in zip(cases, goals, strict=True)]


def basics(group: str, widths: tuple[int, ...], batch: int, dtype: str) -> list[Case]:
    """Basic blocks of the stages of a CIFAR net, 32x32 first."""
    return [block(group, partial(PreActBlock, C, C), C, 32 >> i, batch, dtype) for i, C in enumerate(widths)]


def denses(batch: int, dtype: str) -> list[Case]:
    """Layers of DenseNet-121 on 32x32 images, one in the midst of each of its first three blocks."""
    return [
        block("DenseNet-121 layer", partial(DenseLayer, C, 32), C, H, batch, dtype)
        for C, H in ((160, 32), (320, 16), (640, 8))
    ]


def groups(batch: int, dtype: str) -> list[Case]:
    """Bottlenecks as those of the first two stages of ResNeXt-50, whose 3x3 convolution is torch's own in `cpu` too."""
    return [
        block("ResNeXt bottleneck, 32 groups", partial(make_grouped, C, C // 2, 32), C, H, batch, dtype)
        for C, H in ((256, 16), (512, 8))
    ]


def net(title: str, model: str, batch: int, dtype: str = "fp32") -> Case:
    """A training step of a net on 32x32 images."""
    return Case(
        "Training step",
        f"{title}, N={batch}, {dtype}",
        partial(models.create, model),
        (batch, 3, 32, 32),
        dtype,
        net=True,
        layouts=("channels_last",),
    )


def resnet1001(batch: int, dtype: str = "fp32") -> Case:
    """The step of ResNet-1001 in each memory mode, in fp32 with the goals of each."""
    goals = {
        "fast": {"saved_bytes": 2.0},
        "lean": {"saved_bytes": 5.8, "against_fast": 1 / 1.10},
        "min": {"saved_bytes": 11.0, "against_fast": 1 / 1.20},
    }
    step = {8: 1.9, 16: 1.75, 64: 1.5}
    if batch in step:
        goals["fast"]["total"] = step[batch]
    case = net("ResNet-1001", "resnet1001", batch, dtype)
    case = replace(case, memory=tuple(goals), compiled=batch < 64)  # 10 GB each, from there on
    return replace(case, goals=goals) if dtype == "fp32" else case


def host_cost() -> Case:
    """ResNet-1001 on one tiny image: the kernels have next to nothing to do, and what a call costs is left."""
    case = net("ResNet-1001 on 8x8", "resnet1001", 1)
    return replace(case, group="Host cost", shape=(1, 3, 8, 8), goals={"fast": {"total": 6.0}})


def default_cases() -> list[Case]:
    """Under two minutes on two slow cores."""
    blocks = [case for dtype in USUAL for case in bottlenecks(16, dtype)]
    blocks += [case for dtype in USUAL for case in basics("ResNet-110 block", (16, 32, 64), 16, dtype)]
    blocks += basics("PreActResNet-18 block", (64, 128, 256, 512), 16, "fp32") + denses(16, "fp32")
    blocks += groups(16, "fp32")
    nets = [net("ResNet-110", "resnet110", 16), net("PreActResNet-18", "preactresnet18", 8), resnet1001(8)]
    return [*blocks, *nets, host_cost()]


def full_cases() -> list[Case]:
    """The long version: other batches, every dtype, the larger nets."""
    blocks = [case for batch, dtype in product((1, 16, 64), USUAL) for case in bottlenecks(batch, dtype)]
    narrow = partial(basics, "ResNet-110 block", (16, 32, 64))
    wide = partial(basics, "PreActResNet-18 block", (64, 128, 256, 512))
    for some in narrow, wide, denses, groups:
        blocks += [case for batch, dtype in product((1, 16), USUAL) for case in some(batch, dtype)]
    nets = [net("ResNet-110", "resnet110", 128), net("PreActResNet-18", "preactresnet18", 128)]
    nets += [net("WRN-28-10", "wrn28_10", 32)]
    nets += [net("ResNet-164", "resnet164", 16, dtype) for dtype in USUAL]
    return blocks + nets + [resnet1001(batch) for batch in (8, 16, 64)] + [resnet1001(8, "bf16"), host_cost()]


def table_cases() -> list[Case]:
    """Units over a grid, each backend by name: the data behind the choice that backend="auto" makes."""
    shapes = [(C, C, 3, 1, H) for C, H in ((16, 32), (32, 16), (64, 8))]
    shapes += [(C, C, 3, 1, H) for C, H in ((64, 32), (128, 16), (256, 8), (512, 4))]
    shapes += [(C, C, 3, 1, H) for C, H in ((160, 32), (320, 16), (640, 8))]
    shapes += [(128, 32, 3, 1, H) for H in (32, 16, 8)]
    shapes += [(C, 2 * C, 3, 2, H) for C, H in ((16, 32), (64, 32), (128, 16), (256, 8))]
    shapes += [(4 * M, M, 1, 1, H) for M, H in ((16, 32), (32, 16), (64, 8), (128, 16), (512, 4))]
    shapes += [(M, 4 * M, 1, 1, H) for M, H in ((16, 32), (32, 16), (64, 8), (128, 16), (512, 4))]
    shapes += [(C, 128, 1, 1, H) for C, H in ((64, 32), (256, 32), (256, 16), (512, 16), (512, 8), (1024, 8))]
    shapes += [(C, 2 * C, 1, 2, H) for C, H in ((64, 32), (128, 16), (256, 8))]
    return [
        Case(
            f"Unit {kernel}x{kernel}, stride {stride}",
            f"{C}->{K}, {H}x{H}, N={batch}, {dtype}, {layout}",
            unit(C, K, kernel, stride),
            (batch, C, H, H),
            dtype,
            backends=("cpu", "library", "auto", "eager"),
            layouts=(layout,),
        )
        for (C, K, kernel, stride, H), batch, dtype, layout in product(dict.fromkeys(shapes), (1, 16), USUAL, LAYOUTS)
    ]
