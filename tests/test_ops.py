import dataclasses
import functools

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cases import (
    BACKENDS,
    BY_ID,
    CHAINS,
    PYTHON_BACKENDS,
    assert_as_close_as_eager,
    backward_arguments,
    eager,
    forward_arguments,
    fused,
)
from fused_preact import PreActBlock, bn_relu_conv2d, ops, plans

SAMPLES = ["odd", "one-channel", "odd-eval", "basic-residual", "bottleneck-stride-2", "bottleneck-first"]


@pytest.fixture(autouse=True)
def poisoned():
    """Fill every new tensor with NaN, so that a value which is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.id)
def test_a_chain_is_as_close_to_float64_as_plain_layers(case, dtype, backend):
    """Every result of a chain, forward and backward, has at most twice eager's error."""
    assert_as_close_as_eager(case, backend, dtype)


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.id)
def test_a_float64_chain_agrees_with_plain_layers(case, backend):
    """In float64 nothing but rounding separates a backend from autograd's own derivative."""
    sample = case.draw(3, torch.float64, "nchw")
    theirs = eager(sample)
    for name, result in fused(sample, backend).items():
        assert_close(result, theirs[name], rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_opcheck(name, layout, backend):
    """Schema, fake kernel and autograd registration of both operators fit what they return."""
    sample = BY_ID[name].draw(0, torch.float32, layout)
    forward, backward = ops.OPERATORS[backend]
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    torch.library.opcheck(backward, backward_arguments(sample, backend), test_utils=tests)
    for leaf in sample.leaves().values():
        leaf.requires_grad_()
    torch.library.opcheck(forward, forward_arguments(sample, backend), test_utils=tests)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_float64_in_another_order(backend):
    """Statistics are float64 then, and an order that is neither of the two that results have is not kept."""
    sample = BY_ID["basic-residual"].draw(0, torch.float64)
    x = sample.x.transpose(2, 3).contiguous().transpose(2, 3)
    sample = dataclasses.replace(sample, x=x)
    forward, backward = ops.OPERATORS[backend]
    torch.library.opcheck(forward, forward_arguments(sample, backend), test_utils="test_faketensor")
    torch.library.opcheck(backward, backward_arguments(sample, backend), test_utils="test_faketensor")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0)])
@pytest.mark.parametrize("step", [1, 2], ids=["dense", "sliced"])
def test_opcheck_of_filters_in_another_order(step, order, backend):
    """Their gradients have their order where they are dense, or code that is compiled for that order breaks."""
    sample = BY_ID["basic-stride-2"].draw(0)
    for unit in sample.units:
        w = unit.weight.permute(order).contiguous().repeat_interleave(step, 3)[..., ::step]
        unit.weight.set_(w.permute(torch.tensor(order).argsort().tolist()))
    torch.library.opcheck(ops.OPERATORS[backend][1], backward_arguments(sample, backend), test_utils="test_faketensor")


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_opcheck_traced(backend):
    """AOT tracing of the operator gives the gradients of the operator itself."""
    sample = BY_ID["basic-stride-2"].draw(0)
    sample.leaves()
    arguments = forward_arguments(sample, backend)
    torch.library.opcheck(ops.OPERATORS[backend][0], arguments, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["odd", "bottleneck-stride-2", "bottleneck-first", "frozen-first"])
