"""Somebody's net with its blocks fused: what is a block, what stays, and that nothing but the way it is run changes."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import fused_preact
from foreign import (
    Branch,
    Cifar,
    Cut,
    Deep,
    Detached,
    Excited,
    Factor,
    Nested,
    Raw,
    Renamed,
    Rounded,
    Scaled,
    Smooth,
    Stopped,
    Timm,
    Told,
    Wide,
    conv_first,
    norm_twice,
)
from fused_preact import PreActBlock, PreActBottleneck, PreActStage, blocks, fuse, models

KINDS = {kind.__name__: kind for kind in (Cifar, Raw, Wide, Timm, Nested)}
CASES = [(name, bottleneck) for name in KINDS for bottleneck in (False, True) if not (name == "Wide" and bottleneck)]


class Net(nn.Module):
    """Two stages of somebody's blocks, no setting of which is the default, in float64."""

    def __init__(self, kind, bottleneck: bool = False, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(kind(8, 16, bottleneck, **options), kind(16, 16, bottleneck, **options))
        self.layer2 = nn.Sequential(kind(16, 24, bottleneck, 2, **options), kind(24, 24, bottleneck, **options))
        self.bn, self.fc = nn.BatchNorm2d(24), nn.Linear(24, 5)
        for bn in self.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.eps, bn.momentum = 1e-3, 0.3
                nn.init.uniform_(bn.weight, 0.5, 1.5), nn.init.uniform_(bn.bias, -0.5, 0.5)
        self.double()

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.layer2(self.layer1(self.stem(x))))).mean((2, 3)))


def images() -> torch.Tensor:
    return torch.randn(3, 3, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(net: nn.Module) -> dict[str, torch.Tensor]:
    """Scores, gradients and state after a training step."""
    net.zero_grad()
    y = net(images())
    y.square().sum().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in net.named_parameters()}, **net.state_dict()}


@pytest.mark.parametrize(("name", "bottleneck"), CASES)
def test_a_fused_net_is_the_net_it_was(name, bottleneck):
    """Parameters, their order, keys, settings and modes stay, and so does what a training step makes of them."""
    net = Net(KINDS[name], bottleneck)
    list(net.layer1[0].children())[-1].requires_grad_(False)
    net.layer2.eval()
    parameters, modes = list(net.parameters()), [m.training for m in net.modules() if isinstance(m, nn.Conv2d)]
    plain = copy.deepcopy(net)
    assert fuse(net, backend="library") is net
    assert [type(stage) for stage in (net.layer1, net.layer2)] == [PreActStage] * 2
    assert {type(block) for block in net.layer1} == {PreActBottleneck if bottleneck else PreActBlock}
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [m.training for m in net.modules() if isinstance(m, nn.Conv2d)] == modes
    assert (net.layer1.training, net.layer2.training) == (True, False)
    assert [choice.backend for choice in fused_preact.explain(net, images())] == ["library"] * 2
    ours, theirs = step(net), step(plain)
    for key, value in theirs.items():
        assert_close(ours[key], value, rtol=1e-9, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", KINDS)
def test_a_fused_net_is_copied_pickled_and_compiled(name):
    """As any of the package's own."""
    net = fuse(Net(KINDS[name]), memory="lean").eval()
    assert net.layer1.memory == "lean"
    y = net(images())
    assert_close(copy.deepcopy(net)(images()), y)
    assert_close(pickle.load(io.BytesIO(pickle.dumps(net.layer1)))(net.stem(images())), net.layer1(net.stem(images())))
    assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(images()), y)


