import copy
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fused_preact
from cases import BACKENDS
from fused_preact import PreActBlock, PreActBottleneck, blocks
from fused_preact.bench.measure import saved_bytes

SHAPES = {
    "basic": (PreActBlock, 8, 8, 1),
    "basic-wider": (PreActBlock, 8, 12, 1),
    "basic-stride": (PreActBlock, 8, 12, 2),
    "bottleneck": (PreActBottleneck, 16, 4, 1),
    "bottleneck-wider": (PreActBottleneck, 8, 4, 1),
    "bottleneck-stride": (PreActBottleneck, 16, 4, 2),
    "bottleneck-first": (partial(PreActBottleneck, stride_on="first"), 16, 4, 2),
}
OPTIONS = {
    "default": {},
    "raw": {"shortcut_input": "raw", "shortcut_name": "downsample"},
}


def twins(shape: str, backend: str, **options) -> tuple[nn.Module, nn.Module]:
    """A fused block and the same plain layers, batch norms away from their initial state."""
    torch.manual_seed(0)
    kind, in_planes, planes, stride = SHAPES[shape]
    block = kind(in_planes, planes, stride, backend=backend, **options)
    for child in block.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.uniform_(child.bias, -0.5, 0.5)
    plain = copy.deepcopy(block)
    plain.backend = "eager"
    return block, plain


