"""`fused-preact train`: train a network on CIFAR or on scikit-learn's digits."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import backends, models
from ..cli import Handlers, handled, thread_count
from ..errors import UserError
from ..files import naming
from ..stage import MEMORY
from . import checkpoint, cifar, settings
from .data import Dataset, digits
from .lock import alone
from .loop import Run, Summary, Trainer
from .record import Recorder, check_tensorboard, draw

# What a run writes into its folder; the folder, whose removal may fail halfway, comes first.
HALF = "checkpoint.pt.tmp"  # of a run that was killed as it saved: alone, of one that had not begun
PRODUCTS = ("tensorboard", "checkpoint.pt", HALF, "metrics.jsonl", "curve.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags. A default of None means: the recipe's, or, with --resume, the run's."""
    parser.description = "Train a pre-activation ResNet. Defaults are those of the recipe; any flag replaces one."
    names = models.names()
    parser.add_argument(
        "--model", choices=names, metavar="NAME", help=f"of {', '.join(names)} (required unless --resume)"
    )
    parser.add_argument("--data", help="`digits` (no download), or a CIFAR-10/100 archive or folder; default: digits")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the run; default: runs/MODEL-DATA")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--overwrite", action="store_true", help="discard the run in --out and start anew")

    _add_recipe(parser.add_argument_group("recipe"))
    _add_machine(parser.add_argument_group("machine"))
    output = parser.add_argument_group("output")
    output.add_argument("--eval-every", type=int, metavar="N", help="iterations between evaluations; default: an epoch")
    saving = f"iterations between checkpoints; default: {settings.DEFAULTS['save_every']}"
    output.add_argument("--save-every", type=int, metavar="N", help=saving)
    output.add_argument(
        "--tensorboard", action=argparse.BooleanOptionalAction, default=None, help="default: where it is installed"
    )


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    """The flags of what a run computes."""
    usual, of_recipes = settings.DEFAULTS, settings.Recipe
    group.add_argument("--recipe", choices=list(settings.RECIPES), help="default: digits for digits, paper otherwise")
    group.add_argument("--iterations", type=int, metavar="N", help="steps of the whole run")
    group.add_argument("--batch-size", type=int, metavar="N", help="images of a step")
    group.add_argument("--lr", type=float, metavar="RATE", help=f"learning rate; default: {of_recipes.lr:g}")
    group.add_argument(
        "--milestones", type=int, nargs="*", metavar="N", help="iterations after which the rate is divided by 10"
    )
    group.add_argument("--momentum", type=float, metavar="SHARE", help=f"of SGD; default: {of_recipes.momentum:g}")
    group.add_argument("--nesterov", action=argparse.BooleanOptionalAction, default=None, help="Nesterov's momentum")
    group.add_argument("--weight-decay", type=float, metavar="RATE", help=f"default: {of_recipes.weight_decay:g}")
    warmup = f"iterations at --warmup-lr first; default: {usual['warmup']}; 400 is the paper's warm-up"
    group.add_argument("--warmup", type=int, metavar="N", help=warmup)
    group.add_argument("--warmup-lr", type=float, metavar="RATE", help=f"default: {usual['warmup_lr']:g}")
    padding = f"border of the random crop; default: {of_recipes.padding}"
    group.add_argument("--padding", type=int, metavar="PIXELS", help=padding)
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, default=None, help="mirror images at random")
    seed = f"of weights and of the order of images; default: {usual['seed']}"
    group.add_argument("--seed", type=int, metavar="N", help=seed)


def _add_machine(group: argparse._ArgumentGroup) -> None:
    """The flags of how it is computed."""
    usual = settings.DEFAULTS
    precision = f"automatic mixed precision; default: {usual['amp']}"
    group.add_argument("--amp", choices=["none", "bf16"], help=precision)
    group.add_argument("--backend", choices=backends.NAMES, help=f"default: {usual['backend']}; eager: plain layers")
    memory = f"what is kept for backward: the less, the slower; default: {usual['memory']}"
    group.add_argument("--memory", choices=MEMORY, help=memory)
    group.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="record the step in a CUDA graph and replay it: the host launches once a step",
    )
    group.add_argument("--device", help="default: cuda where there is one, else cpu")
    group.add_argument("--threads", type=thread_count, metavar="COUNT", help="default: as torch chooses")


def run(args: argparse.Namespace) -> int:
    """Train as the flags say. Returns 0, or 128 + the signal's number if one stopped it.

    Raises:
        UserError: the flags, the data or what is in the folder do not fit, or the run diverges.
    """
    given = {
        name: value for name, value in vars(args).items() if name in settings.Settings.names() and value is not None
    }
    if given.get("data", "digits") not in ("", "digits"):
        given["data"] = str(Path(given["data"]).absolute())  # --resume may be given elsewhere
    console = _Console(highlight=False, markup=False, emoji=False)
    check_tensorboard(args.tensorboard)  # before --overwrite removes anything
    with contextlib.ExitStack() as held:
        trainer, folder = (_resumed if args.resume else _new)(args, given, held)
        recorder = held.enter_context(contextlib.closing(Recorder(folder, trainer.iteration, args.tensorboard)))
        console.print(_heading(trainer, folder), soft_wrap=True)
        with _signals() as stopped, _progress(trainer, console) as show:
            summary = Run(trainer, folder, recorder, show).until_done(stop=lambda: bool(stopped))
    console.print(_conclusion(summary), soft_wrap=True)
    if draw(recorder.rows, folder / "curve.png", f"{trainer.settings.model} on {trainer.dataset.name}"):
        console.print(f"Learning curve: {folder / 'curve.png'}", soft_wrap=True)
    if not summary.finished:
        console.print(f"Stopped after iteration {summary.iteration} of {trainer.settings.iterations}. Go on with:")
        console.print(f"fused-preact train --resume --out {shlex.quote(str(folder))}", soft_wrap=True)
    return 128 + stopped[0] if stopped else 0


