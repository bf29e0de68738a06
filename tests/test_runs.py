"""runs.py: what is remembered of a module is what it is now, and does not keep it alive."""

import gc
import weakref

import pytest
import torch
from torch import nn

from fused_preact import BNReLUConv2d, PreActBlock, PreActStage


def modules() -> list[nn.Module]:
    return [BNReLUConv2d(4, 4, 3, padding=1), PreActBlock(4, 4), PreActStage(PreActBlock(4, 4), PreActBlock(4, 4))]


@pytest.mark.parametrize("index", range(3))
def test_a_module_that_ran_is_freed(index):
    """The memory of a net goes when its last name goes, although its calls are remembered."""
    module = modules()[index]
    module(torch.randn(2, 4, 5, 5))
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


CHANGES = {
    "weight": lambda bn, conv: setattr(conv, "weight", nn.Parameter(-conv.weight.detach())),
    "bias": lambda bn, conv: setattr(conv, "bias", nn.Parameter(torch.ones(4))),
    "gamma": lambda bn, conv: setattr(bn, "weight", nn.Parameter(torch.full((4,), 3.0))),
    "eval": lambda bn, conv: bn.eval(),
    "momentum": lambda bn, conv: setattr(bn, "momentum", 0.7),
    "average": lambda bn, conv: setattr(bn, "momentum", None),
    "eps": lambda bn, conv: setattr(bn, "eps", 0.5),
    "padding": lambda bn, conv: setattr(conv, "padding", (2, 2)),
    "hook": lambda bn, conv: bn.register_forward_hook(lambda module, given, result: 2 * result),
    "hooks": lambda bn, conv: setattr(bn, "_forward_hooks", {0: lambda module, given, result: 2 * result}),
    "parameters": lambda bn, conv: setattr(conv, "_parameters", {"weight": nn.Parameter(-conv.weight), "bias": None}),
    "running": lambda bn, conv: setattr(bn, "running_mean", torch.full((4,), 9.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_calls_is_heard(change):
    """Whatever is changed about a layer after a call, the next call does as the plain layers do."""
    torch.manual_seed(0)
    ours, theirs = (BNReLUConv2d(4, 4, 3, padding=1, backend=backend) for backend in ("auto", "eager"))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 5, 5)
    for module in (ours, theirs):
        torch.manual_seed(1)
        module(x)
        CHANGES[change](module.bn, module.conv)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
