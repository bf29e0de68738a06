"""Forward and backward of one block: bottlenecks, basic blocks and dense layers of the default cases."""

from fused_preact.bench.cases import default_cases

CASES = [case for case in default_cases() if not case.net]


def test_block(race, case, contender):
    race(case, contender, rounds=10)
