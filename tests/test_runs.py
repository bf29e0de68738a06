"""What a fused module remembers from call to call: heard of when it changes, freed with the module, never copied."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fused_preact
from fused_preact import BNReLUConv2d, PreActBlock, PreActStage, bn_relu_conv2d, runs, tables


def x_of(N: int = 2, C: int = 8, size: int = 5) -> torch.Tensor:
    return torch.randn(N, C, size, size)


def modules() -> list[nn.Module]:
    return [BNReLUConv2d(4, 4, 3, padding=1), PreActBlock(4, 4), PreActStage(PreActBlock(4, 4), PreActBlock(4, 4))]


@pytest.mark.parametrize("index", range(3))
def test_a_module_that_ran_is_freed(index):
    """The memory of a net goes when its last name goes, although its calls are remembered."""
    module = modules()[index]
    module(torch.randn(2, 4, 5, 5))
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


class Owner:
    """Has a model, and a hook in it that refers back to the owner."""

    def __init__(self, where):
        self.model = PreActStage(PreActBlock(8, 8), PreActBlock(8, 8))
        where(self.model).register_forward_hook(self.hook)

    def hook(self, *_args):
        return None


@pytest.mark.parametrize(
    "where",
    [lambda model: model, lambda model: model[0], lambda model: model[0].conv1],
    ids=["stage", "block", "layer"],
)
def test_a_module_is_freed_with_what_refers_to_it(where):
    """What is remembered of a module must not keep it alive, whatever its hooks hold."""
    owner = Owner(where)
    owner.model(x_of())
    model = weakref.ref(owner.model)
    del owner
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("index", range(3))
def test_parameters_are_freed_without_a_collection(index):
    """Those of a net on a GPU are to be gone when its last name is."""
    module = modules()[index]
    module(torch.randn(2, 4, 5, 5))
    parameters = [weakref.ref(parameter) for parameter in module.parameters()]
    gc.disable()
    try:
        del module
        assert not any(parameter() is not None for parameter in parameters)
    finally:
        gc.enable()


def test_it_is_remembered_from_the_first_call_on():
    """Nothing is made again where nothing has changed."""
    made = []
    for module in modules():
        for _ in range(3):
            runs.remembered(module, lambda: made.append(0))
    assert len(made) == 3


def test_what_is_pickled_does_not_tell_what_was_called():
    """No private class of the package is in a file, nor that the module was compiled, as torch leaves it out."""
    for module in modules():
        fresh = pickle.dumps(module)
        module(torch.randn(2, 4, 5, 5))
        module.load_state_dict(pickle.loads(fresh).state_dict())
        module.compile(backend="eager")
        assert len(pickle.dumps(module)) == len(fresh)


def test_a_copy_remembers_nothing_of_the_first():
    """Not one of copy.copy either, which shares the first one's attributes."""
    block = PreActBlock(8, 8).eval()
    y = block(x := x_of())
    deep, shallow = copy.deepcopy(block), copy.copy(block)
    shallow._modules = {**block._modules, "conv1": nn.Conv2d(8, 8, 3, padding=1, bias=False)}
    assert_close(deep(x), y)
    assert not torch.allclose(shallow(x), y)
    assert torch.equal(block(x), y)


@pytest.mark.parametrize("member", ["conv1", "bn2"])
def test_a_forward_of_its_own_runs(member):
    """A forward that was put on a layer, as libraries that move weights do it, is not passed over; nor on a block."""
    stage = PreActStage(PreActBlock(8, 8), PreActBlock(8, 8))
    stage(x_of())
    seen = []

    def watched(module):
        before = module.forward
        module.forward = lambda x: (seen.append(type(module)), before(x))[1]

    watched(stage[0].get_submodule(member))
    watched(stage[1])
    stage(x_of())
    assert seen == [type(stage[0].get_submodule(member)), PreActBlock]
    assert f"{member} has a forward of its own" in str(fused_preact.explain(stage, x_of()))


