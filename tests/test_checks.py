from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from fused_preact import BNReLUConv2d, DenseLayer, PreActBlock, PreActStage, bn_relu_conv2d, checks, explain
from fused_preact.backends import NAMES


def arguments() -> dict:
    return {
        "x": torch.randn(2, 6, 5, 4),
        "weight": torch.randn(8, 6, 3, 3),
        "bn_weight": torch.ones(6),
        "bn_bias": torch.zeros(6),
        "running_mean": torch.zeros(6),
        "running_var": torch.ones(6),
        "padding": 1,
    }


# What is wrong: the arguments, the error, and what its message says: the argument, what was expected and what came.
BAD = {
    "x is no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x has 1 dimension": ({"x": torch.randn(6)}, ValueError, r"x must have 4 dimensions.*\(6,\)"),
    "x has 3 dimensions": ({"x": torch.randn(6, 5, 4)}, ValueError, r"x must have 4 dimensions.*\(6, 5, 4\)"),
    "x is integer": ({"x": torch.ones(2, 6, 5, 4, dtype=torch.int64)}, TypeError, "x must be one of.*float32.*int64"),
    "x is complex": ({"x": torch.ones(2, 6, 5, 4, dtype=torch.complex64)}, TypeError, "x must be one of.*complex64"),
    "x is elsewhere": ({"x": torch.ones(2, 6, 5, 4, device="meta")}, ValueError, "bn_weight must be on meta.*got cpu"),
    "x is sparse": ({"x": torch.ones(2, 6, 5, 4).to_sparse()}, TypeError, "x must be a dense tensor.*sparse"),
    "x has no channels": (
        {"x": torch.randn(2, 0, 5, 4)},
        ValueError,
        r"x must have at least one channel.*\(2, 0, 5, 4\)",
    ),
    "x has no pixels": ({"x": torch.randn(2, 6, 0, 4)}, ValueError, r"x must have at least.*one pixel.*\(2, 6, 0, 4\)"),
    "weight is no tensor": ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    "weight has 2 dimensions": ({"weight": torch.randn(8, 6)}, ValueError, r"weight must have 4 dimensions.*\(8, 6\)"),
    "weight reads other channels": (
        {"weight": torch.randn(8, 7, 3, 3)},
        ValueError,
        r"weight of shape \(8, 7, 3, 3\) expects an input of 7 channels, got one of 6: shape \(2, 6, 5, 4\)",
    ),
    "weight is of another dtype": (
        {"weight": torch.randn(8, 6, 3, 3).half()},
        TypeError,
        "weight must be.*float32.*float16",
    ),
    "weight is elsewhere": (
        {"weight": torch.randn(8, 6, 3, 3, device="meta")},
        ValueError,
        "weight must be on cpu.*meta",
    ),
    "weight is sparse": (
        {"weight": torch.randn(8, 6, 3, 3).to_sparse()},
        TypeError,
        "weight must be a dense tensor, got layout torch.sparse_coo",
    ),
    "weight is empty": ({"weight": torch.randn(0, 6, 3, 3)}, ValueError, r"weight must not be empty.*\(0, 6, 3, 3\)"),
    "groups do not divide": ({"groups": 4}, ValueError, "groups must divide.*6.*8.*groups=4"),
    "groups do not divide the output": (
        {"groups": 3, "weight": torch.randn(8, 2, 3, 3)},
        ValueError,
        "groups must divide.*6.*8.*groups=3",
    ),
    "x is not for these groups": (
        {"x": torch.randn(2, 8, 5, 4), "weight": torch.randn(8, 3, 3, 3), "groups": 2},
        ValueError,
        "x must have 6 channels, as its batch norm and convolution have; got 8",
    ),
    "weight is not for these groups": (
        {"groups": 2},
        ValueError,
        "expects an input of 12 channels with groups=2, got one of 6",
    ),
    "groups is a pair": ({"groups": (2, 3)}, TypeError, r"groups must be an integer, got \(2, 3\)"),
    "groups is zero": ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
    "stride is zero": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride is a float": ({"stride": 1.5}, TypeError, "stride must be an integer or a pair.*1.5"),
    "stride is a truth value": ({"stride": True}, TypeError, "stride must be an integer or a pair.*True"),
    "stride has a truth value": ({"stride": (1, np.True_)}, TypeError, "stride must be an integer or a pair.*True"),
    "stride is a triple": ({"stride": (1, 1, 1)}, TypeError, r"stride must be an integer or a pair.*\(1, 1, 1\)"),
    "padding is negative": ({"padding": (1, -1)}, ValueError, r"padding must be at least 0, got \(1, -1\)"),
    "padding is too large": ({"padding": 1 << 31}, ValueError, "padding must be at most 2147483647, got 2147483648"),
    "groups are too many": ({"groups": 1 << 63}, ValueError, "groups must be at most 2147483647, got 9223372036854"),
    "padding is a bad word": ({"padding": "full"}, ValueError, "padding must be.*'same' or 'valid', got 'full'"),
    "padding='same' with a stride": (
        {"padding": "same", "stride": 2},
        ValueError,
        "padding='same' needs a stride of 1",
    ),
    "padding='same' with a stride in one direction": (
        {"padding": "same", "stride": (1, 2)},
        ValueError,
        r"padding='same' needs a stride of 1, got stride=\(1, 2\)",
    ),
    "padding='same' with an even filter": (
        {"padding": "same", "weight": torch.randn(8, 6, 2, 3)},
        ValueError,
        r"padding='same' must come out equal on both sides, got a filter of \(2, 3\)",
    ),
    "dilation is zero": ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    "the filter is too wide": ({"dilation": (1, 9)}, ValueError, "does not fit an input of 5x4 pixels.*5x0"),
    "the filter does not fit": ({"dilation": 9}, ValueError, "does not fit an input of 5x4 pixels.*0x0"),
    "bn_weight is too short": ({"bn_weight": torch.ones(5)}, ValueError, r"bn_weight must have shape \(6,\).*\(5,\)"),
    "bn_bias is a matrix": ({"bn_bias": torch.ones(6, 1)}, ValueError, r"bn_bias must have shape \(6,\).*\(6, 1\)"),
    "bn_weight is of another dtype": ({"bn_weight": torch.ones(6).double()}, TypeError, "bn_weight must be.*float64"),
    "bn_bias is elsewhere": ({"bn_bias": torch.ones(6, device="meta")}, ValueError, "bn_bias must be on cpu.*meta"),
    "running_mean is too long": (
        {"running_mean": torch.ones(7)},
        ValueError,
        r"running_mean must have.*\(6,\).*\(7,\)",
    ),
    "running_var is integer": ({"running_var": torch.ones(6).int()}, TypeError, "running_var must be.*int32"),
    "no statistics in eval": (
        {"running_mean": None, "running_var": None},
        ValueError,
        "running_mean is needed where batch statistics are not used.*None",
    ),
    "one statistic": (
        {"running_var": None, "training": True},
        ValueError,
        "running_var is needed where running_mean is given",
    ),
    "bias is too long": (
        {"bias": torch.ones(9)},
        ValueError,
        r"bias must have shape \(8,\), one.*output channel; got \(9,\)",
    ),
    "bias is of another dtype": ({"bias": torch.ones(8).double()}, TypeError, "bias must be.*float32.*float64"),
    "residual of the wrong shape": (
        {"residual": torch.ones(2, 8, 5, 5)},
        ValueError,
        r"residual must have the shape of the output, \(2, 8, 5, 4\); got \(2, 8, 5, 5\)",
    ),
    "residual to be broadcast": ({"residual": torch.ones(1, 8, 5, 4)}, ValueError, r"residual.*got \(1, 8, 5, 4\)"),
    "residual of another dtype": ({"residual": torch.ones(2, 8, 5, 4).half()}, TypeError, "residual must be.*float16"),
    "residual is elsewhere": (
        {"residual": torch.ones(2, 8, 5, 4, device="meta")},
        ValueError,
        "residual must be on cpu",
    ),
    "empty batch in training": (
        {"x": torch.randn(0, 6, 5, 4), "training": True},
        ValueError,
        r"x must have more than one value per channel in training, got shape \(0, 6, 5, 4\)",
    ),
    "one value in training": (
        {"x": torch.randn(1, 6, 1, 1), "training": True},
        ValueError,
        r"x must have more than one value per channel in training, got shape \(1, 6, 1, 1\)",
    ),
    "eps is negative": ({"eps": -1e-5}, ValueError, "eps must not be negative, got -1e-05"),
    "eps is zero": ({"eps": 0.0, "training": True}, ValueError, "eps must be positive in training, got 0.0"),
    "eps is NaN": ({"eps": float("nan")}, ValueError, "eps must not be negative, got nan"),
    "eps is a word": ({"eps": "small"}, TypeError, "eps must be a number, got 'small'"),
    "momentum is None": ({"momentum": None}, TypeError, "momentum must be a number, got None"),
    "training is a word": ({"training": "no"}, TypeError, "training must be True or False, got 'no'"),
    "training is a number": ({"training": 0}, TypeError, "training must be True or False, got 0"),
    "training is a tensor": ({"training": torch.tensor(True)}, TypeError, r"training must be.*got tensor\(True\)"),
    "no such backend": (
        {"backend": "cudnn"},
        ValueError,
        f"backend must be one of {', '.join(map(repr, NAMES))}; got 'cudnn'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_one_message_names_argument_expectation_and_what_came(name):
    """Each kind of bad input gets its own sentence, before anything is computed or written."""
    changes, error, message = BAD[name]
    given = arguments() | changes
    mean = given["running_mean"]
    with pytest.raises(error, match=message):
        bn_relu_conv2d(**given)
    if mean is not None and mean.dtype.is_floating_point:
        assert mean.unique().numel() == 1


@pytest.mark.parametrize("name", ["weight reads other channels", "residual of the wrong shape", "x is integer"])
def test_fake_tensors_are_checked_too(name):
    """The checks look at shapes and types only, so what is traced or planned gets the same messages."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    changes, error, message = BAD[name]
    mode = FakeTensorMode()
    given = tree_map_only(torch.Tensor, mode.from_tensor, arguments() | changes)
    with mode, pytest.raises(error, match=message):
        bn_relu_conv2d(**given)


@pytest.mark.parametrize("backend", ["reference", "library", "eager", "auto"])
def test_every_backend_gives_the_same_error(backend):
    """The same bad input gets the same message, whoever serves."""
    with pytest.raises(ValueError, match="expects an input of 7 channels, got one of 6"):
        bn_relu_conv2d(**arguments() | {"weight": torch.randn(8, 7, 3, 3), "backend": backend})


def test_numbers_of_any_type():
    """eps and momentum may come from an array of settings: a number of NumPy is the number."""
    given, results = arguments(), []
    for kind in float, np.float32, np.float64:
        buffers = {name: given[name].clone() for name in ("running_mean", "running_var")}
        y = bn_relu_conv2d(**given | buffers, training=True, eps=kind(0.25), momentum=kind(0.5))
        results.append((y, *buffers.values()))
    for same in zip(*results, strict=True):
        assert all(torch.equal(t, same[0]) for t in same)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_integers_of_any_type(kind):
    """A stride or padding of NumPy is taken, as torch's conv2d takes it, and kept as an int."""
    weight = arguments()["weight"]
    conv = checks.geometry(kind(2), (kind(1), 0), [kind(1)], kind(1), weight)
    assert conv == checks.geometry(2, (1, 0), 1, 1, weight)
    assert {type(number) for number in conv} == {int}
    with pytest.raises(ValueError, match="stride must be at least 1, got"):
        checks.geometry(kind(0), 0, 1, 1, weight)


def test_autocast_casts_no_integers():
    """Filters of integers are refused as they are without it."""
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"weight must be .*; got torch.int64"):
        bn_relu_conv2d(**arguments() | {"weight": torch.ones(8, 6, 3, 3, dtype=torch.int64)})


@pytest.mark.parametrize("name", BAD)
def test_a_good_call_does_not_excuse_a_bad_one(name):
    """Plans are kept by shapes, types and the like: a call that differs in one of them is checked anew."""
    changes, error, message = BAD[name]
    bn_relu_conv2d(**arguments())
    with pytest.raises(error, match=message):
        bn_relu_conv2d(**arguments() | changes)


def test_a_block_names_its_own_attributes():
    """In a block the message says which layer it is."""
    block = PreActBlock(4, 4)
    with pytest.raises(ValueError, match=r"x must have 4 channels, as its batch norm and convolution have; got 3"):
        block(torch.randn(2, 3, 5, 5))
    block.bn1 = torch.nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match=r"bn1.weight must have shape \(4,\)"):
        block(torch.randn(2, 4, 5, 5))
    block.bn1 = torch.nn.BatchNorm2d(4)
    block.conv2 = torch.nn.Conv2d(6, 4, 3, padding=1)
    block.bn2 = torch.nn.BatchNorm2d(6)
    with pytest.raises(ValueError, match=r"bn2.weight must have shape \(4,\), one value per input channel; got \(6,\)"):
        block(torch.randn(2, 4, 5, 5))
    block = PreActBlock(4, 4)
    block.conv2 = block.conv2.double()
    with pytest.raises(TypeError, match=r"conv2.weight must be torch.float32, as x is.*; got torch.float64"):
        block(torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"x must have more than one value per channel in training"):
        PreActBlock(4, 4)(torch.randn(1, 4, 1, 1))


