"""Branches of 16 bits on a stream of float32: the kernel that joins them, and a stage against its blocks one by one."""

import itertools
import random
import statistics
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cases import PYTHON_BACKENDS
from fused_preact import ops, reference, schedule
from fused_preact.kernels import Affine, Gradient

BF16 = torch.bfloat16
NONE, IDENTITY, RAW, ACTIVATED = map(schedule.SHORTCUTS.index, ("none", "identity", "raw", "activated"))


@pytest.fixture(params=PYTHON_BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Any:
    """Each table of kernels in Python."""
    return ops.table(request.param)


@pytest.fixture(params=[BF16, torch.float16], ids=str)
def narrow(request: pytest.FixtureRequest) -> torch.dtype:
    """Each type of 16 bits."""
    return request.param


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (3, 35, 9, 5), (1, 5, 1, 2), (2, 300, 3, 4)], ids=str)
def test_a_branch_joins_a_stream_of_float32(
    shape: tuple[int, ...], subtract: bool, kernels: Any, narrow: torch.dtype
) -> None:
    """The sum and its rounding are exact, and the statistics those of the rounded sum."""
    stream, branch = (t.contiguous(memory_format=torch.channels_last) for t in torch.randn(2, *shape))
    branch = branch.to(narrow)
    following = Affine(torch.rand(shape[1]), torch.randn(shape[1]), 1e-5)
    joined, narrowed, rows = kernels.join(stream, Gradient(branch), subtract, False, following)
    assert torch.equal(joined, stream - branch.float() if subtract else stream + branch.float())
    assert torch.equal(narrowed, joined.to(narrow))
    exact = reference.statistics(narrowed.double(), Affine(*(t.double() for t in following[:2]), following.eps))
    assert_close(rows.double(), exact, rtol=1e-6, atol=1e-7)
    for wanted in (False, True):
        alone, rounded, no_rows = kernels.join(stream, Gradient(branch), subtract, wanted, None)
        assert torch.equal(alone, joined)
        assert rounded is None if not wanted else torch.equal(rounded, narrowed)
        assert no_rows is None


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("channels", [5, 24])
def test_a_gradient_joins_a_stream_of_float32_as_it_is_formed(
    channels: int, batch: bool, kernels: Any, narrow: torch.dtype
) -> None:
    """Not rounded in between."""
    stream, dz, x = (t.contiguous(memory_format=torch.channels_last) for t in torch.randn(3, 2, channels, 3, 5))
    dz, x = dz.to(narrow), x.to(narrow)
    norm = reference.statistics(x, Affine(torch.rand(channels), torch.randn(channels), 1e-5))
    grad = list(torch.randn(4, channels)) if batch else [torch.zeros(channels)] * 4
    joined, narrowed, _ = kernels.join(stream, Gradient(dz, x, norm, grad), False, True, None)
    formed = reference.dx(Gradient(dz.double(), x.double(), norm.double(), [row.double() for row in grad]), None)
    assert_close(joined.double(), stream + formed, rtol=1e-6, atol=2e-6)
    assert torch.equal(narrowed, joined.to(narrow))


