"""Forward and backward of one block: ResNet-1001's bottlenecks, ResNet-110's and PreActResNet-18's basic blocks."""

from fused_preact.bench.cases import default_cases

CASES = [case for case in default_cases() if not case.net]


def test_block(race, case, contender):
    race(case, contender, rounds=10)
