"""Who takes part in a measurement, and what of each is timed."""

from dataclasses import replace

import pytest
import torch

from fused_preact.bench import check
from fused_preact.bench.contenders import Contender, build, contenders, step
from fused_preact.bench.plain import Plain


def test_compiled_takes_part_where_the_case_lets_it(block):
    """It is asked for, and it fits into memory beside the others."""
    case = replace(block, layouts=("NCHW",))
    assert [c.name for c in contenders(case, compiled=True)] == ["fused NCHW", "eager NCHW", "compiled NCHW"]
    assert [c.name for c in contenders(case)] == ["fused NCHW", "eager NCHW"]
    assert [c.name for c in contenders(replace(case, compiled=False), compiled=True)] == ["fused NCHW", "eager NCHW"]


def test_modes_are_of_the_fused(small_net):
    """Plain layers have one, and a name says the mode where it is not the usual one."""
    names = [c.name for c in contenders(replace(small_net, memory=("fast", "lean")))]
    assert names == ["fused channels_last", "fused lean channels_last", "eager channels_last"]


def test_a_module_is_built_as_its_contender_says(block, small_net):
    """In training mode, with the parameters of the problem in the memory format, block by block compiled."""
    problem = check.pose(block)
    for layout, format in ("channels_last", torch.channels_last), ("NCHW", torch.contiguous_format):
        module = build(Contender("auto", layout), problem)
        assert module.conv1.weight.is_contiguous(memory_format=format)
        assert torch.equal(module.conv1.weight, problem.state["conv1.weight"])
        assert module.training
        assert module._compiled_call_impl is None
    compiled = build(Contender("compiled", "NCHW"), problem)
    assert type(compiled) is Plain
    assert compiled._compiled_call_impl is not None
    net = build(Contender("auto", "channels_last", "lean"), check.pose(small_net))
    assert {stage.memory for stage in (net.layer1, net.layer2, net.layer3)} == {"lean"}


def test_a_step_of_a_block_begins_without_gradients(block):
    """Of the parameters and of x, which is a copy of the problem's: else each step would add to those before."""
    problem = check.pose(block)
    contender = Contender("auto", "channels_last")
    module, read = build(contender, problem), []
    module.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    trial = step(contender, problem, module)
    trial.run()
    (x,) = read
    assert torch.equal(x, problem.x)
    assert x.data_ptr() != problem.x.data_ptr()
    assert x.grad is not None
    trial.prepare()
    assert x.grad is None
    assert all(p.grad is None for p in module.parameters())


def test_a_step_of_a_net_is_one_of_sgd(small_net):
    """Cross entropy, its gradients alone, and the update."""
    problem = check.pose(small_net)
    contender = Contender("eager", "channels_last")
    module = build(contender, problem)
    trial = step(contender, problem, module)
    trial.prepare()
    loss = trial.forward()
    assert loss == torch.nn.functional.cross_entropy(build(contender, problem)(problem.x), problem.target)
    trial.backward(loss)
    weight, before = module.linear.weight, problem.state["linear.weight"]
    torch.testing.assert_close(weight.detach(), before - 1e-3 * (weight.grad + 1e-4 * before))
    assert weight.grad.abs().sum() > 0
    trial.prepare()
    assert weight.grad is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_computes_in_the_type_of_its_case(block, dtype):
    """bf16 is autocast's."""
    problem = check.pose(replace(block, dtype=dtype))
    contender = Contender("eager", "NCHW")
    module, seen = build(contender, problem), []
    module.conv2.register_forward_hook(lambda _, given, y: seen.append(y.dtype))
    step(contender, problem, module).forward()
    assert seen == [{"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]]
