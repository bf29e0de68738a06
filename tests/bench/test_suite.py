import json
from dataclasses import replace

import pytest

from fused_preact.bench import check, contenders, suite
from fused_preact.bench.measure import Times, saved_bytes
from fused_preact.bench.memory import peak_rss

QUICK = suite.Settings(budget=0.0, rounds=(2, 2))


def test_document_has_the_schema_and_survives_json(block, small_net):
    """A result file holds everything a reader needs: machine, versions, commit, malloc, medians and quantiles."""
    told, kept = [], []
    document = suite.run([block, small_net], QUICK, told.append, lambda found: kept.append(len(found["cases"])))
    assert told == [block, small_net]
    assert kept == [1, 2]
    assert json.loads(json.dumps(document)) == document
    top = {"schema", "date", "device", "versions", "platform", "commit", "malloc", "settings", "left_out", "cases"}
    assert top == set(document)
    assert {"model", "cores", "threads", "isa", "torch_isa", "bf16_instructions"} == set(document["device"])
    assert {"python", "torch", "fused_preact"} == set(document["versions"])
    case = document["cases"][0]
    assert {"group", "label", "shape", "dtype", "net", "rounds", "busy", "errors", "contenders", "rows"} == set(case)
    assert case["busy"] is None or case["busy"] >= 0
    for found in case["contenders"].values():
        assert {"backend", "layout", "memory", "forward", "total", "saved_bytes", "peak_rss_bytes"} == set(found)
        for quantity in ("forward", "total"):
            assert 0 < found[quantity]["low"] <= found[quantity]["median"] <= found[quantity]["high"]
        assert found["forward"]["median"] < found["total"]["median"]
        assert found["saved_bytes"] > 0


def test_goal_stands_at_the_fused_channels_last_row_alone(block):
    """A goal is reached or not by the measured ratio, and only where one was set."""
    rows = suite.measure(block, QUICK)["rows"]
    assert len(rows) == 6
    (aimed,) = [row for row in rows if row["goal"] is not None]
    assert (aimed["contender"], aimed["quantity"]) == ("fused channels_last", "saved_bytes")
    assert aimed["reached"] is (aimed["ratio"]["median"] >= 1.5)
    assert all(row["reached"] is None for row in rows if row is not aimed)


def test_baseline_is_the_fastest_eager(block):
    """The ratio is taken against the best that eager can do, in whichever format, and pair by pair."""
    entrants = contenders.contenders(block)
    assert [c.name for c in entrants] == ["fused channels_last", "eager channels_last", "fused NCHW", "eager NCHW"]
    seconds = {"fused channels_last": (1.0, 2.0), "eager channels_last": (4.0, 9.0), "fused NCHW": (3.0, 3.0)}
    times = [Times(t := seconds.get(c.name, (3.0, 6.0)), t) for c in entrants]
    rows = {(r["contender"], r["quantity"]): r for r in suite._rows(block, entrants, times, [6, 12, 6, 9])}
    assert rows["fused channels_last", "total"]["baseline"] == "eager NCHW"
    assert rows["fused channels_last", "total"]["ratio"]["median"] == 3.0
    assert rows["fused NCHW", "forward"]["ratio"]["median"] == 1.5
    assert rows["fused NCHW", "saved_bytes"]["ratio"]["median"] == 1.5


def test_a_goal_is_reached_by_the_median(block):
    """Not by the best rounds."""
    case = replace(block, layouts=("channels_last",), goals={"fast": {"total": 2.0}})
    entrants = contenders.contenders(case)
    samples = {"auto": (1.0, 1.0, 1.0, 1.0, 1.0), "eager": (1.5, 1.5, 1.9, 3.0, 3.0)}
    times = [Times(samples[c.backend], samples[c.backend]) for c in entrants]
    (row,) = [row for row in suite._rows(case, entrants, times, [1, 2]) if row["goal"] is not None]
    assert row["ratio"]["median"] < 2.0 < row["ratio"]["high"]
    assert row["reached"] is False


def test_against_fast_is_of_a_whole_step(small_net):
    """Forward alone does not pay for what backward makes again."""
    case = replace(small_net, memory=("fast", "lean"))
    entrants = contenders.contenders(case)
    totals = {"fast": 2.0, "lean": 4.0}
    times = [Times((1.0,), (totals[c.memory],)) for c in entrants]
    (row,) = [row for row in suite._rows(case, entrants, times, [1] * 3) if row["quantity"] == "against_fast"]
    assert row["ratio"]["median"] == 0.5


def test_a_net_takes_longer(block, small_net, monkeypatch):
    """It is checked on few images and timed on its own, with three times the time and as few rounds as three."""
    asked, sizes = [], []

    def alternate(steps, *limits):
        asked.append(limits)
        return [Times((1.0,), (2.0,)) for _ in steps]

    def step(contender, problem, module):
        sizes.append(len(problem.x))
        return contenders.step(contender, problem, module)

    monkeypatch.setattr(suite, "alternate", alternate)
    monkeypatch.setattr(suite, "step", step)
    settings = suite.Settings(budget=2.0, rounds=(5, 50))
    for case in block, replace(small_net, shape=(3, 3, 8, 8)):
        suite.race(suite.checked(case)[0], settings)
    assert asked == [(2.0, (5, 50)), (6.0, (3, 50))]
    assert sizes == [4] * 4 + [3] * 2


