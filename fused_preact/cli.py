"""The command `fused-preact`, also `python -m fused_preact`: one subcommand a module, imported when it is asked for."""

import argparse
import contextlib
import importlib
import io
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from . import __version__
from .errors import UserError

COMMANDS = {
    "info": ("info", "versions, instruction set, and which backends are usable"),
    "train": ("train.command", "train a network on CIFAR or on scikit-learn's digits"),
    "tune": ("tune", "measure the backends on this device, for backend='auto'"),
    "bench": ("bench.command", "time fused against eager on this machine"),
}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # as torch says it of a GPU, and of the host
MOST_THREADS = 1024  # more than any processor has, and fewer than the system refuses
Handlers = Mapping[int, Any]  # of signals by their numbers, as signal.getsignal gives them


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 for success, 1 where `bench` finds a result wrong, 2 for what the user can put right; 130 for Ctrl-C, 143 for
    SIGTERM, and of `train` 129 for SIGHUP.
    """
    _escape_output()
    try:
        with _stoppable():
            return _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt as stop:
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def _escape_output() -> None:
    """What standard output cannot encode, such as a letter in a path, is escaped, as on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise a KeyboardInterrupt with their number; what comes after it does not disturb the end."""

    def stop(number: int, before: Handlers) -> None:
        for ignored in before:
            signal.signal(ignored, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    with handled((signal.SIGINT, signal.SIGTERM), stop):
        yield


@contextlib.contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, Handlers], None]) -> Iterator[None]:
    """Signals call ``handler`` meanwhile, with their number and the handlers that all have before and afterwards.

    Left out is what is ignored, as SIGHUP is under nohup and SIGINT in the background of a script, and what other code
    than Python's handles. Only the main thread may set handlers; in others nothing is done.
    """
    main = threading.current_thread() is threading.main_thread()
    found = {number: signal.getsignal(number) for number in numbers if main}
    before = {number: usual for number, usual in found.items() if usual not in (signal.SIG_IGN, None)}

    def call(number: int, frame: FrameType | None) -> None:
        handler(number, before)

    try:
        for number in before:
            signal.signal(number, call)
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def _run(arguments: list[str]) -> int:
    """Run the command; what the user can put right becomes one line on stderr, and exit code 2."""
    try:
        parser = _parser(arguments)
        parsed, unknown = parser.parse_known_args(arguments)
        if unknown:
            getattr(parsed, "command", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed.run(parsed)
    except (UserError, OSError) as error:  # also a full disk, a file of somebody else's
        print(f"fused-preact: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        reason = str(error).splitlines()[0]
        print(f"fused-preact: memory ran out: ask for less, such as a smaller batch ({reason})", file=sys.stderr)
        return 2


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser with the options of the one subcommand that `arguments` names: the others are not imported."""
    parser = argparse.ArgumentParser(
        prog="fused-preact", description="Fused BatchNorm-ReLU-Conv2d for pre-activation residual networks."
    )
    parser.add_argument("--version", action="version", version=f"fused-preact {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in arguments[:1]:
            implementation = importlib.import_module(f"fused_preact.{module}")
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run, command=command)
    return parser


def positive(kind: type) -> Callable[[str], Any]:
    """A converter for options whose value is a finite number above zero."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
        return value

    return convert


def thread_count(text: str) -> int:
    """A converter for options whose value is torch's number of threads: one that cannot be started ends the process."""
    count = positive(int)(text)
    if count > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_THREADS}, got {count}")
    return count
