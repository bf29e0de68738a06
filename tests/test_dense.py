"""Layers of DenseNets: the same as their plain layers, whatever is kept of the features that they read."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from cases import BACKENDS, needs_cpu
from fused_preact import DenseLayer, PreActStage, Transition, explain, tables
from fused_preact.bench.measure import saved_bytes
from fused_preact.dense import RETURNS
from test_blocks import assert_same

SIZES = (6, 4, 4)


def twins(backend: str = "auto", **options) -> tuple[DenseLayer, DenseLayer]:
    """A layer in float64, batch norms away from their initial state, and the same as plain layers."""
    layer = DenseLayer(sum(SIZES), 4, 2, backend=backend, **options).double()
    for norm in (layer.norm1, layer.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    plain = copy.deepcopy(layer)
    plain.backend = "eager"
    return layer, plain


def features(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """What layers before would have made, of a shape that nothing divides."""
    return [torch.randn(2, C, 7, 5, dtype=dtype, requires_grad=True) for C in SIZES]


def step(layer: nn.Module, parts: list[torch.Tensor], call=None) -> dict[str, torch.Tensor]:
    """Output, gradients and state after one training step."""
    parts = [part.detach().clone().requires_grad_() for part in parts]
    y = layer(parts) if call is None else call(parts)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype))
    grads = {f"d{i}": part.grad for i, part in enumerate(parts)} | {
        f"d{n}": p.grad for n, p in layer.named_parameters()
    }
    return {"y": y.detach(), **grads, **layer.state_dict()}


class Dense(nn.Module):
    """Layers that read all features before them, as torchvision's block."""

    def __init__(self, layers: int, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(16 + 8 * i, 8, **options) for i in range(layers))

    def forward(self, x):
        parts = [x]
        for layer in self.layers:
            parts.append(layer(parts))
        return torch.cat(parts, 1)


