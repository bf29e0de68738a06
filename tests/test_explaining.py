"""`explain`: the backends of a call, told without making it, and how the choices of the calls inside are collected."""

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fused_preact
from fused_preact import BNReLUConv2d, PreActBlock, PreActStage, backends, bn_relu_conv2d, models


def arguments() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3)


def test_explain_computes_and_changes_nothing():
    """The call is made on fake tensors: running statistics and their count stay, and no gradient appears."""
    net = models.create("resnet20")
    before = {name: t.clone() for name, t in net.state_dict().items()}
    text = str(fused_preact.explain(net, torch.randn(2, 3, 32, 32)))
    assert "layer1.0" in text
    assert "layer3" in text
    for name, t in net.state_dict().items():
        assert torch.equal(t, before[name]), name
    mean, var = torch.zeros(4), torch.ones(4)
    fused_preact.explain(bn_relu_conv2d, *arguments(), running_mean=mean, running_var=var, training=True)
    assert torch.equal(mean, torch.zeros(4))
    assert torch.equal(var, torch.ones(4))


def test_explain_of_what_changes_its_own_weight():
    """As one that decays it does, by whatever name it has it."""

    class Decaying(BNReLUConv2d):
        def forward(self, x):
            with torch.no_grad():
                self.conv.own.mul_(0.9)
            return super().forward(x)

    net = Decaying(4, 4, 1)
    net.conv.own = net.conv.weight
    before = net.conv.weight.clone()
    fused_preact.explain(net, torch.randn(2, 4, 5, 5))
    assert torch.equal(net.conv.weight, before)


def test_explain_of_what_is_in_two_places():
    """A block and a layer that a net has twice keep their own parameters: no fake tensor is left in the net."""
    block, first, second = PreActBlock(4, 4), BNReLUConv2d(4, 4, 1), BNReLUConv2d(4, 4, 1)
    second.conv, first.bn.weight = first.conv, second.bn.weight
    net = torch.nn.Sequential(block, PreActStage(block, block), first, second)
    before = net.state_dict(keep_vars=True)
    assert [choice.where for choice in fused_preact.explain(net, torch.randn(2, 4, 5, 5))] == ["0", "1", "2", "3"]
    assert all(t is before[name] for name, t in net.state_dict(keep_vars=True).items())


def test_explain_keeps_nothing():
    """What was remembered of the last call stays, and nothing of the fake tensors, which refer to the real ones."""
    for module in PreActBlock(4, 4), PreActStage(PreActBlock(4, 4)):
        module(torch.randn(2, 4, 5, 5))
        before = dict(module.__dict__)
        fused_preact.explain(module, torch.randn(2, 4, 5, 5))
        assert module.__dict__ == before


def test_explain_takes_back_what_a_first_call_makes():
    """A net that keeps a mask and a scale from its first call on would have fake ones for ever."""

    class Masked(PreActBlock):
        mask = None

        def forward(self, x):
            if self.mask is None:
                self.mask = x.new_ones(x.shape[2:])
                self.register_buffer("scale", x.new_ones(()))
            return super().forward(x * self.mask) * self.scale

    net = torch.nn.Sequential(Masked(4, 4))
    x = torch.randn(2, 4, 5, 5)
    assert [choice.where for choice in fused_preact.explain(net, x)] == ["0"]
    assert net[0].mask is None
    assert not hasattr(net[0], "scale")
    assert type(net(x)) is torch.Tensor


def test_explain_leaves_lazy_layers_to_the_first_call():
    """Their parameters would be fake ones for ever."""
    net = torch.nn.Sequential(torch.nn.LazyConv2d(4, 1), PreActBlock(4, 4))
    x = torch.randn(2, 3, 5, 5)
    with pytest.raises(ValueError, match=r"target must have been called once before: 0\.weight is lazy"):
        fused_preact.explain(net, x)
    net(x)
    assert [choice.where for choice in fused_preact.explain(net, x)] == ["1"]