def step(block: nn.Module, x: torch.Tensor, call: Callable | None = None) -> dict[str, torch.Tensor]:
    """Output, gradients and state after one training step, by the block or by ``call``, with a fixed dy."""
    x = x.clone().requires_grad_()
    y = block(x) if call is None else call(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    grads = {f"d{name}": p.grad for name, p in block.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads, **block.state_dict()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance) -> None:
    """Every entry of one step is that of the other."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_close(value, theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def x_of(shape: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, SHAPES[shape][1], 7, 6, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_is_its_layers(shape, options, backend):
    """In float64 a training step leaves what the plain layers leave: outputs, gradients, running statistics, counts."""
    block, plain = (m.double() for m in twins(shape, backend, **OPTIONS[options]))
    assert_same(step(block, x_of(shape)), step(plain, x_of(shape)), rtol=1e-9, atol=1e-10)
    block.eval()
    plain.eval()
    assert_close(block(x_of(shape)), plain(x_of(shape)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["basic-stride", "bottleneck"])
def test_a_block_is_one_node(shape, backend):
    """The graph of a block has one node, whose inputs are x and the parameters."""
    block, plain = twins(shape, backend)
    x = x_of(shape, torch.float32).requires_grad_()
    y = block(x)  # its node lives as long
    inputs = [edge for edge, _ in y.grad_fn.next_functions if edge is not None]
    assert len(inputs) == 1 + len(list(block.parameters()))
    assert all(type(edge).__name__ == "AccumulateGrad" for edge in inputs)
    assert type(plain(x).grad_fn).__name__ == "AddBackward0"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_keeps_half_of_what_plain_layers_keep(backend):
    """Activations saved for backward: x and the raw convolution outputs, not also the ReLU outputs."""
    x = torch.randn(2, 16, 16, 16)

    def saved(block: nn.Module) -> int:
        return saved_bytes(lambda: block(x), block)

    block, plain = twins("bottleneck", backend)
    assert 0 < saved(block) * 1.9 < saved(plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_state_dict_keys_are_those_of_pytorch_cifar(shape):
    """bn1, conv1, ... and shortcut.0 only where the shape changes."""
    block, _ = twins(shape, "auto")
    n = 2 if shape.startswith("basic") else 3
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = [key for i in range(1, n + 1) for key in (*(f"bn{i}.{name}" for name in norm), f"conv{i}.weight")]
    if shape not in ("basic", "bottleneck"):
        expected.append("shortcut.0.weight")
    assert list(block.state_dict()) == expected
    assert block.expansion == (1 if n == 2 else 4)


def test_stride_and_shortcut_options():
    """stride_on moves the stride, shortcut_name renames the container, and other words are refused."""
    assert [PreActBottleneck(8, 4, 2).get_submodule(f"conv{i}").stride for i in (1, 2, 3)] == [(1, 1), (2, 2), (1, 1)]
    first = PreActBottleneck(8, 4, 2, stride_on="first", shortcut_name="downsample")
    assert [first.get_submodule(f"conv{i}").stride for i in (1, 2, 3)] == [(2, 2), (1, 1), (1, 1)]
    assert first.downsample[0].stride == (2, 2)
    for option in ("stride_on", "shortcut_input", "shortcut_name", "backend"):
        with pytest.raises(ValueError, match=rf"{option} must be one of .*; got 'other'"):
            PreActBottleneck(8, 8, **{option: "other"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'stride_on'"):
        PreActBlock(8, 8, 2, stride_on="first")


@pytest.mark.parametrize("name", ["in_planes", "planes", "stride"])
@pytest.mark.parametrize("kind", [PreActBlock, PreActBottleneck])
def test_sizes_are_positive_integers(kind, name):
    """A pair is not taken for a stride that changes the shape, and nothing is built that cannot run."""
    sizes = {"in_planes": 4, "planes": 4, "stride": 1}
    assert kind(**{**sizes, name: np.int64(4)}).state_dict().keys() >= {"bn1.weight", "conv2.weight"}
    for value in (1, 1), 1.0, None, True:
        with pytest.raises(TypeError, match=rf"^{name} must be an integer, got {re.escape(repr(value))}$"):
            kind(**{**sizes, name: value})
    for value in 0, -2:
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {value}$"):
            kind(**{**sizes, name: value})


@pytest.mark.parametrize("kind", [PreActBlock, PreActBottleneck])
def test_the_parameters_are_made_as_asked(kind):
    """Of a type and on a device, of all layers."""
    block = kind(4, 8, 2, device="meta", dtype=torch.float64)
    floating = [t for t in block.state_dict().values() if t.is_floating_point()]
    assert {(t.device.type, t.dtype) for t in floating} == {("meta", torch.float64)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_takes_a_block_whole(backend):
    """torch.compile traces a block without a graph break, training step and running statistics included."""
    block, plain = (m.double() for m in twins("bottleneck-stride", backend))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = x_of("bottleneck-stride")
    assert_same(step(block, x, compiled), step(plain, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layer", ["bn1", "conv2", "bn3", "shortcut.0"])
def test_hooks_inside_a_block_run(layer):
    """A hook on any inner layer, the shortcut's too, runs, and the block steps down to plain layers for it."""
    block, plain = twins("bottleneck-stride", "library")
    calls = []
    block.get_submodule(layer).register_forward_hook(lambda *args: calls.append(1))
    x = x_of("bottleneck-stride", torch.float32)
    assert_close(block(x), plain(x))
    assert calls == [1]
    (choice,) = fused_preact.explain(block, x)
    assert choice.backend == "eager"
    assert f"{layer} has hooks" in choice.others["library"]


def test_a_hooked_shortcut_container_runs():
    """A hook on the Sequential around the shortcut's convolution is not ignored either."""
    block, plain = twins("bottleneck-stride", "library")
    calls = []
    block.shortcut.register_forward_hook(lambda *args: calls.append(1))
    x = x_of("bottleneck-stride", torch.float32)
    assert_close(block(x), plain(x))
    assert calls == [1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("shape", ["basic-wider", "bottleneck-stride"])
def test_a_shortcut_with_a_bias(shape, both, backend):
    """It is added to the output as that of the last convolution, which may have one, in every step as it is then."""
    block, plain = twins(shape, backend)
    last = block.get_submodule(block._names[-1][1])
    for conv in [block.shortcut[0], last][: 1 + both]:
        conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels))
    plain = copy.deepcopy(block)
    plain.backend = "eager"
    x = x_of(shape)
    [choice] = fused_preact.explain(block, x.float())
    assert choice.backend == backend
    for module in block.double(), plain.double():
        step(module, x)
        torch.optim.SGD(module.parameters(), 0.1).step()
    assert_same(step(block, x), step(plain, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shortcut_with_a_bias_under_autocast(backend):
    """It is cast as that of any convolution is: parameters are in float32 there."""
    block, plain = twins("basic-wider", backend)
    for module in block, plain:
        module.shortcut[0].bias = nn.Parameter(torch.linspace(-1, 1, 12))
    x = x_of("basic-wider", torch.float32)
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = ((module(x).double() - exact).abs().max() for module in (block, plain))
    assert ours <= 2 * theirs


def test_a_bias_of_a_shortcut_that_does_not_fit():
    """It is the shortcut's that is told of, not that of the convolution with which it is added."""
    block, x = PreActBlock(4, 8, backend="library"), torch.randn(2, 4, 5, 5)
    for bias, error, got in (
        (torch.ones(5), ValueError, r"\(5,\)"),
        (torch.ones(8).double(), TypeError, "torch.float64"),
    ):
        block.shortcut[0].bias = nn.Parameter(bias)
        with pytest.raises(error, match=rf"^shortcut\.bias must .*; got {got}$"):
            block(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda block: block.shortcut.append(nn.BatchNorm2d(16)),
            "shortcut is not an nn.Sequential of one convolution",
        ),
        (
            lambda block: setattr(block, "shortcut", nn.Sequential(nn.Sequential(block.shortcut[0]))),
            "shortcut.0 is of type Sequential, not a plain nn.Conv2d",
        ),
    ],
    ids=["more", "deeper"],
)
def test_another_shortcut_runs_as_it_is(change, reason):
    """A shortcut that is not one plain convolution is run, not read."""
    block, plain = twins("bottleneck-stride", "library")
    change(block)
    change(plain)
    x = x_of("bottleneck-stride", torch.float32)
    assert_close(block(x), plain(x))
    assert reason in str(fused_preact.explain(block, x))


