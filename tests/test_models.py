import copy

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fused_preact
from cases import BACKENDS
from fused_preact import PreActBlock, PreActBottleneck, models

# Of 10 classes; pytorch-cifar's count for the preactresnets, pytorchcv's for wrn28_10. Those of resnet200 and wrn34_10
# are nobody's: they follow from the layers.
PARAMETERS = {
    "resnet20": 272_282,
    "resnet56": 855_578,
    "resnet110": 1_730_522,
    "resnet164": 1_703_258,
    "resnet1001": 10_327_706,
    "resnet200": 62_637_642,
    "wrn28_10": 36_479_194,
    "wrn34_10": 46_160_474,
    "preactresnet18": 11_171_146,
    "preactresnet34": 21_279_306,
    "preactresnet50": 23_509_066,
    "preactresnet101": 42_501_194,
    "preactresnet152": 58_144_842,
}


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", models.names())
def test_parameter_counts(name):
    """Each network has the published number of parameters, where there is one."""
    with torch.device("meta"):
        assert count(models.create(name)) == PARAMETERS[name]


def test_parameter_counts_for_100_classes():
    """The linear layer follows num_classes."""
    with torch.device("meta"):
        assert count(models.create("resnet164", 100)) == 1_726_388
        assert count(models.create("resnet1001", num_classes=100)) == 10_350_836


def test_resnet1001_is_the_network_of_the_paper():
    """333 units of three convolutions, a stem and three projections; 1000 batch norms."""
    with torch.device("meta"):
        net = models.create("resnet1001")
    kinds = [type(m) for m in net.modules()]
    assert kinds.count(PreActBottleneck) == 333
    assert kinds.count(torch.nn.Conv2d) == 1003
    assert kinds.count(torch.nn.BatchNorm2d) == 1000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["resnet20", "preactresnet18"])
def test_a_net_is_its_plain_layers(name, backend):
    """A whole network, fused, gives the scores, gradients and statistics of the eager one."""
    options = {"width": 8} if name == "preactresnet18" else {}
    torch.manual_seed(0)
    net = models.create(name, backend=backend, **options).double()
    plain = models.create(name, backend="eager", **options).double()
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    y, expected = net(x), plain(x)
    assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    for (key, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, msg=key, rtol=1e-8, atol=1e-9)
    for (key, p), q in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert_close(p, q, msg=key)


def test_the_first_activation_comes_before_the_split():
    """Behind the stem of a basic network the shortcut is relu(bn1(x)), as the paper's appendix has it."""
    block = models.FirstPreActBlock(4, 4).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert_close(block(x), block.bn1(x).relu())
    assert type(models.create("resnet20").layer1[0]) is models.FirstPreActBlock
    net = models.create("resnet164")
    assert net.layer1[0].shortcut_input == "activated"
    assert len(net.layer1[0].shortcut) == 1


def test_a_checkpoint_of_a_whole_net_moves_every_statistic_once():
    """Those of the stem's block and of the head, which are plain layers, too."""
    net = models.create("resnet20")
    plain = copy.deepcopy(net)
    x = torch.randn(2, 3, 16, 16)
    checkpoint(net, x, use_reentrant=False).sum().backward()
    plain(x)
    assert_close(net.state_dict(), plain.state_dict())


def test_the_first_block_has_no_projection():
    """A net whose stem is of another width could not run: it is not built."""
    with pytest.raises(ValueError, match="in_planes and planes must be the same and stride 1, got 8, 16 and 1"):
        models.create("resnet20", stem_width=8)


def test_a_first_block_of_another_width():
    """What follows takes the channels that it gives."""
    net = models.PreActResNet(PreActBottleneck, [2, 1], width=4, first_block=models.FirstPreActBlock)
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_hooks_in_the_first_block_run():
    """Its layers are called or stepped down to like those of any block."""
    block, calls = models.FirstPreActBlock(4, 4), []
    for name in ("bn1", "conv1", "bn2", "conv2"):
        block.get_submodule(name).register_forward_hook(lambda *args, name=name: calls.append(name))
    block(torch.randn(2, 4, 5, 5))
    assert calls == ["bn1", "conv1", "bn2", "conv2"]


