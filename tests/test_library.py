"""torch's own convolutions: as the table `library`, and in csrc/library.cpp, between the kernels of the CPU."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from cases import BY_ID, CHAINS, OTHER_FILTERS, UNITS, Case, Layer, needs_cpu
from fused_preact import (
    BNReLUConv2d,
    PreActBlock,
    PreActBottleneck,
    PreActStage,
    bn_relu_conv2d,
    library,
    ops,
    reference,
)
from fused_preact.kernels import Activation, Affine, Conv, Gradient
from test_ops import backward_arguments, forward_arguments

# A case for each limit of what the kernels take.
OTHERS = [
    Case("strides-of-3", (2, 3, 7, 7), (Layer(4, stride=(3, 3)),)),
    Case("dilated-rows", (2, 3, 7, 7), (Layer(4, dilation=(2, 1)),)),
    Case("dilated-columns", (2, 3, 7, 7), (Layer(4, dilation=(1, 2)),)),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OTHER_FILTERS + UNITS[1:3] + CHAINS[:1], ids=lambda case: case.id)
def test_kernels_agree_with_the_reference(case, dtype):
    """Kernel by kernel, in every dtype, the library returns what the plain torch calls return."""
    sample = case.draw(0, dtype)
    unit, x = sample.units[0], sample.x
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    close = {"rtol": 1e-9, "atol": 1e-9} if wide == torch.float64 else {"rtol": 3e-2, "atol": 3e-2}
    if dtype == torch.float32:
        close = {"rtol": 1e-4, "atol": 1e-4}
    affine = Affine(unit.bn_weight.to(wide), unit.bn_bias.to(wide), unit.eps)
    rows = library.statistics(x, affine)
    assert_close(rows, reference.statistics(x, affine), rtol=1e-5, atol=1e-6)

    def results(table):
        a = Activation(x, rows)
        y, _ = table.forward(unit.conv, a, unit.weight, unit.bias, None, None)
        dy = Gradient(torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape))
        dweight, _ = table.wgrad(unit.conv, dy, a, unit.weight, False)
        g = table.dgrad(unit.conv, dy, unit.weight, a, None, True)
        return y, dweight, g.grad[0], g.grad[1], table.dx(g, None)

    for ours, theirs in zip(results(library), results(reference), strict=True):
        scale = theirs.abs().max().clamp(min=1e-30)
        assert ours.dtype == theirs.dtype
        assert_close(ours / scale, theirs / scale, **close)


def test_the_activation_is_made_once():
    """wgrad and dgrad of a unit share one recomputed activation."""
    affine = Affine(torch.ones(3), torch.zeros(3), 1e-5)
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1)
    conv, dy = Conv(1, 1, 0, 0, 1, 1, 1), Gradient(torch.randn(2, 5, 4, 4))
    a = Activation(x, library.statistics(x, affine))
    library.wgrad(conv, dy, a, weight, False)
    made = a.value
    library.dgrad(conv, dy, weight, a, None, True)
    assert made is not None
    assert a.value is made


def stage(backend: str, memory: str = "fast") -> PreActStage:
    """Bottlenecks with a filter in groups, one with a dilation, and a projection; the weights of each call the same."""
    torch.manual_seed(0)
    blocks = [PreActBottleneck(12, 4, backend=backend)] + [PreActBottleneck(16, 4, backend=backend) for _ in range(2)]
    for block, options in zip(blocks, ({"groups": 2}, {"groups": 4}, {"padding": 2, "dilation": 2}), strict=True):
        block.conv2 = nn.Conv2d(4, 4, 3, bias=False, **{"padding": 1} | options)
    return PreActStage(*blocks, memory=memory).double()


def assert_as_plain_layers(make, channels: int, memory: str, wanted: str) -> None:
    """What a mode keeps, and what is not wanted, changes nothing: float64 is that of plain layers."""
    results = []
    for backend in "cpu", "eager":
        net = make(backend, memory if backend == "cpu" else "fast")
        x = torch.randn(3, channels, 6, 5, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        x.requires_grad_(wanted in ("all", "images"))
        for name, parameter in net.named_parameters():
            of = {"images": False, "filters": "conv" in name, "norms": "bn" in name, "last": name.startswith("2.conv2")}
            parameter.requires_grad_(of.get(wanted, True))
        y = net(x)
        leaves = [t for t in (x, *net.parameters()) if t.requires_grad]
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves), *net.buffers()])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@needs_cpu
@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
@pytest.mark.parametrize("wanted", ["all", "images", "filters", "norms", "last"])
def test_products_of_torch_among_those_of_the_cpu_kernels(memory, wanted):
    """Between two that are fused, with a projection in front of them."""
    assert_as_plain_layers(stage, 12, memory, wanted)


@needs_cpu
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 3, 2), (3, 2, 1, 0)], ids=str)
def test_a_filter_of_any_order_has_a_gradient_of_that_order(order):
    """Autograd keeps such a one without a copy, and compiled code counts on it."""
    bn, conv = nn.BatchNorm2d(6), nn.Conv2d(6, 4, (3, 2), groups=2, bias=False)
    back = [order.index(i) for i in range(4)]
    conv.weight = nn.Parameter(conv.weight.detach().permute(order).contiguous().permute(back))
    x = torch.randn(2, 6, 5, 4)
    gradients = []
    for backend in "cpu", "eager":
        y = BNReLUConv2d.from_layers(bn, conv, backend)(x)
        gradients += torch.autograd.grad(y.square().sum(), [conv.weight])
    assert_close(*gradients)
    assert gradients[0].stride() == conv.weight.stride()


def ends(backend: str, memory: str = "fast") -> PreActStage:
    """Blocks whose first and last convolutions are torch's, beside a projection of the activation and the identity."""
    torch.manual_seed(0)
    blocks = [PreActBlock(channels, 8, backend=backend) for channels in (6, 8, 8)]
    blocks[0].conv1 = nn.Conv2d(6, 8, 5, padding=2)
    for block, dilation in zip(blocks, ((1, 2), (2, 1), (1, 1)), strict=True):
        block.conv2 = nn.Conv2d(8, 8, 3, padding=dilation, dilation=dilation)
    blocks[2].conv1, blocks[2].conv2 = blocks[2].conv2, nn.Conv2d(8, 8, 3, padding=1, groups=2)
    return PreActStage(*blocks, memory=memory).double()


