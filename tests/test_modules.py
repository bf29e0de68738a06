import copy
import functools
import io
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fused_preact
from cases import BACKENDS
from fused_preact import BNReLUConv2d, PreActBlock, PreActStage


def twins(backend: str, **options) -> tuple[BNReLUConv2d, BNReLUConv2d]:
    """A fused unit and plain layers with the same random state, eight channels in and five out."""
    torch.manual_seed(0)
    unit = BNReLUConv2d(8, 5, 3, padding=1, backend=backend, **options)
    for t in unit.state_dict().values():
        if t.dtype.is_floating_point:
            t.copy_(torch.rand_like(t) + 0.5)
    plain = copy.deepcopy(unit)
    plain.backend = "eager"
    return unit, plain


def step(unit: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of one training step with a fixed dy."""
    unit.zero_grad()
    x = x.clone().requires_grad_()
    y = unit(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in unit.parameters())]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("track", [True, False], ids=["track", "forget"])
@pytest.mark.parametrize("momentum", [0.1, 0.5, None, 0.0])
def test_batch_norm_behaves_as_in_torch(backend, affine, track, momentum):
    """Three steps, then eval: outputs, gradients, running statistics and their count are those of nn.BatchNorm2d."""
    unit, plain = twins(backend, affine=affine, track_running_stats=track, momentum=momentum, bias=True)
    for seed in range(3):
        x = torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(seed)) * (seed + 1) + seed
        assert_close(step(unit, x), step(plain, x), rtol=1e-4, atol=1e-4)
    assert unit.state_dict().keys() == plain.state_dict().keys()
    for name, t in unit.state_dict().items():
        assert_close(t, plain.state_dict()[name], msg=name)
    unit.eval()
    plain.eval()
    assert_close(unit(x), plain(x))
    if track:
        assert unit.bn.num_batches_tracked == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_flags_of_batch_norm_that_change_later(backend):
    """A frozen batch norm in a training unit, and one that stops tracking, do what nn.BatchNorm2d does."""
    x = torch.randn(3, 8, 4, 5)
    for change in (
        lambda bn: bn.eval(),
        lambda bn: setattr(bn, "track_running_stats", False),
        lambda bn: (setattr(bn, "track_running_stats", False), bn.eval()),
        lambda bn: setattr(bn, "num_batches_tracked", None),
        lambda bn: setattr(bn, "eps", 0.5),
    ):
        unit, plain = twins(backend)
        change(unit.bn)
        change(plain.bn)
        assert_close(step(unit, x), step(plain, x), rtol=1e-4, atol=1e-5)
        for name, t in unit.state_dict().items():
            assert_close(t, plain.state_dict()[name], msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_running_statistics_move_once_a_forward(backend):
    """Backward and repeated backward move nothing; no_grad forward does, as in nn.BatchNorm2d."""
    unit, _ = twins(backend)
    x = torch.randn(3, 8, 4, 5)
    mean = unit.bn.running_mean.clone()
    y = unit(x)
    once = unit.bn.running_mean.clone()
    assert_close(once, 0.9 * mean + 0.1 * x.mean((0, 2, 3)))
    y.backward(torch.randn_like(y), retain_graph=True)
    y.backward(torch.randn_like(y))
    assert torch.equal(unit.bn.running_mean, once)
    with torch.no_grad():
        unit(x)
    assert unit.bn.num_batches_tracked == 2
    unit.eval()
    unit(x)
    assert unit.bn.num_batches_tracked == 2


@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
def test_a_residual_is_added(backend):
    """It gets its gradient, and is never broadcast, by plain layers neither."""
    unit, plain = twins(backend)
    x, residual = torch.randn(2, 8, 4, 5), torch.randn(2, 5, 4, 5, requires_grad=True)
    y = unit(x, residual)
    assert_close(y, plain(x, residual))
    y.backward(torch.ones_like(y))
    assert torch.equal(residual.grad, torch.ones_like(y))
    with pytest.raises(ValueError, match=r"residual must have the shape of the output, \(2, 5, 4, 5\)"):
        unit(x, residual[:1])


HOOKS = {
    "forward hook": lambda layer, call: layer.register_forward_hook(lambda *a: call()),
    "forward pre-hook": lambda layer, call: layer.register_forward_pre_hook(lambda *a: call()),
    "backward hook": lambda layer, call: layer.register_full_backward_hook(lambda *a: call()),
    "backward pre-hook": lambda layer, call: layer.register_full_backward_pre_hook(lambda *a: call()),
}


@pytest.mark.parametrize("layer", ["bn", "conv"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_the_layers_run(kind, layer):
    """A hook on a child is never ignored: the unit steps down to plain layers, and back when the hook is gone."""
    unit, plain = twins("library")
    x, calls = torch.randn(2, 8, 4, 5), []
    expected = step(plain, x)
    handle = HOOKS[kind](getattr(unit, layer), lambda: calls.append(1))
    assert_close(step(unit, x), expected, rtol=1e-4, atol=1e-5)
    assert calls == [1]
    assert f"{layer} has hooks" in str(fused_preact.explain(unit, x))
    calls.clear()
    handle.remove()
    step(unit, x)
    assert calls == []


def test_what_a_hook_has_kept_is_not_overwritten():
    """The step down does not run ReLU in place over an output that a hook holds."""
    unit, _ = twins("library")
    kept = []
    unit.bn.register_forward_hook(lambda module, args, out: kept.append(out))
    x = torch.randn(2, 8, 4, 5)
    unit(x)
    assert kept[0].min() < 0
    kept.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: kept.append(out))
    try:
        twins("library")[0](x)
    finally:
        handle.remove()
    assert kept[0].min() < 0


def test_global_hooks_run():
    """A hook for all modules sees the inner layers."""
    unit, _ = twins("library")
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        unit(torch.randn(2, 8, 4, 5))
    finally:
        handle.remove()
    assert seen == [nn.BatchNorm2d, nn.Conv2d, BNReLUConv2d]


def test_hooks_on_the_unit_itself_do_not_hinder():
    """A hook on the fused module sees its input and output as ever."""
    unit, _ = twins("library")
    seen = []
    unit.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert fused_preact.explain(unit, torch.randn(2, 8, 4, 5))[0].backend == "library"
    assert seen == [(2, 5, 4, 5)]


class Doubled(nn.BatchNorm2d):
    """A subclass that does more than its base."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda unit: setattr(unit, "bn", Doubled(8)), "bn is of type Doubled, not a plain nn.BatchNorm2d"),
        (lambda unit: setattr(unit, "bn", nn.Identity()), "bn is of type Identity"),
        (lambda unit: setattr(unit, "bn", nn.GroupNorm(2, 8)), "bn is of type GroupNorm"),
        (lambda unit: setattr(unit.conv, "padding_mode", "circular"), "conv has padding_mode='circular', not 'zeros'"),
        (
            lambda unit: setattr(unit, "conv", nn.Conv2d(8, 5, 4, padding="same")),
            r"conv has padding='same' with a filter of \(4, 4\), which pads one side more",
        ),
        (lambda unit: nn.utils.parametrizations.weight_norm(unit.conv), "conv is of type ParametrizedConv2d"),
    ],
    ids=["subclass", "identity", "group-norm", "circular", "lopsided", "parametrized"],
)
def test_other_layers_run_as_they_are(change, reason):
    """A child that is not exactly the plain layer keeps its own behaviour, and explain() says why."""
    unit, _ = twins("auto")
    change(unit)
    x = torch.randn(2, 8, 6, 5)
    before = x.clone()
    assert_close(unit(x), unit.conv(F.relu(unit.bn(x))))
    assert torch.equal(x, before)
    (choice,) = fused_preact.explain(unit, x)
    assert choice.backend == "eager"
    assert re.search(reason, str(choice))


