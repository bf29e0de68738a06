"""`fused-preact bench`: fused against eager on this machine."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from fused_preact import backends
from fused_preact.cli import positive, thread_count
from fused_preact.errors import UserError
from fused_preact.files import check_writable, write_json

from . import cuda, environment, picture, report, suite
from .cases import Case, default_cases, full_cases, table_cases
from .check import CheckError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fused-preact bench`."""
    parser.description = (
        "Times what is fused against eager torch on this machine, once both are found to compute the same; prints "
        "tables, and writes them as JSON and as a picture."
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--full", action="store_true", help="the long version: more cases, torch.compile, both mallocs")
    extent.add_argument("--table", action="store_true", help="time every backend over a grid of units (backend='auto')")
    extent.add_argument("--show", type=Path, metavar="JSON", help="measure nothing; print and draw a result file again")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda: blocks, nets, kernels on a GPU (default: cpu)")
    parser.add_argument("--only", metavar="TEXT", default="", help="only cases whose name contains TEXT")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--output", type=_stem, metavar="STEM", help="write STEM.json and STEM.png (default: bench)")
    parser.add_argument(
        "--threads", type=thread_count, metavar="COUNT", help="torch's threads (default: its own choice)"
    )
    parser.add_argument(
        "--budget",
        type=positive(float),
        metavar="SECONDS",
        help="for a block, a net takes three times as long (default: 1, full: 5, table: 0.5)",
    )
    parser.add_argument("--memory", action="store_true", help="also the peak resident memory of each net")
    parser.add_argument(
        "--malloc",
        choices=("default", "tuned", "both"),
        help="setting of glibc's malloc: as it comes, told to keep freed memory, or one after the other (full: both)",
    )


def _stem(text: str) -> Path:
    path = Path(text)
    if path.name in ("", ".."):
        raise argparse.ArgumentTypeError(f"expected the name of files, without .json and .png, got {text!r}")
    return path


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns 1 if a contender is wrong: nothing is reported then, with --table of its case.

    Raises:
        UserError: no case is chosen, an option does not go with the device, or the file to show is no result file.
    """
    console = Console()
    if arguments.show is not None:
        others = "device", "list", "only", "threads", "budget", "memory", "malloc"
        _refuse(arguments, "--show goes with --output alone", *others)
        _show(arguments.show, arguments.output or arguments.show.with_suffix(""), console)
        return 0
    try:
        return (_on_gpu if arguments.device == "cuda" else _on_cpu)(arguments, console)
    except CheckError as error:
        console.print(f"[red]Wrong result, it is not reported.[/] {escape(str(error))}", highlight=False)
        return 1


def _on_cpu(arguments: argparse.Namespace, console: Console) -> int:
    """Measures the cases that are asked for, in this process or in one of the malloc that is asked for."""
    cases = _choose(arguments)
    if arguments.list:
        console.print("\n".join(case.name for case in cases), markup=False, highlight=False)
        return 0
    reason = backends.status()["cpu"]
    if reason is not None and any("cpu" in case.backends for case in cases):
        raise UserError(f"--table: {reason}")
    output = arguments.output or Path("bench")
    malloc = arguments.malloc or ("both" if arguments.full else None)
    if malloc == "both":
        return _child(arguments, "default", output) or _child(arguments, "tuned", _suffixed(output, "-tuned"))
    if malloc not in (None, environment.malloc()["setting"]):
        return _child(arguments, malloc, output)
    check_writable(_suffixed(output, ".json"))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    document = _measure(cases, _settings(arguments), console, _suffixed(output, ".json"))
    _present(document, output, console)
    console.print(f"Results in {_suffixed(output, '.json')}", markup=False, highlight=False)
    return int(len(document["cases"]) < len(cases))


def _on_gpu(arguments: argparse.Namespace, console: Console) -> int:
    """The same of blocks, nets and kernels on a GPU, which are always measured all."""
    cpu_only = "list", "full", "table", "only", "threads", "budget", "memory", "malloc"
    _refuse(arguments, "is for the CPU; --device cuda goes with --output alone", *cpu_only)
    output = _suffixed(arguments.output or Path("bench"), ".json")
    check_writable(output)
    cuda.run(console, lambda document: write_json(document, output))
    return 0


def _refuse(arguments: argparse.Namespace, why: str, *names: str) -> None:
    for name in names:
        if getattr(arguments, name):
            raise UserError(f"--{name}: {why}")


def _choose(arguments: argparse.Namespace) -> list[Case]:
    every = full_cases() if arguments.full else table_cases() if arguments.table else default_cases()
    chosen = [case for case in every if arguments.only.lower() in case.name.lower()]
    if not chosen:
        raise UserError(f"--only: no case contains {arguments.only!r}; --list names them all")
    return chosen


def _settings(arguments: argparse.Namespace) -> suite.Settings:
    extent = "full" if arguments.full else "table" if arguments.table else "default"
    budget = arguments.budget or {"full": 5.0, "table": 0.5, "default": 1.0}[extent]
    memory = arguments.memory or arguments.full
    return suite.Settings(extent, budget, compiled=arguments.full, memory=memory, strict=not arguments.table)


def _measure(cases: list[Case], settings: suite.Settings, console: Console, path: Path) -> dict[str, Any]:
    """The result document; what is measured is in the file after each case, so that nothing is lost."""
    kept, done = 0, 0

    def announce(case: Case) -> None:
        progress.update(task, description=case.name, completed=done)

    def keep(document: dict[str, Any]) -> None:
        nonlocal kept, done
        write_json(document, path)
        kept, done = len(document["cases"]), done + 1
        if not console.is_terminal:  # which has the bar
            line = f"{done} of {len(cases)}: {cases[done - 1].name}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        with report.progress_bar(console) as progress:
            task = progress.add_task("", total=len(cases))
            return suite.run(cases, settings, announce, keep)
    except KeyboardInterrupt:
        show = f"fused-preact bench --show {shlex.quote(str(path))} prints them"
        said = f"{kept} case{'s' * (kept != 1)}; {show}" if kept else "no case was done"
        print(f"{path}: {said}", file=sys.stderr)
        raise


def _child(arguments: argparse.Namespace, malloc: str, output: Path) -> int:
    """The same command in a process whose malloc is set so: glibc reads its setting when a process starts."""
    bare = {k: v for k, v in os.environ.items() if k not in environment.malloc()["variables"]}
    tuned = environment.TUNED_MALLOC if malloc == "tuned" else {}
    command = [sys.executable, "-m", "fused_preact", "bench", f"--malloc={malloc}", f"--output={output}"]
    for name in ("full", "table", "memory"):
        command += [f"--{name}"] if getattr(arguments, name) else []
    for name in ("only", "threads", "budget"):
        value = getattr(arguments, name)
        command += [] if value in (None, "") else [f"--{name}={value}"]
    code = _code(command, bare | tuned)
    if code < 0:
        raise UserError(
            f"the measuring process was ended by {signal.Signals(-code).name}"
            f"{', as the system does where memory runs out' if code == -signal.SIGKILL else ''}; "
            f"{_suffixed(output, '.json')} has the cases before, and --only measures some of them"
        )
    return code


def _code(command: list[str], env: dict[str, str]) -> int:
    """The exit code of a command, which ends with this process."""
    with subprocess.Popen(command, env=env) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.terminate()  # one that has had a terminal's Ctrl-C hears no more signals
            child.wait()
            raise


def _show(path: Path, output: Path, console: Console) -> None:
    """Prints and draws a result file.

    Raises:
        UserError: it is none, or lacks something that is shown.
    """
    document = report.read(path)
    try:
        _present(document, output, console)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--show {path}: expected a whole result file of fused-preact bench, got one that cannot be shown "
            f"({type(error).__name__}: {error}); measure again"
        ) from error


def _present(document: dict[str, Any], output: Path, console: Console) -> None:
    report.show(document, console)
    if document["settings"]["extent"] == "table":
        return
    if reason := picture.unavailable():
        console.print(reason, style="yellow", markup=False)
        return
    picture.draw(document, _suffixed(output, ".png"))
    console.print(f"Picture in {_suffixed(output, '.png')}", markup=False, highlight=False)


def _suffixed(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)
