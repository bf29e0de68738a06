"""`fused-preact info`: versions, instruction set, threads, and which backends can be used here."""

import argparse
import platform

import torch
from rich.console import Console
from rich.table import Table

import fused_preact

from . import _extension, backends, tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`fused-preact info` has no options."""
    parser.description = "Versions, the instruction set chosen, and which backends are built and usable."


def facts() -> dict[str, str]:
    """What a report of a problem should say, as name -> text."""
    return {
        "fused_preact": fused_preact.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "instruction set": _instruction_set(),
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads changes it)",
        "extension": _extension.unavailable or str(_extension.BINARY),
        "measured calls": _measured_calls(),
    }


def run(_arguments: argparse.Namespace) -> int:
    """Prints the facts and the backends; returns 0, for a backend that is missing is an answer."""
    console = Console()
    _print(console, "fused_preact", facts())
    _print(console, "backends", {name: reason or "usable" for name, reason in backends.status().items()})
    return 0


def _instruction_set() -> str:
    if _extension.unavailable is not None:
        return "none: the CPU kernels are not there"
    sets = _extension.instruction_sets()
    return f"{sets.chosen} (built: {', '.join(sets.built)}; this processor: {', '.join(sets.supported)})"


def _measured_calls() -> str:
    device = tables.device_name("cuda") or tables.device_name("cpu")
    calls = len(tables.load(device)["calls"])
    return f"{calls} on {device}" if calls else f"none on {device}: auto goes by rule, `fused-preact tune` measures"


def _print(console: Console, title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table, markup=False, highlight=False)
