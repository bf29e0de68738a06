"""What a run leaves behind for people: metrics as JSON lines, TensorBoard events, the learning curve."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import naming, replacing

# What each kind of row must have for the summary and the curve.
FIGURES = {"train": ("iteration", "loss"), "test": ("iteration", "loss", "error")}


class Recorder:
    """Appends the metrics of a run to `metrics.jsonl` in `folder`, and to TensorBoard events under `tensorboard/`.

    A line has `split` ("train": one iteration; "test": the held-out images after it), `iteration` (from 1) and figures.
    What an earlier, interrupted session wrote after iteration `start` is taken back. The first figures begin the files.
    tensorboard: True, False, or None for "where it is installed".

    Raises:
        UserError: tensorboard is True and it is not installed, or the figures of the earlier session cannot be read.
    """

    def __init__(self, folder: Path, start: int = 0, tensorboard: bool | None = None) -> None:
        self._path = folder / "metrics.jsonl"
        self.rows = _keep(self._path, start)
        self._events, self._start = folder / "tensorboard", start
        self._wanted = check_tensorboard(tensorboard)
        self._writer: Any | None = None

    def add(self, split: str, iteration: int, **figures: float) -> None:
        """Record figures of one split after `iteration` iterations.

        Raises:
            UserError: they cannot be written.
        """
        row = {"split": split, "iteration": iteration, **figures}
        self.rows.append(row)
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._wanted:
            with naming(self._events):
                self._writer = self._writer or _writer(self._events, self._start)
                for name, value in figures.items():
                    self._writer.add_scalar(f"{split}/{name}", value, iteration)

    def sync(self) -> None:
        """Make the lines so far last through a power cut.

        Raises:
            UserError: they cannot be written.
        """
        if self._path.exists():
            with naming(self._path), self._path.open("ab") as file:
                os.fsync(file.fileno())

    def of(self, split: str) -> list[dict[str, Any]]:
        """All rows of one split, in order."""
        return [row for row in self.rows if row["split"] == split]

    def close(self) -> None:
        """Hand the last events to TensorBoard.

        Raises:
            UserError: they cannot be written.
        """
        if self._writer is not None:
            with naming(self._events):
                self._writer.close()


def _keep(path: Path, start: int) -> list[dict[str, Any]]:
    """The rows up to iteration `start`; anything after them is cut off the file."""
    if not path.exists():
        return []
    rows, size = [], 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
                if row is None or row["iteration"] > start:
                    break
                sum(row[name] for name in FIGURES[row["split"]])  # they are there, and numbers
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path}: line {len(rows) + 1} is none that fused-preact train wrote; delete that line, "
                    "or move the file away, to go on without those figures"
                ) from error
            rows.append(row)
            size += len(line)
    os.truncate(path, size)
    return rows


def check_tensorboard(wanted: bool | None) -> bool:
    """Whether events are to be written.

    Raises:
        UserError: they are asked for, and TensorBoard is not installed.
    """
    there = importlib.util.find_spec("tensorboard") is not None
    if wanted and not there:
        raise UserError("--tensorboard: TensorBoard is not installed: pip install tensorboard")
    return there and wanted is not False


def _writer(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start + 1)


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw training loss and held-out error against the iteration to path. False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    loss = figure.add_subplot(xlabel="iteration", ylabel="training loss", yscale="log", title=title)
    error = loss.twinx()
    error.set_ylabel("held-out error, %")
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    loss.plot([row["iteration"] for row in train], [row["loss"] for row in train], color="tab:blue", linewidth=0.8)
    error.plot([row["iteration"] for row in test], [100 * row["error"] for row in test], color="tab:orange", marker=".")
    loss.yaxis.label.set_color("tab:blue")
    error.yaxis.label.set_color("tab:orange")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True
