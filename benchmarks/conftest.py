"""pytest-benchmark over the cases of `fused-preact bench`: the same modules, inputs, checks and steps.

One test a contender. Before each timed round every other contender of the case runs once, outside of the clock, so that
here too the contenders take turns, and ratios come of neighbouring rounds. A case whose check fails has no figures.
"""

from collections.abc import Callable
from dataclasses import asdict

import pytest

from fused_preact.bench import environment
from fused_preact.bench.cases import Case
from fused_preact.bench.contenders import Contender, contenders
from fused_preact.bench.measure import ratio, spread
from fused_preact.bench.suite import LineUp, checked, line_up


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each contender of each case in the module's CASES."""
    pairs = [(case, contender) for case in metafunc.module.CASES for contender in contenders(case)]
    metafunc.parametrize(("case", "contender"), pairs, ids=[f"{case.name}: {c.name}" for case, c in pairs])


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    """Adds processor, versions, commit and malloc, as in the result files of `fused-preact bench`."""
    machine_info["fused_preact"] = environment.describe()


@pytest.fixture(scope="session")
def lined_up() -> Callable[[Case], tuple[LineUp, dict[str, dict[str, float]]]]:
    """The checked contenders of a case and their errors; the last are kept, for the tests of its other contenders."""
    last: dict[str, tuple[LineUp, dict[str, dict[str, float]]]] = {}

    def get(case: Case) -> tuple[LineUp, dict[str, dict[str, float]]]:
        if case.name not in last:
            last.clear()
            problem, errors = checked(case)
            last[case.name] = line_up(problem), errors
        return last[case.name]

    return get


@pytest.fixture
def race(benchmark, lined_up) -> Callable[[Case, Contender, int], None]:
    """Times forward + backward of one contender over some rounds; the rest of the figures go to extra_info."""

    def run(case: Case, contender: Contender, rounds: int) -> None:
        ready, errors = lined_up(case)
        own = ready.entrants.index(contender)
        log: dict[str, list[tuple[float, float]]] = {entrant.name: [] for entrant in ready.entrants}

        def rivals() -> None:
            for entrant, step in zip(ready.entrants, ready.steps, strict=True):
                if entrant != contender:
                    log[entrant.name].append(step.run())

        benchmark.group = case.name
        benchmark.pedantic(
            lambda: log[contender.name].append(ready.steps[own].run()), setup=rivals, rounds=rounds, warmup_rounds=1
        )
        times = {name: [total for _, total in runs] for name, runs in log.items()}
        benchmark.extra_info.update(
            forward_s=asdict(spread([forward for forward, _ in log[contender.name]])),
            ratio={n: asdict(ratio(t, times[contender.name])) for n, t in times.items() if n != contender.name},
            saved_bytes=ready.saved[own],
            errors=errors[contender.name],
        )

    return run