def test_a_stage_names_its_own_attributes():
    """And the block that they are in."""
    stage = PreActStage(PreActBlock(4, 4, 2), PreActBlock(4, 4))
    with pytest.raises(ValueError, match=r"the input of 0.bn2 must have more than one value per channel"):
        stage(torch.randn(1, 4, 2, 2))
    stage[0].eval()
    with pytest.raises(ValueError, match=r"the input of 1.bn1 must have more than one value per channel"):
        stage(torch.randn(1, 4, 2, 2))
    stage[1].conv2.stride = (2, 2)
    with pytest.raises(
        ValueError, match=r"the input of 1.bn1 must have the output's shape \(2, 4, 2, 2\), to be added"
    ):
        stage(torch.randn(2, 4, 7, 7))
    stage = PreActStage(PreActBlock(4, 4), PreActBlock(4, 8, 2))
    stage[1].shortcut[0].stride = (1, 1)
    with pytest.raises(ValueError, match=r"1.shortcut must give the shape of the output, \(2, 8, 4, 4\)"):
        stage(torch.randn(2, 4, 7, 7))


def hooked(block):
    block.register_forward_hook(lambda *_: None)


def frozen(block):
    block.requires_grad_(False)


@pytest.mark.parametrize("apart", [hooked, frozen])
def test_a_block_behind_others_that_run_apart_is_named_as_the_stage_names_it(apart):
    """Its place in what runs as one node is another."""
    stage = PreActStage(OrderedDict((name, PreActBlock(4, 4)) for name in "abc"))
    apart(stage.a)
    stage.c.bn2.eps = 0.0
    with pytest.raises(ValueError, match=r"^c.bn2.eps must be positive"):
        stage(torch.randn(2, 4, 5, 5))


