"""What is known of a call before its tensors are read, and how long it is remembered."""

import pytest
import torch

from fused_preact import PreActBlock, plans


def test_plans_do_not_pile_up():
    """A net that sees images of every size remembers some."""
    known = plans.Plans(3)
    for size in range(10):
        assert known.find((size,), lambda size=size: size) == size
        assert known.find((size,), lambda: pytest.fail("known already")) == size
        assert len(known) <= 3


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_runs_from_block_to_block(dtype, memory):
    """What a mode rebuilds it rebuilds from float32 or better."""
    block = PreActBlock(4, 4).to(dtype)._layers().block()
    plan = plans.make_plan(torch.randn(2, 4, 5, 5, dtype=dtype), [block], memory=memory)
    assert plan.stream == (dtype if memory == "fast" or dtype == torch.float64 else torch.float32)


def test_what_is_rebuilt_runs_from_block_to_block_in_float32():
    """Of parameters in 16 bits, too: x = y - branch would lose what their type cannot hold."""
    block = PreActBlock(4, 4, dtype=torch.bfloat16)._layers().block()
    x = torch.randn(2, 4, 5, 5, dtype=torch.bfloat16)
    assert plans.make_plan(x, [block], memory="lean").stream == torch.float32
    assert plans.make_plan(x, [block], memory="fast").stream == torch.bfloat16


def test_without_numbers():
    """On the meta device shapes come out."""
    for backend in "auto", "reference":
        x = torch.randn(2, 8, 5, 5, device="meta", requires_grad=True)
        y = PreActBlock(8, 8, backend=backend).to("meta")(x)
        assert y.shape == torch.autograd.grad(y.sum(), x)[0].shape == (2, 8, 5, 5)