def test_a_tensor_of_tensors_is_not_taken_apart():
    """A parameter that wraps others, as a sharded one does, is for torch's own operators."""
    unit, _ = twins("auto")
    unit.conv.weight = nn.Parameter(TwoTensor(unit.conv.weight.detach(), unit.conv.weight.detach()))
    (choice,) = fused_preact.explain(unit, torch.randn(2, 8, 4, 5))
    assert choice.others["library"] == "conv.weight is a TwoTensor, not a plain tensor"


def test_the_parameters_are_made_as_asked():
    """Of a type and on a device, of both layers."""
    unit = BNReLUConv2d(3, 4, 1, bias=True, device="meta", dtype=torch.float64)
    floating = [t for t in unit.state_dict().values() if t.is_floating_point()]
    assert {(t.device.type, t.dtype) for t in floating} == {("meta", torch.float64)}


def test_a_selective_checkpoint_where_auto_prefers_plain_layers():
    """What the checkpoint has kept of them is not written over."""
    kept = [torch.ops.aten.native_batch_norm.default, torch.ops.aten.convolution.default]
    policy = functools.partial(create_selective_checkpoint_contexts, kept)
    unit = BNReLUConv2d(8, 4, 3, padding=1, groups=2)
    x, residual = torch.randn(2, 8, 4, 5, requires_grad=True), torch.ones(2, 4, 4, 5)
    ys = unit(x, residual), checkpoint(unit, x, residual, use_reentrant=False, context_fn=policy)
    ours, theirs = (torch.autograd.grad(y.square().sum(), [x, *unit.parameters()]) for y in ys)
    assert_close(theirs, ours, rtol=0, atol=0)


