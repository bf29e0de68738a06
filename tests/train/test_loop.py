"""Trainer and Run: steps, evaluation, and going on as if nothing had happened."""

import math
import os
from dataclasses import replace

import pytest
import torch

from fused_preact.errors import UserError
from fused_preact.train import checkpoint, loop
from fused_preact.train.data import Images
from fused_preact.train.loop import Run, Trainer
from fused_preact.train.record import Recorder

from .trainers import same, trainer


def run(one, folder, start=0):
    folder.mkdir(exist_ok=True)
    return Run(one, folder, Recorder(folder, start, tensorboard=False))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"amp": "bf16"},
        {"nesterov": True, "milestones": [2, 4], "flip": True},
        {"backend": "eager"},
        {"memory": "lean"},
    ],
    ids=["default", "bf16", "nesterov-flip", "eager", "lean"],
)
def test_resuming_is_exact(given, dataset, tmp_path):
    """A run that stops after 3 of 6 iterations and goes on from its checkpoint ends with the same bits."""
    whole = trainer(dataset, **given)
    run(whole, tmp_path / "whole").until_done()

    first = trainer(dataset, **given)
    run(first, tmp_path / "parts").until_done(stop=lambda: first.iteration == 3)
    state = checkpoint.load(tmp_path / "parts" / "checkpoint.pt")
    assert state["iteration"] == 3
    second = trainer(dataset, **given)
    second.load_state_dict(state, tmp_path)
    torch.rand(5)
    summary = run(second, tmp_path / "parts", start=3).until_done()

    assert summary.iteration == 6
    states = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts")]
    assert same(*[{**state, "rng": None} for state in states])
    losses = [
        [row["loss"] for row in Recorder(tmp_path / name, 6, tensorboard=False).rows] for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("at", [2, 4], ids=["between steps", "after the last step"])
def test_an_evaluation_is_given_up_and_made_up_for(at, dataset, tmp_path):
    """A signal does not wait for it; the session that goes on makes it first, and ends with the same metrics."""
    for name, stops in (("whole", []), ("parts", [at])):
        one, start = trainer(dataset, iterations=4, eval_every=2), 0
        for stop in stops:
            summary = run(one, tmp_path / name).until_done(stop=lambda one=one, stop=stop: one.iteration == stop)
            assert (summary.iteration, summary.finished, summary.idle) == (stop, False, False)
            assert summary.newest is None if stop == 2 else summary.newest["iteration"] == 2
            state, start = checkpoint.load(tmp_path / name / "checkpoint.pt"), stop
            one = trainer(dataset, iterations=4, eval_every=2)
            one.load_state_dict(state, tmp_path)
        assert run(one, tmp_path / name, start).until_done().finished
    whole, parts = (Recorder(tmp_path / name, 4, tensorboard=False).rows for name in ("whole", "parts"))
    assert [{**row, "images_per_second": 0} for row in whole] == [{**row, "images_per_second": 0} for row in parts]
    assert run(one, tmp_path / "parts", 4).until_done().idle


def test_an_evaluation_stops_between_batches(dataset):
    """That of fifty thousand images takes longer than the grace a scheduler gives."""
    one, asked = trainer(dataset), []
    assert one.evaluate(stop=lambda: asked.append(None) or len(asked) == 3) is None
    assert len(asked) == 3
    assert one.evaluate() is not None


def test_a_checkpoint_comes_before_the_evaluation(dataset, tmp_path):
    """What kills the run meanwhile costs no steps."""
    one, seen = run(trainer(dataset, iterations=3, eval_every=2, save_every=2), tmp_path), []

    def evaluate(stop):
        seen.append((one.trainer.iteration, checkpoint.load(tmp_path / "checkpoint.pt")["iteration"]))
        return 1.0, 0.5

    one.trainer.evaluate = evaluate
    one.until_done()
    assert seen == [(2, 2), (3, 3)]


def test_metrics_reach_the_disk_before_the_checkpoint(dataset, tmp_path, monkeypatch):
    """After a power cut no checkpoint is ahead of its figures."""
    one, events = run(trainer(dataset, iterations=1), tmp_path), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(checkpoint, "save", lambda path, state: events.append(state["iteration"]))
    one.until_done()
    assert events == [0, (tmp_path / "metrics.jsonl").stat().st_ino, 1]


def test_another_seed_is_another_run(dataset):
    """The comparison above can fail: initial weights depend on the seed."""
    assert not same(trainer(dataset).model.state_dict(), trainer(dataset, seed=1).model.state_dict())


def test_random_numbers_go_on(dataset, tmp_path):
    """Whatever draws from torch's generator in a forward pass goes on where it was."""
    first = trainer(dataset)
    checkpoint.save(tmp_path / "checkpoint.pt", first.state_dict())
    expected = torch.rand(4)
    second = trainer(dataset)
    torch.rand(9)
    second.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt"), tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_a_step_is_sgd_on_the_batch(dataset):
    """One step is plain SGD with momentum and weight decay, at the schedule's rate, on the batch of that iteration."""
    one = trainer(dataset, backend="eager", lr=0.05, weight_decay=1e-3, warmup=2, warmup_lr=0.02)
    x, labels = one.batches.at(0)
    before = {name: parameter.detach().clone() for name, parameter in one.model.named_parameters()}
    loss, accuracy = one.step()
    logits = trainer(dataset, backend="eager").model(x)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert loss == expected
    assert accuracy == (logits.argmax(1) == labels).float().mean()
    for name, parameter in one.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.02 * (parameter.grad + 1e-3 * before[name]))