@needs_cpu
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("wanted", ["all", "filters"])
def test_products_of_torch_at_the_ends_of_blocks(memory, wanted):
    """Their results are those that the next batch norm reads, and to their gradients a projection's is added."""
    assert_as_plain_layers(ends, 6, memory, wanted)


@needs_cpu
def test_the_gradient_of_a_bias_whose_unit_comes_first():
    """Of a unit whose input wants no gradient, filter and bias alone have one."""
    x, weight, bias = torch.randn(2, 4, 6, 5), torch.randn(6, 4, 5, 5, requires_grad=True), torch.randn(6)
    bias.requires_grad_()
    results = []
    for backend in "cpu", "eager":
        y = bn_relu_conv2d(x, weight, bias=bias, padding=2, training=True, backend=backend)
        results.append(torch.autograd.grad(y.square().sum(), [weight, bias]))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_channel_of_rows_that_make_one_output(dtype):
    """Its strides may say NHWC as well as NCHW, of which torch's convolution does not take both."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 1, 16, 4), (4, 1, 3, 3)))
    arguments = {"stride": (1, 4), "padding": 1, "training": True}
    y = bn_relu_conv2d(x, weight, backend="cpu", **arguments)
    exact = bn_relu_conv2d(x.double(), weight.double(), backend="eager", **arguments)
    tolerance = 4 * torch.finfo(dtype).eps  # what the convolution reads is rounded, and its result
    assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


@needs_cpu
@pytest.mark.parametrize(
    "options",
    [
        {"stride": (1, 2**28), "padding": (0, 2**31 - 1), "groups": 2},
        {"stride": (1, 2**31 - 1), "padding": (0, 2)},
        {"padding": (0, 2**31 - 1), "dilation": (1, 2**31 - 1)},
    ],
    ids=["padding", "stride", "dilation"],
)
@pytest.mark.parametrize("turned", [False, True], ids=["columns", "rows"])
def test_what_torch_cannot_count_is_an_error(options, turned):
    """oneDNN would end the process: it counts bytes within a row in 32 bits."""
    width = 3 if "dilation" in options else 5
    x, weight = torch.randn(1, 2, 8, 8), torch.randn(2, 2 // options.get("groups", 1), 1, width)
    if turned:
        weight = weight.transpose(2, 3)
        options = {name: value[::-1] if isinstance(value, tuple) else value for name, value in options.items()}
    with pytest.raises(RuntimeError, match="that torch's own convolution can count"):
        bn_relu_conv2d(x, weight, training=True, backend="cpu", **options)


@needs_cpu
def test_autocast_around_a_backward_leaves_what_it_makes_again_alone(monkeypatch):
    """On a GPU autocast casts for aten::convolution itself, which the kernels behind it would read as float32."""
    (forward, backward), on = ops.OPERATORS["cpu"], []

    def watched(*arguments):
        on.append(torch.is_autocast_enabled("cpu"))
        return backward(*arguments)

    monkeypatch.setitem(ops.OPERATORS, "cpu", (forward, watched))
    x = torch.randn(3, 12, 6, 5, dtype=torch.double, requires_grad=True)
    y = stage("cpu", "min")(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert on == [False]


@needs_cpu
def test_an_empty_batch():
    """It gives an empty result and gradients of zero, as plain layers do."""
    net = stage("cpu").eval()
    x = torch.zeros(0, 12, 6, 5, dtype=torch.double, requires_grad=True)
    y = net(x)
    y.sum().backward()
    assert y.shape == (0, 16, 6, 5)
    assert x.grad.shape == x.shape
    assert not any(parameter.grad.any() for parameter in net.parameters())


@needs_cpu
@pytest.mark.parametrize("name", ["depthwise", "dilation", "bottleneck-groups"])
def test_opcheck(name):
    """The fake kernels know these convolutions."""
    sample, tests = BY_ID[name].draw(0), ["test_schema", "test_faketensor", "test_autograd_registration"]
    forward, backward = ops.OPERATORS["cpu"]
    torch.library.opcheck(backward, backward_arguments(sample, "cpu"), test_utils=tests)
    for leaf in sample.leaves().values():
        leaf.requires_grad_()
    torch.library.opcheck(forward, forward_arguments(sample, "cpu"), test_utils=tests)


@needs_cpu
@pytest.mark.parametrize(
    ("wanted", "made"),
    [
        ("conv3.weight", []),
        ("bn3.weight", []),
        ("conv2.weight", [(False, True, False)]),
        ("bn2.weight", [(True, False, False)]),
        ("conv1.weight", [(True, False, False)]),
    ],
)
def test_torch_makes_what_is_wanted_alone(wanted, made):
    """Of the gradients of x, filter and bias; here of the last block's second convolution."""
    net = stage("cpu").requires_grad_(False)
    net[2].get_parameter(wanted).requires_grad_(True)
    y = net(torch.randn(2, 12, 6, 5, dtype=torch.double))
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        y.sum().backward()
    calls = [event for event in profile.function_events if event.name == "aten::convolution_backward"]
    assert [tuple(call.concrete_inputs[-1]) for call in calls] == made


@needs_cpu
@pytest.mark.parametrize("case", UNITS + CHAINS + OTHER_FILTERS + OTHERS, ids=lambda case: case.id)
def test_convolutions_that_the_kernels_take_are_not_torch_s(case):
    """Whose passes around them would take longer, unseen in what they give."""
    arguments = forward_arguments(case.draw(0), "cpu")
    with torch.autograd.profiler.profile() as profile:
        ops.OPERATORS["cpu"][0](*arguments)
    calls = [event for event in profile.function_events if event.name == "aten::convolution"]
    assert bool(calls) == (case in OTHER_FILTERS + OTHERS)