def test_sync_batch_norm_is_not_replaced():
    """A SyncBatchNorm is taken as it is, and is not fused."""
    unit, _ = twins("auto")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(unit)
    assert type(converted.bn) is nn.SyncBatchNorm
    converted.eval()
    assert "SyncBatchNorm" in str(fused_preact.explain(converted, torch.randn(2, 8, 4, 5)))
    assert_close(converted(torch.ones(2, 8, 4, 5)), unit.eval()(torch.ones(2, 8, 4, 5)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_layers_shares_the_layers(backend):
    """A unit made of two layers is those layers: parameters are shared, and the mode of each is kept."""
    bn, conv = nn.BatchNorm2d(3).eval(), nn.Conv2d(3, 4, 3, padding="same")
    unit = BNReLUConv2d.from_layers(bn, conv, backend=backend)
    assert unit.bn is bn
    assert unit.conv is conv
    assert unit.training
    assert not unit.bn.training
    x = torch.randn(2, 3, 5, 4)
    assert_close(unit(x), conv(F.relu(bn(x))))


def test_from_layers_checks_the_layers():
    """Layers that do not go together are named."""
    for bn in nn.ReLU(), nn.BatchNorm1d(3), nn.BatchNorm3d(3):
        with pytest.raises(TypeError, match=f"bn must be an nn.BatchNorm2d or .*, got {type(bn).__name__}"):
            BNReLUConv2d.from_layers(bn, nn.Conv2d(3, 4, 3))
    assert type(BNReLUConv2d.from_layers(nn.SyncBatchNorm(3), nn.Conv2d(3, 4, 3)).bn) is nn.SyncBatchNorm
    with pytest.raises(TypeError, match=r"conv must be an nn.Conv2d, got Linear"):
        BNReLUConv2d.from_layers(nn.BatchNorm2d(3), nn.Linear(3, 4))
    with pytest.raises(ValueError, match="bn must have the 3 channels that conv reads, got 5"):
        BNReLUConv2d.from_layers(nn.BatchNorm2d(5), nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .*; got 'fast'"):
        BNReLUConv2d(3, 4, 1, backend="fast")


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_and_files(backend):
    """deepcopy, pickle and state_dict carry the whole unit."""
    unit, _ = twins(backend)
    x = torch.randn(2, 8, 4, 5)
    unit(x)
    file = io.BytesIO()
    torch.save(unit, file)
    file.seek(0)
    loaded = BNReLUConv2d(8, 5, 3, padding=1, backend=backend)
    loaded.load_state_dict(unit.state_dict())
    copies = copy.deepcopy(unit), torch.load(file, weights_only=False), loaded
    expected = unit.eval()(x)
    for other in copies:
        assert torch.equal(other.eval()(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_module_conversions(backend):
    """double() and memory formats change the parameters, and the unit follows, its gradients too: the optimiser meets
    them laid out like the parameters, whatever the kernels prefer.
    """
    unit, plain = twins(backend)
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    assert_close(step(unit.double(), x), step(plain.double(), x))
    for layout in (torch.contiguous_format, torch.channels_last):
        unit, plain = (m.to(memory_format=layout) for m in (unit, plain))
        ours, theirs = step(unit, x), step(plain, x)
        assert_close(ours, theirs)
        assert ours[-1].stride() == unit.conv.weight.stride()


def dual(unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The derivative of unit at x along ones, in forward mode."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(unit(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS = {
    "vmap": lambda unit, x: torch.vmap(unit)(x.unsqueeze(1)),
    "grad": lambda unit, x: torch.func.grad(lambda x: unit(x).square().sum())(x),
    "jvp": lambda unit, x: torch.func.jvp(unit, (x,), (torch.ones_like(x),))[1],
    "dual": dual,
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_run_the_plain_layers(transform, grad):
    """Under torch.func and in forward mode `auto` gives what plain layers give, not zero; a backend by name refuses."""
    unit, plain = twins("auto")
    x = torch.randn(3, 8, 4, 5)
    with torch.set_grad_enabled(grad):
        unit.eval()(x), plain.eval()  # a plan from outside of the transform is known
        assert torch.equal(transform(unit, x), transform(plain, x))
        unit.backend = "library"
        with pytest.raises(ValueError, match=r"'library' cannot serve this call: it knows no transforms"):
            transform(unit, x)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_vmap_over_what_is_added_alone(backend):
    """The sum is mapped and the layers' result is not: it does not fit into that result, so it is not written there."""
    unit, block = twins(backend)[0].eval(), PreActBlock(8, 5, backend=backend).eval()
    x, residuals, weights = torch.randn(2, 8, 4, 5), torch.randn(3, 2, 5, 4, 5), torch.randn(3, 5, 8, 1, 1)

    def projected(weight):
        return torch.func.functional_call(block, {"shortcut.0.weight": weight}, (x,))

    for call, mapped in (lambda residual: unit(x, residual), residuals), (projected, weights):
        assert_close(torch.vmap(call)(mapped), torch.stack(list(map(call, mapped))))


@pytest.mark.parametrize(
    "name", ["vmap", "grad"]
)  # torch 2.13 refuses to trace the batch norm of plain layers in a jvp
def test_transforms_in_compiled_code(name):
    """The same holds where Dynamo traces the transform: no derivative is lost without a word."""
    unit, _ = twins("auto")
    unit.eval().requires_grad_(False)
    x = torch.randn(3, 8, 4, 5)
    transform = TRANSFORMS[name]
    assert_close(torch.compile(lambda x: transform(unit, x), backend="eager")(x), transform(unit, x))


def test_what_is_not_the_default_is_shown():
    """By print(module), as torch's own layers do it."""
    assert "backend" not in repr(BNReLUConv2d(4, 4, 1))
    assert "backend='library'" in repr(PreActBlock(4, 4, backend="library"))
    assert "memory" not in repr(PreActStage(PreActBlock(4, 4)))
    assert "memory='lean'" in repr(PreActStage(PreActBlock(4, 4), memory="lean"))


def test_settings_that_are_integers():
    """A convolution may be given one number for both directions after it was made, as nets with dilation do."""
    for backend in BACKENDS:
        unit, plain = twins(backend)
        for module in unit, plain:
            module.conv.stride, module.conv.padding = 2, 2
        x = torch.randn(2, 8, 7, 6)
        assert_close(unit(x), plain(x))
        for module in unit, plain:
            module.conv.stride = (1,)
        assert_close(unit(x), plain(x))


def test_symbolic_tracing():
    """torch.fx, and what is built on it, sees the layers; those of a stage, too."""
    unit, plain = twins("auto")
    traced = torch.fx.symbolic_trace(unit, {"residual": None})
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["bn", "conv"]
    stage = PreActStage(PreActBlock(8, 8), PreActBlock(8, 8)).eval()
    layers = torch.fx.symbolic_trace(stage)
    assert [node.op for node in layers.graph.nodes].count("call_module") == 8
    x = torch.randn(2, 8, 7, 6)
    assert_close(layers(x), stage(x))
    assert_close(traced(x), plain(x))


def test_symbolic_tracing_of_padding_by_name():
    """A geometry that is to be worked out is that of the filter, not of the proxy by which a tracer replaces it."""
    unit = BNReLUConv2d(8, 4, 3, padding="same")
    traced = torch.fx.symbolic_trace(unit.eval(), {"residual": None})
    x = torch.randn(2, 8, 7, 6)
    assert_close(traced(x), unit(x))
