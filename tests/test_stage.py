import dataclasses
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from cases import BACKENDS, Case, Layer, Sample, backward_arguments, error, forward_arguments, needs_cpu, separate
from fused_preact import PreActBlock, PreActBottleneck, PreActStage, _extension, explain, ops, tables
from test_blocks import assert_same, step
from test_schedule import compare

Kind = Callable[[str], list[nn.Module]]


def bottlenecks(backend: str) -> list[nn.Module]:
    """A projection of the activated input in front and one of the raw input in the middle."""
    shapes = [(8, 4, 2), (16, 4, 1), (16, 4, 1), (16, 6, 1), (24, 6, 1), (24, 6, 1)]
    return [PreActBottleneck(*s, shortcut_input="raw" if s[1] == 6 else "activated", backend=backend) for s in shapes]


def basics(backend: str) -> list[nn.Module]:
    """An identity in front, a projection in the middle."""
    return [PreActBlock(*shape, backend=backend) for shape in [(8, 8, 1), (8, 8, 1), (8, 12, 2), (12, 12, 1)]]


MODES = [(kind, memory) for kind in (bottlenecks, basics) for memory in ("fast", "lean", "min")][:-1]
modes = pytest.mark.parametrize(("kind", "memory"), MODES, ids=lambda v: v if isinstance(v, str) else v.__name__)


def make(kind: Kind, memory: str = "fast", backend: str = "auto", dtype: torch.dtype = torch.float64) -> PreActStage:
    """A stage with batch norms away from their initial state; the same parameters for every backend and mode."""
    torch.manual_seed(0)
    stage = PreActStage(*kind(backend), memory=memory)
    for child in stage.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.uniform_(child.bias, -0.5, 0.5)
    return stage.to(dtype)


def x_of(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 8, 7, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


CLOSE = {"rtol": 1e-9, "atol": 1e-10}
FUSED = "cpu" if _extension.unavailable is None else "reference"


@pytest.mark.parametrize("backend", BACKENDS)
@modes
def test_a_stage_is_its_blocks(kind, memory, backend):
    """In every mode a training step in float64 leaves what plain layers leave: y, gradients, statistics, counts."""
    stage, plain = make(kind, memory, backend), make(kind, backend="eager")
    assert_same(step(stage, x_of()), step(plain, x_of()), **CLOSE)
    stage.eval(), plain.eval()
    assert_close(stage(x_of()), plain(x_of()))


@modes
def test_a_stage_is_one_node(kind, memory):
    """Neither Python nor autograd stands between the blocks."""
    stage = make(kind, memory, FUSED)
    y = stage(x_of())  # its node lives as long
    inputs = [edge for edge, _ in y.grad_fn.next_functions if edge is not None]
    assert len(inputs) == len(list(stage.parameters()))
    assert all(type(edge).__name__ == "AccumulateGrad" for edge in inputs)


@modes
def test_what_a_mode_keeps(kind, memory):
    """Inputs and hidden tensors as the table of docs/memory.md counts them, and no other activation."""
    stage, saved, x = make(kind, memory, FUSED), {}, x_of()
    plain, inputs, hidden = make(kind, backend="eager"), [], []
    for block in plain:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].numel()))
        last = block._layers().pairs[-1].conv
        for *_, conv in block._layers().pairs:
            if conv is not last:
                conv.register_forward_hook(lambda _, __, y: hidden.append(y.numel()))
    y = plain(x)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t) if t.dim() == 4 and t.size(0) == 2 else t, lambda t: t
    ):
        stage(x)
    changed = [i for i, block in enumerate(stage) if block._layers().container is not None]
    if memory != "fast":  # x itself, the inputs of blocks that change the shape, and y to rebuild the others from
        inputs = [inputs[i] for i in sorted({0, *changed})] + [y.numel()]
    if memory == "min":
        hidden = hidden[1::2]
    assert sorted(t.numel() for t in saved.values()) == sorted(inputs + hidden)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_kept_where_there_is_no_backward(backend, monkeypatch):
    """Without gradients a deep net needs the memory of one block: the operator returns nothing to keep."""
    stage, kept = make(bottlenecks, backend=backend), []
    forward, backward = ops.OPERATORS[backend]
    monkeypatch.setitem(ops.OPERATORS, backend, (lambda *args: kept.append(forward(*args)) or kept[-1], backward))
    with torch.no_grad():
        stage(x_of())
    stage.requires_grad_(False)(x_of())
    assert [len(result[1]) for result in kept] == [0, 0]