def test_memory_modes_are_contenders(small_net):
    """Each keeps fewer bytes than the one before, is compared with eager and with fast, and has goals of its own."""
    goals = {"fast": {"total": 1.5}, "lean": {"saved_bytes": 1.0, "against_fast": 1e6}}
    case = replace(small_net, memory=("fast", "lean"), goals=goals)
    found = suite.measure(case, QUICK)
    fast, lean, eager = "fused channels_last", "fused lean channels_last", "eager channels_last"
    assert list(found["contenders"]) == [fast, lean, eager]
    assert [found["contenders"][name]["memory"] for name in (fast, lean)] == ["fast", "lean"]
    saved = [found["contenders"][name]["saved_bytes"] for name in (lean, fast, eager)]
    assert saved == sorted(set(saved))
    rows = {(row["contender"], row["quantity"]): (row["baseline"], row["goal"]) for row in found["rows"]}
    assert rows[lean, "against_fast"] == (fast, 1e6)
    assert rows[lean, "saved_bytes"] == (eager, 1.0)
    assert rows[lean, "total"] == (eager, None)
    assert rows[fast, "total"] == (eager, 1.5)
    assert (fast, "against_fast") not in rows
    (speed,) = [row for row in found["rows"] if row["quantity"] == "against_fast"]
    assert not speed["reached"]  # no machine is as noisy as that


def test_times_are_of_a_process_that_saw_nothing_else(block, monkeypatch):
    """After the check in float64, or a larger case, malloc keeps blocks that it gives back in a user's program."""
    asked = []

    def call(what, function, *arguments):
        asked.append((what, function))
        return function(*arguments)

    monkeypatch.setattr(suite.process, "call", call)
    suite.measure(block, QUICK)
    assert asked == [(block.name, suite.race)]


@pytest.mark.usefixtures("broken")
def test_wrong_contender_is_not_timed(block, monkeypatch):
    """The check comes first: of a wrong contender there is not even a time."""
    monkeypatch.setattr(suite.process, "call", lambda *arguments: pytest.fail("timed a wrong contender"))
    with pytest.raises(check.CheckError):
        suite.run([block], QUICK)


@pytest.mark.usefixtures("broken")
def test_wrong_contender_is_left_out_where_the_rest_goes_on(block):
    """The grid for the choice of a backend goes on without a wrong case, and says which and why."""
    document = suite.run([block, replace(block, backends=("eager",))], replace(QUICK, strict=False))
    assert len(document["cases"]) == 1
    (reason,) = document["left_out"]
    assert "Tiny, block: the error of y of fused channels_last" in reason


def test_fused_keeps_fewer_bytes(block):
    """What the package promises for every block: about half of eager's bytes are kept for backward."""
    found = suite.measure(replace(block, layouts=("channels_last",)), QUICK)["contenders"]
    assert found["fused channels_last"]["saved_bytes"] * 1.9 < found["eager channels_last"]["saved_bytes"]


def test_peak_memory_is_measured_in_a_process_of_its_own(small_net):
    """A step raises resident memory by no less than what it keeps for backward, and this process does not grow."""
    case, contender = replace(small_net, shape=(8, 3, 32, 32)), contenders.Contender("eager", "channels_last")
    problem = check.pose(case)
    module = contenders.build(contender, problem)
    kept = saved_bytes(contenders.step(contender, problem, module).forward, module)
    assert kept < peak_rss(case, contender) < 2**30


def test_peak_memory_is_measured_where_asked(small_net, monkeypatch):
    """Of nets alone, and only with the setting: each contender takes a process."""
    monkeypatch.setattr(suite, "peak_rss", lambda case, contender: 7)
    for memory, expected in ((True, {7}), (False, {None})):
        found = suite.measure(small_net, replace(QUICK, memory=memory))["contenders"]
        assert {contender["peak_rss_bytes"] for contender in found.values()} == expected


def test_missing_compiler_is_reported_not_fatal(block, monkeypatch):
    """Without a C++ compiler torch.compile is left out, and the document says so."""
    monkeypatch.setattr(suite, "_no_compiler", lambda: "no compiler found")
    document = suite.run([replace(block, layouts=("NCHW",))], replace(QUICK, compiled=True))
    assert document["left_out"] == ["torch.compile: no compiler found"]
    assert set(document["cases"][0]["contenders"]) == {"fused NCHW", "eager NCHW"}


def test_other_work_is_watched_while_a_case_is_timed(block, monkeypatch):
    """From the first round to the last, in the process that is timed."""
    order = []
    monkeypatch.setattr(suite, "alternate", lambda steps, *_: order.append("timed") or [Times((1.0,), (2.0,))] * 4)
    monkeypatch.setattr(suite.environment, "watch", lambda: order.append("watched") or (lambda: len(order)))
    *_, busy = suite.race(suite.checked(block)[0], QUICK)
    assert order == ["watched", "timed"]
    assert busy == 2