def test_the_optimizer_is_that_of_the_settings(dataset):
    """One group with every parameter: decay is of all of them, as in the paper's code."""
    one = trainer(dataset, momentum=0.5, weight_decay=2e-3, nesterov=True)
    (group,) = one.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.5, 2e-3, True)
    assert group["lr"] is one.lr
    assert len(group["params"]) == len(list(one.model.parameters()))


def test_the_batches_are_those_of_the_settings(dataset):
    """What is drawn and how it is moved, not the weights alone."""
    batches = trainer(dataset, seed=5, padding=2, flip=True).batches
    assert (batches.batch_size, batches.seed, batches.padding, batches.flip) == (8, 5, 2, True)


def test_an_evaluation_between_steps_leaves_training_as_it_was(dataset):
    """Steps are in training mode whatever was before, and evaluation computes in the type of training."""
    one, seen = trainer(dataset, amp="bf16"), []
    one.model.linear.register_forward_hook(lambda layer, given, y: seen.append((layer.training, y.dtype)))
    one.step()
    one.evaluate()
    one.step()
    assert seen[0] == seen[-1] == (True, torch.bfloat16)
    assert set(seen[1:-1]) == {(False, torch.bfloat16)}


def test_a_memory_mode_keeps_less_and_computes_the_same(dataset):
    """The setting reaches the net: fewer activations are kept for the same loss and gradients."""
    kept, losses, gradients = {}, {}, {}
    for memory in ("fast", "lean"):
        one, storages = trainer(dataset, memory=memory), {}

        def note(t, storages=storages):
            return storages.setdefault(t.data_ptr(), t)

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            losses[memory], _ = one.step()
        kept[memory] = sum(t.nbytes for t in storages.values() if t.dim() == 4)
        gradients[memory] = torch.cat([parameter.grad.flatten() for parameter in one.model.parameters()])
    assert kept["lean"] < 0.9 * kept["fast"]
    assert torch.equal(losses["lean"], losses["fast"])
    assert (gradients["lean"] - gradients["fast"]).norm() < 1e-2 * gradients["fast"].norm()


def test_evaluation_counts_the_held_out_errors(dataset):
    """Loss and error are means over all held-out images, in eval mode, and change nothing."""
    one = trainer(dataset, backend="eager")
    one.step()
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    loss, error = one.evaluate()
    assert same(before, dict(one.model.state_dict()))
    mean, std = dataset.moments
    with torch.no_grad():
        logits = one.model.eval()((dataset.test.images.float() - mean) / std)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, dataset.test.labels).item(), rel=1e-5)
    assert error == (logits.argmax(1) != dataset.test.labels).sum().item() / len(dataset.test)


