"""Sample inputs for the tests of the operators and of everything above them, with the plain layers as their eager twin.

A `Case` names the shapes of a chain; `Case.draw` makes its tensors. `fused` and `eager` run them and name every result
alike, so that the errors of both against float64 can be compared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_preact import _extension, backends, ops, plans, reference
from fused_preact.kernels import Activation, Conv, Gradient, accumulation_type
from fused_preact.units import Block, Shortcut, Unit

Results = dict[str, Tensor]
# For what does not depend on the instruction set; the fixture `backend` adds each of those.
# triton is among them where its interpreter runs the kernels on CPU tensors (TRITON_INTERPRET=1).
ON_CPU = backends.Problem(torch.device("cpu"), torch.float32, (1, 1, 1, 1), ())
PYTHON_BACKENDS = [name for name in ("reference", "library", "triton") if backends.obstacle(name, ON_CPU) is None]
BACKENDS = PYTHON_BACKENDS + (["cpu"] if _extension.unavailable is None else [])
# Without the extension, of which `fused-preact info` says why it is not there, the other backends are tested.
needs_cpu = pytest.mark.skipif(_extension.unavailable is not None, reason=str(_extension.unavailable))


@dataclass(frozen=True)
class Layer:
    """Convolution of a unit: output channels, filter, stride, padding; batch: its batch norm uses batch statistics."""

    K: int
    size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch: bool = True

    @property
    def conv(self) -> Conv:
        return Conv(*self.stride, *self.padding, *self.dilation, self.groups)


@dataclass(frozen=True)
class Case:
    """Shapes of a chain on an input [N, C, H, W]."""

    id: str
    shape: tuple[int, int, int, int]
    layers: tuple[Layer, ...]
    shortcut: str = "none"
    bias: bool = False
    residual: bool = False
    mean: float = 1.0  # of x, in standard deviations

    @property
    def eval(self) -> Case:
        """The same with running statistics everywhere."""
        return replace(self, id=f"{self.id}-eval", layers=tuple(replace(layer, batch=False) for layer in self.layers))

    def draw(self, seed: int = 0, dtype: torch.dtype = torch.float32, layout: str = "channels_last") -> Sample:
        """Random tensors of values that dtype holds exactly; no pre-activation is near zero (see `separate`)."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
            return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

        def filters(K: int, C: int, size: tuple[int, int]) -> Tensor:
            return (uniform(K, C, *size) * (3 / (C * size[0] * size[1])) ** 0.5).to(dtype)

        C = self.shape[1]
        sigma, mean = uniform(1, C, 1, 1, low=0.5, high=2.0), self.mean * uniform(1, C, 1, 1, low=0.5, high=1.0)
        x = (sigma * (torch.randn(self.shape, generator=generator, dtype=torch.float64) + mean)).to(dtype)
        h, units = x.double(), []
        for layer in self.layers:
            var, mean = torch.var_mean(h, (0, 2, 3), correction=0)
            running = mean + uniform(C, low=-0.2, high=0.2) * var.sqrt(), var * uniform(C, low=0.8, high=1.2)
            gamma = uniform(C, low=0.5, high=1.5) * torch.where(uniform(C) > 0, 1.0, -1.0)
            used = (mean, var) if layer.batch else running
            beta = separate(h, *used, gamma)
            norms = [t.to(accumulation_type(dtype)) for t in (gamma, beta, *running)]
            bias = uniform(layer.K).to(dtype) if self.bias else None
            weight = filters(layer.K, C // layer.groups, layer.size)
            units.append(Unit(weight, bias, *norms, layer.batch, 1e-5, layer.conv))
            h, C = convolve(F.relu(F.batch_norm(h, *used, gamma, beta, False, 0.0, 1e-5)), units[-1]), layer.K
        shortcut = Shortcut(self.shortcut)
        if self.shortcut in ("activated", "raw"):
            strides = (-(-self.shape[i] // h.size(i)) for i in (2, 3))
            shortcut = Shortcut(self.shortcut, filters(C, self.shape[1], (1, 1)), Conv(*strides, 0, 0, 1, 1, 1))
        residual = uniform(*h.shape).to(dtype) if self.residual else None
        return Sample(laid_out(x, layout), [Block(units, shortcut)], residual, uniform(*h.shape).to(dtype))


def separate(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor) -> Tensor:
    """beta that puts the zeros of gamma*xhat + beta into the widest gap between the middle values of xhat, by channel.

    So a rounding error does not turn a ReLU on or off, and what is compared are the kernels, not their luck.
    """
    xhat = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
    values = xhat.transpose(0, 1).flatten(1).sort().values
    values = values[:, values.size(1) // 8 : values.size(1) - values.size(1) // 8]
    gap, i = values.diff().max(1)
    return -gamma * (values.gather(1, i[:, None])[:, 0] + gap / 2)


def convolve(a: Tensor, unit: Unit) -> Tensor:
    """The convolution of a unit, in the type of a."""
    conv, bias = unit.conv, None if unit.bias is None else unit.bias.to(a.dtype)
    return F.conv2d(a, unit.weight.to(a.dtype), bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@dataclass
class Sample:
    """Tensors of a run of blocks, most often of one, and the gradient dy of its output."""

    x: Tensor
    blocks: list[Block]
    residual: Tensor | None
    dy: Tensor

    @property
    def units(self) -> list[Unit]:
        return [unit for block in self.blocks for unit in block.units]

    @property
    def shortcut(self) -> Shortcut:
        (block,) = self.blocks
        return block.shortcut

    def replace(self, units: list[Unit], shortcut: Shortcut | None = None, **tensors: Tensor | None) -> Sample:
        """The same with other units, by the one block that there is."""
        return replace(self, blocks=[Block(units, shortcut or self.shortcut)], **tensors)

    def to(self, dtype: torch.dtype) -> Sample:
        """The same values in dtype; batch norm in its accumulation type."""
        accumulation = accumulation_type(dtype)

        def cast(t: Tensor | None, to: torch.dtype = dtype) -> Tensor | None:
            return None if t is None else t.detach().to(to)

        units = [
            unit._replace(
                weight=cast(unit.weight),
                bias=cast(unit.bias),
                **{name: cast(getattr(unit, name), accumulation) for name in unit._fields[2:6]},
            )
            for unit in self.units
        ]
        shortcut = self.shortcut._replace(weight=cast(self.shortcut.weight))
        return Sample(cast(self.x), [Block(units, shortcut)], cast(self.residual), cast(self.dy))

    def leaves(self) -> Results:
        """The tensors that have a gradient, by the name that their gradient has; they require it from here on."""
        named = {"dx": self.x, "dresidual": self.residual, "dshortcut": self.shortcut.weight}
        for i, unit in enumerate(self.units, start=1):
            named |= {f"dW{i}": unit.weight, f"dbias{i}": unit.bias}
            named |= {f"dgamma{i}": unit.bn_weight, f"dbeta{i}": unit.bn_bias}
        return {name: t.requires_grad_() for name, t in named.items() if t is not None}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x as "nchw", as "channels_last", or as a slice of a larger tensor, dense in no order."""
    if layout == "nchw":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    N, C, H, W = x.shape
    larger = x.new_full((N, H + 2, W + 1, C + 3), float("nan")).permute(0, 3, 1, 2)
    view = larger[:, 1 : C + 1, 1 : H + 1, :W]
    view.copy_(x)
    return view


def _gradients(sample: Sample, y: Tensor, dy: Tensor) -> Results:
    leaves = sample.leaves()
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)), strict=True))


def fused(sample: Sample, backend: str) -> Results:
    """y, all gradients, and the batch statistics of the units that use them, from a fused backend."""
    sample.leaves()
    plan = plans.make_plan(sample.x, sample.blocks, sample.residual, backend)
    y, rows = plans.execute(plan, sample.x, ops.Arguments.of(sample.blocks), sample.residual)
    results = {"y": y.detach()}
    for i, (unit, row) in enumerate(zip(sample.units, rows, strict=True), start=1):
        if unit.batch:
            results |= {f"mean{i}": row[0], f"var{i}": row[2]}
    return results | _gradients(sample, y, sample.dy)


def eager(sample: Sample) -> Results:
    """The same from plain torch layers."""
    sample.leaves()
    results, h, across = {}, sample.x, sample.residual
    for i, unit in enumerate(sample.units, start=1):
        # With a momentum of one the buffers become the statistics of the batch.
        mean, var = unit.running_mean.clone(), unit.running_var.clone()
        a = F.relu(F.batch_norm(h, mean, var, unit.bn_weight, unit.bn_bias, unit.batch, 1.0, unit.eps))
        if unit.batch:
            results |= {f"mean{i}": mean, f"var{i}": var}
        if i == 1 and sample.shortcut.kind == "identity":
            across = sample.x
        elif i == 1 and sample.shortcut.weight is not None:
            source = a if sample.shortcut.kind == "activated" else sample.x
            across = F.conv2d(source, sample.shortcut.weight, None, sample.shortcut.conv.stride)
        h = convolve(a, unit)
    y = h if across is None else h + across
    return {"y": y.detach()} | results | _gradients(sample, y, sample.dy)


def forward_arguments(sample: Sample, backend: str, memory: str = "fast") -> tuple:
    """What a backend's forward operator is called with."""
    plan = plans.make_plan(sample.x, sample.blocks, sample.residual, backend, memory)
    return sample.x, sample.residual, *ops.Arguments.of(sample.blocks), *plan.facts


def backward_arguments(sample: Sample, backend: str, memory: str = "fast") -> tuple:
    """What a backend's backward operator is called with after its forward; every gradient is needed."""
    arguments = forward_arguments(sample, backend, memory)
    y, kept, rows = ops.OPERATORS[backend][0](*arguments)
    x, _, weight, bias, *_, projections, training, _, geometry, units, shortcut, dtype, code, tf32 = arguments
    n = len(weight)
    needs = [True] * (1 + 2 * n + len(bias) + len(projections))
    lists = list(kept), list(rows), weight, bias, projections
    return sample.dy, x, y if code else None, *lists, training, geometry, units, shortcut, dtype, code, tf32, needs


def error(result: Tensor, exact: Tensor) -> float:
    """Root of the mean squared error, relative to the root mean square of the exact values."""
    return ((result.double() - exact).square().mean() / exact.square().mean().clamp(min=1e-300)).sqrt().item()


@functools.cache
def exact(case: Case, seed: int, dtype: torch.dtype) -> Results:
    """What plain layers make in float64 of a draw of dtype."""
    return eager(case.draw(seed, dtype).to(torch.float64))


def errors(case: Case, dtype: torch.dtype, run: Callable[[Sample], Results], draws: int = 8) -> dict[str, float]:
    """Error of each result of ``run`` against float64, over some draws of the case together."""
    squares: dict[str, list[float]] = {}
    for seed in range(draws):
        for name, result in run(case.draw(seed, dtype)).items():
            if not vanishes(case, name):
                squares.setdefault(name, []).append(error(result, exact(case, seed, dtype)[name]) ** 2)
    return {name: (sum(values) / draws) ** 0.5 for name, values in squares.items()}


@functools.cache
def eager_errors(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """The errors of plain layers, which are the measure for everything else."""
    return errors(case, dtype, eager)


def vanishes(case: Case, name: str) -> bool:
    """Whether a gradient is zero but for rounding: that of a bias in front of a batch norm that subtracts the mean."""
    return name.startswith("dbias") and any(layer.batch for layer in case.layers[int(name[5:]) : int(name[5:]) + 1])


def assert_as_close_as_eager(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Each result has at most twice the error that plain layers have in the same dtype, or that of one rounding."""
    assert_no_worse(errors(case, dtype, lambda sample: fused(sample, backend)), eager_errors(case, dtype), dtype)


def assert_no_worse(ours: dict[str, float], theirs: dict[str, float], dtype: torch.dtype) -> None:
    """The rule of `assert_as_close_as_eager` for errors that have been measured."""
    rounding = torch.finfo(dtype).eps / 2
    assert ours.keys() == theirs.keys()
    # Eager's may be no number: torch's filter gradient of 1x1 images at stride 2, in bf16, is of memory never written.
    bounds = {name: max(2 * e, rounding) if math.isfinite(e) else rounding for name, e in theirs.items()}
    worse = {name: (ours[name], theirs[name]) for name in ours if not ours[name] <= bounds[name]}
    assert not worse, f"relative error and that of eager: {worse}"


def assert_exact_on_integers(case: Case, kernels: Any, dtype: torch.dtype) -> None:
    """A table of kernels gives the integers that the sums of one unit are: y, dx, dW and dbias, without batch norm."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        values = torch.randint(-1, 2, shape, generator=generator).to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    layer, x = case.layers[0], integers(*case.shape)
    weight, bias = integers(layer.K, case.shape[1], *layer.size), integers(layer.K)
    dy = integers(*layer.conv.output_shape(case.shape, weight.shape))

    def results(table: Any, to: torch.dtype) -> list[Tensor]:
        a, g, w = Activation(x.to(to), None), Gradient(dy.to(to)), weight.to(to)
        y, _ = table.forward(layer.conv, a, w, bias.to(to), g.g, None)
        dx = table.dgrad(layer.conv, g, w, a, a.x, False).g
        return [y, dx, *table.wgrad(layer.conv, g, a, w, True)]

    for actual, expected in zip(results(kernels, dtype), results(reference, torch.float64), strict=True):
        # A sum may be an integer that dtype does not hold.
        assert torch.equal(actual, expected.to(dtype))


_POINT = Layer(0, (1, 1), padding=(0, 0))


def point(K: int, **changes) -> Layer:
    """A 1x1 convolution."""
    return replace(_POINT, K=K, **changes)


# One unit, in shapes that every backend serves.
UNITS = [
    Case("one-channel", (2, 1, 5, 5), (Layer(1),)),
    Case("odd", (3, 3, 7, 5), (Layer(5),), bias=True, residual=True),
    Case("35-channels", (2, 35, 6, 7), (Layer(37),)),
    Case("35-channels-1x1", (2, 35, 6, 7), (point(37),), bias=True, residual=True),
    Case("one-image", (1, 16, 8, 8), (Layer(16),)),
    Case("one-row", (4, 16, 1, 9), (Layer(8),)),
    Case("one-column-1x1", (4, 3, 9, 1), (point(35),)),
    Case("stride-2", (2, 16, 9, 8), (Layer(24, stride=(2, 2)),)),
    Case("stride-2-1x1", (2, 12, 7, 6), (point(20, stride=(2, 2)),)),
    Case("no-padding", (2, 8, 6, 5), (Layer(4, padding=(0, 0)),), residual=True),
    Case("stride-2-no-padding", (2, 3, 8, 9), (Layer(5, stride=(2, 2), padding=(0, 0)),)),
    Case("padded-1x1", (2, 4, 4, 3), (point(6, padding=(1, 2)),)),
    Case("wide-padding", (2, 5, 3, 4), (Layer(6, padding=(2, 3)),)),
    Case("64-channels", (2, 64, 8, 8), (Layer(64),)),
    # Work for several threads: the CPU's kernels cut the columns of its few tiles into parts.
    Case("70-channels-1x1", (1, 70, 8, 8), (point(66),), bias=True, residual=True),
    Case("40-channels-stride-2", (1, 40, 15, 15), (Layer(36, stride=(2, 2)),), bias=True),
    Case("images-of-nine-columns", (3, 8, 7, 9), (Layer(8),)),  # runs of six and of eight pixels from image to image
    # Tiles of the CPU's kernels that take the images of a position together.
    Case("small-images", (17, 5, 4, 4), (Layer(7),), bias=True),
    Case("small-images-in-tiles", (27, 16, 4, 3), (Layer(24),), residual=True),
    Case("small-images-stride-2", (9, 12, 7, 7), (Layer(20, stride=(2, 2)),)),
    Case("small-images-wide-padding", (8, 6, 2, 3), (Layer(6, padding=(2, 3)),)),
    Case("many-pixels", (2, 16, 33, 31), (Layer(12),)),
]
# What the CPU's kernels make of quads, 2x2 outputs at a time (csrc/cpu/winograd.h): as few quads as they take, and
# tails of channels; quads that read no padding, and some that read nothing else; several images in a tile; tiles of
# unequal rows; odd rows and columns, which end in half a quad; rows longer than a tile; more channels than one run or
# one panel has.
QUADS = [
    Case("quads", (1, 17, 12, 16), (Layer(35),), bias=True, residual=True),
    Case("quads-no-padding", (2, 16, 12, 16), (Layer(24, padding=(0, 0)),), residual=True),
    Case("quads-wide-padding", (3, 20, 6, 8), (Layer(16, padding=(2, 3)),)),
    Case("quads-of-small-images", (17, 16, 4, 4), (Layer(32),), bias=True),
    Case("quads-in-tiles", (2, 16, 34, 30), (Layer(16),)),
    Case("quads-of-odd-images", (5, 17, 7, 9), (Layer(33),), bias=True, residual=True),
    Case("quads-of-odd-images-without-padding", (2, 16, 17, 15), (Layer(16, padding=(0, 0)),)),
    # dgrad reads dy in place here, where it may not read the last half of a quad: past its end.
    Case("quads-of-odd-images-in-place", (2, 16, 11, 13), (Layer(16, padding=(2, 2)),)),
    Case("quads-in-odd-tiles", (1, 16, 37, 35), (Layer(20),)),
    Case("quads-in-long-rows", (1, 16, 4, 290), (Layer(16),)),
    Case("quads-of-many-channels", (1, 151, 12, 16), (Layer(70),), bias=True),
]
QUADS += [QUADS[0].eval]
# What only the composed backends serve.
OTHER_FILTERS = [
    Case("groups", (2, 6, 5, 4), (Layer(9, groups=3),), bias=True),
    Case("depthwise", (2, 5, 6, 4), (Layer(5, groups=5, stride=(2, 2)),)),
    Case("dilation", (2, 4, 9, 8), (Layer(3, dilation=(2, 3), padding=(2, 3)),)),
    Case("5x5", (2, 3, 7, 6), (Layer(4, (5, 5), padding=(2, 2)),)),
    Case("1x3", (2, 3, 5, 6), (Layer(4, (1, 3), padding=(0, 1)),), residual=True),
    Case("stride-3", (2, 3, 8, 6), (Layer(4, stride=(1, 3)),), "raw"),
    Case("bottleneck-groups", (2, 12, 5, 6), (point(8), Layer(8, groups=4), point(16)), "activated", bias=True),
]
# Chains of two and three units.
CHAINS = [
    Case("basic", (2, 16, 6, 7), (Layer(16), Layer(16)), "identity"),
    Case("basic-stride-2", (2, 8, 7, 6), (Layer(12, stride=(2, 2)), Layer(12)), "activated"),
    Case("basic-residual", (2, 3, 5, 4), (Layer(5), Layer(7)), bias=True, residual=True),
    Case("bottleneck", (2, 32, 5, 6), (point(8), Layer(8), point(32)), "identity"),
    Case("bottleneck-wider", (3, 16, 4, 5), (point(8), Layer(8), point(32)), "activated"),
    Case("bottleneck-stride-2", (2, 24, 6, 8), (point(8), Layer(8, stride=(2, 2)), point(32)), "activated", bias=True),
    Case("bottleneck-first", (2, 12, 7, 8), (point(4, stride=(2, 2)), Layer(4), point(16)), "raw"),
    Case("raw", (2, 3, 6, 5), (Layer(5, stride=(2, 2)), Layer(35)), "raw"),
    Case("basic-quads", (3, 16, 8, 8), (Layer(16), Layer(24)), "activated"),
    Case("frozen-second", (2, 16, 6, 5), (point(8), Layer(8, batch=False), point(16)), "identity"),
    Case("frozen-first", (2, 16, 6, 5), (Layer(16, batch=False), Layer(16)), "identity"),
]
CHAINS += [CHAINS[0].eval, CHAINS[5].eval, CHAINS[6].eval]
UNITS += [UNITS[1].eval, UNITS[7].eval]
# For GPUs: more channels than one block has, rows longer than a tile, and more tiles than blocks.
LARGE = [
    Case("200-channels", (1, 200, 5, 6), (Layer(130),), bias=True),
    Case("200-channels-1x1", (2, 200, 5, 6), (point(72),), residual=True),
    Case("264-to-8-channels-1x1", (2, 264, 6, 5), (point(8),)),
    Case("long-rows", (1, 8, 3, 150), (Layer(16),)),
    Case("long-rows-stride-2", (1, 9, 5, 141), (Layer(8, stride=(2, 2)),)),
    Case("many-images", (40, 4, 3, 3), (Layer(8),)),
    # Of which torch's own filter gradient in bf16 is wrong on a CPU, so that the library's is not compared.
    Case("one-pixel-stride-2", (9, 12, 1, 1), (Layer(20, stride=(2, 2)),)),
    Case("many-tiles", (2, 16, 33, 31), (Layer(16),)),
    # A block of dgrad has several tiles, each of two chunks or more, and sums.
    Case("many-tiles-of-chunks-1x1", (2, 24, 16, 17), (point(72),)),
]
BY_ID = {case.id: case for case in UNITS + QUADS + OTHER_FILTERS + CHAINS + LARGE}
