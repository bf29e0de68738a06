import pytest
import torch

import fused_preact
from cases import BACKENDS, needs_cpu
from fused_preact import PreActBlock, PreActBottleneck, PreActStage, _extension, backends, bn_relu_conv2d, tables


def arguments(C=4, K=4, size=3, dtype=torch.float32):
    return torch.randn(2, C, 5, 5, dtype=dtype), torch.randn(K, C, size, size, dtype=dtype)


def test_status_names_every_fused_backend():
    """`status` says of each backend that it can be used, or why not."""
    assert tuple(backends.status()) == backends.FUSED
    assert all(reason is None or len(reason) > 20 for reason in backends.status().values())


def test_a_backend_that_is_not_built_says_so(monkeypatch):
    """Without the extension "auto" runs plain layers, and asking for the CPU kernels says how to get them."""
    monkeypatch.setattr(_extension, "unavailable", "_C.abi3.so is not built")
    problem = backends.Problem(torch.device("cpu"), torch.float32, (1, 1, 1, 1), ())
    assert backends.choose("auto", problem) == "eager"
    assert backends.status()["cpu"] == "_C.abi3.so is not built"
    with pytest.raises(ValueError, match=r"backend='cpu' cannot serve this call: _C.abi3.so is not built"):
        backends.choose("cpu", problem)


