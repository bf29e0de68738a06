"""Pre-activation blocks as other projects write them, and modules that are none though they look like them."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def filters(C: int, K: int, bottleneck: bool, stride: int) -> list[nn.Conv2d]:
    """The convolutions of a block."""
    if not bottleneck:
        return [nn.Conv2d(C, K, 3, stride, 1, bias=False), nn.Conv2d(K, K, 3, 1, 1, bias=False)]
    M = K // 4
    return [nn.Conv2d(C, M, 1, bias=False), nn.Conv2d(M, M, 3, stride, 1, bias=False), nn.Conv2d(M, K, 1, bias=False)]


class Cifar(nn.Module):
    """As in pytorch-cifar: the shortcut reads relu(bn1(x)), and is there only where the shape changes."""

    def __init__(self, C: int, K: int, bottleneck: bool, stride: int = 1) -> None:
        super().__init__()
        for i, conv in enumerate(filters(C, K, bottleneck, stride), start=1):
            self.add_module(f"bn{i}", nn.BatchNorm2d(conv.in_channels))
            self.add_module(f"conv{i}", conv)
        self.units = i
        if stride != 1 or C != K:
            self.shortcut = nn.Sequential(nn.Conv2d(C, K, 1, stride, bias=False))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        across = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        for i in range(2, self.units + 1):
            out = self.get_submodule(f"conv{i}")(F.relu(self.get_submodule(f"bn{i}")(out)))
        return out + across


class Raw(nn.Module):
    """As in pytorch-classification: ``downsample`` reads x; one nn.ReLU for all."""

    def __init__(self, C: int, K: int, bottleneck: bool, stride: int = 1) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        for i, conv in enumerate(filters(C, K, bottleneck, stride), start=1):
            self.add_module(f"bn{i}", nn.BatchNorm2d(conv.in_channels))
            self.add_module(f"conv{i}", conv)
        self.units = i
        self.downsample = nn.Sequential(nn.Conv2d(C, K, 1, stride, bias=False)) if stride != 1 or C != K else None

    def forward(self, x):
        out = x
        for i in range(1, self.units + 1):
            out = self.get_submodule(f"conv{i}")(self.relu(self.get_submodule(f"bn{i}")(out)))
        return out + (x if self.downsample is None else self.downsample(x))


class Wide(nn.Module):
    """As in wide ResNets of robustness work: the shortcut is the convolution itself, and there may be dropout."""

    def __init__(self, C: int, K: int, bottleneck: bool, stride: int = 1, dropped: float = 0.0) -> None:
        super().__init__()
        assert not bottleneck
        conv1, conv2 = filters(C, K, False, stride)
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(C), nn.ReLU(inplace=True), conv1
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(K), nn.ReLU(inplace=True), conv2
        self.dropped = dropped
        self.convShortcut = None if stride == 1 and C == K else nn.Conv2d(C, K, 1, stride, bias=False)

    def forward(self, x):
        out = self.relu1(self.bn1(x))
        across = x if self.convShortcut is None else self.convShortcut(out)
        out = F.dropout(self.relu2(self.bn2(self.conv1(out))), self.dropped, self.training)
        return torch.add(across, self.conv2(out))


class Normed(nn.BatchNorm2d):
    """A batch norm that activates, too, with modules for that, as timm's."""

    def __init__(self, C: int) -> None:
        super().__init__(C)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Boxed(nn.Module):
    """A shortcut of its own kind, with places for other layers."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.norm = conv, nn.Identity()

    def forward(self, x):
        return self.norm(self.conv(x))


class Timm(nn.Module):
    """As in timm: the shortcut comes first, the norms activate, and layers that do nothing stand for others."""

    def __init__(self, C: int, K: int, bottleneck: bool, stride: int = 1) -> None:
        super().__init__()
        self.downsample = Boxed(nn.Conv2d(C, K, 1, stride, bias=False)) if stride != 1 or C != K else None
        for i, conv in enumerate(filters(C, K, bottleneck, stride), start=1):
            self.add_module(f"norm{i}", Normed(conv.in_channels))
            self.add_module(f"conv{i}", conv)
        self.units, self.drop_path = i, nn.Identity()

    def forward(self, x):
        out = self.norm1(x)
        across = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        for i in range(2, self.units + 1):
            out = self.get_submodule(f"conv{i}")(self.get_submodule(f"norm{i}")(out))
        return self.drop_path(out) + across


class Unit(nn.Module):
    """BN, ReLU and convolution as a module, which gives what is between, too."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.bn, self.activ, self.conv = nn.BatchNorm2d(conv.in_channels), nn.ReLU(inplace=True), conv

    def forward(self, x):
        a = self.activ(self.bn(x))
        return self.conv(a), a


