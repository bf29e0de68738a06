from dataclasses import replace

import pytest
import torch
from torch import nn

from fused_preact.bench import check
from fused_preact.bench.contenders import Contender, build


def pre_activations(problem):
    """Values that enter the ReLUs of the eager module, in float64."""
    module = problem.case.make(backend="eager")
    module.load_state_dict(problem.state)
    module.double().train()
    found = []
    for norm in [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.register_forward_hook(lambda *arguments: found.append(arguments[2].detach()))
    module(problem.x.double())
    return found


def test_pose_keeps_relu_inputs_away_from_zero(block):
    """Rounding must not decide a mask: the gap around zero is far wider than float32's rounding, in every channel."""
    for z in pre_activations(check.pose(replace(block, shape=(8, 8, 16, 16)))):
        assert z.abs().min() > 1e-5
        assert (z.amin((0, 2, 3)) < 0).all()
        assert (z.amax((0, 2, 3)) > 0).all()


def test_pose_is_reproducible(block):
    """The same seed poses the same problem, and another seed another."""
    before = torch.get_rng_state()
    first, again, other = check.pose(block), check.pose(block), check.pose(block, seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # the numbers that others draw are not disturbed
    assert torch.equal(first.x, again.x)
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    assert not torch.equal(first.x, other.x)


def test_posed_parameters_are_fresh(block):
    """Contenders start with untouched running statistics, whatever pose ran to choose the parameters."""
    state = check.pose(block).state
    assert all((state[f"bn{i}.num_batches_tracked"] == 0).all() for i in (1, 2))
    assert all((state[f"bn{i}.running_mean"] == 0).all() for i in (1, 2))


def test_error_is_relative():
    """Root mean square of relative errors: 10 % of one tensor and none of another."""
    reference = [torch.tensor([3.0, 4.0]), torch.tensor([1.0])]
    assert check.error([torch.tensor([3.3, 4.4]), torch.tensor([1.0])], reference) == pytest.approx(0.1 / 2**0.5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_right_contenders_pass(block, dtype):
    """The package's own kernels are within the limit, in both formats, with errors of the dtype's size."""
    errors = check.verify(check.pose(replace(block, dtype=dtype)))
    assert set(errors) == {f"{who} {layout}" for who in ("fused", "eager") for layout in ("channels_last", "NCHW")}
    size = {"fp32": 1e-5, "bf16": 1e-1}[dtype]
    assert all(0 < value < size for found in errors.values() for value in found.values())


@pytest.mark.usefixtures("broken")
def test_wrong_contender_is_named(block):
    """An error of 1e-4 in y is caught, and the message says who, what and by how much."""
    with pytest.raises(check.CheckError, match=r"Tiny, block: the error of y of fused channels_last .* is 1\.00e-04"):
        check.verify(check.pose(block))


@pytest.mark.parametrize(("off", "right"), [(1.9e-3, True), (2.1e-3, False)])
def test_the_limit_is_twice_the_largest_error_of_eager(off, right, block, monkeypatch):
    """Of all formats: the two may round differently."""
    errors = {"eager channels_last": 1e-3, "eager NCHW": 1e-6, "fused channels_last": off, "fused NCHW": 0.0}

    def answers(contender, problem, dtype=None):
        return {"y": [torch.ones(1) * (1 + (0 if dtype else errors[contender.name]))]}

    monkeypatch.setattr(check, "_answers", answers)
    problem = check.pose(block)
    if right:
        assert check.verify(problem)["fused channels_last"]["y"] == pytest.approx(off, rel=1e-3)
    else:
        with pytest.raises(check.CheckError, match="the error of y of fused channels_last"):
            check.verify(problem)


def test_not_a_number_is_wrong(block, monkeypatch):
    """A NaN fails every comparison, so it must not slip through one."""
    monkeypatch.setattr(check, "error", lambda tensors, reference: float("nan"))
    with pytest.raises(check.CheckError):
        check.verify(check.pose(block))


def test_widen_keeps_the_parameters(small_net):
    """A net is checked at a small batch and timed at its own, with the same parameters."""
    posed = check.pose(small_net)
    wide = check.widen(posed, replace(small_net, shape=(5, 3, 8, 8)))
    assert wide.x.shape == (5, 3, 8, 8)
    assert wide.target.shape == (5,)
    assert wide.state is posed.state
    assert torch.equal(check.widen(posed, replace(small_net, shape=(5, 3, 8, 8))).x, wide.x)
    assert not torch.equal(wide.x[:2], posed.x)


def test_eager_baseline_overwrites_in_place(block):
    """The baseline is the strongest eager: its ReLU writes over what batch norm returned."""
    module = build(Contender("eager", "NCHW"), check.pose(block))
    seen = []
    relu = torch.nn.functional.relu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "relu", lambda x, inplace=False: seen.append(inplace) or relu(x, inplace))
        module(torch.randn(4, 8, 8, 8))
    assert seen == [True, True]
