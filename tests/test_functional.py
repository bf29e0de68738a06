import contextlib
import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from cases import BACKENDS, BY_ID, OTHER_FILTERS, QUADS, UNITS, assert_as_close_as_eager, fused
from fused_preact import bn_relu_conv2d, explain, functional


def plain(x, weight, bn_weight, bn_bias, mean, var, *, training=False, momentum=0.1, eps=1e-5, **conv):
    """What the function computes, by plain layers; keyword arguments of the convolution."""
    residual = conv.pop("residual", None)
    z = F.batch_norm(x, mean, var, bn_weight, bn_bias, training, momentum, eps)
    y = F.conv2d(F.relu(z), weight, **conv)
    return y if residual is None else y + residual


def tensors(C=6, K=5, size=3, dtype=torch.float32):
    torch.manual_seed(0)
    x, weight = torch.randn(3, C, 6, 5, dtype=dtype), torch.randn(K, C, size, size, dtype=dtype)
    norm = [torch.rand(C) + 0.5, torch.randn(C), torch.randn(C), torch.rand(C) + 0.5]
    return x, weight, *norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [*UNITS, *QUADS], ids=lambda case: case.id)
def test_a_unit_is_as_close_to_float64_as_plain_layers(case, dtype, backend):
    """Every result of one unit, forward and backward, has at most twice eager's error."""
    assert_as_close_as_eager(case, backend, dtype)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", OTHER_FILTERS, ids=lambda case: case.id)
def test_other_filters_are_as_close_to_float64_as_plain_layers(case, dtype, backend):
    """Groups, dilation and other filters hold to the same rule in the backends that serve them."""
    assert_as_close_as_eager(case, backend, dtype)


@pytest.mark.parametrize("mean", [30.0, 1000.0])
@pytest.mark.parametrize("name", ["odd", "35-channels-1x1", "many-pixels", "quads-in-tiles"])
def test_a_large_mean_keeps_its_digits(name, mean, backend):
    """A channel whose mean is large against its deviation is normalised as well as by plain layers."""
    assert_as_close_as_eager(replace(BY_ID[name], mean=mean), backend, torch.float32)


