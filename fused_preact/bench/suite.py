"""Runs cases and makes the result document: plain JSON types all through.

    {schema, date, device, versions, platform, commit, malloc, settings, left_out: [str], cases: [case]}
    case:      {group, label, shape, dtype, net, rounds, busy, errors, contenders, rows}
    contender: {backend, layout, memory, forward, total: {median, low, high} in seconds, saved_bytes, peak_rss_bytes or
                null}
    row:       {contender, quantity: forward | total | saved_bytes | against_fast, baseline, ratio: {median, low, high},
                goal, reached}

A ratio is the fastest (or least) eager contender's over the row's; that of against_fast, in the memory modes other than
"fast", is fast's total time over the row's. goal and reached are null where there is no goal. busy: how many cores
other work took while the case was timed, null where the system does not tell; files from before it lack it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from . import environment, process
from .cases import Case
from .check import NET_BATCH, CheckError, pose, verify, widen
from .contenders import Contender, Problem, build, contenders, step
from .measure import Spread, Step, Times, alternate, ratio, saved_bytes, spread
from .memory import peak_rss
from .report import SCHEMA


@dataclass(frozen=True)
class Settings:
    """How long, and with what besides.

    Args:
        extent: which list of cases this is: default, full or table.
        budget: seconds of timed rounds a case; a net takes three times as many.
        rounds: fewest and most rounds a case.
        compiled: torch.compile of the eager module takes part.
        memory: measure the peak resident memory of nets, each contender in a process of its own.
        strict: a wrong contender means no document; else its case is left out, and the document says why.
    """

    extent: str = "default"
    budget: float = 1.0
    rounds: tuple[int, int] = (5, 50)
    compiled: bool = False
    memory: bool = False
    strict: bool = True


def run(
    cases: list[Case],
    settings: Settings,
    announce: Callable[[Case], None] = lambda case: None,
    keep: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Measures the cases one by one and returns the result document.

    `announce` is told each case before it starts, and `keep` gets the document after each.

    Raises:
        CheckError: a contender is wrong, and the settings are strict.
    """
    document = {"schema": SCHEMA, **environment.describe(), "left_out": []}
    document["settings"] = {**asdict(settings), "rounds": list(settings.rounds)}
    if settings.compiled and (reason := _no_compiler()):
        document["left_out"].append(f"torch.compile: {reason}")
        settings = replace(settings, compiled=False)
    document["cases"] = []
    for case in cases:
        announce(case)
        try:
            document["cases"].append(measure(case, settings))
        except CheckError as error:
            if settings.strict:
                raise
            document["left_out"].append(str(error))
        keep(document)
    return document


@dataclass(frozen=True)
class LineUp:
    """The contenders of a problem, ready to be timed; the lists go together."""

    entrants: list[Contender]
    steps: list[Step]
    saved: list[int]


def checked(case: Case) -> tuple[Problem, dict[str, dict[str, float]]]:
    """The problem of a case, and the errors of its contenders, which passed the check.

    Raises:
        CheckError: a contender is wrong.
    """
    problem = pose(case.at(NET_BATCH) if case.net else case)
    errors = verify(problem)
    return widen(problem, case) if case.net else problem, errors


def line_up(problem: Problem, compiled: bool = False) -> LineUp:
    """Builds the steps of a problem's contenders and counts what they keep for backward."""
    entrants = contenders(problem.case, compiled)
    modules = [build(contender, problem) for contender in entrants]
    steps = [step(contender, problem, module) for contender, module in zip(entrants, modules, strict=True)]
    for contender, trial in zip(entrants, steps, strict=True):
        if contender.backend == "compiled":
            trial.run()
    saved = [saved_bytes(trial.forward, module) for trial, module in zip(steps, modules, strict=True)]
    return LineUp(entrants, steps, saved)


def race(problem: Problem, settings: Settings) -> tuple[list[Times], list[int], float | None]:
    """Times of a problem's contenders, what each keeps for backward, and how many cores other work took meanwhile."""
    ready = line_up(problem, settings.compiled)
    net, budget, (fewest, most) = problem.case.net, settings.budget, settings.rounds
    others = environment.watch()
    times = alternate(ready.steps, 3 * budget if net else budget, (3 if net else fewest, most))
    return times, ready.saved, others()


def measure(case: Case, settings: Settings) -> dict[str, Any]:
    """Checks a case, then times it, in a process that did not see the check.

    Raises:
        CheckError: a contender is wrong.
        UserError: the process was ended.
    """
    problem, errors = checked(case)
    entrants = contenders(case, settings.compiled)
    peaks = [peak_rss(case, contender) if settings.memory and case.net else None for contender in entrants]
    times, saved, busy = process.call(case.name, race, problem, settings)
    return {
        "group": case.group,
        "label": case.label,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "net": case.net,
        "rounds": len(times[0].total),
        "busy": busy,
        "errors": errors,
        "contenders": {
            c.name: {
                "backend": c.backend,
                "layout": c.layout,
                "memory": c.memory,
                "forward": asdict(spread(t.forward)),
                "total": asdict(spread(t.total)),
                "saved_bytes": b,
                "peak_rss_bytes": peak,
            }
            for c, t, b, peak in zip(entrants, times, saved, peaks, strict=True)
        },
        "rows": list(_rows(case, entrants, times, saved)),
    }


def _rows(case: Case, entrants: list[Contender], times: list[Times], saved: list[int]) -> Iterator[dict[str, Any]]:
    samples = {
        "forward": [t.forward for t in times],
        "total": [t.total for t in times],
        "saved_bytes": [(b,) for b in saved],
    }
    eager = [i for i, c in enumerate(entrants) if c.backend == "eager"]
    for i, contender in enumerate(entrants):
        if i in eager:
            continue
        best = {quantity: min(eager, key=lambda j: spread(s[j]).median) for quantity, s in samples.items()}
        if contender.memory != "fast":
            best["against_fast"] = entrants.index(replace(contender, memory="fast"))
        aimed = contender.backend == "auto" and contender.layout == "channels_last"
        goals = case.goals.get(contender.memory, {}) if aimed else {}
        for quantity, baseline in best.items():
            sample = samples["total" if quantity == "against_fast" else quantity]
            found: Spread = ratio(sample[baseline], sample[i])
            goal = goals.get(quantity)
            yield {
                "contender": contender.name,
                "quantity": quantity,
                "baseline": entrants[baseline].name,
                "ratio": asdict(found),
                "goal": goal,
                "reached": None if goal is None else found.median >= goal,
            }


def _no_compiler() -> str | None:
    """Why torch.compile does not work on this machine, in one line, or None."""
    try:
        torch.compile(torch.nn.ReLU())(torch.ones(2))
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        return str(error).strip().splitlines()[0]
    return None
