"""The result as one picture: how much faster, and how much less is kept for backward."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fused_preact.files import replacing

from .report import QUANTITIES, by_contender, compared, emulates_bf16

FUSED = re.compile(r"fused (?:(\w+) )?channels_last")  # the contenders that are drawn, and their memory mode
FORWARD, TOTAL, SAVED = "#3f7fc1", "#1f62ab", "#23865f"
TEXT, GRID, GOAL = "#6e7781", "#9aa4b03c", "#d9822b"
BAR = 0.36
SHORTEST = 0.11  # bar that has its number inside, about as long as the number is: a share of the axis


def unavailable() -> str | None:
    """Why there can be no picture, with what to do about it, or None."""
    if find_spec("matplotlib") is None:
        return "no picture: matplotlib is not installed; `pip install matplotlib` and repeat with --show"
    return None


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes a PNG with a transparent background, legible on light and on dark pages.

    Left: ratio to the fastest eager contender in time, forward and forward + backward, with the spread and the goals.
    Right: the same of the bytes kept for backward. Only fused channels_last contenders are drawn, in each memory mode.
    Where eager has to emulate bf16, its bars may be cut at the edge: they would shrink all others to nothing. So would
    goals far beyond what was reached: they are numbers there.
    """
    from matplotlib.figure import Figure

    entries = [entry for case in document["cases"] for entry in _entries(case)]
    figure = Figure(figsize=(9.5, 1.5 + 0.36 * len(entries) + 0.2 * len({e["group"] for e in entries})), dpi=150)
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(5, 4))
    fast = ("fp32", "bf16") if document["device"]["bf16_instructions"] else ("fp32",)
    time.set_xlim(0, 1.05 * max([2.5, *(_extent(entry) for entry in entries if entry["dtype"] in fast)]))
    widest = max(entry["saved_bytes"]["ratio"]["median"] for entry in entries)
    memory.set_xlim(0, 1.5 * widest)  # room for the amounts behind the bars
    _bars(time, memory, entries)
    for axes, title in ((time, "Speed relative to the fastest eager"), (memory, "Bytes kept, eager / fused")):
        _dress(axes, title)
    has_goals = any(entry[quantity]["goal"] is not None for entry in entries for quantity in QUANTITIES)
    _legend(figure, has_goals)
    figure.suptitle(_title(document), color=TEXT, fontsize=9)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
    with replacing(path) as file:
        figure.savefig(file, format="png", transparent=True)


def _bars(time: Any, memory: Any, entries: list[dict[str, Any]]) -> None:
    """Draws the bars of each entry on both axes, below each other, under the names of their groups."""
    ticks = []
    height, group = 0.0, None
    for entry in entries:
        if entry["group"] != group:
            group = entry["group"]
            height += 0.8
            place = {"transform": time.get_yaxis_transform(), "ha": "right", "va": "center"}
            time.text(-0.02, height - 0.75, group, color=TEXT, fontsize=9, fontweight="bold", **place)
        ticks.append((height, entry["label"]))
        _bar(time, height - BAR / 2, entry["forward"], FORWARD)
        _bar(time, height + BAR / 2, entry["total"], TOTAL)
        end = (_bar(memory, height, entry["saved_bytes"], SAVED, 2 * BAR), height)
        place = {"textcoords": "offset points", "va": "center"}
        memory.annotate(entry["bytes"], end, (5, 0), color=TEXT, fontsize=7.5, **place)
        height += 1.0
    time.set_yticks([h for h, _ in ticks], [label for _, label in ticks])
    time.set_ylim(height - 0.4, -0.5)


def _legend(figure: Any, has_goals: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    legend = [
        Patch(color=FORWARD, label="forward"),
        Patch(color=TOTAL, label="forward + backward (of a net: and update)"),
        Patch(color=SAVED, label="bytes kept for backward"),
        Line2D([], [], color=TEXT, linewidth=1, label="quantiles 0.2 to 0.8"),
    ]
    if has_goals:
        legend.append(Line2D([], [], color=GOAL, linewidth=2, label="goal"))
    figure.legend(handles=legend, loc="lower center", ncols=5, frameon=False, labelcolor=TEXT, fontsize=8.5)


def _entries(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, rows in by_contender(case).items():
        fused = FUSED.fullmatch(name)
        if fused is None:
            continue
        before, after = (size / 2**20 for size in compared(case, rows["saved_bytes"]))
        amounts = f"{before:.{_digits(before)}f} to {after:.{_digits(after)}f} MiB"
        label = ", ".join(filter(None, (case["label"], fused[1])))
        yield {"group": case["group"], "label": label, "dtype": case["dtype"], "bytes": amounts, **rows}


def _extent(entry: dict[str, Any]) -> float:
    """How far right the times of an entry reach, with the goals that are not far beyond them."""
    rows = [entry[quantity] for quantity in ("forward", "total")]
    goals = (row["goal"] for row in rows if row["goal"] is not None and row["goal"] < 2 * row["ratio"]["high"])
    return max(*(row["ratio"]["high"] for row in rows), *goals)


def _digits(value: float) -> int:
    """Decimals that leave about three digits."""
    return 0 if value >= 100 else 1 if value >= 10 else 2


def _bar(axes: Any, y: float, row: dict[str, Any], color: str, thickness: float = BAR) -> float:
    """Draws a bar with its number, spread and goal; where bar and number end."""
    ratio = row["ratio"]
    axes.barh(y, ratio["median"], thickness, color=color)
    axes.hlines(y, ratio["low"], ratio["high"], color=TEXT, linewidth=1)
    edge = axes.get_xlim()[1]
    place = {"fontsize": 7.5, "fontweight": "bold", "va": "center"}
    fits = ratio["median"] > SHORTEST * edge
    begin = (0 if fits else ratio["high"]) + 0.008 * edge
    axes.text(begin, y, f"{ratio['median']:.2f}x", color="white" if fits else TEXT, **place)
    if row["goal"] is not None and row["goal"] < edge:
        axes.vlines(row["goal"], y - thickness / 2, y + thickness / 2, color=GOAL, linewidth=2)
    elif row["goal"] is not None:
        axes.text(0.995 * edge, y, f"goal {row['goal']:g}x", color=GOAL, ha="right", **place)
    return ratio["median"] if fits else begin + SHORTEST * edge


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, color=TEXT, fontsize=10, loc="left", pad=16)
    axes.axvline(1, color=TEXT, linewidth=1, zorder=0.5)
    axes.text(1, 1.002, "eager", color=TEXT, fontsize=8, ha="center", transform=axes.get_xaxis_transform())
    axes.tick_params(colors=TEXT, labelsize=8.5, length=0)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _title(document: dict[str, Any]) -> str:
    device, versions = document["device"], document["versions"]
    parts = device["model"], document["date"][:10], f"{device['threads']} threads", f"torch {versions['torch']}"
    title = ", ".join([*parts, f"malloc {document['malloc']['setting']}"])
    return title + ("; eager emulates bf16 on this processor" if emulates_bf16(document) else "")