def test_explain_of_averages():
    """Plain batch norms with momentum=None read their count, which a fake tensor does not have."""
    net = torch.nn.Sequential(BNReLUConv2d(4, 4, 1, momentum=None, backend="eager"), BNReLUConv2d(4, 4, 1))
    net[1].bn = net[0].bn
    net.append(net[0])
    assert [choice.where for choice in fused_preact.explain(net, torch.randn(2, 4, 5, 5))] == ["0", "1", "0"]
    assert net[0].bn.num_batches_tracked == 0


@pytest.mark.parametrize("kind", ["method", "function", "partial", "int"])
def test_explain_is_of_a_module_or_the_function(kind):
    """Of anything else the tensors that it changes are not known: it is refused, and nothing has changed."""
    unit, x = BNReLUConv2d(4, 4, 1), torch.randn(2, 4, 5, 5)
    calls = {"method": unit.forward, "function": lambda x: unit(x), "partial": functools.partial(unit), "int": 3}
    with pytest.raises(TypeError, match=f"target must be a module, or bn_relu_conv2d; got a {kind}: pass the module"):
        fused_preact.explain(calls[kind], x)
    assert unit.bn.num_batches_tracked == 0


@pytest.mark.parametrize("momentum", [0.1, None])
def test_explain_names_the_module_and_the_reason(momentum):
    """A block that is asked for a backend, and one with a hook, are told apart by name."""
    net = torch.nn.Sequential(PreActBlock(4, 4, backend="library"), PreActBlock(4, 4), BNReLUConv2d(4, 2, 1))
    net[1].conv2.register_forward_hook(lambda *args: None)
    net[2].bn.momentum = momentum
    first, second, third = fused_preact.explain(net, torch.randn(2, 4, 5, 5))
    assert (first.where, first.backend) == ("0", "library")
    assert "backend='library' was asked for" in first.others["reference"]
    assert (second.where, second.backend) == ("1", "eager")
    assert "conv2 has hooks" in second.others["library"]
    assert third.where == "2"
    assert "1: eager\n    not cpu: conv2 has hooks" in str(fused_preact.explain(net, torch.randn(2, 4, 5, 5)))


def test_explain_of_a_call_that_fails_fails_alike():
    """Bad arguments give the message that the call itself would give, and recording stops."""
    x, weight = arguments()
    with pytest.raises(ValueError, match="running_mean is needed"):
        fused_preact.explain(bn_relu_conv2d, x, weight)
    assert not backends.is_recording()


class Reading(torch.nn.Module):
    """Its forward looks at numbers, by a function of torch."""

    def __init__(self, look) -> None:
        super().__init__()
        self.look, self.block = look, PreActBlock(4, 4)

    def forward(self, x):
        return self.look(self.block(x))


@pytest.mark.parametrize("look", [lambda y: y if y.sum() > 0 else -y, lambda y: y[y > 0]], ids=["item", "mask"])
def test_explain_of_what_reads_numbers(look):
    """Fake tensors have none."""
    with pytest.raises(ValueError, match=r"target must do the same whatever the numbers .* it calls aten\.[\w.]+: exp"):
        fused_preact.explain(Reading(look), torch.randn(2, 4, 5, 5))


def test_what_other_threads_run_is_not_explained():
    """A net that is trained on one thread is not part of a net that is explained on another meanwhile."""
    unit, images = BNReLUConv2d(4, 4, 1), torch.randn(2, 4, 5, 5)

    class Meanwhile(torch.nn.Module):
        def forward(self, x):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(unit, images).result()
            return x

    net = torch.nn.Sequential(BNReLUConv2d(4, 4, 1), Meanwhile())
    assert [choice.where for choice in fused_preact.explain(net, images)] == ["0"]
    assert unit.bn.num_batches_tracked == 1


def test_records_within_one_another():
    """Each has what ran while it was made, and recording stops with the outer one."""
    unit, x = BNReLUConv2d(4, 4, 1), torch.randn(2, 4, 5, 5)
    with backends.recording() as outer:
        with backends.recording() as inner:
            unit(x)
        unit(x)
    unit(x)
    assert not backends.is_recording()
    assert (len(inner), len(outer)) == (1, 2)