def _new(args: argparse.Namespace, given: dict[str, Any], held: contextlib.ExitStack) -> tuple[Trainer, Path]:
    """The trainer and the folder of a new run, which is held."""
    if args.model is None:
        raise UserError("--model: expected the name of a network, such as --model resnet20")
    given = {"data": "digits", **given}
    folder = args.out or _default_folder(args.model, given["data"])
    _check_empty(folder, args.overwrite)
    dataset = _load(given["data"])
    trainer = Trainer(settings.resolve(given, len(dataset.train), dataset.flip), dataset)
    with naming(f"--out {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(alone(folder))
        _check_empty(folder, args.overwrite)  # another run may have begun and ended there meanwhile
        for product in PRODUCTS:
            _remove(folder / product)
    return trainer, folder


def _resumed(args: argparse.Namespace, given: dict[str, Any], held: contextlib.ExitStack) -> tuple[Trainer, Path]:
    """The trainer, as its last checkpoint left it, and the folder of the run, which is held."""
    if args.overwrite:
        raise UserError("--overwrite: discards the run that --resume goes on with; choose one")
    if args.out is None and args.model is None:
        raise UserError("--resume: expected --out with the folder of the run")
    folder = args.out or _default_folder(args.model, given.get("data", "digits"))
    held.enter_context(alone(folder))
    path = folder / "checkpoint.pt"
    state = checkpoint.load(path)
    resumed = settings.resume(state["settings"], given, str(path))
    trainer = Trainer(resumed, _load(resumed.data))
    trainer.load_state_dict(state, path)
    if trainer.iteration > resumed.iterations:
        raise UserError(f"--iterations: expected {trainer.iteration} or more, which are done, got {resumed.iterations}")
    return trainer, folder


def _load(data: str) -> Dataset:
    """The data set that --data names: `digits`, or the path of a CIFAR archive or folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if data == "digits":
        return digits()
    if not data:
        raise UserError("--data: expected digits, or the path of a CIFAR archive or folder, got nothing")
    return cifar.read(data)


def _default_folder(model: str, data: str) -> Path:
    return Path("runs") / f"{model}-{Path(data).name}"


def _check_empty(folder: Path, overwrite: bool) -> None:
    """Raise UserError where a new run must not go."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: not a folder")
    if folder.is_dir() and any(entry.name != HALF for entry in folder.iterdir()) and not overwrite:
        raise UserError(f"{folder}: not empty; --resume goes on with the run there, --overwrite discards it")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Console(Console):
    """Goes quiet when nobody reads it any more, so that the run goes on: a pipe was closed, a terminal is gone."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), self.file.fileno())  # what is left in its buffer must go somewhere

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            if error.errno != errno.EIO:  # of a terminal that is gone
                raise
            self.on_broken_pipe()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that gets the number of the first SIGINT, SIGTERM or SIGHUP; a second one acts as usual."""
    received: list[int] = []

    def note(number: int, before: Handlers) -> None:
        received.append(number)
        for each, usual in before.items():
            signal.signal(each, usual)

    with handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), note):
        yield received


@contextlib.contextmanager
def _progress(trainer: Trainer, console: Console) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A progress bar with the newest figures; every evaluation leaves a line."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        total = trainer.settings.iterations
        task = progress.add_task("train", total=total, completed=trainer.iteration, figures="")

        def show(split: str, row: dict[str, Any]) -> None:
            if split == "test":
                console.print(
                    f"iteration {row['iteration']:>{len(str(total))}}: held-out error {row['error']:.2%}, "
                    f"loss {row['loss']:.4f}"
                )
                return
            figures = f"loss {row['loss']:.4f}, accuracy {row['accuracy']:.1%}, {row['images_per_second']:.1f} images/s"
            progress.update(task, completed=row["iteration"], figures=figures)

        yield show


def _heading(trainer: Trainer, folder: Path) -> str:
    chosen = asdict(trainer.settings)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    data = trainer.dataset
    return (
        f"{chosen['model']} ({parameters:,} parameters) on {data.name} ({len(data.train):,} images, {len(data.test):,} "
        f"held out), recipe {chosen['recipe']}: batch {chosen['batch_size']}, rate {chosen['lr']:g}, iterations "
        f"{trainer.iteration} to {chosen['iterations']}; {chosen['device']}, {chosen['threads']} threads, backend "
        f"{chosen['backend']}, memory {chosen['memory']}, amp {chosen['amp']}; into {folder}"
    )


def _conclusion(summary: Summary) -> str:
    time = f"{summary.seconds:.1f} s, {summary.images_per_second:.1f} images/s in training"
    if summary.idle:
        time = "nothing was left to do, a higher --iterations goes on"
    newest, best = summary.newest, summary.best
    if newest is None or best is None:
        return f"No evaluation yet; {time}"
    return (
        f"Held-out error {newest['error']:.2%} after iteration {newest['iteration']} (best {best['error']:.2%} after "
        f"{best['iteration']}); {time}"
    )
