"""`fused-preact tune`: measures the backends at the models' shapes on this device, for ``backend="auto"`` to read."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from . import backends, models, tables
from .bench import environment
from .bench.cases import DTYPES, LAYOUTS, USUAL
from .bench.contenders import autocast, block_step
from .bench.measure import Step, Times, alternate, ratio, spread
from .bench.plain import plain
from .bench.report import HOST_THREADS, progress_bar, warn_if_busy
from .cli import positive, thread_count
from .errors import UserError
from .explaining import explain
from .files import check_writable
from .modules import Fused
from .stage import PreActStage

MODELS = ("resnet110", "resnet1001", "preactresnet18", "preactresnet50", "wrn28_10")
ROUNDS = (5, 30)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fused-preact tune`."""
    parser.description = (
        "Times every stage and block of some models with each backend on this device, forward and backward of "
        "training and forward of inference, and writes the table that backend='auto' reads. On a GPU with Triton also "
        "its tiles."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU, where torch finds one")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=models.names(),
        default=MODELS,
        metavar="NAME",
        help=_listed(models.names(), MODELS),
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=USUAL, metavar="DTYPE", help=_listed(DTYPES, USUAL)
    )
    parser.add_argument("--batch", type=positive(int), metavar="N", help="images (default: 16 on a CPU, else 128)")
    parser.add_argument(
        "--size", type=positive(int), default=32, metavar="PIXELS", help="height and width of images (default: 32)"
    )
    parser.add_argument(
        "--threads",
        type=thread_count,
        metavar="COUNT",
        help="torch's threads: a CPU's table is for one number of them (default: its own choice)",
    )
    parser.add_argument(
        "--budget", type=positive(float), default=1.0, metavar="SECONDS", help="for each call (default: 1)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="JSON", help="file to write (default: in the user's cache folder)"
    )


def _listed(names: Iterable[str], chosen: Iterable[str]) -> str:
    return f"of {', '.join(names)} (default: {', '.join(chosen)})"


def run(arguments: argparse.Namespace) -> int:
    """Measures call by call, prints each result and adds it to the table's file; returns 0.

    Raises:
        UserError: the device is not there, or the file cannot be written or is no table.
    """
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if tables.device_name(device) is None:
        raise UserError(f"--device: torch finds no {device} device")
    batch = arguments.batch or (16 if device == "cpu" else 128)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    document = _document(device)
    path = arguments.output or tables.place(document["device"])
    check_writable(path)
    tables.existing(path)
    console = Console()
    warn_if_busy(console, HOST_THREADS if device == "cuda" else torch.get_num_threads())
    with progress_bar(console) as progress:
        for dtype in arguments.dtypes:
            calls = _calls(arguments.models, device, DTYPES[dtype], batch, arguments.size)
            distinct = {tables.call_key(problem): (problem, block) for problem, block in calls}
            for key, (problem, block) in progress.track(distinct.items(), description=f"calls in {dtype}"):
                if device == "cuda" and not problem.inference and backends.obstacle("triton", problem) is None:
                    document["tiles"] |= _tiles(problem, block, arguments.budget)
                found = measure(problem, block, arguments.budget)
                document["calls"][key] = {str(batch): found}
                tables.save(document, path)
                console.print(_line(problem, found), markup=False, highlight=False, soft_wrap=True)
    console.print(f"Table in {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _line(problem: backends.Problem, found: dict[str, Any]) -> str:
    """One call and its times, for people; in brackets how many times as fast as eager."""
    seconds, shape = found["seconds"], "x".join(map(str, problem.shape))
    dtype, n = str(problem.dtype).removeprefix("torch."), len(problem.convolutions)
    times = ", ".join(
        f"{name} {1e3 * value:.2f} ms" + (f" ({seconds['eager'] / value:.2f}x)" if name != "eager" else "")
        for name, value in seconds.items()
    )
    purpose = "inference" if problem.inference else "training"
    return f"{found['best']:>8}  {purpose} {dtype} {problem.format} {shape}, {n} convolution{'s' * (n > 1)}: {times}"


def _document(device: str) -> dict[str, Any]:
    versions = environment.versions()
    if backends.status()["triton"] is None:
        import triton

        versions["triton"] = triton.__version__
    facts = {"device": tables.device_name(device), "date": environment.date(), "versions": versions}
    return facts | {"threads": torch.get_num_threads(), "calls": {}, "tiles": {}}


def _calls(
    names: list[str], device: str, dtype: torch.dtype, batch: int, size: int
) -> Iterator[tuple[backends.Problem, nn.Module]]:
    """The fused calls of models, by stages and by blocks, in training and in inference: what, and by which module.

    Raises:
        UserError: a model takes no such images.
    """
    for name in names:
        net = models.create(name, stem="cifar" if size <= 64 else "imagenet").to(device).train()
        images = torch.empty(batch, 3, size, size, device=device)
        for form in (_taken_apart(net, PreActStage.runs), _taken_apart(net, list)):
            try:
                with autocast(device, dtype):
                    # By a backend that serves every call: plain layers would not be one.
                    choices = explain(_served_by("reference", form), images)
            except ValueError as error:
                raise UserError(f"--models {name} --batch {batch} --size {size}: {error}") from error
            for choice in choices:
                for inference in (False, True):
                    yield choice.problem._replace(inference=inference), form.get_submodule(choice.where)


def _taken_apart(net: nn.Module, parts: Callable[[PreActStage], list[nn.Module]]) -> nn.Module:
    """A copy of a net with modules of their own for the parts of its stages."""
    net = copy.deepcopy(net)
    for name, stage in [(name, m) for name, m in net.named_modules() if isinstance(m, PreActStage)]:
        net.set_submodule(name, nn.Sequential(*parts(stage)))
    return net


def _served_by(backend: str, module: nn.Module) -> nn.Module:
    """A copy of a module whose blocks a backend serves."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, Fused):
            part.backend = backend
    return module


def _step(problem: backends.Problem, block: nn.Module, backend: str) -> Step:
    """Forward, and where it is training backward, of a stage or block with a backend."""
    module = plain(copy.deepcopy(block)) if backend == "eager" else _served_by(backend, block)
    module.train(not problem.inference)
    x = torch.randn(problem.shape, device=problem.device, dtype=problem.dtype)
    x = x.to(memory_format=LAYOUTS.get(problem.format, torch.contiguous_format))
    y = block_step(module, x, None, problem.dtype).forward()
    step = block_step(module, x, None if problem.inference else torch.randn_like(y), problem.dtype)
    return replace(step, wait=torch.cuda.synchronize) if x.is_cuda else step


def measure(problem: backends.Problem, block: nn.Module, budget: float) -> dict[str, Any]:
    """The entry of one call: the median seconds of each backend that serves it, and the best.

    Another than eager is best only if it was faster in four of five rounds, and by its median: "auto" promises not to
    be slower.
    """
    served = [name for name in backends.FUSED if name != "reference" and backends.obstacle(name, problem) is None]
    names = ["eager", *served]
    times = dict(zip(names, alternate([_step(problem, block, name) for name in names], budget, ROUNDS), strict=True))
    seconds = {name: spread(found.total).median for name, found in times.items()}
    return {"best": _best(times), "seconds": seconds}


def _best(times: dict[str, Times]) -> str:
    eager = times["eager"].total
    shorter = {name: t.total for name, t in times.items() if spread(t.total).median < spread(eager).median}
    gains = {name: ratio(eager, total) for name, total in shorter.items()}
    faster = {name: gain.median for name, gain in gains.items() if gain.low > 1}
    return max(faster, key=faster.__getitem__) if faster else "eager"


def _tiles(problem: backends.Problem, block: nn.Module, budget: float) -> dict[str, dict[str, list[int]]]:
    """The fastest shipped tile of each Triton kernel of a call at its N, one kernel after the other."""
    from .triton import configurations

    configurations.asked.clear()
    step = _step(problem, block, "triton")
    step.backward(step.forward())
    for key in sorted(configurations.asked):
        seconds = {}
        for tile in configurations.candidates(problem.device, problem.dtype):
            configurations.trial[key] = tile
            (times,) = alternate([step], budget / 10, (3, 10))
            seconds[tile] = spread(times.total).median
        configurations.trial[key] = min(seconds, key=seconds.__getitem__)
    return {key: {str(problem.shape[0]): list(configurations.trial[key])} for key in configurations.asked}