class Chain(nn.Module):
    """Units by themselves."""

    def __init__(self, units: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        layers = [(nn.BatchNorm2d(4), act(), nn.Conv2d(4, 4, 3, 1, 1, groups=2)) for _ in range(units)]
        self.layers = nn.ModuleList(itertools.chain(*layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("units", [1, 2])
def test_units_alone(units, recwarn):
    """Whatever becomes of what they give, of which nothing needs to be said."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units = Chain(units)

        def forward(self, x):
            return self.units(x).sigmoid()

    net = Head()
    plain, x = copy.deepcopy(net), torch.randn(2, 4, 5, 5)
    assert type(fuse(net).units) is blocks.Branch
    assert not recwarn.list
    assert_close(net(x), plain(x))
    assert list(net.state_dict()) == list(plain.state_dict())
    assert_close(net.state_dict(), plain.state_dict())


def test_a_sequential_of_layers_stays():
    """Its parent may go through it, layer by layer: what makes a block of it is said, where that would."""
    for pairs in 1, 2:
        net = nn.Sequential(nn.Sequential(*Chain(pairs).layers), Chain(pairs))
        with pytest.warns(UserWarning, match=r"as they are; 0: it is a plain nn.Sequential, .*: give it a class"):
            fuse(net)
        assert [type(part) for part in net] == [nn.Sequential, blocks.Branch]
    with pytest.raises(ValueError, match=r"; net: of the layers of a block Sequential computes something else: it giv"):
        fuse(nn.Sequential(*Chain(2, nn.SiLU).layers))


def test_what_is_around_what_was_fused_is_not_spoken_of():
    """What stays is."""
    net = nn.Sequential(Chain(1, nn.SiLU), Chain(1))
    with pytest.warns(UserWarning, match=r"as they are; 0: .* Chain computes .*: it gives another result in training$"):
        fuse(net)


def test_fusing_moves_nothing(monkeypatch):
    """Blocks are tried with copies: statistics, counts and the random numbers that come next are as they were."""
    net = Net(Wide, dropped=0.3)
    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("seeded the generators of every device"))
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"without any; layer1.0, layer1.1, .*: of the layers of a block Wide"):
        fuse(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert {type(block) for block in (*net.layer1, *net.layer2)} == {Wide}


def test_what_computes_something_else_stays():
    """Dropout between the convolutions is no layer that a block has: one warning names where it is."""
    net = Net(Wide)
    net.layer1[1].dropped = 0.5
    with pytest.warns(UserWarning, match=r"^fuse leaves blocks as they are; layer1.1: of the layers of a") as found:
        fuse(net)
    assert len(found) == 1
    assert [type(block) for block in net.layer1] == [PreActBlock, Wide]
    assert type(net.layer1) is nn.Sequential
    assert type(net.layer2) is PreActStage


def test_a_block_with_hooks_stays():
    """They would not be called any more; those of its layers are, for then these run one after the other."""
    net = Net(Cifar)
    net.layer1[0].shortcut.register_forward_hook(lambda *_: None)
    net.layer1[1].register_forward_hook(lambda *_: None)
    for layer in net.layer2[0].bn2, net.layer2[0].shortcut[0]:
        layer.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"; layer1.0, layer1.1: it has hooks or a forward of its own, .* called$"):
        fuse(net, backend="library")
    assert [type(block) for block in net.layer1] == [Cifar, Cifar]
    assert [choice.backend for choice in fused_preact.explain(net, images())] == ["eager", "library"]


def test_batch_norms_without_tensors():
    """They are layers all the same."""
    net = Net(Cifar)
    net.layer1[1].bn1 = nn.BatchNorm2d(16, affine=False, track_running_stats=False)
    plain = copy.deepcopy(net)
    fuse(net)
    assert_close(net(images()), plain(images()))
    assert list(net.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("kind", [Smooth, Cut])
def test_a_block_is_tried_with_other_parameters_than_its_own(kind):
    """A last layer of zeros hides what is before it, and what an activation cuts off comes later in training."""
    block = kind(8, 8, False)
    nn.init.zeros_(block.conv2.weight)
    with pytest.raises(ValueError, match=r" computes something else: it gives another result in training$"):
        fuse(block)


@pytest.mark.parametrize(("kind", "how"), [(Detached, "has other gradients"), (Rounded, "gives another result")])
def test_a_block_of_other_gradients_or_types_stays(kind, how):
    """Its numbers are the same, or nearly."""
    with pytest.raises(ValueError, match=rf"; net: of the layers of a block .* something else: it {how} in training$"):
        fuse(kind(8, 8, False))


def test_a_net_without_numbers():
    """On the meta device blocks are known by what they compute, too."""
    with torch.device("meta"):
        net = fuse(Net(Cifar))
    assert [type(stage) for stage in (net.layer1, net.layer2)] == [PreActStage] * 2


def test_hooks_hear_nothing_of_the_trial():
    """Those of layers are for the net's own calls."""
    net, heard = Net(Cifar), []
    net.layer1[0].conv1.register_forward_hook(lambda *_: heard.append(1))
    net.layer1[0].conv2.register_full_backward_hook(lambda *_: heard.append(1))
    net.layer1[1].conv1.forward = lambda x: heard.append(1)
    fuse(net)
    assert not heard
    assert type(net.layer1) is PreActStage


@pytest.mark.parametrize("place", ["block", "stage", "wrapper"])
def test_what_is_compiled_stays(place):
    """It goes on to call what it was compiled of."""
    net = Net(Cifar)
    if place == "wrapper":
        net.layer1 = torch.compile(net.layer1, backend="eager")
    else:
        (net.layer1 if place == "stage" else net.layer1[0]).compile(backend="eager")
    before = type(net.layer1)
    if place == "stage":
        fuse(net)
    else:
        with pytest.warns(UserWarning, match=r"; layer1(.0)?: it is compiled: fuse it before that$"):
            fuse(net)
    assert type(net.layer1) is before
    assert type(net.layer2) is PreActStage


def test_a_block_that_cannot_be_tried_says_why():
    """Its own code, or torch's, raised."""

    class Shy(Cifar):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies\nof this")

    with pytest.raises(ValueError, match=r"; net: a copy of it that is tried raises RuntimeError: no copies$"):
        fuse(Shy(8, 8, False))


def test_what_is_inside_of_a_block_is_not_spoken_of(recwarn):
    """It has the layers of a block, too, and is none."""
    assert type(fuse(Branch("layers"))) is PreActBlock
    assert not recwarn.list


def test_a_child_named_as_something_of_a_block():
    """It could not be reached."""

    class Named(Nested):
        def __init__(self) -> None:
            super().__init__(8, 8, False)
            self.backend = self._modules.pop("body")

        @property
        def body(self):
            return self.backend

    with pytest.raises(ValueError, match=r"; net: no child of a PreActBlock can have .*: attribute 'backend' already"):
        fuse(Named())


def test_all_layers_in_one_box():
    """That of the shortcut among the others."""

    class Listed(Cifar):
        def __init__(self) -> None:
            super().__init__(8, 16, False)
            self.all = nn.ModuleList([self.bn1, self.conv1, self.bn2, self.conv2, *self.shortcut])
            del self.bn1, self.conv1, self.bn2, self.conv2, self.shortcut

        def forward(self, x):
            bn1, conv1, bn2, conv2, shortcut = self.all
            a = F.relu(bn1(x))
            return conv2(F.relu(bn2(conv1(a)))) + shortcut(a)

    with pytest.raises(ValueError, match=r"got a Listed without any$"):
        fuse(Listed())


def test_the_mode_of_a_shortcut_stays():
    """Of its box, too, where that is another."""
    assert not any(module.training for module in fuse(Net(Timm).eval()).modules())


def test_hooks_of_a_box_are_heard_of():
    """A module in which layers are, or a ReLU beside them, is not called: `explain` names hooks and a forward of it."""
    for name, hook in itertools.product(("body.conv1", "body.conv1.relu"), (True, False)):
        net = Net(Nested)
        net.layer1[0].body.conv1.relu = nn.ReLU()
        box = fuse(net, backend="library").layer1[0].get_submodule(name)
        box.register_forward_hook(lambda *_: None) if hook else setattr(box, "forward", torch.zeros_like)
        reasons = str(fused_preact.explain(net, images()))
        assert f"{name} has hooks or a forward of its own, which run only when it is called" in reasons


def test_a_module_in_two_places_is_exchanged_once():
    """It still is one."""
    block = Cifar(8, 8, False).double()
    net = nn.Sequential(nn.Conv2d(3, 8, 1).double(), block, nn.Sequential(block, block))
    plain = copy.deepcopy(net)
    fuse(net)
    assert net[1] is net[2][0] is net[2][1]
    assert_close(net.eval()(images()), plain.eval()(images()))


def test_a_block_and_a_sequence_of_blocks():
    """What cannot be changed in place is returned; what is fused already is taken as it is."""
    assert type(fuse(Cifar(8, 8, True))) is PreActBottleneck
    stage = fuse(nn.Sequential(PreActBlock(4, 4), Cifar(4, 8, False)).eval(), memory="lean")
    assert (type(stage), stage.memory, stage.training) == (PreActStage, "lean", False)


@pytest.mark.parametrize("kind", [Raw, Timm])
def test_a_shortcut_behind_the_first_activation(kind):
    """As in front of the paper's nets."""

    class First(kind):
        def forward(self, x):
            bn, conv = (self.bn1, self.conv1) if kind is Raw else (self.norm1, self.conv1)
            a = F.relu(bn(x))
            bn = self.bn2 if kind is Raw else self.norm2
            return self.conv2(F.relu(bn(conv(a)))) + a

    old = First(8, 8, False).double()
    plain, x = copy.deepcopy(old), torch.randn(2, 8, 5, 5, dtype=torch.float64)
    block = fuse(old, backend="library")
    assert type(block) is models.FirstPreActBlock
    assert_close(block(x), plain(x))
    assert_close(block.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Stopped, "of the layers of a block Stopped computes something else: it has other gradients in training"),
        (Renamed, "of the layers of a block Renamed computes something else"),
        (Factor, "of the layers of a block Factor computes something else"),
        (Told, "its forward takes more than x"),
    ],
)
def test_what_is_used_otherwise_is_no_block(kind, reason):
    """Gradients of parameters, keys and arguments are a block's, too."""
    with pytest.raises(ValueError, match=f"without any; net: {reason}$"):
        fuse(kind(8, 8, False))


@pytest.mark.parametrize("kind", [conv_first, norm_twice, Scaled, Excited, Deep])
def test_what_has_other_layers_is_no_block(kind):
    """It is passed over without a word."""
    with pytest.raises(ValueError, match=r"^net must have a block of batch norm, .*; got a Sequential without any$"):
        fuse(nn.Sequential(kind(8, 8, False), nn.Flatten()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(net=Cifar), TypeError, "net must be a module, got type"),
        (dict(memory="none"), ValueError, "memory must be one of 'fast', 'lean', 'min'; got 'none'"),
        (dict(backend="x"), ValueError, "backend must be one of .*; got 'x'"),
        (dict(memory="min"), ValueError, "memory='min' needs blocks of three convolutions or more; block 0"),
    ],
    ids=["class", "memory", "backend", "mode"],
)
def test_what_is_refused_changes_nothing(arguments, error, message):
    """One sentence, and the net is as it was."""
    net = Net(Cifar)
    with pytest.raises(error, match=message):
        fuse(**dict(net=net) | arguments)
    assert {type(block) for block in (*net.layer1, *net.layer2)} == {Cifar}
