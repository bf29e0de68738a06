"""Metrics on disk."""

import json
import sys

import pytest
from matplotlib.figure import Figure

from fused_preact.errors import UserError
from fused_preact.train.record import Recorder, draw


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_written_as_they_come(tmp_path):
    """A reader sees each row at once, and the same rows in memory."""
    recorder = Recorder(tmp_path, tensorboard=False)
    recorder.add("train", 1, loss=2.5, lr=0.1)
    recorder.add("test", 1, loss=2.0, error=0.5)
    assert lines(tmp_path) == recorder.rows == [
        {"split": "train", "iteration": 1, "loss": 2.5, "lr": 0.1},
        {"split": "test", "iteration": 1, "loss": 2.0, "error": 0.5},
    ]  # fmt: skip
    assert recorder.of("test") == recorder.rows[1:]


@pytest.mark.parametrize("tail", ["", '{"split": "train", "itera'], ids=["whole lines", "a half line"])
def test_rows_behind_the_checkpoint_are_taken_back(tail, tmp_path):
    """After a kill, what is behind the checkpoint is cut off, a half-written line too, so that no row comes twice."""
    recorder = Recorder(tmp_path, tensorboard=False)
    for iteration in (1, 2, 3):
        recorder.add("train", iteration, loss=float(iteration))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    again = Recorder(tmp_path, start=2, tensorboard=False)
    again.add("train", 3, loss=30.0)
    assert [row["loss"] for row in lines(tmp_path)] == [1.0, 2.0, 30.0] == [row["loss"] for row in again.rows]


def test_a_line_without_its_end_is_not_written_on(tmp_path):
    """It may be half a number; what comes next begins a line of its own."""
    first, half = '{"split": "train", "iteration": 1, "loss": 1.0}', '{"split": "train", "iteration": 2, "loss": 2.0}'
    (tmp_path / "metrics.jsonl").write_text(f"{first}\n{half}")
    Recorder(tmp_path, start=2, tensorboard=False).add("train", 3, loss=3.0)
    assert [row["iteration"] for row in lines(tmp_path)] == [1, 3]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{}",
        "[1]",
        "7",
        '{"iteration": 1}',
        '{"split": "held out", "iteration": 1}',
        '{"split": "train", "iteration": 1}',
        '{"split": "test", "iteration": 1, "loss": 1.0, "error": null}',
    ],
)
def test_a_line_of_somebody_else(line, tmp_path):
    """Metrics that were edited end in an error that names the line."""
    (tmp_path / "metrics.jsonl").write_text(f'{{"split": "train", "iteration": 1, "loss": 1.0}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is none that .*; delete that line, or"):
        Recorder(tmp_path, start=2, tensorboard=False)


def test_what_is_no_number_is_not_written(tmp_path):
    """NaN is no JSON: a reader of another language would refuse the file."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        Recorder(tmp_path, tensorboard=False).add("train", 1, loss=float("nan"))
    assert lines(tmp_path) == []


def test_a_disk_that_is_full(tmp_path):
    """The message names the file, which the system leaves out: the disk may be that of a log."""
    recorder = Recorder(tmp_path, tensorboard=False)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        recorder.add("train", 1, loss=1.0)


def test_no_events_where_they_are_not_wanted(tmp_path):
    """Though TensorBoard is installed."""
    pytest.importorskip("tensorboard")
    Recorder(tmp_path, tensorboard=False).add("train", 1, loss=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("checkpoint", [0, 2])
def test_tensorboard_events(checkpoint, tmp_path):
    """TensorBoard reads the same figures back, once each even where a session was resumed, be it from the start."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, loss in ((0, 1.0), (checkpoint, 5.0)):
        recorder = Recorder(tmp_path, start=start)
        for iteration in range(start + 1, start + 4):
            recorder.add("train", iteration, loss=loss)
        recorder.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    got = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert got == [(step, 1.0 if step <= checkpoint else 5.0) for step in range(1, checkpoint + 4)]


def test_events_that_cannot_be_written(tmp_path):
    """The message names their folder."""
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UserError, match=r"tensorboard: cannot be written: (File exists|Not a directory)"):
        Recorder(tmp_path).add("train", 1, loss=1.0)


def test_tensorboard_asked_for_and_missing(tmp_path, monkeypatch):
    """The message is the command that installs it; not asked for, the run goes on without."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="TensorBoard is not installed: pip install tensorboard"):
        Recorder(tmp_path, tensorboard=True)
    Recorder(tmp_path).add("train", 1, loss=1.0)
    assert not (tmp_path / "tensorboard").exists()


def test_curve(tmp_path, monkeypatch):
    """A picture where matplotlib is installed; else none, and no error."""
    rows = [{"split": "train", "iteration": 1, "loss": 1.0}, {"split": "test", "iteration": 1, "error": 0.1}]
    assert draw(rows, tmp_path / "curve.png", "a run")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw(rows, tmp_path / "curve.png", "a run")
    (loss,), (error,) = (axes.lines for axes in figures[0].axes)
    assert [(*line.get_xdata(), *line.get_ydata()) for line in (loss, error)] == [(1, 1.0), (1, 10.0)]  # percent
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not draw(rows, tmp_path / "none.png", "a run")


def test_a_curve_is_written_whole_or_not_at_all(full_disk, tmp_path):
    """On a full disk that of the run before it was resumed stays, and one error says why."""
    path = tmp_path / "curve.png"
    path.write_bytes(b"before")
    with pytest.raises(UserError, match=r"curve\.png: cannot be written: No space left on device"):
        draw([], path, "a run")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("curve.png", b"before")]
