import copy
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from cases import BACKENDS, BY_ID, CHAINS, Sample, backward_arguments, eager, forward_arguments, fused, needs_cpu
from fused_preact import PreActBlock, PreActBottleneck, PreActStage, kernels, ops, reference, schedule
from fused_preact.kernels import Conv
from test_blocks import assert_same, step

CASES = CHAINS + [BY_ID[name] for name in ("odd", "stride-2", "odd-eval")]


@needs_cpu
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_both_schedules_agree(case, layout):
    """C++ and Python return the same structure of the same numbers, forward and backward, hidden and rows included."""
    sample = case.draw(0, torch.float64, layout)
    ours, theirs = (ops.OPERATORS[name][0](*forward_arguments(sample, name)) for name in ("cpu", "reference"))
    compare(ours, theirs)
    arguments = backward_arguments(sample, "reference")
    ours, theirs = (ops.OPERATORS[name][1](*arguments) for name in ("cpu", "reference"))
    compare(ours, theirs)


@needs_cpu
@pytest.mark.parametrize("seed", range(12))
def test_both_schedules_leave_out_the_same(seed):
    """For any choice of gradients both compute the ones that are needed and return the others empty."""
    case = CHAINS[seed % len(CHAINS)]
    sample = case.draw(0, torch.float64)
    arguments = backward_arguments(sample, "reference")
    every = arguments[-1]
    chosen = torch.rand(len(every), generator=torch.Generator().manual_seed(seed)) < 0.4
    needs = [bool(need and choice) for need, choice in zip(every, chosen, strict=True)]
    ours, theirs = (ops.OPERATORS[name][1](*arguments[:-1], needs) for name in ("cpu", "reference"))
    compare(ours, theirs)
    *_, weight, bias, _ = arguments[:8]
    norms = slice(1 + len(weight) + len(bias), 1 + 2 * len(weight) + len(bias))
    expected = [*needs[: norms.stop], *needs[norms], *needs[norms.stop :]]
    assert [t.numel() > 0 for t in tree_leaves(ours)] == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [BY_ID["bottleneck-first"], BY_ID["bottleneck-first"].eval], ids=lambda case: case.id)
