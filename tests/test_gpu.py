"""The backends cuda and triton on a GPU, by the cases that pass without one; `make gpu` runs them."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cases import BY_ID, OTHER_FILTERS, Case, Layer, Results, Sample, assert_no_worse, eager, errors, fused, laid_out
from fused_preact import BNReLUConv2d, PreActBottleneck, PreActStage, backends
from fused_preact.stage import MEMORY
from fused_preact.train.graph import CudaGraph
from fused_preact.units import Block
from test_cuda import CASES
from test_stage import assert_as_close_as_eager_under_autocast
from tf32 import PRODUCTS, eager_tf32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine")

each_product = pytest.mark.parametrize("product", PRODUCTS)
HEAVY = Case("heavy", (2, 128, 9, 8), (Layer(128),))  # more than the backend cuda takes: cuDNN's, between its kernels


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill every new tensor with NaN, so that a value which is never written shows; torch's own TF32 stays off."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend with kernels for GPUs."""
    reason = backends.status()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


def to_gpu(sample: Sample) -> Sample:
    def move(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().cuda()

    units = [unit._replace(**{name: move(getattr(unit, name)) for name in unit._fields[:6]}) for unit in sample.units]
    shortcut = sample.shortcut._replace(weight=move(sample.shortcut.weight))
    return Sample(move(sample.x), [Block(units, shortcut)], move(sample.residual), move(sample.dy))


def on_gpu(run, product: str):
    """A function that runs a sample on the GPU, float32 with torch's switch for TF32 as the product wants it."""

    def moved(sample: Sample) -> Results:
        torch.backends.cudnn.allow_tf32 = product == "tf32"
        return {name: value.cpu() for name, value in run(to_gpu(sample)).items()}

    return moved


def fused_on_gpu(backend: str, product: str):
    """The same with a fused backend."""
    return on_gpu(functools.partial(fused, backend=backend), product)


@each_product
@pytest.mark.parametrize("case", [*CASES, *OTHER_FILTERS, HEAVY], ids=lambda case: case.id)
def test_as_close_to_float64_as_plain_layers(case: Case, product: str, backend: str) -> None:
    """At most twice the error of eager torch on the same device, in the same dtype; TF32's is of tests/tf32.py."""
    if backend == "triton" and any((layer.groups, *layer.dilation) != (1, 1, 1) for layer in case.layers):
        pytest.skip("Triton's kernels have no groups and no dilation")
    dtype = PRODUCTS[product]
    ours = errors(case, dtype, fused_on_gpu(backend, product))
    theirs = on_gpu(eager_tf32, "fp32") if product == "tf32" else on_gpu(eager, product)
    assert_no_worse(ours, errors(case, dtype, theirs), dtype)


def test_a_large_mean_keeps_its_digits(backend: str) -> None:
    """Statistics whose squares would cancel."""
    case = replace(BY_ID["35-channels-1x1"], mean=1000.0)
    ours = errors(case, torch.float32, fused_on_gpu(backend, "fp32"))
    assert_no_worse(ours, errors(case, torch.float32, on_gpu(eager, "fp32")), torch.float32)


@each_product
@pytest.mark.parametrize("name", ["odd", "many-pixels", "many-images", "bottleneck-stride-2"])
def test_two_runs_agree_to_the_bit(name: str, product: str, backend: str) -> None:
    """Blocks arrive in another order each time, and sums do not depend on it."""
    run, sample = fused_on_gpu(backend, product), BY_ID[name].draw(0, PRODUCTS[product])
    first = run(sample)
    for _ in range(5):
        assert all(torch.equal(value, first[name]) for name, value in run(sample).items())


@each_product
@pytest.mark.parametrize("layout", ["nchw", "sliced"])
def test_layouts_give_the_same_bits(layout: str, product: str, backend: str) -> None:
    """NCHW, channels_last and slices of larger tensors differ in speed only."""
    sample, run = BY_ID["bottleneck-stride-2"].draw(0, PRODUCTS[product]), fused_on_gpu(backend, product)
    expected = run(sample)
    sample.x = laid_out(sample.x, layout)
    assert all(torch.equal(value, expected[name]) for name, value in run(sample).items())


@pytest.mark.parametrize("memory", MEMORY)
def test_autocast(memory: str, backend: str) -> None:
    """Branches in bf16, in `lean` and `min` on a float32 stream, are as close as eager autocast's on this device."""
    assert_as_close_as_eager_under_autocast(memory, backend, "cuda")


STEPS = """
import hashlib, sys
import torch
from fused_preact import PreActBottleneck, PreActStage

torch.manual_seed(0)
stage = PreActStage(*(PreActBottleneck(64, 16, backend="cuda") for _ in range(8)), memory=sys.argv[1])
stage = stage.cuda().to(memory_format=torch.channels_last)
digest = hashlib.sha256()
for size in 32, 8, 32, 9:
    torch.cuda._sleep(100_000_000)  # or the device would be done before the host launches more, and nothing overlap
    x = torch.randn(16, 64, size, size, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = stage(x * 2).relu()
    gradients = torch.autograd.grad(y, [x, *stage.parameters()], torch.ones_like(y))
    for t in (y, *gradients, *stage.buffers()):
        digest.update(t.detach().float().cpu().numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("memory", MEMORY)
def test_launches_that_overlap_give_the_bits_of_launches_one_by_one(memory: str) -> None:
    """From SM 9.0 on a launch begins before the one in front is over: what it reads is there all the same."""
    if reason := backends.status()["cuda"]:
        pytest.skip(reason)
    command = [sys.executable, "-c", STEPS, memory]
    overlapping, one_by_one = (
        subprocess.run(
            command, env=os.environ | {"CUDA_LAUNCH_BLOCKING": blocking}, capture_output=True, text=True, check=True
        ).stdout
        for blocking in "01"
    )
    assert overlapping == one_by_one


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_as_those_of_plain_layers(momentum: float | None, backend: str) -> None:
    """Over some batches; an average of all batches goes by the count."""
    states = []
    for of in backend, "eager":
        torch.manual_seed(0)
        block = PreActBottleneck(32, 16, backend=of)
        for norm in (layer for layer in block.modules() if isinstance(layer, nn.BatchNorm2d)):
            norm.momentum = momentum
        block = block.cuda().to(memory_format=torch.channels_last)
        for x in torch.randn(3, 4, 32, 9, 9):
            block(x.cuda())
        states.append(block.state_dict())
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", MEMORY)
def test_a_cuda_graph_replays_a_training_step(backend: str, memory: str) -> None:
    """Forward and backward of a stage never wait for the device, and replays give the bits of the calls themselves."""
    torch.use_deterministic_algorithms(False)  # its NaN would be captured too
    blocks = PreActBottleneck(32, 16, backend=backend), PreActBottleneck(64, 16, backend=backend)
    stage = PreActStage(*blocks, memory=memory).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(4, 32, 9, 9, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(4, 64, 9, 9, device="cuda").contiguous(memory_format=torch.channels_last)
    counts = [value for name, value in stage.state_dict().items() if name.endswith("num_batches_tracked")]

    def step() -> list[Tensor]:
        return [*torch.autograd.grad(stage(x), [x, *stage.parameters()], dy)]

    recorder = CudaGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = recorder.warm_up(step, ())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    captured, replay = recorder.record(step, ())
    for i in range(3):
        for gradient in captured:
            gradient.fill_(torch.nan)
        replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
        assert all(count == 2 + i for count in counts)


def test_a_batch_of_more_values_than_32_bits_count(backend: str) -> None:
    """A pair of images many times over comes out as the pair by itself, with as many times its gradients."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of a GPU's memory")
    pairs = 21500
    unit = BNReLUConv2d(16, 16, 3, padding=1, eps=0.0, backend=backend).to("cuda", torch.bfloat16)
    shapes = (2, 56, 56, 16), (2, 56, 56, 16), (16, 3, 3, 16)
    x, dy, filters = (torch.randint(-1, 2, shape, device="cuda").bfloat16() for shape in shapes)
    unit.conv.weight.data = filters.permute(0, 3, 1, 2)
    results = []
    for times in 1, pairs:
        given, dgiven = (t.repeat(times, 1, 1, 1).permute(0, 3, 1, 2) for t in (x, dy))
        y = unit.eval()(given.requires_grad_())
        dx, *gradients = torch.autograd.grad(y, [given, *unit.parameters()], dgiven)
        moved = copy.deepcopy(unit).train()
        moved.bn.eps = 1e-5
        with torch.no_grad():
            moved(given)
        results.append([y[-2:].detach(), dx[-2:], *(g.float() / times for g in gradients), *moved.buffers()])
    assert given.numel() > 2**31
    torch.testing.assert_close(*results, rtol=2**-7, atol=0)  # two roundings to bf16


def test_compiled_kernels_are_in_the_graph_of_inductor(backend: str) -> None:
    """torch.compile with its own GPU backend takes a training step of a block whole, and makes the same gradients."""
    torch.use_deterministic_algorithms(False)
    block = PreActBottleneck(64, 16, backend=backend).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(4, 64, 9, 9, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()
    dy, parameters = torch.randn_like(x), [x, *block.parameters()]
    expected = torch.autograd.grad(block(x), parameters, dy)
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), parameters, dy), expected)