def sample_of(kind: Kind, memory: str, dtype: torch.dtype = torch.float64) -> Sample:
    stage = make(kind, memory, dtype=dtype)
    with torch.no_grad():
        y = stage(x_of(dtype))
    blocks = [block._layers().block() for block in stage]
    return Sample(x_of(dtype), blocks, None, torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype))


@needs_cpu
@modes
def test_both_schedules_agree(kind, memory):
    """C++ and Python return the same structure of the same numbers for a run of blocks, whatever is wanted of it."""
    sample = sample_of(kind, memory)
    with torch.no_grad():
        compare(*(ops.OPERATORS[name][0](*forward_arguments(sample, name, memory)) for name in ("cpu", "reference")))
        *arguments, every = backward_arguments(sample, "reference", memory=memory)
        generator = torch.Generator().manual_seed(0)
        for share in (1.0, 0.4, 0.1, 0.02, 0.0):
            chosen = torch.rand(len(every), generator=generator) < share
            needs = [bool(need and choice) for need, choice in zip(every, chosen, strict=True)]
            compare(*(ops.OPERATORS[name][1](*arguments, needs) for name in ("cpu", "reference")))


@pytest.mark.parametrize("backend", BACKENDS)
@modes
def test_opcheck(kind, memory, backend):
    """Schema, fake kernels and autograd registration fit what the operators return for a run of blocks."""
    sample, tests = sample_of(kind, memory, torch.float32), ["test_schema", "test_faketensor"]
    forward, backward = ops.OPERATORS[backend]
    torch.library.opcheck(forward, forward_arguments(sample, backend, memory), test_utils=tests)
    torch.library.opcheck(backward, backward_arguments(sample, backend, memory=memory), test_utils=tests)


def errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: error(result, exact[name].double()) for name, result in results.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
def test_rebuilt_inputs_leave_float32_gradients_as_close_as_eager(memory, backend):
    """Over many blocks the gradients are as close to float64 as those of plain float32 layers."""

    def deep(backend: str) -> list[nn.Module]:
        return [PreActBottleneck(16, 4, backend=backend) for _ in range(24)]

    x = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(3))
    exact = step(make(deep, backend="eager"), x.double())
    theirs = errors(step(make(deep, backend="eager", dtype=torch.float32), x), exact)
    ours = errors(step(make(deep, memory, backend, torch.float32), x), exact)
    gradients = [name for name in ours if name.startswith("d")]
    # A ReLU near zero falls on either side by rounding, in eager too: what is compared is all gradients together.
    assert sum(ours[name] for name in gradients) <= 2 * sum(theirs[name] for name in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
def test_autocast(memory, backend):
    """Under bf16 autocast results are as close as eager autocast's; a rebuilding stage hands on a float32 stream."""
    assert_as_close_as_eager_under_autocast(memory, backend, "cpu")


def posed(x: Tensor) -> dict[str, Tensor]:
    """The state of a stage none of whose pre-activations, of x, is near zero (see `separate`)."""

    def pose(norm: nn.BatchNorm2d, args: tuple[Tensor]) -> None:
        var, mean = torch.var_mean(args[0], (0, 2, 3), correction=0)
        norm.bias.copy_(separate(args[0], mean, var, norm.weight))

    stage = make(bottlenecks, backend="eager")
    for child in stage.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.register_forward_pre_hook(pose)
    with torch.no_grad():
        stage(x)
    return stage.state_dict()


def assert_as_close_as_eager_under_autocast(memory: str, backend: str, device: str) -> None:
    """The types of what a stage returns, and the error of each result against float64, on a device.

    The error is the median of some draws: of one alone, rounding in bf16 may turn a ReLU on or off all the same.
    """

    def run(stage: PreActStage) -> dict[str, Tensor]:
        stage, leaf = stage.to(device), x.to(device, copy=True).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            y = stage(leaf)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
        gradients = {f"d{name}": p.grad for name, p in stage.named_parameters()}
        return {name: t.detach().cpu() for name, t in {"y": y, "dx": leaf.grad, **gradients}.items()}

    ours, theirs = [], []
    for seed in range(9):
        x = torch.randn(2, 8, 7, 6, generator=torch.Generator().manual_seed(seed))
        exact_twin, stage, plain = (
            make(bottlenecks, *options)
            for options in (("fast", "eager"), (memory, backend, torch.float32), ("fast", "eager", torch.float32))
        )
        state = posed(x.double())
        for twin in (exact_twin, stage, plain):
            twin.load_state_dict(state)
        exact, results = step(exact_twin, x.double()), run(stage)
        assert results["y"].dtype == (torch.bfloat16 if memory == "fast" else torch.float32)
        assert all(p.grad.dtype == torch.float32 for p in stage.parameters())
        ours.append(errors(results, exact))
        theirs.append(errors(run(plain), exact))
    our, their = ({name: statistics.median(d[name] for d in draws) for name in draws[0]} for draws in (ours, theirs))
    assert sum(our.values()) <= 2 * sum(their.values())
    for name, value in our.items():
        assert value <= max(2 * their[name], 0.07), (name, value, their[name])


def test_a_half_precision_model_gets_its_dtype_back():
    """Parameters in bfloat16: the stream inside is float32, and y is bfloat16 as x is."""
    stage = make(bottlenecks, "lean", FUSED, torch.bfloat16)
    y = stage(x_of(torch.bfloat16).requires_grad_())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.bfloat16 for p in stage.parameters())


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_hooked_block_runs_by_itself(memory):
    """A hook in one block is called once, the others stay fused, and explain says why; results are the same."""
    stage, plain, calls = make(bottlenecks, memory, FUSED), make(bottlenecks, backend="eager"), []
    stage[2].conv2.register_forward_hook(lambda *_: calls.append("conv"))
    stage[4].register_forward_hook(lambda *_: calls.append("block"))
    assert_same(step(stage, x_of()), step(plain, x_of()), **CLOSE)
    assert calls == ["conv", "block"]
    choices = explain(stage, x_of())
    assert [(choice.where, choice.backend) for choice in choices] == [
        ("0", FUSED), ("2", "eager"), ("3", FUSED), ("4", FUSED), ("5", FUSED),
    ]  # fmt: skip
    assert "conv2 has hooks" in str(choices)
    assert f"4: {FUSED}\n    apart from its stage: it has hooks" in str(choices)
    assert [len(run) if isinstance(run, PreActStage) else run for run in stage.runs()] == [2, stage[2], 1, stage[4], 1]