def test_layers_of_other_names_are_called_by_these():
    """Those of torchvision's DenseNet, of a unit, of a projection."""
    layer, unit, block = DenseLayer(4, 2), BNReLUConv2d(4, 4, 1), PreActBlock(4, 8, shortcut_name="downsample")
    layer.norm2.eps = unit.bn.eps = 0.0
    block.downsample[0].stride = (2, 2)
    messages = r"^norm2.eps must be positive", r"^bn.eps must be positive", r"^downsample must give the shape"
    for module, message in zip((layer, unit, block), messages, strict=True):
        with pytest.raises(ValueError, match=message):
            module(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("eps", [None, "1e-5"])
def test_an_eps_that_is_no_number(eps):
    """nn.BatchNorm2d takes anything when it is made."""
    block = PreActBlock(4, 4)
    block.bn2.eps = eps
    with pytest.raises(TypeError, match=f"^bn2.eps must be a number, got {eps!r}"):
        block(torch.randn(2, 4, 5, 5))


def test_a_bias_has_the_type_of_x():
    """Unlike the batch norm's parameters, which may be wider."""
    given = {key: t.bfloat16() for key, t in arguments().items() if key in ("x", "weight")}
    with pytest.raises(TypeError, match=r"bias must be torch.bfloat16, as x is .*; got torch.float32"):
        bn_relu_conv2d(**arguments() | given | {"bias": torch.zeros(8)})


def test_channels_that_are_symbols():
    """The check of x reads sizes that a tracer made symbols of."""
    block = PreActBlock(4, 4, backend="library").eval()
    arguments = torch.randn(2, 4, 5, 5), *(p.detach() for p in block.parameters())

    def call(x, gamma, beta, weight, *_):
        return bn_relu_conv2d(x, weight, gamma, beta, training=True, padding=1, backend="library")

    graph = make_fx(call, tracing_mode="symbolic")(*arguments)
    torch.testing.assert_close(graph(*arguments), call(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bn_weight=torch.ones(())), r"bn_weight must have shape \(6,\), one value per input channel; got \(\)"),
        (dict(bn_weight=[1.0] * 3), "bn_weight must be a tensor, got list"),
    ],
    ids=["shape", "type"],
)
def test_x_is_not_blamed_for_what_is_wrong_with_another(change, message):
    """Only where all that read x agree."""
    given = dict(weight=torch.ones(4, 5, 3, 3), bn_weight=torch.ones(6), training=True) | change
    with pytest.raises((TypeError, ValueError), match=message):
        bn_relu_conv2d(torch.randn(2, 6, 5, 4), **given)


