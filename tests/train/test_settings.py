"""Recipes and settings."""

from dataclasses import asdict

import pytest

from fused_preact.errors import UserError
from fused_preact.train import settings

CIFAR = 50_000


def cifar(**given):
    return settings.resolve({"model": "resnet110", "data": "cifar", **given}, CIFAR, flip=True)


def test_the_recipe_of_the_paper():
    """SGD 0.9, weight decay 1e-4, batch 128, 0.1 divided by 10 at 32k and 48k of 64k, pad 4 and mirror."""
    chosen = cifar()
    assert (chosen.recipe, chosen.batch_size, chosen.iterations) == ("paper", 128, 64_000)
    assert (chosen.momentum, chosen.weight_decay, chosen.nesterov) == (0.9, 1e-4, False)
    assert (chosen.padding, chosen.flip) == (4, True)
    assert (chosen.eval_every, chosen.save_every) == (CIFAR // 128, 100)  # an epoch
    rates = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    for iteration, rate in rates.items():
        assert chosen.lr_at(iteration) == pytest.approx(rate, rel=1e-12)


def test_the_recipe_of_resnet_1k_layers():
    """Nesterov, batch 64, 200 epochs of 781 batches, dropped as epochs 81 and 122 begin."""
    chosen = cifar(recipe="resnet-1k-layers")
    assert (chosen.batch_size, chosen.nesterov, chosen.iterations) == (64, True, 200 * 781)
    assert chosen.milestones == [80 * 781, 121 * 781]


def test_digits_have_a_shorter_recipe_without_mirroring():
    """It ends in minutes, its rate drops where the paper's does; a mirrored digit is not the same digit."""
    chosen = settings.resolve({"model": "resnet20", "data": "digits"}, 1437, flip=False)
    assert (chosen.recipe, chosen.flip) == ("digits", False)
    assert (chosen.iterations, chosen.milestones) == (200, [100, 150])


def test_a_batch_may_be_all_images():
    """And no more."""
    assert cifar(batch_size=CIFAR).eval_every == 1


def test_warm_up():
    """--warmup 400 is the paper's 0.01 for 400 iterations."""
    chosen = cifar(warmup=400)
    assert [chosen.lr_at(iteration) for iteration in (0, 399, 400)] == [0.01, 0.01, 0.1]


def test_flags_replace_parts_and_milestones_follow_the_length():
    """A shorter run keeps the shape of the schedule, unless told otherwise."""
    assert cifar(iterations=100, lr=0.2).milestones == [50, 75]
    assert cifar(iterations=100, milestones=[10]).lr_at(10) == pytest.approx(0.01)
    assert cifar(milestones=[]).lr_at(63_999) == 0.1


def test_a_run_of_one_iteration_is_at_the_full_rate():
    """A drop that rounds to no iteration at all comes after the first."""
    chosen = cifar(iterations=1)
    assert (chosen.milestones, chosen.lr_at(0)) == ([1], 0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, r"--batch-size: expected from 1 to 50000, the number of training images, got 0"),
        ({"batch_size": 60_000}, r"--batch-size: expected from 1 to 50000.*got 60000"),
        ({"iterations": 0}, "--iterations: expected at least 1, got 0"),
        ({"lr": 0.0}, "--lr: expected more than 0, got 0.0"),
        ({"lr": float("nan")}, "--lr: expected more than 0, got nan"),
        ({"lr": float("inf")}, r"--lr: expected at most 3.4e\+38, as float32 holds no more"),
        ({"lr": 1e39}, r"--lr: expected at most 3.4e\+38, as float32 holds no more, got 1e\+39"),
        ({"warmup_lr": float("inf")}, r"--warmup-lr: expected at most 3.4e\+38, as float32 holds no more"),
        ({"momentum": float("inf")}, r"--momentum: expected at most 3.4e\+38, as float32 holds no more"),
        ({"weight_decay": float("inf")}, r"--weight-decay: expected at most 3.4e\+38, as float32 holds no more"),
        ({"momentum": -0.5}, "--momentum: expected at least 0, got -0.5"),
        ({"milestones": [20, 10]}, r"--milestones: expected increasing iterations, got \[20, 10\]"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov: expected a --momentum of more than 0 with it"),
        ({"recipe": "mine"}, "--recipe: expected one of paper, resnet-1k-layers, digits, got mine"),
        ({"amp": "fp8"}, "--amp: expected none or bf16, got fp8"),
        ({"memory": "tiny"}, "--memory: expected one of fast, lean, min, got tiny"),
        ({"seed": -1}, "--seed: expected at least 0, got -1"),
        ({"seed": 2**63}, r"--seed: expected less than 2\^63, got 9223372036854775808"),
        ({"weight_decay": -0.1}, "--weight-decay: expected at least 0, got -0.1"),
        ({"warmup": -1}, "--warmup: expected at least 0, got -1"),
        ({"warmup_lr": 0.0}, "--warmup-lr: expected more than 0, got 0.0"),
        ({"milestones": [10, 10]}, r"--milestones: expected increasing iterations, got \[10, 10\]"),
        ({"milestones": [-1]}, r"--milestones: expected increasing iterations, got \[-1\]"),
        ({"eval_every": 0}, "--eval-every: expected at least 1, got 0"),
        ({"padding": -1}, "--padding: expected at least 0, got -1"),
        ({"padding": 33}, "--padding: expected at most 32, the size of the images, got 33"),
        ({"save_every": 0}, "--save-every: expected at least 1, got 0"),
        ({"threads": 0}, "--threads: expected from 1 to 1024, got 0"),
        ({"threads": 1025}, "--threads: expected from 1 to 1024, got 1025"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_values(given, message):
    """Each names the flag, what was expected and what came."""
    with pytest.raises(UserError, match=message):
        cifar(**given)


def test_resuming_keeps_what_was_trained():
    """A resumed run has the settings it began with; flags that change nothing about them may be repeated."""
    before = cifar(seed=3, threads=2)
    given = {"model": "resnet110", "seed": 3, "threads": 1, "memory": "lean", "iterations": 70_000}
    free = {"data": "elsewhere", "backend": "library", "cuda_graph": True, "device": "cuda", "eval_every": 1}
    assert settings.resume(asdict(before), {**free, "save_every": 2}, "run").backend == "library"
    after = settings.resume(asdict(before), given, "run")
    assert (after.threads, after.memory, after.iterations) == (1, "lean", 70_000)
    assert {**asdict(after), "threads": 2, "memory": "fast", "iterations": 64_000} == asdict(before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "resnet20"), ("seed", 1), ("batch_size", 32), ("amp", "bf16"), ("lr", 0.2), ("flip", False)],
)
def test_resuming_refuses_another_run(name, value):
    """A different net, seed, batch or precision would not go on with the same run."""
    flag = settings.flag(name)
    with pytest.raises(UserError, match=f"run: trained with {flag} .*; --resume cannot change it to {value}"):
        settings.resume(asdict(cifar()), {name: value}, "run")


def test_resuming_refuses_unknown_settings():
    """A checkpoint with other settings than this version has says so."""
    with pytest.raises(UserError, match="written by another version"):
        settings.resume({"model": "resnet20"}, {}, "run")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", "x", "int for batch_size, got 'x'"),
        ("model", 5, "str for model, got 5"),
        ("lr", None, "float for lr, got None"),
        ("flip", 1, "bool for flip, got 1"),
        ("milestones", [1, "x"], r"list\[int\] for milestones, got \[1, 'x'\]"),
    ],
)
def test_resuming_refuses_values_of_another_type(name, value, expected):
    """What somebody else wrote into a checkpoint is one clear error, not a traceback from where it is used."""
    with pytest.raises(UserError, match=f"run: damaged: expected {expected}; start anew"):
        settings.resume({**asdict(cifar()), name: value}, {}, "run")


def test_resuming_refuses_a_batch_of_nothing():
    """The size of a batch is held to its range in a checkpoint, too: an epoch is divided by it."""
    with pytest.raises(UserError, match="--batch-size: expected at least 1, got 0"):
        settings.resume({**asdict(cifar()), "batch_size": 0}, {}, "run")