def test_both_paths_have_the_same_gradients(name, backend):
    """The eager node and the registered formula that tracing uses give the same bits."""
    sample = BY_ID[name].draw(0)
    results = fused(sample, backend)
    y, _, _ = ops.OPERATORS[backend][0](*forward_arguments(sample, backend))
    leaves = sample.leaves()
    for name, grad in zip(leaves, torch.autograd.grad(y, list(leaves.values()), sample.dy), strict=True):
        assert torch.equal(grad, results[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["bottleneck-stride-2", "raw", "basic-residual", "odd", "frozen-first", "frozen-second"]
)
def test_frozen_parameters(name, backend):
    """Gradients that are wanted do not depend on which others are; the rest is None."""
    sample = BY_ID[name].draw(0)
    every = fused(sample, backend)
    leaves = sample.leaves()
    for wanted in [[name] for name in leaves] + [list(leaves)[::2], list(leaves)[1::2]]:
        for leaf_name, leaf in leaves.items():
            leaf.grad = None
            leaf.requires_grad_(leaf_name in wanted)
        plan = plans.make_plan(sample.x, sample.blocks, sample.residual, backend)
        y, _ = plans.execute(plan, sample.x, ops.Arguments.of(sample.blocks), sample.residual)
        y.backward(sample.dy)
        for leaf_name, leaf in leaves.items():
            if leaf_name in wanted:
                assert torch.equal(leaf.grad, every[leaf_name]), (leaf_name, wanted)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_frozen_layer_does_not_need_is_not_computed(compiled):
    """The operator is told what is wanted, by the node and by compiled code."""
    told = []

    class Told(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is ops.OPERATORS["reference"][1]:
                told.append(args[-1])
            return function(*args, **(kwargs or {}))

    # x, two weights, two norms
    for part, wanted in ("conv2", [False, False, True, False, False]), ("", [False, True, True, True, True]):
        block = PreActBlock(4, 4, backend="reference").requires_grad_(False)
        block.get_submodule(part).requires_grad_(True)
        call, x = torch.compile(block, backend="aot_eager") if compiled else block, torch.randn(2, 4, 5, 5)
        call(x).sum().backward()  # compiles
        y = call(x)
        with Told():
            y.sum().backward()
        assert told.pop() == wanted

    # Nor is what nobody asks for, as an attack does that wants the gradient of the images alone.
    for names, wanted in (["x"], [True, *[False] * 4]), (["conv1.weight"], [False, True, *[False] * 3]):
        block, x = PreActBlock(4, 4, backend="reference"), torch.randn(2, 4, 5, 5, requires_grad=True)
        leaves = {"x": x, **dict(block.named_parameters())}
        given = [leaves[name] for name in names]
        expected = torch.autograd.grad(block(x).square().sum(), leaves.values())
        with Told():
            found = torch.autograd.grad(block(x).square().sum(), given)
            block(x).square().sum().backward(inputs=given)
        assert [told.pop(), told.pop()] == [wanted, wanted]
        for name, grad in zip(names, found, strict=True):
            assert torch.equal(grad, leaves[name].grad)
            assert torch.equal(grad, dict(zip(leaves, expected, strict=True))[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SAMPLES)
def test_a_gradient_that_is_not_needed_is_empty(name, backend):
    """``needs`` of all False makes a backward that returns empty tensors, in the fake kernel too."""
    sample = BY_ID[name].draw(0)
    *arguments, needs = backward_arguments(sample, backend)
    arguments = *arguments, [False] * len(needs)
    backward = ops.OPERATORS[backend][1]
    assert all(t.numel() == 0 for t in torch.utils._pytree.tree_leaves(backward(*arguments)))
    torch.library.opcheck(backward, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["odd", "bottleneck-stride-2", "frozen-second"])
def test_what_is_saved_for_backward(name, backend):
    """Only x, the raw convolution outputs, the rows and the weights are kept: no z, no ReLU output, no mask."""
    sample = BY_ID[name].draw(0)
    saved = []
    sample.leaves()
    plan = plans.make_plan(sample.x, sample.blocks, sample.residual, backend)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        plans.execute(plan, sample.x, ops.Arguments.of(sample.blocks), sample.residual)
    _, kept, rows = ops.OPERATORS[backend][0](*forward_arguments(sample, backend))
    parameters = [t for unit in sample.units for t in unit[:2]] + [sample.shortcut.weight]
    expected = [sample.x, *kept, *rows, *(t for t in parameters if t is not None)]
    assert sorted(t.numel() for t in saved) == sorted(t.numel() for t in expected)


@pytest.mark.parametrize("name", ["one-channel", "basic-residual", "bottleneck-first", "frozen-second"])
def test_gradcheck(name, backend):
    """Finite differences in float64 confirm every derivative."""
    sample = BY_ID[name].draw(0, torch.float64)
    leaves = sample.leaves()

    def run(*values):
        given = dict(zip(leaves, values, strict=True))
        units = [
            unit._replace(
                weight=given[f"dW{i}"],
                bias=given.get(f"dbias{i}"),
                bn_weight=given[f"dgamma{i}"],
                bn_bias=given[f"dbeta{i}"],
            )
            for i, unit in enumerate(sample.units, start=1)
        ]
        shortcut, residual = sample.shortcut._replace(weight=given.get("dshortcut")), given.get("dresidual")
        changed = sample.replace(units, shortcut, x=given["dx"], residual=residual)
        plan = plans.make_plan(changed.x, changed.blocks, residual, backend)
        return plans.execute(plan, changed.x, ops.Arguments.of(changed.blocks), residual)[0]

    torch.autograd.gradcheck(run, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend):
    """create_graph=True gives first gradients; differentiating those says in one sentence that it cannot be done."""
    sample = BY_ID["bottleneck-stride-2"].draw(0)
    first = fused(sample, backend)
    plan = plans.make_plan(sample.x, sample.blocks, None, backend)
    y, _ = plans.execute(plan, sample.x, ops.Arguments.of(sample.blocks))
    (dx,) = torch.autograd.grad(y, sample.x, sample.dy, create_graph=True)
    assert torch.equal(dx, first["dx"])
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*backend='eager'"):
        dx.square().sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of", ["x", "dy", "conv1.weight", "conv2.weight", "bn1.weight", "bn2.bias"])
def test_a_second_derivative_is_refused_whatever_is_asked_for(of, backend):
    """`torch.autograd.grad` runs what leads to its inputs alone: a gradient that led nowhere would be a constant."""
    block = PreActBlock(4, 4, backend=backend)
    x, dy = (torch.randn(2, 4, 5, 5, requires_grad=True) for _ in range(2))
    (dx,) = torch.autograd.grad(block(x), x, dy, create_graph=True)
    wanted = {"x": x, "dy": dy, **dict(block.named_parameters())}[of]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(dx.square().sum() + block(x).sum() + dy.sum(), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("product", [torch.autograd.functional.hvp, torch.autograd.functional.vhp])
def test_a_product_with_a_second_derivative_is_refused(product, backend):
    """Where it was lost this would be zero."""
    block, (x, v) = PreActBlock(4, 4, backend=backend), torch.randn(2, 2, 4, 5, 5)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        product(lambda x: block(x).pow(3).sum(), x, v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_with_a_graph_may_be_changed_in_place(backend):
    """As a hook that scales them does; with create_graph=True as without."""
    found = []
    for create in False, True:
        torch.manual_seed(0)
        block = PreActBlock(4, 4, backend=backend)
        loss = block(torch.randn(2, 4, 5, 5)).square().sum()
        (gradient,) = torch.autograd.grad(loss, block.conv1.weight, create_graph=create)
        found.append(gradient.mul_(2).detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused_where_batch_norms_alone_train(backend):
    """There the operator's backward is handed nothing that has a gradient, but its result depends on gamma."""
    block = PreActBlock(4, 4, backend=backend)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name.startswith("bn"))
    loss = (block(torch.randn(2, 4, 5, 5)) * torch.randn(2, 4, 5, 5)).sum()
    (dgamma,) = torch.autograd.grad(loss, block.bn1.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dgamma.square().sum().backward()


@pytest.mark.parametrize("batched", ["grad", "vmap"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_gradients_is_refused(backend, batched):
    """is_grads_batched=True, as a vectorised Jacobian uses it, and vmap say in one sentence what serves instead."""
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    y = PreActBlock(4, 4, backend=backend)(x)
    grad, dy = functools.partial(torch.autograd.grad, y, x), torch.randn(3, *y.shape)
    with pytest.raises(RuntimeError, match=r"one gradient at a time.*backend='eager'"):
        grad(dy, is_grads_batched=True) if batched == "grad" else torch.vmap(grad)(dy)


@pytest.mark.parametrize("name", ["odd", "many-pixels", "quads", "bottleneck-stride-2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_runs_agree_to_the_bit(name, dtype, backend):
    """Nothing depends on scheduling or on what memory held before."""
    sample = BY_ID[name].draw(0, dtype)
    first, second = fused(sample, backend), fused(sample, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["nchw", "sliced"])
@pytest.mark.parametrize("name", ["odd", "stride-2", "quads", "basic-residual", "bottleneck-stride-2", "35-channels"])
def test_layouts_give_the_same_bits(name, layout, dtype, backend):
    """NCHW, channels_last and slices of larger tensors differ in speed only, and the result follows x."""
    expected = fused(BY_ID[name].draw(0, dtype), backend)
    sample = BY_ID[name].draw(0, dtype, layout)
    sample.dy = sample.dy.contiguous(memory_format=torch.channels_last)
    results = fused(sample, backend)
    for key, value in results.items():
        assert torch.equal(value, expected[key]), key
    like = torch.channels_last if layout == "sliced" else torch.contiguous_format
    assert results["y"].is_contiguous(memory_format=like)
    assert results["dx"].is_contiguous(memory_format=like)


@pytest.mark.parametrize("layout", ["nchw", "sliced"])
@pytest.mark.parametrize("name", ["odd", "35-channels"])
def test_layouts_of_float64_give_the_same_bits(name, layout, backend):
    """The same of values of eight bytes; apart, for the kernels that share the test above do not all have them."""
    test_layouts_give_the_same_bits(name, layout, torch.float64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dy_may_be_expanded(backend):
    """The gradient of a sum has no memory of its own per pixel."""
    sample = BY_ID["basic-stride-2"].draw(0)
    sample.dy = torch.full((), 0.5).expand(sample.dy.shape)
    expanded = fused(sample, backend)
    sample.dy = sample.dy.contiguous()
    for name, value in fused(sample, backend).items():
        assert torch.equal(value, expanded[name]), name


@pytest.mark.parametrize("name", ["odd", "35-channels-1x1", "stride-2", "wide-padding", "many-pixels", "quads"])
def test_integers_are_exact(name, backend):
    """Small integers leave no room for rounding: forward and weight gradient are right to the bit.

    eps is lost beside a variance of 1; torch 2.11 wants one that is positive.
    """
    generator = torch.Generator().manual_seed(0)
    sample = BY_ID[name].eval.draw(0) if not name.endswith("eval") else BY_ID[name].draw(0)

    def integers(t):
        return torch.randint(-3, 4, t.shape, generator=generator).to(t)

    unit = sample.units[0]
    ones = torch.ones_like(unit.bn_weight)
    unit = unit._replace(
        weight=integers(unit.weight), bias=None if unit.bias is None else integers(unit.bias), bn_weight=integers(ones),
        bn_bias=integers(ones), running_mean=integers(ones), running_var=ones, eps=2.0**-60,
    )  # fmt: skip
    residual = None if sample.residual is None else integers(sample.residual)
    sample = sample.replace([unit], x=integers(sample.x), residual=residual, dy=integers(sample.dy))
    exact = eager(sample.to(torch.float64))
    results = fused(sample, backend)
    for key in [key for key in results if key in ("y", "dW1", "dbias1", "dresidual")]:
        assert torch.equal(results[key].double(), exact[key]), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors_run_a_chain(backend):
    """Shapes, types and strides of y and dx come out without any arithmetic."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    sample = BY_ID["bottleneck-stride-2"].draw(0)
    real = fused(sample, backend)
    with FakeTensorMode(allow_non_fake_inputs=True):
        results = fused(sample, backend)
    for name, value in results.items():
        assert value.shape == real[name].shape, name
        assert value.dtype == real[name].dtype, name
        assert value.stride() == real[name].stride(), name


@pytest.mark.parametrize("backend", PYTHON_BACKENDS)
def test_a_table_has_the_kernels_of_the_schedule(backend):
    """A table is a module with these six functions."""
    for name in ("forward", "dgrad", "wgrad", "statistics", "running", "dx"):
        assert callable(getattr(ops.table(backend), name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_relu_is_flat_at_zero(dtype, backend):
    """A batch norm whose gamma and beta are zero, as they are often initialised, passes no gradient on."""
    x = torch.randn(2, 20, 4, 3, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 20, 3, 3, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    gamma, beta = (torch.zeros(20, dtype=wide, requires_grad=True) for _ in range(2))
    y = bn_relu_conv2d(x, weight, gamma, beta, training=True, padding=1, backend=backend)
    assert not any(g.any() for g in torch.autograd.grad(y, [x, gamma, beta], torch.ones_like(y)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layout_of_one_channel(backend):
    """It is in both, and counts as contiguous."""
    x = torch.randn(2, 5, 5, 1).permute(0, 3, 1, 2)
    assert bn_relu_conv2d(x, torch.randn(3, 1, 3, 3), training=True, backend=backend).is_contiguous()
