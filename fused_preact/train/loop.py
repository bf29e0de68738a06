"""The training loop: one step, one evaluation, and the run made of them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from .. import models
from ..errors import UserError
from ..explaining import explain
from ..stage import PreActStage
from . import checkpoint
from .data import Batches, Dataset
from .graph import CudaGraph, Recorded
from .record import Recorder
from .settings import Settings


class Trainer:
    """A model, its optimizer and its data, at some iteration of a run.

    A step depends on the state and the iteration alone: on a CPU, with one number of threads, a trainer that was saved
    and loaded goes on bit by bit as one that was not. Sets torch's number of threads and its global seed.

    Raises:
        UserError: a model, a device or a backend is not there to be had, or cannot take a step.
    """

    def __init__(self, settings: Settings, dataset: Dataset) -> None:
        self.settings, self.dataset = settings, dataset
        self.device = _device(settings.device)
        if settings.cuda_graph and self.device.type != "cuda":
            raise UserError(f"--cuda-graph: expected --device cuda with it, got --device {settings.device}")
        torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.model = _model(settings, dataset.classes, self.device)
        # On the device, where a step that is replayed reads it.
        self.lr = torch.tensor(settings.lr, device=self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=self.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
            fused=True,
        )
        self.recorded = self._recorded()
        self.batches = Batches(
            dataset, settings.batch_size, settings.seed, settings.padding, settings.flip, self.device
        )
        self.iteration = 0
        self._check_step()

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on the next batch. Returns its mean loss and its accuracy before the update, as tensors."""
        images, labels = self.batches.at(self.iteration)
        self.lr.fill_(self.settings.lr_at(self.iteration))
        update = self.recorded or self._update
        loss, accuracy = update(images, labels)
        self.iteration += 1
        return loss, accuracy

    def _update(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on a batch, without the host: see `Recorded`."""
        self.model.train()
        with self._precision():
            logits = self.model(images)
        loss = cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == labels).float().mean()

    def _recorded(self) -> Recorded | None:
        return Recorded(self._update, CudaGraph()) if self.settings.cuda_graph else None

    @torch.no_grad()
    def evaluate(self, stop: Callable[[], bool] = lambda: False) -> tuple[float, float] | None:
        """Mean loss and share of errors (0 to 1) on the held-out images; None if `stop()` before a batch of them."""
        self.model.eval()
        loss = errors = 0.0
        for images, labels in self.batches.held_out():
            if stop():
                return None
            with self._precision():
                logits = self.model(images)
            loss += cross_entropy(logits.float(), labels, reduction="sum").item()
            errors += (logits.argmax(1) != labels).sum().item()
        return loss / len(self.dataset.test), errors / len(self.dataset.test)

    def finite(self) -> bool:
        """Whether every weight and running statistic is a finite number."""
        numbers = [tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        return bool(torch.nn.utils.get_total_norm(numbers, math.inf).isfinite())

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint holds: tensors and plain values."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "settings": asdict(self.settings),
            "dataset": self.dataset.name,
            "iteration": self.iteration,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng,
        }

    def load_state_dict(self, state: dict[str, Any], where: Path) -> None:
        """Go on from `state`. where: its file, for messages.

        Raises:
            UserError: it is of another net or data set, or none that `state_dict` gives.
        """
        if state["dataset"] != self.dataset.name:
            raise UserError(f"{where}: of a run on {state['dataset']}; --data is {self.dataset.name}")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, kept in self.optimizer.state.items():
                if kept["momentum_buffer"].shape != parameter.shape:  # SGD would write beyond its end
                    raise ValueError
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
            torch.set_rng_state(state["rng"]["cpu"])
            if "cuda" in state["rng"] and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: of another net than {self.settings.model}, or damaged: names, shapes or types differ; "
                "choose another --out, or start anew with --overwrite"
            ) from error
        self.iteration = state["iteration"]
        self.recorded = self._recorded()  # what was recorded before knows other momenta

    def _check_step(self) -> None:
        """Raise UserError where a step would be refused; nothing is computed."""
        settings, short = self.settings, copy.copy(self.model)
        # Two blocks of each stage stand for all: a thousand layers would take seconds.
        short._modules = {n: m[:2] if isinstance(m, PreActStage) else m for n, m in self.model.named_children()}
        images = torch.empty(settings.batch_size, *self.dataset.train.images.shape[1:], device=self.device)
        try:
            with self._precision():
                explain(short, images)
        except ValueError as error:
            asked = f"--model {settings.model} --backend {settings.backend} --batch-size {settings.batch_size}"
            raise UserError(f"{asked} --device {settings.device}: {error}") from error

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp == "bf16")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()  # meta tensors have a shape alone
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device: expected a device that torch finds here, such as cpu, got {name}") from error
    return device


def _model(settings: Settings, classes: int, device: torch.device) -> torch.nn.Module:
    if settings.backend == "eager" and settings.memory != "fast":
        raise UserError(f"--memory {settings.memory}: needs fused blocks; --backend eager runs the plain layers")
    options = {"num_classes": classes, "backend": settings.backend, "memory": settings.memory}
    try:
        model = models.create(settings.model, **options)
    except ValueError as error:
        raise UserError(f"--model {settings.model} --memory {settings.memory}: {error}") from error
    return model.to(device, memory_format=torch.channels_last)


@dataclass(frozen=True)
class Summary:
    """Of one session. `newest` and `best` are rows of "test", None before the first evaluation. `finished`: no step and
    no evaluation of the run is left; `idle`: none was when the session began. `seconds` is all of its time,
    `images_per_second` that of training alone."""

    iteration: int
    newest: dict[str, Any] | None
    best: dict[str, Any] | None
    finished: bool
    idle: bool
    seconds: float
    images_per_second: float


class Run:
    """Trains to the end, with checkpoints, evaluations and metrics in `folder`.

    show: called with the iteration and the new figures of "train" or "test", as they come.
    """

    flush_every = 10  # iterations whose figures stay on a GPU, so that not each one waits for it

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        recorder: Recorder,
        show: Callable[[str, dict[str, Any]], None] = lambda split, row: None,
    ) -> None:
        self.trainer, self.folder, self.recorder, self.show = trainer, folder, recorder, show
        self._pending: list[torch.Tensor] = []
        self._saved: int | None = None  # iteration of the newest checkpoint of this session
        self._clock = 0.0
        self._images, self._seconds = 0, 0.0

    def until_done(self, stop: Callable[[], bool] = lambda: False) -> Summary:
        """Train until the last iteration and its evaluation, or until `stop()`; the state is saved either way.

        `stop` is asked between steps and between the batches of an evaluation, which is then given up: the session that
        goes on makes it.

        Raises:
            UserError: a loss or the weights are no longer finite, or a file cannot be written.
        """
        settings, trainer = self.trainer.settings, self.trainer
        started = self._clock = time.perf_counter()
        idle = self._finished()
        while True:
            last = trainer.iteration == settings.iterations
            # The first pass saves, too: settings that are new with this session last from its beginning.
            if self._saved is None or last or trainer.iteration % settings.save_every == 0:
                self.save()
            if self._due():
                self._evaluate(stop)
            if last or stop():
                break
            self._step()
        if self._saved != trainer.iteration:
            self.save()
        return self._summary(idle, time.perf_counter() - started)

    def save(self) -> None:
        """Write the checkpoint, after the figures that lead up to it.

        Raises:
            UserError: weights or losses are not finite, or it cannot be written.
        """
        self._flush()
        if not self.trainer.finite():
            raise self._diverged("weights are not finite after", self.trainer.iteration)
        self.recorder.sync()
        checkpoint.save(self.folder / "checkpoint.pt", self.trainer.state_dict())
        self._saved = self.trainer.iteration
        self._clock = time.perf_counter()

    def _finished(self) -> bool:
        return self.trainer.iteration == self.trainer.settings.iterations and not self._due()

    def _due(self) -> bool:
        """Whether an evaluation belongs after this iteration and has not been made."""
        iteration, settings = self.trainer.iteration, self.trainer.settings
        wanted = iteration == settings.iterations or iteration % settings.eval_every == 0
        return iteration > 0 and wanted and all(row["iteration"] != iteration for row in self.recorder.of("test"))

    def _step(self) -> None:
        self._pending.append(torch.stack(self.trainer.step()))
        if self.trainer.device.type == "cpu" or len(self._pending) == self.flush_every:
            self._flush()

    def _flush(self) -> None:
        """Hand on the figures of the pending iterations."""
        if not self._pending:
            return
        figures = torch.stack(self._pending).tolist()
        seconds = time.perf_counter() - self._clock
        images = len(figures) * self.trainer.settings.batch_size
        first = self.trainer.iteration - len(figures) + 1
        for iteration, (loss, accuracy) in enumerate(figures, first):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss} at", iteration)
            lr = self.trainer.settings.lr_at(iteration - 1)
            self._hand_on("train", iteration, loss=loss, accuracy=accuracy, lr=lr, images_per_second=images / seconds)
        self._pending.clear()
        self._images += images
        self._seconds += seconds
        self._clock = time.perf_counter()

    def _evaluate(self, stop: Callable[[], bool]) -> None:
        self._flush()
        figures = self.trainer.evaluate(stop)
        if figures is not None:
            loss, error = figures
            if not math.isfinite(loss):
                raise self._diverged(f"the held-out loss is {loss} after", self.trainer.iteration)
            self._hand_on("test", self.trainer.iteration, loss=loss, error=error)
        self._clock = time.perf_counter()

    def _diverged(self, what: str, iteration: int) -> UserError:
        before = self._saved is not None and self._saved < iteration
        return UserError(
            f"{what} iteration {iteration}: start anew, with --overwrite and a lower --lr (now "
            f"{self.trainer.settings.lr}) or a --warmup{'; the last checkpoint is from before' if before else ''}"
        )

    def _hand_on(self, split: str, iteration: int, **figures: float) -> None:
        self.recorder.add(split, iteration, **figures)
        self.show(split, {"iteration": iteration, **figures})

    def _summary(self, idle: bool, seconds: float) -> Summary:
        tests = self.recorder.of("test")
        return Summary(
            iteration=self.trainer.iteration,
            newest=tests[-1] if tests else None,
            best=min(tests, key=lambda row: row["error"], default=None),
            finished=self._finished(),
            idle=idle,
            seconds=seconds,
            images_per_second=self._images / self._seconds if self._seconds else 0.0,
        )