def test_keys_and_signature_are_torchvisions():
    """Its name may be put in the place of torchvision's, whose checkpoints load."""
    layer = DenseLayer(64 + 32, growth_rate=32, bn_size=4, drop_rate=0.0, memory_efficient=True)
    shapes = {name: tuple(t.shape) for name, t in layer.state_dict().items() if name.endswith("weight")}
    assert shapes == {
        "norm1.weight": (96,), "conv1.weight": (128, 96, 1, 1), "norm2.weight": (128,), "conv2.weight": (32, 128, 3, 3)
    }  # fmt: skip
    assert "conv1.bias" not in layer.state_dict()


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("returns", RETURNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_is_its_plain_layers(backend, returns, memory_efficient):
    """Of a list and of one tensor, in training with all gradients and statistics, and in eval mode."""
    layer, plain = twins(backend, returns=returns, memory_efficient=memory_efficient)
    parts = features()
    assert_same(step(layer, parts), step(plain, parts), rtol=1e-9, atol=1e-10)
    layer.zero_grad()
    plain.zero_grad()
    whole = [torch.cat(parts, 1).detach()]
    assert_same(step(layer, whole), step(plain, whole), rtol=1e-9, atol=1e-10)
    x = torch.cat(parts, 1)
    assert_close(layer.eval()(x), plain.eval()(parts))
    of_x = {"new": slice(0, 0), "new+x": slice(4, None), "x+new": slice(0, x.size(1))}[returns]
    assert torch.equal(layer(x)[:, of_x], x[:, : 0 if returns == "new" else None])


@needs_cpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_kept_does_not_change_a_bit(layout):
    """What is joined again is what was joined."""
    layer, _ = twins("cpu")
    saving = copy.deepcopy(layer)
    saving.memory_efficient = True
    parts = [part.to(memory_format=layout) for part in features()]
    assert_same(step(saving, parts), step(layer, parts), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transition_is_its_plain_layers(backend):
    """Torchvision's keys; an odd row and column are left out, as by torch's pooling."""
    layer = Transition(6, 3, backend=backend).double()
    nn.init.uniform_(layer.norm.bias, -0.5, 0.5)
    plain = nn.Sequential(copy.deepcopy(layer.norm), nn.ReLU(), copy.deepcopy(layer.conv), nn.AvgPool2d(2))
    x = features()[0]
    for mode in True, False:
        y, expected = layer.train(mode)(x), plain.train(mode)(x)
        assert_close(y, expected)
        grads = [
            torch.autograd.grad(out.square().sum(), [x, *m.parameters()]) for out, m in ((y, layer), (expected, plain))
        ]
        assert_close(*grads, rtol=1e-9, atol=1e-10)
    assert list(layer.state_dict())[:5] == [f"norm.{name}" for name in plain[0].state_dict()]
    assert_close([*layer.state_dict().values()], [*plain.state_dict().values()])


def test_memory_grows_with_the_depth_not_with_its_square():
    """The features are kept once, not once for each layer that reads them; beside them what each conv1 gives."""
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    read, hidden = [16 + 8 * i for i in range(8)], 8 * 32

    def kept(rows: int, **options):
        """Values of each pixel; without the rows of the batch norms."""
        net = Dense(8, **options)
        return (saved_bytes(lambda: net(x), net) / 4 - rows * (sum(read) + hidden)) / (2 * 8 * 8)

    assert kept(5, memory_efficient=True) == read[-1] + hidden
    assert kept(5) == sum(read) + hidden
    assert kept(2, backend="eager") == 2 * (sum(read) + hidden)


def test_features_changed_before_backward_are_an_error():
    """As what autograd keeps always is; a wrong gradient would be silent."""
    layer, _ = twins(memory_efficient=True)
    parts = [part * 1 for part in features()]
    y = layer(parts)
    parts[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_of_saved_tensors_see_the_features():
    """As torch.autograd.graph.save_on_cpu, which moves what is kept."""
    layer, _ = twins(memory_efficient=True)
    parts = features()
    seen = []

    def pack(t):
        seen.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(parts)
    assert {part.data_ptr() for part in parts} <= set(seen)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_within_a_checkpoint(use_reentrant, memory_efficient):
    """Statistics move once, and gradients are the same."""
    layer, plain = twins(memory_efficient=memory_efficient)

    def call(parts):
        return checkpoint(lambda *parts: layer(parts), *parts, use_reentrant=use_reentrant)

    parts = features()
    assert_same(step(layer, parts, call), step(plain, parts), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("memory_efficient", [False, True])
@needs_cpu
@pytest.mark.parametrize(("backend", "stem"), [("cpu", torch.bfloat16), ("auto", torch.float32)])
def test_under_autocast(backend, stem, memory_efficient):
    """The features may be of two types, as behind a stem that is left in float32: `auto` then takes plain layers."""
    layer = twins(backend, memory_efficient=memory_efficient)[0].float()
    first, *others = features(torch.float32)
    parts = [first.to(stem), *(part.bfloat16() for part in others)]
    reference = copy.deepcopy(layer).double()
    truth = step(reference, [part.double() for part in parts])
    plain = copy.deepcopy(layer)
    plain.backend = "eager"
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = step(layer, parts), step(plain, parts)
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    for name in truth:
        if truth[name].is_floating_point():
            error = (ours[name].double() - truth[name]).norm() / truth[name].norm()
            limit = (theirs[name].double() - truth[name]).norm() / truth[name].norm()
            assert error <= 2 * limit + 1e-6, name


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_compiled(memory_efficient):
    """By torch.compile, whole."""
    layer, plain = twins(memory_efficient=memory_efficient)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    parts = features()
    assert_same(step(layer, parts, compiled), step(plain, parts), rtol=1e-9, atol=1e-10)


def test_dropout_is_behind_the_layers():
    """Of the new features alone, as torchvision's, and not in eval mode."""
    layer, plain = twins(drop_rate=0.5, returns="x+new")
    bare = copy.deepcopy(plain)
    bare.drop_rate = 0.0
    parts = features()
    x = torch.cat(parts, 1)
    torch.manual_seed(3)
    expected = torch.cat((x, F.dropout(bare(x)[:, -4:], 0.5)), 1)
    torch.manual_seed(3)
    assert_close(layer(parts), expected)
    assert_close(layer.eval()(parts), bare.eval()(parts))
    assert not DenseLayer(4, 4, drop_rate=1)(torch.randn(2, 4, 5, 5)).any()


@needs_cpu
def test_an_explanation_names_it():
    """Whatever it keeps."""
    layer, _ = twins("cpu", memory_efficient=True)
    (choice,) = explain(layer, features())
    assert choice.backend == "cpu"


@needs_cpu
def test_memory_comes_before_speed(monkeypatch):
    """Plain layers would keep everything, however fast they were; of one tensor there is nothing to keep less of."""
    monkeypatch.setattr(tables, "best", lambda problem: "eager")
    saving, fast = twins(memory_efficient=True)[0], twins()[0]
    parts = features()
    asked = (saving, parts), (saving, torch.cat(parts, 1)), (fast, parts)
    assert [explain(*call)[0].backend for call in asked] == ["cpu", "eager", "eager"]
    nodes = [type(layer(x).grad_fn).__name__ for layer, x in asked]
    assert nodes[0] != nodes[1] == nodes[2] == "ConvolutionBackward0"


def test_symbolic_tracing():
    """torch.fx calls with no tensors, in a list, too."""
    net = Dense(3).double().eval()
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    assert_close(torch.fx.symbolic_trace(net)(x), net(x))


def test_function_transforms():
    """torch.func takes the plain layers."""
    layer, _ = twins(memory_efficient=True)
    parts = [part.detach() for part in features()]
    layer.eval()
    ours = torch.func.grad(lambda first: layer([first, *parts[1:]]).sum())(parts[0])
    parts[0].requires_grad_()
    assert_close(ours, torch.autograd.grad(layer(parts).sum(), parts[0])[0])


def test_copies_and_pickles_are_the_same():
    """With their options."""
    layer, parts = twins(memory_efficient=True, returns="new+x", drop_rate=0.25)[0].eval(), features()
    for twin in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert repr(twin) == repr(layer)
        assert torch.equal(twin(parts), layer(parts))


def test_options_are_shown():
    """Those that are not the default."""
    assert DenseLayer(4, 4).extra_repr() == ""
    text = repr(DenseLayer(4, 4, drop_rate=0.1, memory_efficient=True, returns="x+new", backend="cpu"))
    assert "backend='cpu', drop_rate=0.1, memory_efficient=True, returns='x+new'" in text


def test_in_a_stage_it_runs_by_itself():
    """A stage is a node of residual blocks."""
    stage = PreActStage(DenseLayer(4, 2, returns="x+new"), DenseLayer(6, 2, returns="x+new"))
    x = torch.randn(1, 4, 5, 5)
    assert_close(stage.eval()(x), stage[1](stage[0](x)))
    assert [choice.where for choice in explain(stage, x)] == ["0", "1"]


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        ([], ValueError, "x must be a tensor, or a list of one and more; got an empty one"),
        ([torch.ones(1, 4, 2, 2), None], TypeError, "x[1] must be a tensor, got NoneType"),
        (
            [torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 3)],
            ValueError,
            "x[1] must have 4 dimensions (N, C, H, W), and N, H and W of x[0], which is of shape (1, 4, 2, 2); got "
            "(1, 4, 2, 3)",
        ),
        ([torch.ones(1, 4, 2, 2), torch.ones(2, 4, 2, 2)], ValueError, "got (2, 4, 2, 2)"),
        ([torch.ones(1, 4, 2, 2), torch.ones(4)], ValueError, "got (4,)"),
        ([torch.ones(4), torch.ones(4)], ValueError, "x[0] must have 4 dimensions"),
        (
            [torch.ones(1, 4, 2, 2), torch.ones(1, 3, 2, 2)],
            ValueError,
            "x must have 8 channels, as its batch norm and convolution have; got 7",
        ),
        (None, TypeError, "x must be a tensor, got NoneType"),
    ],
)
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_features_that_do_not_fit(x, kind, message, memory_efficient):
    """The message names which of them."""
    with pytest.raises(kind, match=re.escape(message)):
        DenseLayer(8, 4, memory_efficient=memory_efficient)(x)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_input_features": 0}, ValueError, "num_input_features must be"),
        ({"growth_rate": 2.5}, TypeError, "growth_rate must be"),
        ({"bn_size": -1}, ValueError, "bn_size must be"),
        ({"drop_rate": 1.5}, ValueError, "drop_rate must be between 0 and 1, got 1.5"),
        ({"drop_rate": "much"}, TypeError, "drop_rate must be a number"),
        ({"memory_efficient": "yes"}, TypeError, "memory_efficient must be"),
        ({"returns": "all"}, ValueError, "returns must be one of"),
        ({"backend": "fastest"}, ValueError, "backend must be one of"),
    ],
)
def test_options_that_do_not_fit(options, kind, message):
    """One error that names the option."""
    with pytest.raises(kind, match=message):
        DenseLayer(**{"num_input_features": 8, "growth_rate": 4} | options)


def test_channels_of_a_transition_that_do_not_fit():
    """One error that names them."""
    with pytest.raises(ValueError, match="num_input_features must be"):
        Transition(0, 4)
    with pytest.raises(TypeError, match="num_output_features must be"):
        Transition(4, 2.0)
