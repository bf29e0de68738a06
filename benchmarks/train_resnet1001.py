"""Trains ResNet-1001 on scikit-learn's digits from one seed, eager and in each memory mode: what it took, as a picture.

    python benchmarks/train_resnet1001.py RESULT.json           # some twenty minutes on two cores; draws RESULT.png
    python benchmarks/train_resnet1001.py RESULT.json --show    # draw it again, training nothing

Each run is `fused-preact train` with its defaults, in a process of its own, one after the other. Seconds are those of
the steps (saving and evaluating left out); peak memory is all that the process ever had resident. The result is

    {date, device, versions, platform, commit, malloc, runs: {name: run}}
    run: {seconds: [by step, since the first began], loss: [by step], iteration: [of each evaluation],
          error: [of each evaluation, 0 to 1], peak_bytes}
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fused_preact.bench import environment
from fused_preact.bench.picture import GOAL, GRID, SAVED, TEXT, TOTAL
from fused_preact.files import replacing

RUNS = {
    "eager": ["--backend", "eager"],
    "fast": [],
    "lean": ["--memory", "lean"],
    "min": ["--memory", "min"],
}
COLORS = {"eager": TEXT, "fast": TOTAL, "lean": SAVED, "min": GOAL}
BATCH, AVERAGED, GIB = 32, 10, 2**30
TICKS = (0.1, 0.2, 0.5, 1, 2)  # of the loss


def train(options: list[str]) -> dict[str, Any]:
    """Trains to the end; see the top of this file for what it returns.

    Raises:
        SystemExit: training failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = ["--out", folder, "--overwrite", "--no-tensorboard"]
        command = [sys.executable, "-m", "fused_preact", "train", "--model", "resnet1001", "--batch-size", str(BATCH)]
        process = subprocess.Popen([*command, *where, *options])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            sys.exit(process.returncode)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps, tests = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    return {
        "seconds": [round(s, 3) for s in accumulate(BATCH / row["images_per_second"] for row in steps)],
        "loss": [round(row["loss"], 5) for row in steps],
        "iteration": [row["iteration"] for row in tests],
        "error": [row["error"] for row in tests],
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes a PNG with a transparent background: loss against minutes, and the peak memory of each run.

    A loss is the mean of AVERAGED steps.
    """
    figure = Figure(figsize=(9.5, 3.4), dpi=150)
    loss, memory = figure.subplots(1, 2, width_ratios=(5, 3))
    runs = document["runs"]
    for name, run in runs.items():
        minutes, peak = np.array(run["seconds"]) / 60, run["peak_bytes"] / GIB
        smooth = np.convolve(run["loss"], np.ones(AVERAGED) / AVERAGED, "valid")
        loss.plot(minutes[AVERAGED - 1 :], smooth, color=COLORS[name], linewidth=1.5, label=name)
        memory.barh(name, peak, 0.6, color=COLORS[name])
        figures = f"  {peak:.1f} GiB; {minutes[-1]:.1f} min; {1 - run['error'][-1]:.1%}"
        memory.text(peak, name, figures, color=TEXT, fontsize=8, va="center")
    loss.set_yscale("log")
    loss.minorticks_off()
    loss.set_yticks(TICKS, map(str, TICKS))
    loss.set_title("Training loss against minutes", color=TEXT, fontsize=9, loc="left")
    memory.set_title("Peak memory; time; held-out digits right", color=TEXT, fontsize=9, loc="left")
    memory.set_xlim(0, 1.9 * max(run["peak_bytes"] for run in runs.values()) / GIB)
    memory.invert_yaxis()
    memory.set_xticks([])
    loss.grid(axis="y", color=GRID)
    for axes in (loss, memory):
        axes.tick_params(colors=TEXT, labelsize=8, length=0, which="both")
        axes.spines[:].set_visible(False)
    loss.legend(frameon=False, labelcolor=TEXT, fontsize=8)
    device, steps = document["device"], len(runs["eager"]["loss"])
    title = f"ResNet-1001, float32, {steps} steps of {BATCH} images; {device['model']}, {device['threads']} threads"
    figure.suptitle(title, color=TEXT, fontsize=9)
    figure.tight_layout()
    with replacing(path) as file:
        figure.savefig(file, format="png", transparent=True)


def main() -> None:
    """Trains, or with --show takes the result that is there, and draws it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("result", type=Path, help="a JSON file; the picture is written beside it")
    parser.add_argument("--show", action="store_true", help="draw the result again, training nothing")
    arguments = parser.parse_args()
    if not arguments.show:
        document = {**environment.describe(), "runs": {name: train(options) for name, options in RUNS.items()}}
        with replacing(arguments.result) as file:
            file.write(json.dumps(document).encode() + b"\n")
    document = json.loads(arguments.result.read_text())
    for name, run in document["runs"].items():
        right, peak = 1 - run["error"][-1], run["peak_bytes"] / GIB
        print(f"{name:6}{run['seconds'][-1]:8.0f} s{peak:8.2f} GiB{right:10.2%} of the held-out digits right")
    draw(document, arguments.result.with_suffix(".png"))


if __name__ == "__main__":
    main()
