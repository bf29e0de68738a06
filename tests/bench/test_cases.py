import re
from collections import Counter
from itertools import groupby

import pytest

from fused_preact.bench import cases
from fused_preact.bench.contenders import contenders

LISTS = [cases.default_cases, cases.full_cases, cases.table_cases]


@pytest.mark.parametrize("make", LISTS)
def test_names_are_unique(make):
    """A result row can be told from every other."""
    assert Counter(case.name for case in make()).most_common(1)[0][1] == 1


@pytest.mark.parametrize("make", LISTS)
def test_cases_of_a_group_follow_each_other(make):
    """The report has one table, and the picture one heading, for each."""
    groups = [group for group, _ in groupby(case.group for case in make())]
    assert len(groups) == len(set(groups))


@pytest.mark.parametrize("make", LISTS)
def test_every_case_has_an_eager_baseline(make):
    """A ratio needs an eager contender in the same case, and something to compare with it."""
    for case in make():
        backends = {contender.backend for contender in contenders(case)}
        assert "eager" in backends
        assert len(backends) > 1


@pytest.mark.parametrize("make", LISTS)
def test_a_label_is_true(make):
    """It names the batch, the pixels and the dtype of its case, also at another batch."""
    for case in make():
        pixels = re.search(r"\b(\d+)x\1,", case.label)
        assert pixels is None or case.shape[2:] == (int(pixels[1]),) * 2, case.name
        assert re.search(rf"\bN={case.shape[0]}, {case.dtype}\b", case.label), case.name
        assert case.at(3).shape == (3, *case.shape[1:])
    assert cases.host_cost().shape[2:] == (8, 8)


def test_default_covers_formats_and_dtypes():
    """Blocks are measured in both memory formats and both dtypes without asking."""
    blocks = [case for case in cases.default_cases() if not case.net]
    assert {case.dtype for case in blocks} == {"fp32", "bf16"}
    assert all(set(case.layouts) == {"channels_last", "NCHW"} for case in blocks)


def test_goals_of_the_stages():
    """The ratios that the project sets itself for ResNet-1001's stages at N = 16, fp32."""
    found = [dict(case.goals) for case in cases.bottlenecks(16, "fp32")]
    assert found == [{"fast": {"forward": f, "total": t}} for f, t in ((2.5, 2.0), (1.9, 1.7), (1.5, 1.5))]
    assert [dict(case.goals) for case in cases.bottlenecks(1, "fp32")] == [{}, {}, {}]


def test_goals_of_the_memory_modes():
    """What ResNet-1001's stages are to keep and to cost in each mode; in fp32 alone, as docs/benchmarks.md says."""
    for N, total in ((8, 1.9), (16, 1.75), (64, 1.5)):
        case = cases.resnet1001(N)
        assert case.memory == ("fast", "lean", "min")
        assert [case.goals[memory]["saved_bytes"] for memory in case.memory] == [2.0, 5.8, 11.0]
        assert [case.goals[memory].get("total") for memory in case.memory] == [total, None, None]
        slower = [1 / case.goals[memory]["against_fast"] for memory in ("lean", "min")]
        assert slower == pytest.approx([1.10, 1.20])
    narrow = cases.resnet1001(8, "bf16")
    assert (narrow.memory, narrow.goals) == (("fast", "lean", "min"), {})


def test_modules_fit_their_inputs():
    """Every block and unit of the lists reads as many channels as its input has."""
    for make in LISTS:
        for case in make():
            if not case.net and case.shape[0] == 1:
                first = next(m for m in case.make(backend="eager").modules() if hasattr(m, "num_features"))
                assert first.num_features == case.shape[1], case.name
