"""`fused-preact train` as a person runs it."""

import contextlib
import signal
import sys

import pytest
import torch

from fused_preact import backends
from fused_preact.errors import UserError
from fused_preact.train import checkpoint, command, lock

from .runs import QUICK, metrics, start, train, wait_until


def state(folder):
    """Weights, batch statistics and momenta of the last checkpoint."""
    saved = checkpoint.load(folder / "checkpoint.pt")
    momenta = {str(key): value["momentum_buffer"] for key, value in saved["optimizer"]["state"].items()}
    return {**saved["model"], **momenta}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of 40 iterations that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(*QUICK, "--iterations", 40, "--out", folder) == 0
    return folder


@pytest.mark.parametrize(
    ("number", "writing"),
    [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGINT, False)],
    ids=["kill", "kill while a checkpoint is written", "Ctrl-C"],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(number, writing, whole, tmp_path):
    """Stopped at any moment, --resume ends with the weights, momenta and losses of an undisturbed run."""
    folder = tmp_path / "run"
    process = start(*QUICK, "--iterations", 40, "--save-every", 1 if writing else 3, "--out", folder)
    wait_until(process, lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) >= 7)
    if writing:
        wait_until(process, (folder / "checkpoint.pt.tmp").exists)
    process.send_signal(number)
    output, _ = process.communicate()
    iteration = checkpoint.load(folder / "checkpoint.pt")["iteration"]
    assert 0 < iteration < 40
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number, output
        assert iteration == metrics(folder)[-1]["iteration"]
        assert f"fused-preact train --resume --out {folder}" in output.splitlines()

    assert train("--resume", "--out", folder, "--no-tensorboard") == 0
    got, expected = state(folder), state(whole)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert [row["loss"] for row in metrics(folder)] == [row["loss"] for row in metrics(whole)]


def test_digits_are_learnt(tmp_path, capsys):
    """The defaults of the embedded data set reach over 95 % of the held-out images."""
    folder = tmp_path / "run"
    assert train("--model", "resnet20", "--out", folder) == 0
    rows = metrics(folder)
    assert rows[-1]["split"] == "test"
    assert rows[-1]["error"] < 0.05
    assert f"Held-out error {rows[-1]['error']:.2%} after iteration {rows[-1]['iteration']}" in capsys.readouterr().out
    assert (folder / "curve.png").exists()


def test_a_run_is_not_overwritten_by_accident(tmp_path, capsys):
    """A folder with something in it needs --resume or --overwrite, and --overwrite takes the run's own files only."""
    folder = tmp_path / "run"
    assert train(*QUICK, "--out", folder) == 0
    (folder / "notes.txt").write_text("mine")
    before = (folder / "checkpoint.pt").read_bytes()
    assert train(*QUICK, "--out", folder) == 2
    assert "not empty; --resume goes on with the run there, --overwrite discards it" in capsys.readouterr().err
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert train(*QUICK, "--iterations", 3, "--out", folder, "--overwrite") == 0
    assert [row["iteration"] for row in metrics(folder)] == [1, 2, 3, 3]
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_run_that_could_not_begin_leaves_nothing(tmp_path, monkeypatch, capsys):
    """After a disk too full for the first checkpoint the same command begins, and needs no --overwrite."""

    def full(path, state):
        raise UserError(f"{path}: cannot be written: No space left on device")

    arguments = "--model", "resnet20", "--iterations", 1, "--threads", 1, "--out", tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        assert train(*arguments) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert train(*arguments) == 0


def test_a_run_that_was_killed_before_it_began_is_not_in_the_way(tmp_path):
    """Of half of a first checkpoint --resume says to begin without it; the same command does, without --overwrite."""
    (tmp_path / "checkpoint.pt.tmp").write_bytes(b"half")
    assert train(*QUICK, "--iterations", 1, "--out", tmp_path) == 0
    assert not (tmp_path / "checkpoint.pt.tmp").exists()


def test_two_runs_do_not_share_a_folder(whole, capsys):
    """Neither --resume nor --overwrite comes between a run that is going on and its checkpoints."""
    before = (whole / "checkpoint.pt").read_bytes()
    with lock.alone(whole):
        assert train("--resume", "--out", whole, "--no-tensorboard") == 2
        assert train(*QUICK, "--out", whole, "--overwrite") == 2
    assert capsys.readouterr().err.count(f"{whole}: another run is going on there") == 2
    assert (whole / "checkpoint.pt").read_bytes() == before


def test_overwriting_leaves_nothing_of_the_run_before(tmp_path):
    """No metrics, no picture, no events, and no half of a checkpoint."""
    (tmp_path / "tensorboard").mkdir()
    old = [tmp_path / name for name in ("checkpoint.pt.tmp", "curve.png", "metrics.jsonl", "tensorboard/events")]
    for path in old:
        path.write_text("of the run before\n")
    assert train(*QUICK, "--iterations", 1, "--out", tmp_path, "--overwrite") == 0
    assert not any(path.exists() and path.read_bytes() == b"of the run before\n" for path in old)
    assert not (tmp_path / "checkpoint.pt.tmp").exists()
    assert not (tmp_path / "tensorboard").exists()