def test_intervals_and_summary(dataset, tmp_path):
    """Evaluations and checkpoints come when asked for and at the end; the summary holds the last and the best one."""
    one = run(trainer(dataset, iterations=5, eval_every=2, save_every=4), tmp_path)
    saved = []
    one.save, save = lambda: (saved.append(one.trainer.iteration), save()), one.save
    summary = one.until_done()
    assert saved == [0, 4, 5]
    tests = one.recorder.of("test")
    assert [row["iteration"] for row in tests] == [2, 4, 5]
    assert [row["iteration"] for row in one.recorder.of("train")] == [1, 2, 3, 4, 5]
    assert (summary.newest, summary.best["error"]) == (tests[-1], min(row["error"] for row in tests))
    assert 0 < 40 / summary.images_per_second < summary.seconds


def test_figures_are_of_their_iteration_and_of_training_alone(dataset, tmp_path, monkeypatch):
    """On a CPU each row is there after its step, with the rate of that step; no save or evaluation is timed."""
    now, rows = [0.0], []
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    def takes(seconds, what):
        def run(*given):
            now[0] += seconds
            return what(*given)

        return run

    one = run(trainer(dataset, iterations=4, milestones=[2], eval_every=2, save_every=1, warmup=1), tmp_path)
    errors = iter([(1.0, 0.25), (1.0, 0.5)])
    one.trainer.step = takes(0.5, one.trainer.step)
    one.trainer.evaluate = takes(100.0, lambda stop: next(errors))
    monkeypatch.setattr(checkpoint, "save", takes(10.0, lambda *_: None))
    summary = one.until_done(stop=lambda: rows.append(len(one.recorder.of("train"))))
    assert rows == [0, 1, 2, 3]
    train = one.recorder.of("train")
    assert [row["images_per_second"] for row in train] == [16.0] * 4  # 8 in half a second
    assert [row["lr"] for row in train] == pytest.approx([0.01, 0.1, 0.01, 0.01], rel=1e-12)
    assert summary.images_per_second == 16.0
    assert summary.seconds == 4 * 0.5 + 2 * 100 + 5 * 10
    assert (summary.newest["error"], summary.best["error"], summary.best["iteration"]) == (0.5, 0.25, 2)


def test_a_loss_that_is_not_finite(dataset, tmp_path):
    """Training stops with advice, and the last checkpoint is from before."""
    one = run(trainer(dataset, lr=1e30, save_every=1), tmp_path)
    with pytest.raises(UserError, match=r"the loss is nan at iteration [23]: start anew, with --overwrite and a"):
        one.until_done()
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["iteration"] < 3
    assert all(math.isfinite(row["loss"]) for row in one.recorder.rows)


def test_an_update_that_diverges_is_not_saved(dataset, tmp_path):
    """The loss of the last step is from before its update: the weights tell, and the run does not end well."""
    one = run(trainer(dataset, lr=3e38, weight_decay=100.0, iterations=1), tmp_path)
    with pytest.raises(UserError, match=r"weights are not finite after iteration 1: start anew, .* is from before"):
        one.until_done()
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["iteration"] == 0
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_figures_of_a_cpu_come_at_once(dataset, tmp_path):
    """Nothing waits for it."""
    one, counts = run(trainer(dataset), tmp_path), []
    one.until_done(stop=lambda: counts.append(len(one.recorder.of("train"))) or len(counts) == 3)
    assert counts == [0, 1, 2]


def test_weights_that_are_not_finite_to_begin_with(dataset, tmp_path):
    """As a checkpoint may hold them that was made otherwise: no other is from before."""
    one = run(trainer(dataset), tmp_path)
    torch.nn.init.constant_(one.trainer.model.linear.bias, math.inf)
    with pytest.raises(UserError, match=r"weights are not finite after iteration 0: .* or a --warmup$"):
        one.until_done()
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(number, dataset):
    """In a running statistic, too; large ones are none."""
    one = trainer(dataset)
    one.model.conv1.weight.data.fill_(3e38)
    assert one.finite()
    one.model.bn.running_mean[3] = number
    assert not one.finite()