def test_a_filter_larger_than_the_image_is_named():
    """A unit inside a chain whose input has become too small says so."""
    unit = BNReLUConv2d(3, 4, 3)
    with pytest.raises(ValueError, match=r"weight with a 3x3 filter.*does not fit an input of 2x9 pixels.*0x7"):
        unit(torch.randn(2, 3, 2, 9))


def test_a_projection_by_itself_trains_its_block():
    """It is no frozen block, which would run apart from those behind it."""
    stage = PreActStage(PreActBlock(6, 8, backend="library"), PreActBlock(8, 8, backend="library"))
    stage[0].requires_grad_(False).shortcut.requires_grad_()
    assert len(explain(stage, torch.randn(2, 6, 5, 4))) == 1
    stage[0].requires_grad_(False)
    assert len(explain(stage, torch.randn(2, 6, 5, 4))) == 2


@pytest.mark.parametrize("backend", ["auto", "cpu", "library", "reference"])
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("stride", (0, 0), r"stride must be at least 1, got \(0, 0\)"),
        ("stride", (1.0, 1.0), r"stride must be an integer or a pair of integers, got \(1.0, 1.0\)"),
        ("padding", (1, -1), r"padding must be at least 0, got \(1, -1\)"),
        ("dilation", (0, 1), r"dilation must be at least 1, got \(0, 1\)"),
        ("groups", 0, "groups must be at least 1, got 0"),
        ("padding", (0, 1 << 40), r"padding must be at most 2147483647, got \(0, 1099511627776\)"),
    ],
    ids=["no-stride", "float-stride", "negative-padding", "no-dilation", "no-groups", "too-large"],
)
def test_settings_of_a_convolution(setting, value, message, backend):
    """nn.Conv2d takes most of these when it is made, and anything later; the call refuses them, whoever serves."""
    unit = BNReLUConv2d(4, 4, 3, padding=1, backend=backend)
    block = PreActBlock(4, 6, backend=backend)
    for module, layer, name in (unit, unit.conv, "conv."), (block, block.conv2, "conv2."):
        setattr(layer, setting, value)
        with pytest.raises((TypeError, ValueError), match=f"^{name}{message}"):
            module(torch.randn(2, 4, 5, 5))