def test_what_a_forward_of_its_own_returns_is_not_overwritten():
    """It may be x itself, which is the caller's."""
    block = PreActBlock(8, 8).eval()
    block.bn1.forward = lambda x: x
    before = (x := x_of()).clone()
    with torch.no_grad():
        block(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_repeats_what_a_layer_does(reentrant):
    """Its own forward, and statistics that are not tracked any more: all but the update of the running ones."""
    gradients = []
    for repeat in False, True:
        torch.manual_seed(0)
        block = PreActBlock(8, 8)
        forward = block.bn1.forward
        block.bn1.forward = lambda x, forward=forward: 3 * forward(x) + 1
        block.bn2.track_running_stats = False
        x = x_of().requires_grad_()
        y = checkpoint(block, x, use_reentrant=reentrant) if repeat else block(x)
        y.square().sum().backward()
        assert block.bn1.num_batches_tracked == 1
        gradients.append(x.grad)
    assert_close(*gradients)


def test_a_layer_that_becomes_another_is_heard_of():
    """By its class alone."""

    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    unit = BNReLUConv2d(8, 8, 1).eval()
    x = x_of()
    y = unit(x)
    unit.conv.__class__ = Doubled
    assert_close(unit(x), 2 * y)


def test_a_filter_of_another_size_has_other_padding():
    """Where the padding is "same", also if the new filter came in as data of the old parameter."""
    unit = BNReLUConv2d(8, 8, 3, padding="same").eval()
    x = x_of()
    unit(x)
    unit.conv.weight.data = torch.randn(8, 8, 5, 5)
    assert_close(unit(x), unit.conv(torch.relu(unit.bn(x))), rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_a_plain_attribute():
    """As a hypernetwork sets it, it is read anew in each call; replicas of nn.DataParallel run as plain layers."""
    block, x = PreActBlock(8, 8).eval(), x_of()
    weight = block.conv1.weight
    del block.conv1.weight
    ys = []
    for scale in 1, 2:
        block.conv1.weight = scale * weight.detach()
        ys.append(block(x) - x)
    assert not torch.allclose(*ys)
    assert "plain attribute" not in str(fused_preact.explain(block, x))
    block.conv1._is_replica = True
    assert "conv1.weight is a plain attribute" in str(fused_preact.explain(block, x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_scripted_and_traced():
    """A scripted layer runs as it is, and torch.jit.trace sees the plain layers."""
    block = PreActBlock(8, 8).eval()
    x = x_of()
    expected = block(x)
    assert_close(torch.jit.trace(block, x)(x), expected)
    block.bn1 = torch.jit.script(block.bn1)
    assert_close(block(x), expected)
    stage = PreActStage(PreActBlock(8, 8), torch.jit.script(nn.Conv2d(8, 4, 1)))
    assert stage(x).shape == (2, 4, 5, 5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_does_not_meet_layers_that_were_exchanged():
    """What was remembered of them is not read there: torch.jit.trace would refuse it, of parameters that it lacks."""
    block, x = PreActBlock(8, 8), x_of()
    block(x)
    block.bn2 = nn.BatchNorm2d(8)
    block.eval()
    assert_close(torch.jit.trace(block, x)(x), block(x))


def test_a_setting_that_changes_in_place_is_heard_of():
    """A list is the same object with other numbers."""
    unit = BNReLUConv2d(8, 8, 1).eval()
    unit.conv.stride = [2, 2]
    x = x_of()
    y = unit(x)
    unit.conv.stride[:] = 1, 1
    assert_close(unit(x)[:, :, ::2, ::2], y)


def test_a_new_table_is_heard_of(folder):
    """By modules and functions that have been called before, too."""
    block, x = PreActBlock(8, 8), x_of()
    weight = torch.randn(8, 8, 1, 1, requires_grad=True)
    function = functools.partial(bn_relu_conv2d, weight=weight, training=True)
    choices = *fused_preact.explain(block, x), *fused_preact.explain(function.func, x, **function.keywords)
    assert all("Stage" in type(call(x).grad_fn).__name__ for call in (block, function))
    calls = {tables.call_key(choice.problem): {"2": {"best": "eager", "seconds": {}}} for choice in choices}
    tables.save({"device": tables.device_name("cpu"), "calls": calls, "tiles": {}})
    assert not any("Stage" in type(call(x).grad_fn).__name__ for call in (block, function))
    assert fused_preact.explain(block, x)[0].backend == "eager"


def test_one_compilation_for_batches_of_any_size():
    """No size of a batch is built into code that is to serve them all, and such code can be exported."""
    block = PreActBlock(8, 8).eval()
    compilations = []

    def compiler(graph, _inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(block, backend=compiler, dynamic=True)
    for x in map(x_of, (2, 3, 5, 8)):
        assert_close(compiled(x), block(x))
    assert len(compilations) == 1
    batch = torch.export.Dim("batch", min=2)
    for strict in True, False:
        program = torch.export.export(block, (x_of(4),), dynamic_shapes=({0: batch},), strict=strict)
        x = x_of(7)
        assert_close(program.module()(x), block(x))


def test_a_call_whose_every_size_may_change_is_compiled_whole():
    """Of the function, where the filter's sizes are symbols too."""
    weight, gamma, beta = torch.randn(4, 8, 3, 3), torch.ones(8), torch.zeros(8)

    def call(x):
        return bn_relu_conv2d(x, weight, gamma, beta, training=True, padding=1)

    compiled = torch.compile(call, backend="eager", dynamic=True, fullgraph=True)
    for x in map(x_of, (2, 3, 5)):
        assert_close(compiled(x), call(x))


CHANGES = {
    "weight": lambda bn, conv: setattr(conv, "weight", nn.Parameter(-conv.weight.detach())),
    "bias": lambda bn, conv: setattr(conv, "bias", nn.Parameter(torch.ones(4))),
    "gamma": lambda bn, conv: setattr(bn, "weight", nn.Parameter(torch.full((4,), 3.0))),
    "eval": lambda bn, conv: bn.eval(),
    "momentum": lambda bn, conv: setattr(bn, "momentum", 0.7),
    "average": lambda bn, conv: setattr(bn, "momentum", None),
    "eps": lambda bn, conv: setattr(bn, "eps", 0.5),
    "padding": lambda bn, conv: setattr(conv, "padding", (2, 2)),
    "stride": lambda bn, conv: setattr(conv, "stride", (2, 2)),
    "dilation": lambda bn, conv: setattr(conv, "dilation", (2, 2)),
    "groups": lambda bn, conv: (
        setattr(conv, "groups", 2),
        setattr(conv.weight, "data", conv.weight.data[:, :2].clone()),
    ),
    "padding mode": lambda bn, conv: setattr(conv, "padding_mode", "circular"),
    "tracking": lambda bn, conv: setattr(bn, "track_running_stats", False),
    "forward for another attribute": lambda bn, conv: (delattr(bn, "note"), setattr(bn, "forward", torch.sin)),
    "hook": lambda bn, conv: bn.register_forward_hook(lambda module, given, result: 2 * result),
    "hooks": lambda bn, conv: setattr(bn, "_forward_hooks", {0: lambda module, given, result: 2 * result}),
    "parameters": lambda bn, conv: setattr(conv, "_parameters", {"weight": nn.Parameter(-conv.weight), "bias": None}),
    "running": lambda bn, conv: setattr(bn, "running_mean", torch.full((4,), 9.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_calls_is_heard(change):
    """Whatever is changed about a layer after a call, the next call does as the plain layers do."""
    torch.manual_seed(0)
    ours, theirs = (BNReLUConv2d(4, 4, 3, padding=1, backend=backend) for backend in ("auto", "eager"))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 5, 5)
    for module in (ours, theirs):
        torch.manual_seed(1)
        module.bn.note = "of the user"
        module(x)
        CHANGES[change](module.bn, module.conv)
    assert_close(ours(x), theirs(x))
    assert_close(ours.state_dict(), theirs.state_dict())


def test_an_attribute_that_is_gone_is_missed():
    """As by the plain layers, also where another one has come."""
    unit = BNReLUConv2d(4, 4, 1)
    unit(x_of(C=4))
    del unit.bn.eps
    unit.bn.note = "of the user"
    with pytest.raises(AttributeError, match="eps"):
        unit(x_of(C=4))


def test_parameters_of_another_type_are_heard_of():
    """A module without buffers is converted in place: the parameters stay the same objects."""
    unit = BNReLUConv2d(4, 4, 1, affine=False, track_running_stats=False)
    unit(x_of(C=4))
    unit.double()
    with pytest.raises(TypeError, match=r"weight must be torch.float32, as x is .*; got torch.float64"):
        unit(x_of(C=4))


def test_a_global_hook_is_heard_of():
    """It sees the layers of modules that ran before it was there."""
    unit, seen = BNReLUConv2d(4, 4, 1), []
    unit(x_of(C=4))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        unit(x_of(C=4))
    finally:
        handle.remove()
    assert seen == [nn.BatchNorm2d, nn.Conv2d, BNReLUConv2d]


def test_another_memory_mode_is_heard_of():
    """The same stage keeps less from the next call on."""
    stage, kept = PreActStage(*(PreActBlock(4, 4) for _ in range(3))), []
    for memory in "fast", "lean", "fast":
        stage.memory, storages = memory, set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=storages: s.add(t.data_ptr()) or t, lambda t: t):
            stage(x_of(C=4))
        kept.append(len(storages))
    assert kept[1] < kept[0] == kept[2]


def test_another_input_of_the_shortcut_is_heard_of():
    """By a block that is fused and by one that is not."""
    x, raw = x_of(C=4), PreActBlock(4, 4, 2, shortcut_input="raw", backend="eager").eval()
    for backend in "auto", "eager":
        block = PreActBlock(4, 4, 2, backend=backend).eval()
        block.load_state_dict(raw.state_dict())
        block(x)
        block.shortcut_input = "raw"
        assert_close(block(x), raw(x))


def test_averages_of_all_batches_are_each_by_its_own_count():
    """A batch norm may have counted more batches than another of its block."""
    ours, theirs = (PreActBlock(4, 4, backend=backend) for backend in ("auto", "eager"))
    theirs.load_state_dict(ours.state_dict())
    x = x_of(C=4)
    for block in ours, theirs:
        block.bn1.momentum = block.bn2.momentum = None
        block.bn2.num_batches_tracked.fill_(3)
        block(x)
    assert_close(ours.state_dict(), theirs.state_dict())


def test_the_name_of_a_shortcut_is_heard_of():
    """The block has a projection under the name that it is told."""
    block = PreActBlock(4, 4, 2)
    block(x_of(C=4))
    block.shortcut_name = "downsample"
    with pytest.raises(ValueError, match="x must have the output's shape"):
        block(x_of(C=4))


@pytest.mark.parametrize("computed", [False, True])
def test_no_tensor_that_was_put_in_for_one_call_is_kept(computed):
    """A parameter that another net computed, with its graph, or one of an ensemble's, goes when that call is done."""
    unit, weight = BNReLUConv2d(4, 4, 3, padding=1), torch.randn(4, 4, 3, 3, requires_grad=True)
    weight = weight.exp() if computed else weight
    gone = weakref.ref(weight)
    torch.func.functional_call(unit, {"conv.weight": weight}, (x_of(C=4),)).sum().backward()
    del weight
    gc.collect()
    assert gone() is None