def test_keys_of_pytorch_cifar():
    """A PreActResNet has the keys of kuangliu/pytorch-cifar, in its order, and no norm behind the last stage."""
    with torch.device("meta"):
        keys = list(models.create("preactresnet18").state_dict())
    assert keys[0] == "conv1.weight"
    assert keys[1:3] == ["layer1.0.bn1.weight", "layer1.0.bn1.bias"]
    assert keys[-2:] == ["linear.weight", "linear.bias"]
    assert not any(key.startswith("bn") for key in keys)
    assert [key for key in keys if "shortcut" in key] == [f"layer{i}.0.shortcut.0.weight" for i in (2, 3, 4)]


def test_initialisation_of_the_paper():
    """Convolutions start at N(0, sqrt(2/(k*k*out)))."""
    torch.manual_seed(0)
    net = models.create("resnet56")
    for conv in (m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 9000):
        K, _, R, S = conv.weight.shape
        assert conv.weight.std().item() == pytest.approx((2 / (K * R * S)) ** 0.5, rel=0.03)


def test_it_runs_channels_last_inside():
    """The first block already sees channels_last, whatever the images are in."""
    net = models.create("resnet20")
    seen = []
    net.layer1[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(torch.randn(2, 3, 8, 8))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_gradients_of_each_image(stem):
    """By vmap over the images, which knows no channels_last; so is a Jacobian."""
    net = models.PreActResNet(PreActBlock, [1, 1], width=4, head_norm=True, stem=stem).double().eval()
    x, parameters = torch.randn(3, 3, 16, 16, dtype=torch.float64), dict(net.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(net, parameters, (image[None],)).square().sum()

    together = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    apart = torch.autograd.grad(loss(parameters, x[1]), [*parameters.values()])
    assert_close([grad[1] for grad in together.values()], [*apart])
    assert_close(torch.func.jacrev(net)(x[:1]), torch.autograd.functional.jacobian(net, x[:1]))


def test_stems_and_options():
    """The ImageNet stem alone divides the size by four; options reach every block; wrong names are listed."""
    net = models.create("preactresnet50", 7, stem="imagenet", width=4, stride_on="first", backend="library")
    assert net.conv1.stride == (2, 2)
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    choices = fused_preact.explain(net, torch.randn(1, 3, 64, 64))
    assert [choice.backend for choice in choices] == ["library"] * 4  # one a stage
    assert choices[0].problem.shape[2:] == (16, 16)
    assert fused_preact.explain(models.create("resnet20"), torch.randn(1, 3, 8, 8))[0].problem.shape[2:] == (8, 8)
    assert [net.layer2[0].get_submodule(f"conv{i}").stride for i in (1, 2)] == [(2, 2), (1, 1)]
    with pytest.raises(TypeError, match="unexpected keyword argument 'stride_on'"):
        models.create("preactresnet18", stride_on="first")
    with pytest.raises(ValueError, match=r"name must be one of 'resnet20', .*; got 'resnet50'"):
        models.create("resnet50")
    with pytest.raises(ValueError, match="stem must be one of 'cifar', 'imagenet'; got 'patch'"):
        models.PreActResNet(PreActBlock, [1], stem="patch")


def test_device_and_dtype_are_of_all_parameters():
    """Stem, blocks, head and linear layer: a net of two dtypes could not run."""
    net = models.create("resnet20", dtype=torch.float64)
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert net(torch.randn(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64
    assert {t.device.type for t in models.create("resnet164", device="meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(block=PreActBlock(4, 4)), TypeError, "block must be a class of blocks.*got PreActBlock"),
        (dict(num_blocks=2), TypeError, "num_blocks must be integers, one for each stage, got 2"),
        (dict(num_blocks=[1, -1]), ValueError, r"num_blocks\[1\] must be at least 1, got -1"),
        (dict(num_classes="10"), TypeError, "num_classes must be an integer, got '10'"),
        (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (dict(width=1.5), TypeError, "width must be an integer, got 1.5"),
        (dict(stem_width=0), ValueError, "stem_width must be at least 1, got 0"),
        (dict(head_norm="yes"), TypeError, "head_norm must be True or False, got 'yes'"),
    ],
    ids=["block", "no-list", "negative-count", "word", "no-classes", "half-a-plane", "no-stem", "head-norm"],
)
def test_options_that_are_no_net(options, error, message):
    """Each is named before torch is asked for tensors of such sizes."""
    with pytest.raises(error, match=message):
        models.PreActResNet(**dict(block=PreActBlock, num_blocks=[1]) | options)
