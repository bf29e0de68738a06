"""What the CUDA kernels make of filters in memory, of operands to be rounded, and of sizes that they do not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import cuda_toolkit
from cases import Case, Layer, assert_exact_on_integers, point
from fused_preact import reference
from fused_preact.kernels import Activation, Affine, Gradient
from raw_table import DTYPES
from test_cuda import SCHEDULES
from tf32 import PRODUCTS

pytestmark = pytest.mark.skipif(cuda_toolkit.home() is None, reason=cuda_toolkit.NO_NVCC)


@pytest.fixture
def kernels(emulated: Any) -> Any:
    """The CUDA kernels on the emulated device."""
    return emulated


@pytest.mark.parametrize("apart", range(4), ids="KCRS".__getitem__)
@pytest.mark.parametrize("channels", [16, 12])
def test_a_filter_may_be_a_part_of_a_larger_one(
    apart: int,
    channels: int,
    product: str,
    kernels: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In channels_last, and one dimension a value further apart than in whole pieces; what lies between is not read."""
    dtype, K, D = PRODUCTS[product], 24, 16
    strides = [9 * D, 1, 3 * D, D]
    strides[apart] += apart != 1
    weight = torch.full((1000 + K * strides[0],), torch.nan, dtype=dtype).as_strided((K, channels, 3, 3), strides)
    weight.copy_(torch.randint(-1, 2, weight.shape))
    x = torch.randint(-1, 2, (2, channels, 5, 4)).to(dtype)
    place = kernels.place
    monkeypatch.setattr(kernels, "place", lambda tensor: tensor if tensor is weight else place(tensor))
    y, _ = kernels.forward(Layer(K).conv, Activation(x, None), weight, None, None, None)
    exact, _ = reference.forward(Layer(K).conv, Activation(x.double(), None), weight.double(), None, None, None)
    assert torch.equal(y, exact.to(dtype))


def test_a_filter_of_one_tap_is_copied_in_either_layout(kernels: Any) -> None:
    """Piece by piece: how far apart taps would be says nothing of one. Other layouts are loaded value by value."""
    x, copies = torch.ones(1, 16, 4, 4, dtype=torch.bfloat16), []
    dense = torch.ones(24, 16, 1, 1, dtype=torch.bfloat16)
    for weight in (
        dense,
        dense.to(memory_format=torch.channels_last),
        dense.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        kernels.forward(point(24).conv, Activation(x, None), weight, None, None, None)
        copies.append(kernels.latest_copies())
    assert copies[0] == copies[1] > copies[2]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_operand_of_tf32_is_rounded_to_the_nearest(layout: torch.memory_format, kernels: Any) -> None:
    """Cut off, as the device itself would, each would lose three quarters of the last of ten bits."""
    kernels.tf32 = True
    given, rounded = 1 + 3 * 2.0**-12, 1 + 2.0**-10
    x, weight = torch.full((1, 16, 4, 4), given), torch.full((16, 16, 1, 1), given).to(memory_format=layout)
    conv, a, dy = point(16).conv, Activation(x, None), Gradient(x)
    y, _ = kernels.forward(conv, a, weight, None, None, None)
    dx = kernels.dgrad(conv, dy, weight, a, None, False).g
    dweight, dbias = kernels.wgrad(conv, dy, a, weight, True)
    for result in (y, dx, dweight):  # sixteen products each
        torch.testing.assert_close(result, torch.full_like(result, 16 * rounded**2), rtol=2**-20, atol=0)
    assert dbias.eq(16 * given).all()


def test_a_join_reads_and_writes_at_any_address(kernels: Any) -> None:
    """No tensor is joined in pieces because the others of a call could be."""
    stream, branch = torch.randn(2, 1, 16, 3, 5)
    affine = Affine(torch.ones(16), torch.zeros(16), 1e-5)
    expected = kernels.join(stream, Gradient(branch.bfloat16()), False, True, affine)
    kernels.offset = 1
    for kernels.alone in range(SCHEDULES):
        found = kernels.join(stream, Gradient(branch.bfloat16()), False, True, affine)
        assert all(map(torch.equal, found, expected)), kernels.alone


def test_blocks_beside_each_other_merge_their_own_groups(kernels: Any) -> None:
    """More channels than a block has, in 70 groups of pixels, which are merged in teams."""
    C, K, generator = 136, 40, torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 2, shape, generator=generator).float()

    x, dy, affine = integers(1, C, 70, 128), integers(1, K, 70, 128), Affine(torch.ones(C), torch.zeros(C), 1e-5)
    arguments = {
        "forward": (point(C).conv, Activation(dy, None), integers(C, K, 1, 1), None, None, affine),
        "wgrad": (point(K).conv, Gradient(dy), Activation(x, None), integers(K, C, 1, 1), True),
        "statistics": (x, affine),
    }
    for number in 0, 4:  # in order and at random
        kernels.use_schedule(number, multiprocessors=1000)
        for name, given in arguments.items():
            found, expected = (tree_leaves(getattr(table, name)(*given)) for table in (kernels, reference))
            for value, exact in zip(found, expected, strict=True):
                torch.testing.assert_close(value, exact, rtol=2**-20, atol=1e-6, msg=f"{name} in schedule {number}")


ROOM = {
    # Without padding the first class of a strided dgrad has the most taps, the last the fewest; tiles are several.
    "classes of pixels": Case("", (1, 16, 40, 41), (Layer(16, stride=(2, 2), padding=(0, 0)),)),
    # What the warps of wgrad hand each other takes more room than two such tiles.
    "few pixels": Case("", (2, 16, 1, 1), (point(16),)),
}


@pytest.mark.parametrize("of", ROOM)
def test_shared_memory_has_room_for_the_largest(of: str, product: str, kernels: Any) -> None:
    """Of what takes its turns there, whichever comes last."""
    for number in range(SCHEDULES):
        kernels.use_schedule(number, multiprocessors=1)
        assert_exact_on_integers(ROOM[of], kernels, PRODUCTS[product])


# name -> N, height and width; channels in and out; taps a side; step between filters; and what the error says.
TOO_LARGE = {
    "image": ((1, 2**16, 2**16), (8, 8), 3, 72, "too many pixels in an image for the CUDA kernels"),
    "tensor": ((2**30, 64, 64), (8, 8), 3, 72, "too many pixels for the CUDA kernels"),
    "filter": ((1, 8, 8), (8, 8), 3, 2**29, r"the CUDA kernels have no filters of 2\^31 values"),
    "channels": ((1, 64, 64), (8, 2**18), 1, 8, "too many channels for the CUDA kernels"),
}


@pytest.mark.parametrize("of", TOO_LARGE)
def test_what_the_kernels_do_not_count_is_refused(of: str, kernels: Any) -> None:
    """Before any of it is read."""
    (N, H, W), (C, K), taps, step, message = TOO_LARGE[of]
    conv = kernels.place_words(N, H, W, C, H, W, K, taps, taps, 1, 1, taps // 2, taps // 2)
    weight, nothing = kernels.place_words(0, step, 1, C * taps, C), kernels.place_words(0, 0, 0)
    kernels.use_schedule(0, multiprocessors=2**20)  # of which each tile has one
    with pytest.raises(RuntimeError, match=message):
        kernels.call("forward", conv, DTYPES.index(torch.bfloat16), nothing, weight, 0, 0, 0, nothing, 0)