def test_explain_names_the_stage():
    """A stage that runs as one node is one choice."""
    net = nn.Sequential(make(bottlenecks, backend=FUSED))
    assert [(choice.where, choice.backend) for choice in explain(net, x_of())] == [("0", FUSED)]


@needs_cpu
def test_explain_of_a_stage_that_is_not_one_node(folder):
    """ "auto" may have no backend for all blocks together: they run by themselves, and say why."""
    stage, x = PreActStage(*(PreActBlock(8, 8) for _ in range(3))), x_of(torch.float32)
    (whole,) = explain(stage, x)
    calls = {tables.call_key(whole.problem): {str(len(x)): {"best": "eager", "seconds": {}}}}
    tables.save({"device": tables.device_name("cpu"), "calls": calls, "tiles": {}})
    choices = explain(stage, x)
    assert [(choice.where, choice.backend) for choice in choices] == [("0", "cpu"), ("1", "cpu"), ("2", "cpu")]
    why = "apart from its stage: 3 blocks as one node would be plain layers, not cpu: eager was measured fastest"
    assert all(why in str(choice) for choice in choices)
    stage[2].conv1 = stage[2].conv2 = nn.Conv2d(8, 8, 5, padding=2)
    (choice,) = explain(stage[2:], x)
    assert (choice.backend, choice.apart) == ("eager", None)