def test_explain_without_a_fused_call():
    """A module that has none says so."""
    assert str(fused_preact.explain(torch.nn.ReLU(), torch.randn(2))) == "no fused call is made here"


def test_a_long_explanation_is_short():
    """Up to four calls that are served alike are named, of more the first two and the last."""
    for count, expected in (4, "0, 1, 2, 3: library\n"), (5, "0, 1, ... 4 (5 calls): library\n"):
        net = torch.nn.Sequential(*(PreActBlock(4, 4, backend="library") for _ in range(count)))
        assert str(fused_preact.explain(net, torch.randn(2, 4, 5, 5))).startswith(expected)


def test_explain_takes_arguments_by_name():
    """As the module itself does."""
    with pytest.raises(ValueError, match="residual must have the shape"):
        fused_preact.explain(BNReLUConv2d(4, 4, 1), torch.randn(2, 4, 5, 5), residual=torch.randn(1, 4, 5, 5))


def test_explain_on_several_threads():
    """One after the other: what they change of torch while they run is the process's."""
    running, most = [], []

    class Slow(torch.nn.Module):
        def forward(self, x):
            running.append(x)
            most.append(len(running))
            time.sleep(0.05)
            running.pop()
            return x

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: fused_preact.explain(Slow(), torch.ones(1)), range(3)))
    assert most == [1, 1, 1]


def test_explain_within_code_that_is_compiled():
    """It is called as it is there, by the interpreter."""
    block, x = PreActBlock(4, 4).eval(), torch.randn(2, 4, 5, 5)
    found = []

    def call(x):
        found.append(len(fused_preact.explain(block, x)))
        return x + 1

    torch.compile(call, backend="eager")(x)
    assert found == [1]


def test_explain_of_a_compiled_net():
    """What was compiled reads memory that fake tensors do not have; it is explained as it was written."""
    block = PreActBlock(4, 4)
    x = torch.randn(2, 4, 5, 5)

    def compiler(graph, _inputs):
        def run(*args):
            assert all(t.data_ptr() for t in args)
            return graph.forward(*args)

        return run

    compiled = torch.compile(block, backend=compiler)
    compiled(x)
    (choice,) = fused_preact.explain(compiled, x)
    assert choice.backend == next(iter(fused_preact.explain(block, x))).backend
    block.compile(backend=compiler)
    block(x)
    assert len(fused_preact.explain(block, x)) == 1


def hooked(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module with a hook that does nothing, in the part of that name."""
    module.get_submodule(name).register_forward_hook(lambda *_: None)
    return module


NETS = {
    "blocks": lambda: torch.nn.Sequential(*(PreActBlock(4, 4) for _ in range(3))),
    "stage": lambda: PreActStage(*(PreActBlock(4, 4) for _ in range(3))),
    "stage with a hook": lambda: hooked(PreActStage(*(PreActBlock(4, 4) for _ in range(3))), "1.conv1"),
    "unit with a hook": lambda: torch.nn.Sequential(hooked(BNReLUConv2d(4, 4, 1), "conv"), BNReLUConv2d(4, 4, 1)),
}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "float32"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_explain_is_what_runs(name, training, autocast, layout):
    """The call on fake tensors, which a mode sees and nothing may overwrite, has the types and layouts of the real."""
    net, x = NETS[name]().train(training), torch.randn(2, 4, 6, 6).contiguous(memory_format=layout)
    names = {module: name for name, module in net.named_modules()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), backends.recording() as choices:
        expected = fused_preact.explain(net, x)
        choices.clear()
        net(x)
    assert [choice._replace(where=names[choice.where] or type(net).__name__) for choice in choices] == list(expected)


def test_the_reason_nearest_to_a_block_is_told():
    """Of a stage in a stage, it is the inner one's."""
    inner = PreActStage(PreActBlock(4, 4), PreActBlock(4, 4))
    inner[1].register_forward_hook(lambda *_: None)
    first, second = fused_preact.explain(PreActStage(inner), torch.randn(2, 4, 5, 5))
    assert first.apart == "it is of type PreActStage, no PreActBlock and no PreActBottleneck"
    assert second.apart == "it has hooks, which run only when the block itself is called"