def test_each_batch_norm_has_an_eps_of_its_own(case, backend):
    """Large enough to show, and another one in each unit."""
    sample = case.draw(0, torch.float64)
    sample = sample.replace([unit._replace(eps=0.1 * i) for i, unit in enumerate(sample.units, start=1)])
    theirs = eager(sample)
    for name, result in fused(sample, backend).items():
        assert_close(result, theirs[name], rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def compare(ours, theirs) -> None:
    """The same nesting of tensors of the same shape, type, strides and values."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert len(tree_leaves(one)) == len(tree_leaves(other))
    for one, other in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-11, check_stride=True)


@pytest.mark.parametrize(
    ("conv", "size", "filters"),
    [
        (Conv(1, 1, 0, 0, 1, 1, 1), (5, 7), (3, 3)),
        (Conv(2, 3, 1, 2, 1, 1, 1), (6, 9), (3, 5)),
        (Conv(1, 2, 4, 0, 3, 2, 1), (5, 8), (3, 2)),
    ],
)
def test_output_shape_is_that_of_conv2d(conv, size, filters):
    """The formula for the output's size is torch's."""
    x, weight = torch.zeros(2, 3, *size), torch.zeros(4, 3, *filters)
    y = torch.nn.functional.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    assert conv.output_shape(x.shape, weight.shape) == tuple(y.shape)


def test_memory_format():
    """A result is channels_last where the input's channels are next to each other, and there is more than one."""
    x = torch.zeros(2, 3, 4, 5)
    assert kernels.memory_format(x) == torch.contiguous_format
    assert kernels.memory_format(x.contiguous(memory_format=torch.channels_last)) == torch.channels_last
    assert kernels.memory_format(torch.zeros(2, 1, 4, 5)) == torch.contiguous_format
    assert kernels.memory_format(torch.zeros(2, 4, 5, 6).permute(0, 3, 1, 2)[:, 1:4]) == torch.channels_last


def test_needs_are_split_by_kind():
    """x, weights, biases, batch norms, shortcuts: in this order, and of biases and shortcuts those that are there."""
    weight, bias, projection = [torch.zeros(4, 4, 1, 1)] * 2, [torch.zeros(4)] * 2, [torch.zeros(4, 4, 1, 1)]
    facts = [True] * 2, [1, 1, 0, 0, 1, 1, 1] * 3, [2], [schedule.SHORTCUTS.index("raw")], torch.float32, 0
    stage = schedule.Stage.parse(weight, bias, projection, *facts)
    needs = schedule.Needs.parse([True, False, True, True, False, True, True, False], stage)
    assert needs == schedule.Needs(True, [False, True], [True, False], [True, True], [False])
    plain = schedule.Stage.parse(weight, [], [], facts[0], facts[1][:14], [2], [0], torch.float32, 0)
    needs = schedule.Needs.parse([True, False, True, True, False], plain)
    assert needs == schedule.Needs(True, [False, True], [False, False], [True, False], [False])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shortcut", ["basic", "basic-stride-2", "raw"])
def test_results_of_16_bits_are_foretold(shortcut, backend):
    """Code that is compiled relies on their types, though sums are made in float32."""
    sample, (forward, backward) = BY_ID[shortcut].draw(0, torch.bfloat16), ops.OPERATORS[backend]
    torch.library.opcheck(forward, forward_arguments(sample, backend), test_utils="test_faketensor")
    torch.library.opcheck(backward, backward_arguments(sample, backend), test_utils="test_faketensor")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_wanted_is_foretold(backend):
    """Empty, and of the type that it would have: dx of the stream's, where convolutions have another."""
    with torch.autocast("cpu", torch.bfloat16):
        _, (*arguments, every) = of_small_tensors([PreActBottleneck(8, 2), PreActBlock(8, 8)], "lean")
    needs = [False] * len(every)
    torch.library.opcheck(ops.OPERATORS[backend][1], (*arguments, needs), test_utils="test_faketensor")


@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
@pytest.mark.parametrize("autocast", [False, True])
def test_only_the_first_x_is_read_for_its_statistics_alone(autocast, memory, monkeypatch):
    """Those of all that a kernel returns are made by that kernel, also where a branch is joined with its stream."""
    calls = []
    counted = types.SimpleNamespace(**vars(reference))
    counted.statistics = lambda *args: calls.append(args) or reference.statistics(*args)
    monkeypatch.setattr(ops, "table", lambda _backend: counted)
    stage = PreActStage(*(PreActBottleneck(C, 2, backend="reference") for C in (6, 8, 8)), memory=memory)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stage(torch.randn(2, 6, 4, 4))
    assert len(calls) == 1


def test_no_gradient_is_made_that_leads_to_none(monkeypatch):
    """Behind the first parameter that is trained, of what a unit read."""
    calls = []
    counted = types.SimpleNamespace(**vars(reference))
    counted.dgrad = lambda *args: calls.append(args) or reference.dgrad(*args)
    monkeypatch.setattr(ops, "table", lambda _backend: counted)
    for name, made in ("conv2.weight", 0), ("bn2.bias", 1), ("conv1.weight", 1), ("bn1.weight", 2):
        block = PreActBlock(4, 4, backend="reference").requires_grad_(False)
        block.get_parameter(name).requires_grad_(True)
        block(torch.randn(2, 4, 4, 4)).sum().backward()
        assert len(calls) == made, name
        calls.clear()


def deep(backend: str, kind: type = PreActBottleneck, planes: int = 2) -> PreActStage:
    """So many tiny blocks that one of them repeats its first unit."""
    torch.manual_seed(0)
    blocks = [kind(8, planes, backend=backend) for _ in range(schedule.REPEATING + 1)]
    stage = PreActStage(*blocks).double()
    for name, p in stage.named_parameters():
        if "bn" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    return stage


def images() -> torch.Tensor:
    return torch.randn(3, 8, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "planes", "repeated"), [(PreActBottleneck, 2, 1), (PreActBlock, 8, 0)])
def test_fast_keeps_all_but_one_hidden_tensor_of_many_bottlenecks(kind, planes, repeated, backend):
    """By which a net keeps less than half of what its plain layers keep; a basic block has but one, of a 3x3."""
    stage, kept = deep(backend, kind, planes), []

    def pack(t):
        kept.append(t.shape[1] if t.dim() == 4 and t.shape[0] == 3 else 0)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        stage(images())
    blocks, inside = len(stage), stage[0]._units - 1
    expected = sorted([8] * blocks + [planes] * (blocks * inside - repeated))
    assert sorted(filter(None, kept)) == expected


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_deep_stage_is_its_plain_layers(backend, compiled):
    """With what is made again, in compiled code too, where its shapes are foretold."""
    stage, plain = deep(backend), deep("eager")
    call = torch.compile(stage, backend="aot_eager", fullgraph=True) if compiled else stage
    assert_same(step(stage, images(), call), step(plain, images()), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "library"])
def test_what_is_made_again_is_the_same_to_the_bit(backend, monkeypatch):
    """By the same kernel from the same x and rows."""
    stage, count = deep(backend), schedule.REPEATING
    ours = step(copy.deepcopy(stage), images())
    monkeypatch.setattr(schedule, "REPEATING", count + 2)
    assert_same(ours, step(stage, images()), rtol=0, atol=0)