@needs_cpu
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"groups": 2}, "no groups and no dilation"),
        ({"dilation": 2}, "no groups and no dilation"),
        ({"stride": 3}, "strides of 1 and 2"),
        ({"stride": (1, 2)}, "strides of 1 and 2"),
        ({"size": 5}, "filters of 1x1 and 3x3, not 5x5"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_the_cpu_kernels_leave_to_torch(options, reason):
    """ "auto" runs plain layers and explain() says why; asked for by name, "cpu" serves it."""
    options = dict(options)
    x, weight = arguments(size=options.pop("size", 3))
    weight = weight[:, : 4 // options.get("groups", 1)]
    call = {"padding": 2, "training": True, **options}
    (choice,) = fused_preact.explain(bn_relu_conv2d, x, weight, **call)
    assert choice.backend == "eager"
    assert f"{reason}" in choice.others["cpu"]
    assert "would run torch's own convolution; ask for it by name" in choice.others["cpu"]
    (choice,) = fused_preact.explain(bn_relu_conv2d, x, weight, backend="cpu", **call)
    assert choice.backend == "cpu"


@needs_cpu
def test_a_block_with_one_convolution_of_the_cpu_kernels_is_theirs():
    """Among them is the 3x3 convolution in groups of a ResNeXt's bottleneck."""
    block = PreActBottleneck(16, 8)
    block.conv2 = torch.nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
    (choice,) = fused_preact.explain(block, torch.randn(2, 16, 6, 5))
    assert choice.backend == "cpu"


@needs_cpu
def test_what_the_cpu_kernels_do_not_serve():
    """ "auto" runs plain layers, explain() says why, and asking for "cpu" is an error with that reason."""
    x, weight = arguments(dtype=torch.float16)
    (choice,) = fused_preact.explain(bn_relu_conv2d, x, weight, padding=1, training=True)
    assert choice.backend == "eager"
    assert "not in torch.float16" in choice.others["cpu"]
    with pytest.raises(ValueError, match=r"backend='cpu' cannot serve this call: .*not in torch\.float16"):
        bn_relu_conv2d(x, weight, padding=1, training=True, backend="cpu")


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_what_the_cpu_kernels_serve(dtype, size, stride):
    """1x1 and 3x3 filters at strides 1 and 2 go to the CPU kernels by themselves."""
    x, weight = arguments(size=size, dtype=dtype)
    (choice,) = fused_preact.explain(bn_relu_conv2d, x, weight, stride=stride, training=True)
    assert choice.backend == "cpu"


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of compute capability 9.0, as far as the choice of a backend goes."""
    monkeypatch.setattr(_extension, "unavailable", None)
    monkeypatch.setattr(_extension, "cuda_architectures", ("9.0",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(tables, "device_name", lambda *_: "a GPU that nothing was measured on")
    return monkeypatch


def on_cuda(C=16, K=16, size=3, stride=1, dtype=torch.bfloat16, format="channels_last", count=2):
    """The problem of a block of ``count`` such convolutions on a CUDA device."""
    conv = fused_preact.kernels.Conv(stride, stride, 1, 1, 1, 1, 1)
    return backends.Problem(torch.device("cuda"), dtype, (2, C, 8, 8), ((conv, (K, C, size, size)),) * count, format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_what_the_cuda_kernels_serve(gpu, dtype, size, stride):
    """On a GPU, 16-bit blocks of 1x1 and 3x3 filters of few channels go to the CUDA kernels by themselves."""
    assert backends.choose("auto", on_cuda(size=size, stride=stride, dtype=dtype)) == "cuda"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(C=512, K=512), "meant for up to 8388608 products an image, not 150994944"),
        (dict(dtype=torch.float32), "meant for 16-bit channels_last, not channels_last torch.float32"),
        (dict(format="contiguous"), "meant for 16-bit channels_last, not contiguous torch.bfloat16"),
        (dict(count=1), "one convolution by itself"),
    ],
    ids=["wide", "float32", "contiguous", "one"],
)
def test_what_the_cuda_kernels_are_asked_for_by_name(gpu, options, reason):
    """ "auto" runs plain layers where nothing says that the kernels are faster; they serve those who ask."""
    asked = on_cuda(**options)
    choice = backends.describe("here", "auto", asked)
    assert choice.backend == "eager"
    assert reason in choice.others["cuda"]
    assert "not been measured to be faster" in choice.others["triton"] or "not installed" in choice.others["triton"]
    assert backends.choose("cuda", asked) == "cuda"


def test_the_heaviest_convolution_decides_about_the_cuda_kernels(gpu):
    """Up to the limit and no further, wherever it stands in the block."""
    (conv, _), *_ = on_cuda().convolutions
    for channels, expected in (128, "cuda"), (129, "eager"):
        heavy, light = (conv, (channels, 1024, 1, 1)), (conv, (8, 8, 1, 1))
        for convolutions in (heavy, light), (light, heavy):
            assert backends.choose("auto", on_cuda()._replace(convolutions=convolutions)) == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(dtype=torch.float64), "float32, bfloat16 and float16, not in torch.float64"),
        (dict(size=5), "filters of 1x1 and 3x3, not 5x5, and would run torch's own convolution"),
    ],
    ids=["float64", "5x5"],
)
def test_what_the_cuda_kernels_leave_to_eager(gpu, options, reason):
    """ "auto" runs plain layers and says why."""
    choice = backends.describe("here", "auto", on_cuda(**options))
    assert choice.backend == "eager"
    assert reason in choice.others["cuda"]


def test_why_cuda_cannot_be_used(gpu):
    """Each thing that is missing is named: the kernels in the binary, a GPU, one of NVIDIA's, a new enough one."""
    asked = on_cuda()
    gpu.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or more"):
        backends.choose("cuda", asked)
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="has no CUDA device"):
        backends.choose("cuda", asked)
    gpu.setattr(torch.version, "hip", "7.2")
    with pytest.raises(ValueError, match="is one for AMD's GPUs"):
        backends.choose("cuda", asked)
    gpu.setattr(_extension, "cuda_architectures", ())
    with pytest.raises(ValueError, match=r"the CUDA kernels were left out: .*FUSED_PREACT_CUDA=1"):
        backends.choose("cuda", asked)
    assert "left out" in backends.status()["cuda"]


def test_cuda_is_for_cuda_tensors():
    """Asked for on the CPU, it says where it runs."""
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call: it runs on CUDA devices, not on cpu"):
        bn_relu_conv2d(*arguments(), training=True, backend="cuda")


def test_what_the_library_serves():
    """The devices whose batch norm it calls, a GPU without kernels of its own too."""
    asked = on_cuda(dtype=torch.float64, size=5)
    assert backends.choose("library", asked) == "library"
    assert backends.choose("library", asked._replace(device=torch.device("cpu"))) == "library"
    with pytest.raises(
        ValueError, match="backend='library' cannot serve this call: it knows the CPU and CUDA, not xpu"
    ):
        backends.choose("library", asked._replace(device=torch.device("xpu")))


def test_torch_says_whether_tf32_is_allowed(monkeypatch):
    """The switch of torch's own convolutions, whichever of its names is used."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        assert not backends.allows_tf32()
        conv.fp32_precision = "tf32"
        assert backends.allows_tf32()
    finally:
        conv.fp32_precision = before


def test_compiled_code_may_ask_whether_tf32_is_allowed():
    """Dynamo of torch 2.11 cannot trace the switch itself."""
    chosen = torch.compile(lambda x: x + (1 if backends.allows_tf32() else 2), backend="eager", fullgraph=True)
    assert chosen(torch.zeros(())) == (1 if backends.allows_tf32() else 2)


def test_each_gpu_is_asked_for_itself(gpu):
    """The device of x decides, not the current one."""
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0) if device.index else (7, 5))
    assert backends.choose("cuda", on_cuda()._replace(device=torch.device("cuda:1"))) == "cuda"
    with pytest.raises(ValueError, match="compute capability"):
        backends.choose("cuda", on_cuda()._replace(device=torch.device("cuda:0")))


def test_autocast_counts(monkeypatch):
    """The choice is made for the type that autocast gives, not for that of x."""
    seen = []
    monkeypatch.setattr(backends, "choose", lambda backend, problem: seen.append(problem.dtype) or "library")
    x, weight = arguments(C=3)
    with torch.autocast("cpu", torch.bfloat16):
        bn_relu_conv2d(x, weight, training=True)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("name", [*BACKENDS, "eager"])
def test_what_is_asked_for_serves(name):
    """A backend that is named serves the call."""
    x, weight = arguments()
    (choice,) = fused_preact.explain(bn_relu_conv2d, x, weight, training=True, backend=name)
    assert choice.backend == name


@pytest.mark.parametrize("options", [dict(C=512, K=512), dict(dtype=torch.float32)], ids=["wide", "float32"])
def test_a_memory_mode_goes_before_speed(gpu, options):
    """Who asks for "lean" or "min" is not given plain layers, which keep everything, because those may be faster."""
    choice = backends.describe("here", "auto", on_cuda(**options)._replace(saves_memory=True))
    assert choice.backend == "cuda"
    assert "a mode that keeps less was asked for" in choice.others["eager"]


@pytest.mark.parametrize("best", ["eager", "library"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_memory_mode_goes_before_what_was_measured(folder, memory, best):
    """A table that has plain layers as the fastest decides for "fast", and for inference in every mode."""
    stage = fused_preact.PreActStage(fused_preact.PreActBlock(4, 4), memory=memory)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    calls = {}
    for grad in True, False:
        with torch.set_grad_enabled(grad):
            (choice,) = fused_preact.explain(stage.train(grad), x)
        assert choice.problem.inference is not grad
        calls[tables.call_key(choice.problem)] = {"2": {"best": best, "seconds": {}}}
    tables.save({"device": tables.device_name("cpu"), "calls": calls, "tiles": {}})
    served = "cpu" if (memory, best) == ("lean", "eager") else best
    assert fused_preact.explain(stage.train(), x)[0].backend == served
    with torch.no_grad():
        assert fused_preact.explain(stage.eval(), x)[0].backend == best
    assert fused_preact.explain(stage, x)[0].backend == served


def test_what_was_measured_is_not_for_a_backend_that_is_not_there(folder, monkeypatch):
    """A table may be older than what is installed: the rule decides, and no call is refused or fails."""
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in arguments())
    (choice,) = fused_preact.explain(bn_relu_conv2d, x, weight, training=True)
    calls = {tables.call_key(choice.problem): {"2": {"best": "library", "seconds": {}}}}
    tables.save({"device": tables.device_name("cpu"), "calls": calls, "tiles": {}})
    assert backends.choose("auto", choice.problem) == "library"
    monkeypatch.setitem(backends._OBSTACLES, "library", lambda _problem: "it is not there")
    found = backends.describe("here", "auto", choice.problem)
    assert (found.backend, found.others["library"]) == (choice.backend, "it is not there")


def test_what_was_measured_is_not_for_an_x_that_autocast_would_round(folder):
    """A table is of calls whose x has the type of the convolution already."""
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in arguments())
    with torch.autocast("cpu", torch.bfloat16):
        (choice,) = fused_preact.explain(bn_relu_conv2d, x.bfloat16(), weight, training=True)
        calls = {tables.call_key(choice.problem): {"2": {"best": "library", "seconds": {}}}}
        tables.save({"device": tables.device_name("cpu"), "calls": calls, "tiles": {}})
        for given, expected in (x.bfloat16(), "library"), (x, "eager"):
            (choice,) = fused_preact.explain(bn_relu_conv2d, given, weight, training=True)
            assert choice.backend == expected
    with torch.autocast("cpu", torch.bfloat16):
        (choice,) = fused_preact.explain(PreActStage(PreActBlock(4, 4), memory="lean"), x)
    assert choice.backend != "eager"  # its stream stays in float32


@needs_cpu
def test_what_auto_chooses_is_compiled():
    """Code that is compiled, and not exported, has the operators that calls have without."""
    graphs = []

    def compiler(graph, _inputs):
        graphs.append(str(graph.code))
        return graph.forward

    torch.compile(PreActBlock(4, 4), backend=compiler, fullgraph=True)(torch.randn(2, 4, 5, 5))
    assert ["torch.ops.fused_preact.forward" in graph for graph in graphs] == [True]


@pytest.mark.parametrize("training", [(False, False), (True, False), (False, True), (True, True)])
def test_inference_has_no_batch_statistics(training):
    """A call without gradients that still trains a batch norm is measured as training is."""
    block = PreActBlock(4, 4)
    block.bn1.train(training[0]), block.bn2.train(training[1])
    with torch.no_grad():
        (choice,) = fused_preact.explain(block, torch.randn(2, 4, 5, 5))
    assert choice.problem.inference is not any(training)
    (choice,) = fused_preact.explain(block, torch.randn(2, 4, 5, 5))
    assert not choice.problem.inference


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_exported_has_torch_s_operators_alone(strict):
    """So that another runtime can run it; a backend that was asked for by name stays."""
    x = torch.randn(2, 4, 5, 5)
    for backend in "auto", "library":
        net = PreActStage(PreActBlock(4, 4, backend=backend), PreActBlock(4, 4, backend=backend)).eval()
        program = torch.export.export(net, (x,), strict=strict)
        assert ("fused_preact" in str(program.graph)) == (backend == "library")
        torch.testing.assert_close(program.module()(x), net(x))
