"""csrc/expect.h: every tensor of an operator's call is on the device of x, for kernels see addresses alone."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cases import Case, Layer, backward_arguments, forward_arguments, needs_cpu, point
from fused_preact import ops

pytestmark = needs_cpu

KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # of such a call the dispatcher itself takes the fake kernel
CASES = [
    Case("residual", (2, 4, 3, 5), (Layer(6),), residual=True),
    Case("projection", (2, 4, 3, 5), (Layer(6), point(8)), "activated", bias=True),
]
ARGUMENTS = forward_arguments, backward_arguments


def elsewhere(argument):
    """A tensor, or the last one of a list, that has no memory."""
    return argument.to("meta") if isinstance(argument, Tensor) else [*argument[:-1], argument[-1].to("meta")]


def holds_tensors(argument) -> bool:
    return isinstance(argument, Tensor) or (isinstance(argument, list) and isinstance(next(iter(argument), 0), Tensor))


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES + [case.eval for case in CASES], ids=lambda case: case.id)
def test_a_tensor_elsewhere_is_an_error(case, direction):
    """Whichever it is."""
    operator, given = ops.OPERATORS["cpu"][direction], ARGUMENTS[direction](case.draw(0), "cpu", "lean")
    for i, argument in enumerate(operator._schema.arguments):
        if argument.name != "x" and holds_tensors(given[i]):
            with pytest.raises(RuntimeError, match=f"^{argument.name}: expected on cpu as x, got another device"):
                operator.redispatch(KEY, *given[:i], elsewhere(given[i]), *given[i + 1 :])


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "backward"])
def test_a_device_without_kernels_is_an_error(direction):
    """Though all tensors are on it."""
    given = tree_map_only(Tensor, lambda t: t.to("meta"), ARGUMENTS[direction](CASES[0].draw(0), "cpu"))
    with pytest.raises(RuntimeError, match="expected on another device as x, got another device"):
        ops.OPERATORS["cpu"][direction].redispatch(KEY, *given)