@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_may_be_laid_out_anew(backend, memory):
    """As torch.autograd.graph.save_on_cpu does, which gives NCHW back for channels_last."""
    torch.manual_seed(0)
    stage = PreActStage(*(PreActBottleneck(8, 2, backend=backend) for _ in range(3)), memory=memory).double()
    twin = copy.deepcopy(stage)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        ours = step(stage, images().contiguous(memory_format=torch.channels_last))
    assert_same(ours, step(twin, images()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_no_gradient_leads_to_keep_nothing(backend, memory, compiled):
    """Those in front of the first that is trained, as where the last blocks of a net are tuned."""
    torch.manual_seed(0)
    stage, plain = (
        PreActStage(*(PreActBottleneck(8, 2, backend=b) for _ in range(4)), memory=memory).double()
        for b in (backend, "eager")
    )
    plain.load_state_dict(stage.state_dict())
    for one in stage, plain:
        one[:2].requires_grad_(False)
    call = torch.compile(stage, backend="aot_eager", fullgraph=True) if compiled else stage
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        call(images()).square().sum().backward()
    plain(images()).square().sum().backward()
    inside = [shape for shape in kept if len(shape) == 4 and shape[0] == 3]
    # Of two blocks x and what is inside, or the stage's x and y and what is inside; and what square keeps.
    assert len(inside) == {"fast": 2 * 3, "lean": 2 + 2 * 2, "min": 2 + 2}[memory] + 1
    found = [
        {**one.state_dict(), **{f"d{k}": p.grad for k, p in one.named_parameters() if p.grad is not None}}
        for one in (stage, plain)
    ]
    assert found[0].keys() == found[1].keys()
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)


def allocated(call: Callable, *args) -> tuple[list[int], int]:
    """The bytes of each tensor that torch allocates in a call, and how many it converts.

    Those of 2 KiB and more that C++ makes are not torch's: they are from its pool.
    """
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call(*args)
    events = profile.kineto_results.events()
    made = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    return made, sum(event.name() == "aten::_to_copy" for event in events)


def returned(call: Callable, *args) -> int:
    """The bytes of all that kernels return in a call of `schedule` over the reference; dx overwrites in C++."""
    found = []

    def watched(name: str) -> Callable:
        def kernel(*args):
            result = getattr(reference, name)(*args)
            found.append((result.g, result.grad) if name == "dgrad" else result)
            return result

        return kernel

    names = "forward", "dgrad", "wgrad", "statistics", "running", "join"
    call(types.SimpleNamespace(dx=reference.dx, **{name: watched(name) for name in names}), *args)
    return sum(t.nbytes for t in tree_leaves(found) if t is not None)


def of_small_tensors(blocks: list[nn.Module], memory: str) -> tuple[tuple, tuple]:
    """Arguments of forward and of backward for a run of blocks."""
    x = torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last)
    with torch.no_grad():
        sample = Sample(x, [block._layers().block() for block in blocks], None, nn.Sequential(*blocks)(x).float())
        return forward_arguments(sample, "reference", memory), backward_arguments(sample, "reference", memory)


@needs_cpu
@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
def test_both_schedules_make_the_same_tensors(memory):
    """No pass of C++ is one too many, whatever is wanted; but it subtracts a branch by filters that are negated."""
    kinds = {"shortcut_input": "raw"}, {}
    blocks = [PreActBottleneck(*shape, **kinds[shape[1] != 3]) for shape in ((8, 2), (8, 3), (12, 3), (12, 1), (4, 1))]
    blocks[2].eval()
    forward, (*backward, every) = of_small_tensors(blocks, memory)
    made, converted = allocated(ops.OPERATORS["cpu"][0], *forward)
    assert (sum(made), converted) == (returned(schedule.forward, *forward), 0)
    block_of = [0, *[k for k in range(5) for _ in range(3)] * 2, 1, 3]  # what may be wanted: x, units, projections
    alone = [[i == wanted for i in range(len(every))] for wanted in range(len(every))]
    for needs, first in zip((every, *alone), (0, *block_of), strict=True):
        rebuilt = [k for k in (2, 4) if k >= first and memory != "fast"]
        expected = returned(schedule.backward, *backward, needs) + sum(blocks[k].conv3.weight.nbytes for k in rebuilt)
        made, converted = allocated(ops.OPERATORS["cpu"][1], *backward, needs)
        assert (sum(made), converted) == (expected, 0), needs


@needs_cpu
def test_one_channel_is_not_laid_out_anew():
    """Its images are NCHW and NHWC at once."""
    forward = forward_arguments(BY_ID["one-channel"].draw(0, layout="nchw"), "reference")
    made, _ = allocated(ops.OPERATORS["cpu"][0], *forward)
    assert sum(made) == returned(schedule.forward, *forward)


@needs_cpu
@pytest.mark.parametrize("memory", ["lean", "min"])
def test_a_stream_of_another_type_is_converted_once(memory):
    """At the ends: x, and for backward x and dy. Between blocks it is rounded by the kernel that makes it."""
    blocks = [PreActBottleneck(8, 2) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        forward, backward = of_small_tensors(blocks, memory)
    x, filters = forward[0].nbytes, sum(w.nbytes for w in forward[2])
    made, converted = allocated(ops.OPERATORS["cpu"][0], *forward)
    assert (sum(made), converted) == (returned(schedule.forward, *forward) + (x + filters) // 2, 1)
    made, converted = allocated(ops.OPERATORS["cpu"][1], *backward)
    assert (sum(made), converted) == (returned(schedule.backward, *backward) + (2 * x + filters) // 2 + filters, 2)