@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_batch_norm_relu_and_convolution(training, backend):
    """Result and running statistics are those of the three functions, with every argument in use."""
    x, weight, gamma, beta, mean, var = tensors()
    options = {"stride": (2, 1), "padding": (1, 2), "bias": torch.randn(5)}
    options |= {"training": training, "momentum": 0.3, "eps": 1e-3}
    theirs = mean.clone(), var.clone()
    expected = plain(x, weight, gamma, beta, *theirs, **options)
    options["residual"] = torch.randn_like(expected)
    y = bn_relu_conv2d(x, weight, gamma, beta, mean, var, backend=backend, **options)
    assert_close(y, expected + options["residual"])
    assert_close((mean, var), theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding, backend):
    """The names "same" and "valid" mean what they mean to conv2d."""
    x, weight, *norm = tensors()
    y = bn_relu_conv2d(x, weight, *norm, padding=padding, backend=backend)
    assert_close(y, plain(x, weight, *norm, padding=padding))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_affine_and_running_statistics(backend):
    """gamma, beta and the running statistics may all be left out in training."""
    x, weight, *_ = tensors()
    y = bn_relu_conv2d(x, weight, training=True, backend=backend)
    assert_close(y, plain(x, weight, None, None, None, None, training=True))
    x, weight, gamma, _, mean, var = tensors()
    y = bn_relu_conv2d(x, weight, gamma, None, mean, var, backend=backend)
    assert_close(y, plain(x, weight, gamma, None, mean, var))


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_not_written_to(backend):
    """x, the residual and dy are the caller's; only running statistics change."""
    x, weight, *norm = tensors()
    residual, dy = torch.randn(3, 5, 6, 5), torch.randn(3, 5, 6, 5)
    given = [t.requires_grad_() for t in (x, weight, residual, *norm[:2])]
    before = [t.detach().clone() for t in (*given, dy)]
    bn_relu_conv2d(x, weight, *norm, residual=residual, padding=1, training=True, backend=backend).backward(dy)
    for t, old in zip((*given, dy), before, strict=True):
        assert torch.equal(t, old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_are_only_read_in_eval(backend):
    """Not even the values that they have are written: autograd would take that for a change, and inf - inf is NaN."""
    x, weight, *norm = tensors()
    bn_relu_conv2d(x, weight, *norm, backend=backend)
    assert [t._version for t in norm[2:]] == [0, 0]


@contextlib.contextmanager
def threads(count):
    """torch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


OTHER_CALLS = {
    "backend": (dict(backend="reference"), contextlib.nullcontext()),
    "eps": (dict(eps=0.5), contextlib.nullcontext()),
    "training": (dict(training=True), contextlib.nullcontext()),
    "stride": (dict(stride=2), contextlib.nullcontext()),
    "order of x": (dict(x=tensors()[0].contiguous(memory_format=torch.channels_last)), contextlib.nullcontext()),
    "shape of x": (dict(x=tensors()[0][:2]), contextlib.nullcontext()),
    "type of gamma": (dict(bn_weight=None), contextlib.nullcontext()),
    "residual": (dict(residual=torch.zeros(3, 5, 4, 3)), contextlib.nullcontext()),
    "gradients": ({}, torch.no_grad()),
    "autocast": ({}, torch.autocast("cpu", torch.bfloat16)),
    "its type": ({}, torch.autocast("cpu", torch.float16)),
    "threads": ({}, threads(2)),
}


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_a_plan_is_for_calls_that_differ_in_the_numbers_alone(name):
    """Whatever else differs is looked at anew, for it may be served by another backend, or computed otherwise."""
    changes, context = OTHER_CALLS[name]
    names = "x", "weight", "bn_weight", "bn_bias", "running_mean", "running_var"
    functional._plans.clear()
    for scale in 1, 2:
        bn_relu_conv2d(**{key: scale * t for key, t in zip(names, tensors(), strict=True)})
    assert len(functional._plans) == 1
    if name == "its type":
        with torch.autocast("cpu", torch.bfloat16):
            bn_relu_conv2d(*tensors())
    before = len(functional._plans)
    with context:
        bn_relu_conv2d(**dict(zip(names, tensors(), strict=True)) | changes)
    assert len(functional._plans) == before + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_in_eval(backend):
    """No images give no outputs, zero weight gradients, and no error."""
    x, weight, *norm = tensors()
    x = x[:0].requires_grad_()
    weight.requires_grad_()
    y = bn_relu_conv2d(x, weight, *norm, padding=1, backend=backend)
    assert y.shape == (0, 5, 6, 5)
    y.backward(torch.randn_like(y))
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_nan_stays_nan(backend):
    """A NaN in x reaches y and dx as it does through torch.relu: the mask is not (z <= 0)."""
    x, weight, *norm = tensors(size=1)
    x[1, 2, 3, 4] = float("nan")
    x.requires_grad_()
    y = bn_relu_conv2d(x, weight, *norm, backend=backend)
    assert y[1, :, 3, 4].isnan().all()
    assert y.isnan().sum() == 5
    gradient = torch.ones_like(y)
    gradient[1, :, 3, 4] = float("nan")
    y.backward(gradient)
    assert x.grad[1, 2, 3, 4].isnan()
    assert x.grad.isnan().sum() <= 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pixel_that_no_output_reads_has_no_gradient(backend, value):
    """Whatever its value is: with running statistics x is no part of dx but for the mask."""
    x, weight, *norm = tensors(size=1)
    x[0, 1, 3, 2] = value
    x.requires_grad_()
    y = bn_relu_conv2d(x, weight, *norm, stride=2, backend=backend)
    assert y.isfinite().all()
    y.sum().backward()
    assert x.grad[0, 1, 3, 2] == 0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("pixel", [0, -1], ids=["first", "last"])
def test_statistics_of_what_is_not_finite(value, pixel, backend):
    """The variance is a NaN, as torch's is, and not zero: a run that has diverged shows it."""
    x, weight, gamma, beta, mean, var = tensors(size=1)
    x[pixel, 1, pixel, pixel] = float(value)
    y = bn_relu_conv2d(x, weight, gamma, beta, mean, var, training=True, backend=backend)
    assert y.isnan().all()
    assert var.isnan().tolist() == [channel == 1 for channel in range(len(var))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_what_it_casts_for_a_convolution(dtype, backend):
    """Activations and filters are cast, batch norm's parameters are not; gradients are of the parameters' types."""
    if dtype == torch.float16 and backend == "cpu":
        backend = "auto"  # which another backend serves then
    x, weight, gamma, beta, mean, var = tensors()
    leaves = [t.requires_grad_() for t in (x, weight, gamma, beta)]
    bias, residual = torch.randn(5, requires_grad=True), torch.randn(3, 5, 6, 5, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = bn_relu_conv2d(
            x, weight, gamma, beta, mean, var, bias=bias, residual=residual, padding=1, training=True, backend=backend
        )
    assert y.dtype == dtype
    leaves += [bias, residual]
    grads = torch.autograd.grad(y, leaves, torch.randn_like(y))
    assert all(grad.dtype == torch.float32 for grad in grads)
    cast = [t.detach().to(dtype) for t in (x, weight, bias, residual)]
    expected = plain(
        cast[0], cast[1], gamma, beta, None, None, bias=cast[2], residual=cast[3], padding=1, training=True
    )
    assert_close(y, expected, rtol=0.02, atol=0.1)


def test_autocast_does_not_round_in_front_of_the_batch_norm():
    """Plain layers normalise a float32 x as it is: `auto` runs those, and says so."""
    x, weight = 100 + 0.1 * torch.randn(4, 8, 6, 6), torch.randn(8, 8, 3, 3)
    expected = bn_relu_conv2d(x.double(), weight.double(), training=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = bn_relu_conv2d(x, weight, training=True)
        (choice,) = explain(bn_relu_conv2d, x, weight, training=True)
        (of_bfloat16,) = explain(bn_relu_conv2d, x.bfloat16(), weight, training=True)
        (of_half,) = explain(bn_relu_conv2d, x.half(), weight.half(), training=True)
    assert (y - expected).norm() < 0.01 * expected.norm()
    assert "round x to torch.bfloat16 in front of the batch norm" in choice.others["library"]
    assert not of_bfloat16.problem.rounded
    assert of_half.problem.rounded  # to eight bits of eleven


def test_autocast_leaves_float64():
    """As it does for a convolution."""
    x, weight, *norm = (t.double() for t in tensors())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bn_relu_conv2d(x, weight, *norm), bn_relu_conv2d(x, weight, *norm).double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_has_the_type_of_its_parameter(backend):
    """gamma and beta may be of different types."""
    x, weight, gamma, beta, *_ = tensors()
    leaves = [x.bfloat16(), weight.bfloat16(), gamma, beta.bfloat16()]
    y = bn_relu_conv2d(*(leaf.requires_grad_() for leaf in leaves), training=True, backend=backend)
    assert [grad.dtype for grad in torch.autograd.grad(y.sum(), leaves)] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_do_not_depend_on_the_type_of_gamma(backend):
    """Those of a bfloat16 x in float32 buffers have the digits of float32."""
    found = []
    for dtype in torch.float32, torch.bfloat16:
        x, weight, gamma, beta, *statistics = tensors()
        parameters = weight.bfloat16(), gamma.to(dtype), beta.to(dtype)
        bn_relu_conv2d(x.bfloat16(), *parameters, *statistics, training=True, backend=backend)
        found.append(statistics)
    assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_checkpoint_of_plain_layers_moves_the_statistics_once():
    """As it is with fused ones: groups are served by plain layers."""
    mean, var, x = torch.zeros(4), torch.ones(4), torch.randn(2, 4, 5, 5, requires_grad=True)
    weight = torch.randn(4, 2, 3, 3)
    call = functools.partial(bn_relu_conv2d, weight=weight, groups=2, training=True, running_mean=mean, running_var=var)
    checkpoint(call, x, use_reentrant=False).sum().backward()
    assert_close(mean, 0.1 * x.mean((0, 2, 3)).detach())


def test_a_selective_checkpoint_of_plain_layers():
    """What the checkpoint has kept, here the result of the batch norm and of the convolution, is not written over."""
    x, weight, *norm = tensors()
    kept = [torch.ops.aten.native_batch_norm.default, torch.ops.aten.convolution.default]
    policy = functools.partial(create_selective_checkpoint_contexts, kept)
    residual = torch.ones(3, 5, 4, 3)
    call = functools.partial(bn_relu_conv2d, training=True, residual=residual, backend="eager")
    gradients = []
    for again in False, True:
        leaves = [t.clone().requires_grad_() for t in (x, weight, *norm[:2])]
        y = checkpoint(call, *leaves, use_reentrant=False, context_fn=policy) if again else call(*leaves)
        gradients.append(torch.autograd.grad(y.square().sum(), leaves))
    assert_close(*gradients, rtol=0, atol=0)


def test_vmap_over_the_residual_alone():
    """The sum is mapped and the convolution's result is not: it is not written there."""
    x, weight, *norm = tensors()
    residuals = torch.randn(2, 3, 5, 4, 3)
    ys = torch.vmap(lambda residual: bn_relu_conv2d(x, weight, *norm, residual=residual))(residuals)
    assert_close(ys, bn_relu_conv2d(x, weight, *norm, backend="eager") + residuals)


@pytest.mark.parametrize("of", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_filters_are_cast_as_torch_casts_them(of, backend):
    """Under autocast a filter gives the bits that it gives when torch has cast it, and so does its gradient."""
    x, weight, gamma, beta, *_ = tensors()
    results = []
    for filters in weight.to(of), weight.to(of).bfloat16():
        filters.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = bn_relu_conv2d(x, filters, gamma, beta, training=True, backend=backend)
        (grad,) = torch.autograd.grad(y, filters, torch.linspace(-1, 1, y.numel()).view(y.shape).bfloat16())
        assert grad.dtype == filters.dtype
        results.append((y, grad.to(of)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bfloat16_model(backend):
    """Parameters, buffers and activations may all be bfloat16; gradients and statistics are bfloat16 then."""
    x, weight, *norm = (t.bfloat16() for t in tensors())
    leaves = [t.requires_grad_() for t in (x, weight, *norm[:2])]
    y = bn_relu_conv2d(x, weight, *norm, training=True, backend=backend)
    grads = torch.autograd.grad(y, leaves, torch.randn_like(y))
    assert all(grad.dtype == torch.bfloat16 for grad in grads)
    assert norm[2].dtype == torch.bfloat16
    assert_close(norm[2], (0.9 * tensors()[4].bfloat16() + 0.1 * x.detach().mean((0, 2, 3))), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_infinite_pixel_reaches_only_the_taps_that_read_it(dtype, stride):
    """The last of three pixels has no partner where products take pairs, and what lies beside it must not stand in.

    Of the `cpu` kernels: torch's own bfloat16 convolution does not hold it.
    """
    x, weight, *norm = (t.to(dtype) for t in tensors(C=17))
    x = x[..., :5, :] if stride == 1 else torch.cat([x, x], 3)[..., :7]
    weight.requires_grad_()
    x[..., 3 * stride] = torch.inf  # beyond what the filter's first column reads for the last pixel of a row
    y = bn_relu_conv2d(x, weight, *norm, stride=stride, backend="cpu")
    assert y.shape[-1] == 3
    (dweight,) = torch.autograd.grad(y, weight, torch.randn_like(y))
    assert dweight[..., 0].isfinite().all()
    assert not dweight[..., 2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("K", [32, 33])
def test_a_large_result_has_the_bits_of_its_images(dtype, K):
    """Results of two megabytes and more are written past the cache, where their rows are whole cache lines."""
    _, weight, *norm = tensors(C=4, K=K, size=1)
    x, residual = torch.randn(16, 4, 48, 64, dtype=dtype), torch.randn(16, K, 48, 64, dtype=dtype)
    x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    assert residual.nbytes > 2 << 20

    def run(x, residual):
        return bn_relu_conv2d(x, weight.to(dtype), *norm, bias=norm[0].new_ones(K).to(dtype), residual=residual)

    images = [run(*pair) for pair in zip(x.split(1), residual.split(1), strict=True)]
    assert torch.equal(run(x, residual), torch.cat(images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_and_no_grad(backend):
    """Without a graph the same numbers come out, and no gradient is attached."""
    x, weight, *norm = tensors()
    expected = bn_relu_conv2d(x, weight.requires_grad_(), *norm, backend=backend)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = bn_relu_conv2d(x, weight, *norm, backend=backend)
        assert torch.equal(y, expected)
        assert not y.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_unit_trains_with_a_residual_in_another_layout(backend):
    """x in NCHW and a residual in channels_last (and the reverse) add up pixel by pixel."""
    sample = BY_ID["odd"].draw(0)
    expected = fused(sample, backend)
    other = BY_ID["odd"].draw(0, layout="nchw")
    other.residual = other.residual.contiguous(memory_format=torch.channels_last)
    results = fused(other, backend)
    assert torch.equal(results["y"], expected["y"])
    assert torch.equal(results["dresidual"], expected["dresidual"])