@dataclass
class Block:
    """Three units, 1x1, 3x3 and 1x1, as arguments of the operators."""

    shortcut: int
    weight: list[Tensor]
    bias: list[Tensor]
    norm: list[list[Tensor]]  # weight, bias, running mean, running variance
    projection: list[Tensor]
    training: list[bool]

    @property
    def geometry(self) -> list[int]:
        return [n for w in (*self.weight, *self.projection) for n in (1, 1, w.size(2) // 2, w.size(3) // 2, 1, 1, 1)]


def block(shortcut: int, channels: int, training: bool) -> Block:
    widths = (channels, 6, 16, channels)
    weight = [
        torch.randn(k, c, r, r) / (c * r * r) ** 0.5
        for (c, k), r in zip(itertools.pairwise(widths), (1, 3, 1), strict=True)
    ]
    norm = [[draw(c) for c in widths[:-1]] for draw in (torch.rand, torch.randn, torch.randn, torch.rand)]
    projection = [torch.randn(channels, channels, 1, 1) / channels**0.5] if shortcut != IDENTITY else []
    bias = [torch.randn(c) for c in widths[1:]]
    return Block(shortcut, weight, bias, norm, projection, [training, True, training])


def of_all(blocks: list[Block], name: str) -> list:
    return [value for one in blocks for value in getattr(one, name)]


def forward(
    backend: str, x: Tensor, blocks: list[Block], shortcuts: list[int], memory: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    norms = [[t for b in blocks for t in b.norm[i]] for i in range(4)]
    training, units = of_all(blocks, "training"), [3] * len(blocks)
    facts = training, [1e-5] * len(training), of_all(blocks, "geometry"), units, shortcuts, BF16, memory, False
    return ops.OPERATORS[backend][0](
        x, None, of_all(blocks, "weight"), of_all(blocks, "bias"), *norms, of_all(blocks, "projection"), *facts
    )


def backward(
    backend: str, dy, x, y, kept, rows, blocks: list[Block], shortcuts: list[int], memory: int, needs: list[bool]
) -> list[Tensor]:
    """Gradients but for those of biases, of which most vanish: the batch norm behind them takes the mean away."""
    layers = [of_all(blocks, name) for name in ("weight", "bias", "projection", "training")]
    needs = [*needs[: 1 + 3 * len(blocks)], *[False] * 3 * len(blocks), *needs[1 + 3 * len(blocks) :]]
    facts = of_all(blocks, "geometry"), [3] * len(blocks), shortcuts, BF16, memory, False
    dx, dweight, _, *others = ops.OPERATORS[backend][1](dy, x, y, kept, rows, *layers, *facts, needs)
    return [dx, *dweight, *itertools.chain(*others)]


@pytest.mark.parametrize("memory", [schedule.MEMORY.index("lean"), schedule.MEMORY.index("min")])
@pytest.mark.parametrize("training", [True, False])
def test_a_stage_is_its_blocks_one_by_one(memory: int, training: bool, backend: str) -> None:
    """Forward to the bit; gradients but for how dx and streams that are built again are rounded, whatever is wanted.

    Of each tensor the median of some draws counts: in a single one rounding may turn a ReLU on or off, and a value that
    is halfway between two of 16 bits may go to the other one.
    """
    draws = [differences_from_blocks_one_by_one(memory, training, backend) for _ in range(5)]
    medians = [statistics.median(of_tensor) for of_tensor in zip(*draws, strict=True)]
    for (y, *others), bound in (draws[0], 0.05), (medians, 0.03):
        assert y == 0
        # The convolution of a projection sums up what it gives in another order than a pass of their own.
        assert max(others[:18]) <= 1e-6
        assert max(others[18:]) <= bound


def differences_from_blocks_one_by_one(memory: int, training: bool, backend: str) -> list[float]:
    """Relative differences of y, of the rows of all units and of the gradients, in a draw."""
    kinds = [IDENTITY, IDENTITY, RAW, IDENTITY, ACTIVATED, IDENTITY]
    blocks = [block(kind, 20, training) for kind in kinds]
    x = torch.randn(3, 20, 6, 7).to(memory_format=torch.channels_last)
    y, kept, rows = forward(backend, x, blocks, kinds, memory)
    streams, alone = [x], []
    for one in blocks:
        apart = one.shortcut == IDENTITY
        branch, *saved = forward(backend, streams[-1].to(BF16), [one], [NONE if apart else one.shortcut], 0)
        streams.append(streams[-1] + branch if apart else branch.float())
        alone.append(saved)

    dy = torch.randn_like(y)
    dstream, expected = dy, []
    for one, (one_kept, one_rows), before in reversed(list(zip(blocks, alone, streams[:-1], strict=True))):
        apart = one.shortcut == IDENTITY
        every = [True] * (1 + 6 + len(one.projection))
        shortcut = [NONE if apart else one.shortcut]
        saved = before.to(BF16), None, one_kept, one_rows
        dx, *of_block = backward(backend, dstream.to(BF16), *saved, [one], shortcut, 0, every)
        expected.insert(0, of_block)
        dstream = dstream + dx if apart else dx.float()
    by_kind = [
        [g for of_block in expected for g in of_block[kind]] for kind in map(slice, (0, 3, 6, 9), (3, 6, 9, None))
    ]
    expected = [dstream, *itertools.chain(*by_kind)]
    found = backward(backend, dy, x, y, kept, rows, blocks, kinds, memory, [True] * (1 + 18 + 18 + 2))
    generator = random.Random(0)
    for chance in (0.5, 0.1, 0.1):
        needs = [generator.random() < chance for _ in range(1 + 18 + 18 + 2)]
        wanted = [*needs[:37], *needs[19:37], *needs[37:]]
        some = backward(backend, dy, x, y, kept, rows, blocks, kinds, memory, needs)
        for gradient, is_wanted, one in zip(some, wanted, found, strict=True):
            assert torch.equal(gradient, one) if is_wanted else gradient.numel() == 0
    ours = y, *rows, *found
    theirs = streams[-1], *(row for _, of_block in alone for row in of_block), *expected
    return [((one - other).norm() / other.norm()).item() for one, other in zip(ours, theirs, strict=True)]
