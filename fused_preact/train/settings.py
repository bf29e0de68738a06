"""The recipes, and the settings of one run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from ..cli import MOST_THREADS
from ..errors import UserError
from ..stage import MEMORY


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with momentum, the learning rate divided by 10 after each fraction `drops` of the run.

    The length is given in iterations or in epochs. The settings of a run may replace any part.
    """

    batch_size: int
    drops: tuple[float, ...]
    iterations: int | None = None
    epochs: int | None = None
    nesterov: bool = False
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    padding: int = 4

    def length(self, images: int, batch_size: int) -> int:
        """Iterations of the run, on so many training images."""
        return self.iterations or self.epochs * (images // batch_size)


RECIPES = {
    # He et al., Identity Mappings in Deep Residual Networks, 2016, and Deep Residual Learning, 2015, section 4.2.
    "paper": Recipe(batch_size=128, iterations=64_000, drops=(32 / 64, 48 / 64)),
    # https://github.com/KaimingHe/resnet-1k-layers: the rate drops when its epochs 81 and 122, counted from 1, begin.
    "resnet-1k-layers": Recipe(batch_size=64, epochs=200, drops=(80 / 200, 121 / 200), nesterov=True),
    # The shape of the paper's schedule, at the size of the digits.
    "digits": Recipe(batch_size=32, iterations=200, drops=(32 / 64, 48 / 64)),
}

# Settings that neither the recipe nor the data nor the machine decides.
DEFAULTS = {
    "warmup": 0,
    "warmup_lr": 0.01,
    "seed": 0,
    "amp": "none",
    "backend": "auto",
    "memory": "fast",
    "cuda_graph": False,
    "save_every": 100,
}
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes.

    `resolve` checks `recipe` and `batch_size`, which it reckons with; `model` and `backend` are for the trainer to
    check.
    `milestones`: iterations after which `lr` is divided by 10. `warmup`: iterations at `warmup_lr` before that.
    `amp`: "none" or "bf16". `memory`: a mode of `PreActStage`. `cuda_graph`: steps are replayed from one. `eval_every`
    and `save_every` are in iterations.

    Raises:
        UserError: a value is out of range.
    """

    model: str
    data: str
    recipe: str
    iterations: int
    batch_size: int
    lr: float
    milestones: list[int]
    momentum: float
    nesterov: bool
    weight_decay: float
    warmup: int
    warmup_lr: float
    padding: int
    flip: bool
    seed: int
    amp: str
    backend: str
    memory: str
    cuda_graph: bool
    device: str
    threads: int
    eval_every: int
    save_every: int

    @classmethod
    def names(cls) -> list[str]:
        """The settings, each also a command-line flag."""
        return [field.name for field in fields(cls)]

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "eval_every", "save_every"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in ("momentum", "weight_decay", "warmup", "padding", "seed"):
            self._expect(name, getattr(self, name) >= 0, "at least 0")
        self._expect("threads", 1 <= self.threads <= MOST_THREADS, f"from 1 to {MOST_THREADS}")
        self._expect("seed", self.seed < 2**63, "less than 2^63")
        self._expect("padding", self.padding <= 32, "at most 32, the size of the images")
        for name in ("lr", "warmup_lr"):
            self._expect(name, getattr(self, name) > 0, "more than 0")
        for name in ("lr", "warmup_lr", "momentum", "weight_decay"):
            self._expect(name, getattr(self, name) <= LARGEST, f"at most {LARGEST:.1e}, as float32 holds no more")
        increasing = self.milestones == sorted(set(self.milestones)) and min(self.milestones, default=0) >= 0
        self._expect("milestones", increasing, "increasing iterations")
        self._expect("nesterov", not self.nesterov or self.momentum > 0, "a --momentum of more than 0 with it")
        self._expect("amp", self.amp in ("none", "bf16"), "none or bf16")
        self._expect("memory", self.memory in MEMORY, f"one of {', '.join(MEMORY)}")

    def _expect(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise UserError(f"{flag(name)}: expected {expected}, got {getattr(self, name)}")

    def lr_at(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        if iteration < self.warmup:
            return self.warmup_lr
        return self.lr / 10 ** sum(iteration >= milestone for milestone in self.milestones)


# What may differ when a run is resumed: none of it decides what one iteration should compute, rounding apart.
FREE = ("data", "backend", "memory", "cuda_graph", "device", "threads", "eval_every", "save_every", "iterations")


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def resolve(given: dict[str, Any], images: int, flip: bool) -> Settings:
    """Settings of a new run: the recipe's, except where `given` (flags that were set) says otherwise.

    images: size of the training set; flip: whether mirrored images are of the same class.

    Raises:
        UserError: there is no recipe of that name, or a value is out of range.
    """
    name = given.get("recipe", "digits" if given["data"] == "digits" else "paper")
    if name not in RECIPES:
        raise UserError(f"--recipe: expected one of {', '.join(RECIPES)}, got {name}")
    recipe = RECIPES[name]
    batch_size = given.get("batch_size", recipe.batch_size)
    if not 1 <= batch_size <= images:
        raise UserError(f"--batch-size: expected from 1 to {images}, the number of training images, got {batch_size}")
    iterations = given.get("iterations", recipe.length(images, batch_size))
    defaults = DEFAULTS | {
        "recipe": name,
        "iterations": iterations,
        "batch_size": batch_size,
        "lr": recipe.lr,
        "milestones": sorted({max(1, round(drop * iterations)) for drop in recipe.drops}),
        "momentum": recipe.momentum,
        "nesterov": recipe.nesterov,
        "weight_decay": recipe.weight_decay,
        "padding": recipe.padding,
        "flip": flip,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "eval_every": images // batch_size,
    }
    return Settings(**defaults | given)


def resume(saved: dict[str, Any], given: dict[str, Any], where: str) -> Settings:
    """Settings of a run that goes on: the saved ones, with those of `FREE` that are given.

    where: the run's name in messages.

    Raises:
        UserError: one that is not in `FREE` is given with a different value, or what was saved are no settings of this
            version.
    """
    if set(saved) != set(Settings.names()):
        raise UserError(f"{where}: its checkpoint was written by another version of fused_preact; start anew")
    for field in fields(Settings):
        if not _is_a(field.type, saved[field.name]):
            raise UserError(
                f"{where}: damaged: expected {field.type} for {field.name}, got {saved[field.name]!r}; start anew"
            )
    for name, value in given.items():
        if name not in FREE and value != saved[name]:
            raise UserError(f"{where}: trained with {flag(name)} {saved[name]}; --resume cannot change it to {value}")
    return Settings(**{**saved, **{name: value for name, value in given.items() if name in FREE}})


def _is_a(kind: str, value: Any) -> bool:
    """Whether a value has the type of a field, as it is annotated."""
    if kind == "list[int]":
        return isinstance(value, list) and all(_is_a("int", one) for one in value)
    return type(value).__name__ in {kind, "int" if kind == "float" else kind}
