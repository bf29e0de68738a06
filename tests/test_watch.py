"""Whatever changes of a module between two calls is heard of."""

import collections
import copy
import functools
import gc
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fused_preact import BNReLUConv2d, PreActBlock, PreActStage, backends, explain


def x_of(C: int = 8) -> torch.Tensor:
    return torch.randn(2, C, 5, 5)


@pytest.mark.parametrize("name", ["bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var"])
def test_a_vector_of_another_size_is_heard_of(name):
    """As where channels are pruned by .data, of which no object tells: the message is that of a first call."""
    block = PreActBlock(8, 8)
    block(x_of())
    tensor = block.state_dict(keep_vars=True)[name]
    tensor.data = tensor.data[:4]
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=rf"{name} must have shape \(8,\), .*; got \(4,\)"):
        block(x_of())
    assert_close(block.state_dict(), before, rtol=0, atol=0)


def test_a_filter_of_another_size_may_be_of_another_backend():
    """It came in as data of the old parameter; "auto" gives the call to a backend that serves it."""
    unit, x = BNReLUConv2d(8, 8, 3, padding=2), x_of()
    unit(x)
    unit.conv.weight.data = torch.randn(8, 8, 5, 5)
    with backends.recording() as choices:
        unit(x)
    assert [choice.problem.convolutions[0][1] for choice in choices] == [(8, 8, 5, 5)]


def test_other_groups_of_the_same_filters():
    """They read more channels, of which a batch norm without tensors has no number."""
    unit = BNReLUConv2d(4, 4, 1, affine=False, track_running_stats=False)
    unit(x_of(C=4))
    unit.conv.groups, x = 2, x_of(C=8)
    assert_close(unit(x), unit.conv(F.relu(unit.bn(x))))


def test_a_setting_that_has_no_one_answer():
    """A tensor of two compared with what was there is two answers: the message is that of a first call."""
    unit = BNReLUConv2d(8, 8, 1)
    unit(x_of())
    unit.conv.stride = torch.tensor([1, 1])
    with pytest.raises(TypeError, match="stride must be an integer or a pair of integers, got tensor"):
        unit(x_of())


def test_a_number_that_changes_in_place():
    """A tensor may be eps, which plans have as a number."""
    block, x = PreActBlock(8, 8), x_of()
    block.bn1.eps = torch.tensor(1e-3)
    block(x)
    block.bn1.eps.fill_(1)
    assert torch.equal(block(x), copy.deepcopy(block)(x))


