"""A training step: forward, cross entropy, backward, SGD update."""

from fused_preact.bench.cases import default_cases

CASES = [case for case in default_cases() if case.net]


def test_step(race, case, contender):
    race(case, contender, rounds=3)