@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
def test_frozen_layers(memory):
    """Frozen parameters, batch norms in eval mode and a frozen x leave the other gradients as they are."""

    def freeze(stage: PreActStage) -> PreActStage:
        stage[1].eval()
        stage[4].bn2.eval()
        stage[0].requires_grad_(False)
        stage[3].conv1.weight.requires_grad_(False)
        stage[5].bn3.bias.requires_grad_(False)
        return stage

    stage, plain = freeze(make(bottlenecks, memory, FUSED)), freeze(make(bottlenecks, backend="eager"))
    for module in (stage, plain):
        y = module(x_of())
        y.backward(torch.ones_like(y) * torch.linspace(-1, 1, y.size(1), dtype=y.dtype).view(1, -1, 1, 1))
    for (name, ours), theirs in zip(stage.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert_close(ours.grad, theirs.grad, msg=name, **CLOSE)
    assert_same(stage.state_dict(), plain.state_dict(), **CLOSE)


@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
def test_a_block_that_is_used_twice(memory):
    """Its gradients add up, and its running statistics see both batches, one after the other."""
    stages = []
    for backend, mode in ((FUSED, memory), ("eager", "fast")):
        torch.manual_seed(0)
        first, second = (PreActBottleneck(8, 2, backend=backend) for _ in range(2))
        stages.append(PreActStage(first, second, first, memory=mode).double())
    assert_same(*(step(stage, x_of()) for stage in stages), **CLOSE)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_checkpoint_updates_the_statistics_once(compiled, backend, reentrant):
    """A checkpointed stage repeats its forward; running statistics and counts are those of one pass."""
    stage, plain = make(bottlenecks, "lean", backend), make(bottlenecks, backend="eager")
    x = x_of().requires_grad_()
    call = torch.compile(stage, backend="aot_eager") if compiled else stage
    y = checkpoint(call, x, use_reentrant=reentrant)
    y.backward(torch.ones_like(y))
    plain(x_of())
    assert_same(stage.state_dict(), plain.state_dict(), **CLOSE)


def test_gradients_accumulate():
    """Two backward passes add up."""
    once, twice = make(bottlenecks, "min", FUSED), make(bottlenecks, "min", FUSED)
    grads = step(once, x_of())
    step(twice, x_of())
    step(twice, x_of())
    for name, p in twice.named_parameters():
        assert_close(p.grad, 2 * grads[f"d{name}"], **CLOSE)


def test_compile():
    """torch.compile traces a stage and what runs by itself without a graph break, and its training step is the same."""
    stage, plain = (make(bottlenecks, "lean", FUSED).append(nn.Identity()) for _ in range(2))
    compiled = torch.compile(stage, backend="aot_eager", fullgraph=True)
    assert_same(step(stage, x_of(), compiled), step(plain, x_of()), **CLOSE)


def test_modes_that_cannot_be_had():
    """The message names the mode and the block that forbids it."""
    with pytest.raises(ValueError, match=r"memory must be one of 'fast', 'lean', 'min'; got 'tiny'"):
        PreActStage(memory="tiny")
    with pytest.raises(ValueError, match=r"memory='min' needs blocks of three.*block 0 is a PreActBlock of 2"):
        PreActStage(*basics("auto"), memory="min")
    stage = PreActStage(PreActBlock(8, 8))
    for memory, message in ("min", "needs blocks of three"), ("tiny", "memory must be one of"):
        stage.memory = memory
        with pytest.raises(ValueError, match=message):
            stage(torch.randn(2, 8, 4, 4))


def test_bad_input_names_the_block():
    """A mistake inside of a stage is reported by the path of its parameter."""
    stage = PreActStage(PreActBottleneck(8, 2), PreActBottleneck(8, 2), PreActBottleneck(12, 3))
    with pytest.raises(ValueError, match=r"2.bn1.weight must have shape \(8,\).*got \(12,\)"):
        stage(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_vmap_in_a_mode(memory):
    """A transform runs the plain layers, whatever was asked to be kept."""
    stage = PreActStage(PreActBlock(8, 8), PreActBlock(8, 8), memory=memory).eval()
    xs = torch.randn(3, 2, 8, 5, 4)
    assert_close(torch.vmap(stage)(xs), torch.stack([stage(x) for x in xs]))


def test_y_is_kept_only_where_it_is_read():
    """To rebuild what the last block read; the first one's x is there."""
    for count, kept in (1, False), (2, True):
        stage, pointers = PreActStage(*(PreActBlock(8, 8) for _ in range(count)), memory="lean"), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, p=pointers: p.append(t.data_ptr()) or t, lambda t: t):
            y = stage(torch.randn(2, 8, 5, 4).contiguous(memory_format=torch.channels_last))
        assert (y.data_ptr() in pointers) is kept


@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_biases(memory, backend):
    """Convolutions with a bias, a projection too, which is subtracted where x is rebuilt; one of the stage has none."""
    results = []
    for name, mode in (backend, memory), ("eager", "fast"):
        torch.manual_seed(0)
        stage = PreActStage(*(PreActBottleneck(C, 2, backend=name) for C in (6, 8, 8)), memory=mode)
        for child in stage.modules():
            if isinstance(child, nn.Conv2d):
                child.bias = nn.Parameter(torch.randn(child.out_channels))
        stage[1].conv2.bias = None
        results.append(step(stage.double(), torch.randn(2, 6, 7, 6, dtype=torch.float64)))
    ours, theirs = results
    for key in theirs:
        assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-10, msg=key)


@needs_cpu
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_blocks_of_one_unit_keep_their_input(memory):
    """What the unit read is what would have to be rebuilt."""
    sample = Case("one", (2, 8, 5, 4), (Layer(8),), "identity", bias=True).draw(0, torch.float64)
    sample = dataclasses.replace(sample, blocks=sample.blocks * 3)
    with torch.no_grad():
        compare(*(ops.OPERATORS[name][0](*forward_arguments(sample, name, memory)) for name in ("cpu", "reference")))
        arguments = backward_arguments(sample, "reference", memory=memory)
        compare(*(ops.OPERATORS[name][1](*arguments) for name in ("cpu", "reference")))
