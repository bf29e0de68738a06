"""Wrappers of torch.distributed leave a net's results and gradients as they are; one process is all that it takes."""

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import fused_preact
from fused_preact import PreActBlock, PreActStage, backends


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net(memory: str = "fast", kind: Callable[..., nn.Module] | None = None) -> nn.Module:
    """One that ran: what it remembers of its parameters is no longer so when they are sharded."""
    torch.manual_seed(0)
    make = kind or functools.partial(PreActStage, memory=memory)
    model = nn.Sequential(
        make(PreActBlock(4, 4), PreActBlock(4, 4)),
        make(PreActBlock(4, 8, 2), PreActBlock(8, 8)),
    )
    state = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 4, 6, 6))
    model.load_state_dict(state)
    return model


def sharded(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The model with the parameters of each module of a kind gathered when that runs, and given up in between."""
    mesh = DeviceMesh("cpu", [0])
    for part in [module for module in model.modules() if type(module) is kind]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def trained(model: nn.Module) -> list[torch.Tensor]:
    """Results of three steps, what they moved, and the last gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for seed in range(3):
        x = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        optimizer.step()
        found.append(y.detach())
    found += [whole(p.grad) for p in model.parameters()]
    return found + [whole(t).detach() for t in (*model.parameters(), *model.buffers())]


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "its own buckets as gradients": lambda model: DistributedDataParallel(
        model, gradient_as_bucket_view=True, static_graph=True
    ),
    "fully_shard by stage": lambda model: sharded(model, PreActStage),
}


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_net_trains_as_it_does_alone(group, wrapper, memory):
    """Hooks on the gradients, and parameters that are put in for a call, must neither be missed nor cost the node."""
    model = WRAPPERS[wrapper](net(memory))
    assert_close(trained(model), trained(net(memory)), rtol=0, atol=0)


def test_blocks_sharded_one_by_one_train_as_they_do_alone(group):
    """Each is called, for its hooks, and is no part of its stage's node."""
    assert_close(trained(sharded(net(), PreActBlock)), trained(net(kind=nn.Sequential)), rtol=0, atol=0)


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "its own buckets as gradients"])
def test_explain_leaves_a_wrapped_net_as_it_is(group, wrapper):
    """It may be asked before training starts, and in the middle."""
    model, plain = WRAPPERS[wrapper](net()), WRAPPERS[wrapper](net())
    for _ in range(2):
        choices = fused_preact.explain(model, torch.randn(4, 4, 6, 6))
        assert [choice.where for choice in choices] == ["module.0", "module.1"]
        assert all(choice.backend in backends.FUSED for choice in choices)
        assert_close(trained(model), trained(plain), rtol=0, atol=0)


def of_the_older_kind(model: nn.Module) -> nn.Module:
    """A module of the class alone, which cannot shard without an accelerator."""
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


@pytest.mark.parametrize("shard", [lambda model: sharded(model, PreActStage), of_the_older_kind])
def test_explain_refuses_what_is_sharded(group, shard):
    """A fake tensor in the place of gathered parameters would stay, and each later call give fake tensors."""
    with pytest.raises(ValueError, match="target must not be sharded by torch"):
        fused_preact.explain(shard(net()), torch.randn(2, 4, 6, 6))