def test_a_link_to_events_is_unlinked(tmp_path):
    """What it leads to is somebody else's; the run is removed."""
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "theirs").touch()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tensorboard").symlink_to(tmp_path / "events")
    assert train(*QUICK, "--iterations", 1, "--out", folder, "--overwrite") == 0
    assert not (folder / "tensorboard").is_symlink()
    assert (tmp_path / "events" / "theirs").exists()


def test_events_that_cannot_be_removed(tmp_path, monkeypatch, capsys):
    """The checkpoint of the run before is still there, and the message is what Python said where the system did not."""

    def refuse(path):
        raise OSError("not of this kind")

    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "checkpoint.pt").write_text("of a long run")
    monkeypatch.setattr(command.shutil, "rmtree", refuse)
    assert train(*QUICK, "--out", tmp_path, "--overwrite") == 2
    assert f"--out {tmp_path}: cannot be written: not of this kind\n" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_text() == "of a long run"


def test_a_run_that_ended_meanwhile_is_not_removed(tmp_path, monkeypatch, capsys):
    """Two begin in one folder; while the second reads its data, the first trains to its end."""
    load, (folder, product) = command._load, (tmp_path / "run", tmp_path / "run" / "checkpoint.pt")

    def slow(data):
        folder.mkdir()
        product.write_text("of the first")
        return load(data)

    monkeypatch.setattr(command, "_load", slow)
    assert train(*QUICK, "--out", folder) == 2
    assert f"{folder}: not empty; --resume goes on" in capsys.readouterr().err
    assert product.read_text() == "of the first"