class Nested(nn.Module):
    """As in pytorchcv: the layers are in modules of modules."""

    def __init__(self, C: int, K: int, bottleneck: bool, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Module()
        for i, conv in enumerate(filters(C, K, bottleneck, stride), start=1):
            self.body.add_module(f"conv{i}", Unit(conv))
        if stride != 1 or C != K:
            self.identity_conv = nn.Conv2d(C, K, 1, stride, bias=False)

    def forward(self, x):
        first, *others = self.body.children()
        out, a = first(x)
        for unit in others:
            out, _ = unit(out)
        return out + (self.identity_conv(a) if hasattr(self, "identity_conv") else x)


class Listed(nn.Module):
    """A layer as in torchvision's DenseNet, which reads a list and can repeat its first half in backward."""

    def __init__(self, C: int, growth: int, memory_efficient: bool = False) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(C), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(C, 4 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.memory_efficient = memory_efficient

    def joined(self, parts):
        return torch.cat(parts, 1)

    def forward(self, x):
        parts = [x] if isinstance(x, torch.Tensor) else x

        def half(*parts):
            return self.conv1(self.relu1(self.norm1(self.joined(parts))))

        out = checkpoint(half, *parts, use_reentrant=False) if self.repeats() else half(*parts)
        return self.conv2(self.relu2(self.norm2(out)))

    def repeats(self):
        return self.memory_efficient


class TimmListed(Listed):
    """The same, whose flag has the name that it has in timm."""

    def __init__(self, C: int, growth: int, memory_efficient: bool = False) -> None:
        super().__init__(C, growth)
        del self.memory_efficient
        self.grad_checkpointing = memory_efficient

    def repeats(self):
        return self.grad_checkpointing


class Reversed(Listed):
    """It reads a list as something else than its parts side by side."""

    def joined(self, parts):
        return torch.cat(parts[::-1], 1)


class Joining(Listed):
    """A layer as in pytorch-cifar's DenseNet, which gives x, too: behind the new features, or as others, before."""

    def __init__(self, C: int, growth: int, before: bool = False) -> None:
        super().__init__(C, growth)
        self.before = before

    def forward(self, x):
        out = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, out] if self.before else [out, x], 1)


class Smooth(Cifar):
    """With SiLU in the place of ReLU."""

    def forward(self, x):
        return self.conv2(F.silu(self.bn2(self.conv1(F.silu(self.bn1(x)))))) + x


class Cut(Cifar):
    """With ReLU6."""

    def forward(self, x):
        return self.conv2(F.relu6(self.bn2(self.conv1(F.relu6(self.bn1(x)))))) + x


class Scaling(nn.Conv2d):
    """A convolution that is called with more than x."""

    def forward(self, x, factor):
        return super().forward(x) * factor


class Factor(Cifar):
    """It calls a layer with more than x."""

    def __init__(self, C: int, K: int, bottleneck: bool) -> None:
        super().__init__(C, K, bottleneck)
        self.conv2 = Scaling(K, K, 3, padding=1)

    def forward(self, x):
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))), 1.0) + x


class Detached(Cifar):
    """Its shortcut passes no gradient."""

    def forward(self, x):
        return super().forward(x) - x + x.detach()


class Rounded(Cifar):
    """It gives another type than x has."""

    def forward(self, x):
        return super().forward(x).float()


class Branch(nn.Module):
    """The layers are in a module of a name to choose, which is called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        conv1, conv2 = filters(8, 8, False, 1)
        branch = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv1, nn.BatchNorm2d(8), nn.ReLU(), conv2)
        self.name = name
        self.add_module(name, branch)

    def forward(self, x):
        return x + self.get_submodule(self.name)(x)


def conv_first(C: int, K: int, bottleneck: bool, stride: int = 1) -> nn.Module:
    """A block that normalises behind its convolutions: no pre-activation."""
    conv1, conv2 = filters(C, K, bottleneck, stride)
    return nn.Sequential(conv1, nn.BatchNorm2d(K), nn.ReLU(), conv2, nn.BatchNorm2d(K))


def norm_twice(C: int, K: int, bottleneck: bool, stride: int = 1) -> nn.Module:
    """Two batch norms in front of a convolution, which reads one of them."""
    return nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, K, 3, stride, 1))


class Scaled(Cifar):
    """With a parameter of its own."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(()))


class Excited(Cifar):
    """With layers besides."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.excitation = nn.Linear(4, 4)


class Deep(Cifar):
    """Its shortcut's convolution is in a box in a box."""

    def __init__(self, C: int, K: int, bottleneck: bool, stride: int = 2) -> None:
        super().__init__(C, K, bottleneck, 2)
        self.shortcut = nn.Sequential(self.shortcut)


class Stopped(Cifar):
    """Its first filter is no part of the graph."""

    def forward(self, x):
        out = F.conv2d(F.relu(self.bn1(x)), self.conv1.weight.detach(), padding=1)
        return self.conv2(F.relu(self.bn2(out))) + x


class Told(Cifar):
    """Its forward may be told more."""

    def forward(self, x, scale=1.0):
        return scale * super().forward(x)


class Renamed(Cifar):
    """Its keys are not the names of its layers."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._register_state_dict_hook(lambda module, state, *_: state.pop("bn1.weight"))