@pytest.mark.parametrize("name", ["shortcut", "shortcut.conv"])
def test_the_convolution_of_a_shortcut_may_be_in_a_box_or_in_none(name):
    """In its nn.Sequential it is found by its place; the reasons name it."""
    block, plain = twins("basic-stride", "library")
    for module in block, plain:
        conv = module.shortcut[0]
        module.shortcut = conv if name == "shortcut" else nn.Sequential(OrderedDict(conv=conv))
    x = x_of("basic-stride", torch.float32)
    assert_close(block(x), plain(x))
    assert "Stage" in type(block(x.requires_grad_()).grad_fn).__name__
    block.get_submodule(name).register_forward_hook(lambda *_: None)
    assert f"{name} has hooks" in str(fused_preact.explain(block, x))


def test_the_keys_of_wide_resnets():
    """In those of robustness work the shortcut is the convolution itself."""
    block = PreActBlock(4, 8, shortcut_name="convShortcut")
    assert [name for name, _ in block.named_children()] == ["bn1", "conv1", "bn2", "conv2", "convShortcut"]
    assert "convShortcut.weight" in block.state_dict()
    assert fused_preact.explain(block, torch.randn(2, 4, 5, 5))[0].backend != "eager"


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_train_alike_under_autocast(backend):
    """Under autocast a block computes in bfloat16 and its parameters get float32 gradients, like the plain layers."""
    block, plain = twins("bottleneck-stride", backend)
    x = x_of("bottleneck-stride", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = block(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert_close(ours, theirs, rtol=0.1, atol=0.1)
    ours.backward(torch.randn_like(ours))
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_and_pickles(backend):
    """deepcopy, pickle and state_dict carry a block over."""
    block, plain = twins("bottleneck-stride", backend)
    x = x_of("bottleneck-stride", torch.float32)
    block(x)
    plain.load_state_dict(block.state_dict())
    file = io.BytesIO(pickle.dumps(block))
    for other in (copy.deepcopy(block), pickle.load(file), plain):
        assert_close(other.eval()(x), block.eval()(x))


def test_a_second_derivative_is_there_in_eager():
    """What the error for a second derivative recommends works."""
    _, plain = twins("basic", "eager")
    x = x_of("basic", torch.float32).requires_grad_()
    (dx,) = torch.autograd.grad(plain(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert x.grad.isfinite().all()


class Nothing(torch.autograd.Function):
    """A function that gives no gradient back, as those do that hold a branch out of backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
def test_where_no_gradient_arrives_none_leaves(backend):
    """Gradients of zeros in their place would have an optimizer decay the weights, and take a backward to make."""
    block = PreActBlock(4, 4, backend=backend)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    Nothing.apply(block(x)).sum().backward()
    assert all(t.grad is None for t in (x, *block.parameters()))


def test_docstrings():
    """Each class has its own summary and what holds of all blocks; where Python leaves them out there are none."""
    for kind, summary in (PreActBlock, "Basic block"), (PreActBottleneck, "Bottleneck"):
        assert kind.__doc__.startswith(summary)
        assert "\n        in_planes: channels of x.\n" in kind.__doc__
    assert blocks._documented(None) is None