def test_a_run_that_is_stopped_says_how_it_goes_on(tmp_path, monkeypatch, capsys):
    """The folder is quoted for a shell, and the exit code is that of the signal; --data may be elsewhere then."""
    loaded, load = [], command._load
    monkeypatch.setattr(command, "_load", lambda data: loaded.append(data) or load("digits"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my run"
    with monkeypatch.context() as patch:
        patch.setattr(command, "_signals", lambda: contextlib.nullcontext([15]))
        assert train(*QUICK, "--iterations", 3, "--out", folder) == 128 + 15
    assert f"fused-preact train --resume --out '{folder}'\n" in capsys.readouterr().out
    assert train("--resume", "--out", folder, "--data", "elsewhere", "--iterations", 2, "--no-tensorboard") == 0
    assert loaded == ["digits", str(tmp_path / "elsewhere")]
    assert train("--resume", "--out", folder, "--iterations", 1, "--no-tensorboard") == 2
    assert "--iterations: expected 2 or more, which are done, got 1" in capsys.readouterr().err


def test_data_are_found_from_another_folder(tmp_path, monkeypatch):
    """A run that was given a relative path goes on wherever --resume is given."""
    loaded, load = [], command._load
    monkeypatch.setattr(command, "_load", lambda data: loaded.append(data) or load("digits"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    assert train(*QUICK, "--iterations", 1, "--data", "cifar", "--recipe", "digits", "--out", "run") == 0
    monkeypatch.chdir(tmp_path / "sub")
    assert train("--resume", "--out", "../run", "--no-tensorboard") == 0
    assert loaded == [str(tmp_path / "cifar")] * 2


def test_a_run_stopped_before_an_evaluation_names_the_one_it_made(tmp_path, monkeypatch, capsys):
    """The error is of its own iteration; and what is left to do, if only an evaluation, is said."""
    folder, stopped, step = tmp_path / "run", [], command.Trainer.step

    def third(trainer):
        if trainer.iteration == 2:
            stopped.append(15)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(command, "_signals", lambda: contextlib.nullcontext(stopped))
        patch.setattr(command.Trainer, "step", third)
        assert train(*QUICK, "--iterations", 3, "--eval-every", 2, "--out", folder) == 128 + 15
    output = capsys.readouterr().out
    assert f"Held-out error {metrics(folder)[2]['error']:.2%} after iteration 2 (best" in output
    assert "Stopped after iteration 3 of 3. Go on with:" in output
    assert train("--resume", "--out", folder, "--no-tensorboard") == 0
    assert [row["iteration"] for row in metrics(folder) if row["split"] == "test"] == [2, 3]
    assert "nothing was left to do" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["exp[a]", "exp[/a]b", "a:on:b", "a" * 90])
def test_a_folder_is_printed_as_it_is_called(name, tmp_path, capsys):
    """Nothing in it is markup or an emoji, and no line breaks within it."""
    folder = tmp_path / name
    assert train(*QUICK, "--iterations", 1, "--out", folder) == 0
    output = capsys.readouterr().out
    assert f"; into {folder}\n" in output
    assert f"Learning curve: {folder / 'curve.png'}\n" in output


def test_nothing_is_overwritten_for_a_run_that_cannot_start(tmp_path, monkeypatch, capsys):
    """What is missing is said before what was there is gone."""
    (tmp_path / "checkpoint.pt").write_text("of a long run")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert train("--model", "resnet20", "--out", tmp_path, "--overwrite", "--tensorboard") == 2
    assert "TensorBoard is not installed" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_text() == "of a long run"


def test_a_finished_run_can_be_lengthened(tmp_path, capsys):
    """--resume --iterations N goes on to N; that nothing is left is said on one line, in a log too."""
    folder = tmp_path / "run"
    assert train(*QUICK, "--iterations", 2, "--out", folder) == 0
    assert train("--resume", "--out", folder, "--iterations", 4, "--no-tensorboard") == 0
    assert [row["iteration"] for row in metrics(folder) if row["split"] == "train"] == [1, 2, 3, 4]
    capsys.readouterr()
    assert train("--resume", "--out", folder, "--no-tensorboard") == 0
    assert "nothing was left to do, a higher --iterations goes on" in capsys.readouterr().out


def test_a_run_that_is_lengthened_stays_so(tmp_path, monkeypatch):
    """Killed before its first save on the way, it still goes on to the new end without being told again."""
    folder = tmp_path / "run"
    assert train(*QUICK, "--iterations", 2, "--out", folder) == 0

    def killed(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command.Trainer, "step", killed)
        assert train("--resume", "--out", folder, "--iterations", 4, "--no-tensorboard") == 130
    assert train("--resume", "--out", folder, "--no-tensorboard") == 0
    assert checkpoint.load(folder / "checkpoint.pt")["iteration"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model: expected the name of a network"),
        (["--model", "resnet20", "--data", ""], "--data: expected digits, or the path of a CIFAR archive"),
        (["--model", "resnet20", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["--model", "resnet20", "--batch-size", "2000"], "--batch-size: expected from 1 to 1437"),
        (["--model", "resnet20", "--lr", "-1"], "--lr: expected more than 0, got -1.0"),
        (
            ["--model", "resnet20", "--memory", "min"],
            "--model resnet20 --memory min: memory='min' needs blocks of three",
        ),
        (
            ["--model", "resnet164", "--memory", "lean", "--backend", "eager"],
            "--memory lean: needs fused blocks; --backend eager runs the plain layers",
        ),
        (
            ["--model", "resnet20", "--device", "cpu", "--cuda-graph"],
            "--cuda-graph: expected --device cuda with it, got --device cpu",
        ),
        (["--model", "resnet20", "--device", "meta"], "--device: expected a device that torch finds here, such as cpu"),
        (
            ["--model", "resnet20", "--backend", "cuda", "--device", "cpu"],
            "--backend cuda --batch-size 32 --device cpu: backend='cuda' cannot serve this call: it runs on CUDA dev",
        ),
        (
            ["--model", "resnet200", "--batch-size", "1", "--backend", "library", "--device", "cpu"],
            "--model resnet200 --backend library --batch-size 1 --device cpu: the input of 0.bn3 must have more than",
        ),
        (["--resume"], "--resume: expected --out with the folder of the run"),
        (["--resume", "--model", "resnet20"], "checkpoint.pt: no such checkpoint; leave out --resume"),
        (["--resume", "--model", "resnet20", "--data", "my/cifar"], "runs/resnet20-cifar/checkpoint.pt: no such"),
        (
            ["--resume", "--overwrite", "--model", "resnet20"],
            "--overwrite: discards the run that --resume goes on with",
        ),
        (["--model", "resnet20", "--out", "file"], "--out file: not a folder"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_flags(arguments, message, tmp_path, monkeypatch, capsys):
    """One line on the error stream, exit code 2, and no run left behind, also where a GPU and Triton are."""
    monkeypatch.setattr(backends, "status", lambda: dict.fromkeys(backends.FUSED))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_net_that_is_not_there(capsys):
    """It is told before the data are read."""
    with pytest.raises(SystemExit, match="2"):
        train("--model", "resnet21", "--data", "nowhere")
    assert "argument --model: invalid choice: 'resnet21' (choose from" in capsys.readouterr().err


def test_a_run_of_another_net_is_not_resumed(tmp_path, capsys):
    """--model beside --resume must be the net of the run."""
    folder = tmp_path / "run"
    assert train(*QUICK, "--iterations", 1, "--out", folder) == 0
    assert train("--resume", "--out", folder, "--model", "resnet56") == 2
    assert "trained with --model resnet20; --resume cannot change it to resnet56" in capsys.readouterr().err