@pytest.mark.parametrize("make", [PreActBlock, lambda *size: PreActStage(PreActBlock(*size), PreActBlock(*size, 2))])
def test_parameters_that_are_plain_attributes_when_a_checkpoint_repeats(make):
    """As FSDP has them in backward: the forward that is repeated is the same, fused."""
    block, x = make(8, 8), x_of()
    parameters = dict(block.named_parameters())
    expected = torch.autograd.grad(block(x).square().sum(), parameters.values())
    y = checkpoint(block, x, use_reentrant=False)
    for layer in block.modules():
        for name in [*layer._parameters]:
            layer.__dict__[name] = layer._parameters.pop(name)
    y.square().sum().backward()
    for parameter, gradient in zip(parameters.values(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_a_block_that_is_compiled_later():
    """It runs by itself: what is compiled is its call."""
    stage = PreActStage(PreActBlock(8, 8), PreActBlock(8, 8)).eval()
    y = stage(x := x_of())
    stage[1]._compiled_call_impl = lambda _: 2 * y  # as block.compile() sets it
    assert torch.equal(stage(x), 2 * y)


def test_a_block_that_is_compiled_again():
    """That it is not compiled meanwhile, as torch's own attribute says it, is not taken to last."""
    stage = PreActStage(PreActBlock(8, 8), PreActBlock(8, 8)).eval()
    stage[1]._compiled_call_impl = None
    y = stage(x := x_of())
    stage[1]._compiled_call_impl = lambda _: 2 * y
    assert torch.equal(stage(x), 2 * y)


@pytest.mark.parametrize("pair", [np.ones(2, int), torch.ones(2, dtype=torch.int64)], ids=["NumPy", "torch"])
def test_a_setting_that_becomes_an_array(pair):
    """Compared with what it was, it has no one answer: the call is checked anew, and says what is wrong."""
    unit = BNReLUConv2d(8, 8, 3, padding=1).eval()
    unit(x_of())
    unit.conv.stride = pair
    with pytest.raises(TypeError, match="stride must be an integer or a pair"):
        unit(x_of())


def test_what_a_hook_of_a_convolution_has_kept_is_not_overwritten():
    """The addition of the shortcut makes a tensor of its own."""
    block, kept = PreActBlock(8, 8), []
    block.conv2.register_forward_hook(lambda _layer, _inputs, y: kept.extend((y, y.clone())))
    block(x_of())
    assert torch.equal(*kept)


def test_a_buffer_that_was_computed_is_not_kept():
    """It has a graph behind it, which goes when the call is done that it was put in for."""
    unit, mean = BNReLUConv2d(8, 8, 1).eval(), torch.zeros(8, requires_grad=True).exp()
    gone = weakref.ref(mean)
    with torch.no_grad():
        torch.func.functional_call(unit, {"bn.running_mean": mean}, (x_of(),))
    del mean
    gc.collect()
    assert gone() is None


def test_layers_that_have_no_shape_yet():
    """A lazy layer of a stage is made by the first call, which has nothing to compare."""
    stage = PreActStage(nn.LazyConv2d(8, 1), PreActBlock(8, 8))
    for _ in range(2):
        assert stage(x_of(C=3)).shape == (2, 8, 5, 5)


def doubled(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return 2 * nn.Conv2d.forward(conv, x)


def halved(conv: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return nn.Conv2d._conv_forward(conv, x, weight / 2, bias)


class Doubled(nn.Conv2d):
    forward = doubled


def unchecked(_bn: nn.BatchNorm2d, x: torch.Tensor) -> None:
    x.mul_(2)


METHODS = [
    (nn.Conv2d, "forward", doubled),
    (nn.Conv2d, "_conv_forward", halved),
    (nn.BatchNorm2d, "_check_input_dim", unchecked),
]


@pytest.mark.parametrize("called", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize(("kind", "name", "method"), METHODS, ids=[name for _, name, _ in METHODS])
def test_a_method_of_one_layer_is_called(kind, name, method, called):
    """Code puts one there, as for images that are to tile: the plain layers run."""
    block, x = PreActBlock(8, 8), x_of()
    if called:
        block(x)
    layer = next(m for m in block.modules() if isinstance(m, kind))
    setattr(layer, name, functools.partial(method, layer))
    [choice] = explain(block, x)
    assert choice.backend == "eager"
    assert "forward of its own" in choice.others["reference"]


@pytest.mark.parametrize("make", [PreActBlock, lambda *size: PreActStage(*(PreActBlock(*size) for _ in range(2)))])
@pytest.mark.parametrize(("kind", "name", "method"), METHODS, ids=[name for _, name, _ in METHODS])
def test_a_method_of_all_layers_is_called(make, kind, name, method, monkeypatch):
    """Whoever replaces it wants it called wherever the layer is."""
    net, x = make(8, 8), x_of()
    net(x)
    original, calls = getattr(kind, name), []
    monkeypatch.setattr(kind, name, lambda *args: calls.append(args) or original(*args))
    net(x)
    assert len(calls) == sum(isinstance(m, kind) for m in net.modules())
    monkeypatch.undo()
    net(x)
    assert "eager" not in {choice.backend for choice in explain(net, x)}


@pytest.mark.parametrize("make", [PreActBlock, lambda *size: PreActStage(*(PreActBlock(*size) for _ in range(2)))])
@pytest.mark.parametrize("name", ["conv2d", "batch_norm", "relu"])
def test_a_function_that_layers_call_is_called(make, name, monkeypatch):
    """Whoever counts what they compute, or has it rounded, may put another in its place."""
    net, x = make(8, 8), x_of()
    net(x)
    original, calls = getattr(F, name), []
    monkeypatch.setattr(F, name, lambda *args: calls.append(args) or original(*args))
    net(x)
    assert len(calls) == sum(isinstance(m, nn.Conv2d) for m in net.modules())
    monkeypatch.undo()
    net(x)
    assert "eager" not in {choice.backend for choice in explain(net, x)}


class Halved(nn.Parameter):
    """A filter that convolves as half of itself."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.conv2d:
            args = args[0], args[1] / 2, *args[2:]
        return super().__torch_function__(function, types, args, kwargs or {})


class Named(nn.Parameter):
    """A parameter in all but its name."""


@pytest.mark.parametrize("compiled", [False, True])
def test_a_parameter_that_changes_what_functions_make_of_it(compiled):
    """Only the plain layers call them; a subclass that leaves them as they are is fused."""
    block, x = PreActBlock(8, 8), x_of()
    call = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
    expected = block(x)
    block.conv2.weight = Named(block.conv2.weight.detach())
    assert torch.equal(call(x), expected)
    assert "eager" not in {choice.backend for choice in explain(block, x)}
    block.conv2.weight = Halved(block.conv2.weight.detach())
    assert_close(call(x) - x, (expected - x) / 2)
    if torch.__version__ < (2, 13):  # fake tensors of torch 2.11 are of no use beside those of other classes
        return
    [choice] = explain(block, x)
    assert choice.backend == "eager"
    assert "conv2.weight is a Halved" in choice.others["reference"]


def test_a_parameter_whose_class_changes_in_place():
    """As torch.utils.swap_tensors does it, to quantise a net: the object is what it was."""
    block, x = PreActBlock(8, 8), x_of()
    expected = block(x).detach()  # a graph would hold the parameter
    weight = block.conv2.weight
    torch.utils.swap_tensors(weight, Halved(weight.detach().clone()))
    assert block.conv2.weight is weight
    assert_close(block(x) - x, (expected - x) / 2)


class Changes:
    """What may be done to a net between two calls, each method one of it, on a layer that is drawn."""

    def __init__(self, net: nn.Module, seed: int) -> None:
        self.net, self.random = net, random.Random(seed)

    def any(self, kind: type) -> nn.Module:
        return self.random.choice([m for m in self.net.modules() if isinstance(m, kind)])

    def training(self):
        self.any(nn.Module).train(self.random.random() < 0.7)

    def backend(self):
        self.any((BNReLUConv2d, PreActBlock)).backend = self.random.choice(["auto", "auto", "reference", "eager"])

    def dtype(self):
        self.net.to(self.random.choice([torch.float32, torch.float32, torch.float64]))

    def frozen(self):
        self.any((nn.BatchNorm2d, nn.Conv2d)).requires_grad_(self.random.random() < 0.5)

    def eps(self):
        self.any(nn.BatchNorm2d).eps = self.random.choice([1e-5, 0.1])

    def momentum(self):
        self.any(nn.BatchNorm2d).momentum = self.random.choice([None, 0.1, 0.5])

    def gamma(self):
        self.any(nn.BatchNorm2d).weight = self.random.choice([None, nn.Parameter(torch.rand(8))])

    def numbers(self):
        parameter = self.any(nn.Conv2d).weight
        parameter.data = torch.randn_like(parameter)

    def statistics(self):
        bn = self.any(nn.BatchNorm2d)
        bn.track_running_stats = self.random.random() < 0.7
        bn.running_mean, bn.running_var = self.random.choice([(None, None), (torch.zeros(8), torch.ones(8))])

    def dictionary(self):
        bn = self.any(nn.BatchNorm2d)
        bn._buffers = {**bn._buffers, "num_batches_tracked": torch.tensor(5)}

    def shape(self):
        parameter = self.any(nn.Conv2d).weight
        parameter.data = parameter.data.reshape(self.random.choice([(8, 8, 3, 3), (4, 16, 3, 3)]))

    def filter(self):
        self.any(nn.Conv2d).weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def bias(self):
        self.any(nn.Conv2d).bias = self.random.choice([None, nn.Parameter(torch.randn(8))])

    def geometry(self):
        conv = self.any(nn.Conv2d)
        conv.dilation = conv.padding = self.random.choice([(1, 1), (2, 2)])

    def padding_mode(self):
        self.any(nn.Conv2d).padding_mode = self.random.choice(["zeros", "zeros", "circular"])

    def type(self):
        self.any(nn.Conv2d).__class__ = self.random.choice([nn.Conv2d, nn.Conv2d, Doubled])

    def hook(self):
        self.any(nn.Conv2d).register_forward_hook(lambda _module, _inputs, y: 3 * y)

    def hooks(self):
        self.any(nn.Conv2d)._forward_hooks = collections.OrderedDict()

    def forward(self):
        conv = self.any(nn.Conv2d)
        conv.forward = functools.partial(doubled, conv)

    def forwards(self):
        self.any(nn.Conv2d).__dict__.pop("forward", None)

    def convolution(self):
        conv = self.any(nn.Conv2d)
        conv.__dict__.pop("_conv_forward", None)
        if self.random.random() < 0.5:
            conv._conv_forward = functools.partial(halved, conv)

    def layer(self):
        owner = self.any((BNReLUConv2d, PreActBlock))
        name = self.random.choice([name for name, layer in owner.named_children() if isinstance(layer, nn.Conv2d)])
        setattr(owner, name, nn.Conv2d(8, 8, 3, padding=1, bias=False))


CHANGES = [name for name in vars(Changes) if not name.startswith("_") and name != "any"]


def outcome(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor | str | None]:
    """The result of a call, all gradients and all buffers, or the error that it raises."""
    net.zero_grad()
    x = x.to(next(net.parameters()).dtype).requires_grad_()
    try:
        y = net(x)
        y.square().sum().backward()
    except (RuntimeError, TypeError, ValueError) as error:
        return [repr(error)]
    return [y, x.grad, *(p.grad for p in net.parameters()), *net.buffers()]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("make", [BNReLUConv2d, PreActBlock, PreActStage])
def test_whatever_changes_between_two_calls(make, seed):
    """The second is that of a copy, which remembers nothing of the first."""
    torch.manual_seed(seed)
    options = {"kernel_size": 3, "padding": 1} if make is BNReLUConv2d else {}
    net = PreActStage(PreActBlock(8, 8), PreActBlock(8, 8)) if make is PreActStage else make(8, 8, **options)
    changes, x = Changes(net, seed), x_of()
    for _ in range(40):
        name = changes.random.choice(CHANGES)
        getattr(changes, name)()
        copied = copy.deepcopy(net)
        expected, found = outcome(copied, x.clone()), outcome(net, x.clone())
        same = (
            torch.equal(e, f) if isinstance(e, torch.Tensor) else e == f for e, f in zip(expected, found, strict=True)
        )
        assert all(same), name