def test_a_held_out_loss_that_is_not_finite(dataset, tmp_path):
    """It ends the run with advice, and is no row of the metrics, which are JSON."""
    one = run(trainer(dataset, iterations=1), tmp_path)
    one.trainer.evaluate = lambda stop: (math.nan, 0.9)
    with pytest.raises(UserError, match=r"the held-out loss is nan after iteration 1: start anew, .* or a --warmup$"):
        one.until_done()
    assert one.recorder.of("test") == []


@pytest.mark.parametrize(
    "wrong",
    [{"rng": {}}, {"rng": {"cpu": torch.zeros(3)}}, {"model": {"conv1.weight": 5}}, {"optimizer": {"state": 5}}],
    ids=["no rng", "rng", "model", "optimizer"],
)
def test_a_checkpoint_with_something_else_in_it(wrong, dataset, tmp_path):
    """One clear error that names the file, whatever torch makes of it."""
    one = trainer(dataset)
    with pytest.raises(UserError, match=r"checkpoint.pt: of another net than resnet20, or damaged"):
        one.load_state_dict({**one.state_dict(), **wrong}, tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("momentum", [None, torch.zeros(3)], ids=["none", "of another shape"])
def test_a_momentum_that_is_not_of_its_weight(momentum, dataset, tmp_path):
    """It is refused: torch's fused SGD would look at no shape, and write where other memory is."""
    one = trainer(dataset)
    one.step()
    state = one.state_dict()
    state["optimizer"]["state"][0] = {"momentum_buffer": momentum}
    with pytest.raises(UserError, match=r"checkpoint.pt: of another net than resnet20, or damaged"):
        one.load_state_dict(state, tmp_path / "checkpoint.pt")


def test_a_checkpoint_of_another_net(dataset, tmp_path):
    """Other names or shapes are one clear error, and so is another data set."""
    state = trainer(dataset, model="resnet56").state_dict()
    with pytest.raises(UserError, match="of another net than resnet20, or damaged: names, shapes"):
        trainer(dataset).load_state_dict(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="of a run on CIFAR-10; --data is digits"):
        trainer(dataset).load_state_dict({**state, "dataset": "CIFAR-10"}, tmp_path / "checkpoint.pt")


def test_other_data_with_fewer_images_than_a_batch(dataset, tmp_path):
    """What is told is that they are of another set, whatever the size of the batch."""
    one = Trainer(replace(trainer(dataset).settings, batch_size=2 * len(dataset.train)), dataset)
    with pytest.raises(UserError, match="of a run on CIFAR-10; --data is digits"):
        one.load_state_dict({**one.state_dict(), "dataset": "CIFAR-10"}, tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "resnet21"}, "--model resnet21 --memory fast: name must be one of 'resnet20', 'resnet56'"),
        ({"device": "gpu"}, "--device: expected a device that torch finds here, such as cpu, got gpu"),
        ({"device": "meta"}, "--device: expected a device that torch finds here, such as cpu, got meta"),
        ({"device": "hpu"}, "--device: expected a device that torch finds here, such as cpu, got hpu"),
        ({"device": "cpu", "backend": "cuda"}, "--device cpu: backend='cuda' cannot .*: it runs on CUDA devices, not"),
    ],
    ids=["model", "device", "device without numbers", "device without a library", "backend"],
)
def test_what_is_not_there(given, message, dataset):
    """A net, a device or a backend that cannot be had is named, with what could be."""
    with pytest.raises(UserError, match=message):
        trainer(dataset, **given)


def test_too_few_images(dataset):
    """A batch needs as many training images."""
    few = replace(dataset, train=Images(dataset.train.images[:5], dataset.train.labels[:5]))
    with pytest.raises(UserError, match="--batch-size: expected from 1 to 5, the number of training images, got 8"):
        trainer(few)
