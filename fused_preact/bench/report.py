"""The result document as tables for people, and from disk."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fused_preact.errors import UserError

from . import environment

SCHEMA = 1

LEGEND = (
    "Times are medians; a ratio is the median of the rounds' own, with the quantiles 0.2 and 0.8. Baseline: the "
    "fastest eager contender, ReLU in place. Saved for backward: the storages that autograd keeps, without parameters."
)
HOST_THREADS = 2  # that launch a GPU's work: the caller's and autograd's
NOTICED = 0.2  # of a core that threads needed and other work took
QUANTITIES = ("forward", "total", "saved_bytes")


def read(path: Path) -> dict[str, Any]:
    """Reads a result document.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the result file {path}: {error}") from error
    if isinstance(document, dict) and "nets" in document:
        raise UserError(f"{path} is of a GPU: its figures are to be read as they are; --show draws those of a CPU")
    if not isinstance(document, dict) or document.get("schema") != SCHEMA or "cases" not in document:
        raise UserError(f"{path} is no result file of fused-preact bench (schema {SCHEMA})")
    return document


def progress_bar(console: Console) -> Progress:
    """A bar for a list of measurements; lines printed meanwhile go above it."""
    columns = BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    return Progress(*columns, console=console, transient=True)


def show(document: dict[str, Any], console: Console) -> None:
    """Prints the machine, one table a group, and what to know when reading them."""
    console.print(escape(headline(document)), highlight=False)
    for group, cases in groupby(document["cases"], key=lambda case: case["group"]):
        console.print(_table(group, list(cases)))
    console.print(LEGEND, style="dim", highlight=False)
    for note in notes(document):
        console.print(escape(note), style="yellow")


def headline(document: dict[str, Any]) -> str:
    """One line: processor, threads, versions, commit, malloc."""
    device, versions, commit = document["device"], document["versions"], document["commit"]
    code = (
        "no commit" if commit is None else f"{(commit['hash'] or '?')[:12]}{' (modified)' if commit['dirty'] else ''}"
    )
    return (
        f"{device['model']}, {device['cores']} cores, {device['threads']} threads, ISA {device['isa'] or 'none'}; "
        f"torch {versions['torch']}, fused_preact {versions['fused_preact']}, {code}; "
        f"malloc: {document['malloc']['setting']}"
    )


def notes(document: dict[str, Any]) -> Iterator[str]:
    """What a reader should know before trusting a ratio."""
    if any(row["goal"] is not None for case in document["cases"] for row in case["rows"]):
        yield "Goals are meant for two threads."
    if emulates_bf16(document):
        yield (
            "This CPU has no bf16 instructions (avx512_bf16, amx_bf16): eager bf16 emulates them and is slow, "
            "so the bf16 ratios say little about CPUs that have them."
        )
    if note := busy_note((case.get("busy") for case in document["cases"]), document["device"]):
        yield note
    yield from (f"Left out: {line}" for line in document["left_out"])


def busy_note(others: Iterable[float | None], device: dict[str, Any]) -> str | None:
    """What to say where other work took cores that a measurement's threads needed.

    Args:
        others: how many cores it took, time by time, as `environment.watch` tells.
        device: as `environment.cpu` tells: cores and threads.
    """
    most = max((cores for cores in others if cores is not None), default=0.0)
    if most < NOTICED or most < NOTICED + device["cores"] - device["threads"]:
        return None
    return (
        f"The machine was busy (other work took up to {most:.1f} of {device['cores']} cores): eager suffers more from "
        "that than fused, and the ratios are too high; run again when it is idle."
    )


def warn_if_busy(console: Console, threads: int) -> float | None:
    """Says before so many threads are measured that other work takes cores they need; returns how many it takes."""
    others = environment.busy()
    if note := busy_note([others], {**environment.cpu(), "threads": threads}):
        console.print(escape(note), style="yellow")
    return others


def emulates_bf16(document: dict[str, Any]) -> bool:
    """Whether bf16 was measured on a processor that has no instructions for it."""
    return not document["device"]["bf16_instructions"] and any(case["dtype"] == "bf16" for case in document["cases"])


def by_contender(case: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of a case: contender -> quantity -> row."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in case["rows"]:
        found.setdefault(row["contender"], {})[row["quantity"]] = row
    return found


def compared(case: dict[str, Any], row: dict[str, Any]) -> tuple[Any, Any]:
    """What a ratio is of: the figures of the baseline and of the contender, in seconds or bytes."""
    return tuple(case["contenders"][row[who]][row["quantity"]] for who in ("baseline", "contender"))


def _table(group: str, cases: list[dict[str, Any]]) -> Table:
    total = "forward, backward, update" if cases[0]["net"] else "forward + backward"
    table = Table(title=escape(group), title_justify="left", show_lines=True)
    table.add_column("case", overflow="fold")
    for heading in ("forward", total, "saved for backward"):
        table.add_column(heading, justify="right", overflow="fold")
    for case in cases:
        for name, rows in by_contender(case).items():
            cells = [_cell(case, rows[quantity]) for quantity in QUANTITIES]
            if "against_fast" in rows:
                cells[1] += f"\n{_of_fast(rows['against_fast'])}"
            table.add_row(f"{escape(case['label'])}\n[dim]{escape(name)}[/]", *cells)
    return table


def _cell(case: dict[str, Any], row: dict[str, Any]) -> str:
    before, after = compared(case, row)
    ratio = f"[bold]{row['ratio']['median']:.2f}x[/]"
    if row["quantity"] == "saved_bytes":
        amounts = f"{before / 2**20:.4g} to {after / 2**20:.4g} MiB"
    else:
        amounts = f"{before['median'] * 1e3:.4g} to {after['median'] * 1e3:.4g} ms"
        ratio += f" ({row['ratio']['low']:.2f}-{row['ratio']['high']:.2f})"
    return "\n".join([ratio, f"[dim]{amounts}[/]", *_goal(row)])


def _of_fast(row: dict[str, Any]) -> str:
    """How a memory mode's speed stands to that of the mode "fast"."""
    return "\n".join([f"{row['ratio']['median']:.2f}x of fast", *_goal(row)])


def _goal(row: dict[str, Any]) -> list[str]:
    """The goal of a row and whether it is reached, or nothing."""
    if row["goal"] is None:
        return []
    return [f"goal {row['goal']:.3g}x {'[green]reached[/]' if row['reached'] else '[red]not reached[/]'}"]
