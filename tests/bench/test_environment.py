"""What a result says of the machine and the code that it was measured on."""

import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import fused_preact
from fused_preact import tables
from fused_preact.bench import environment


@pytest.mark.parametrize("field", ["flags", "Features"], ids=["x86", "Arm"])
def test_bf16_instructions_are_those_of_the_processor(field, monkeypatch):
    """Linux names the list of instructions by the architecture."""
    fields = {"model name": "A processor", field: "fp asimd bf16 avx512_bf16"}
    monkeypatch.setattr(tables, "cpuinfo", lambda: fields)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: {0, 3, 5})
    found = environment.cpu()
    assert (found["model"], found["cores"]) == ("A processor", 3)
    assert found["bf16_instructions"] == ["avx512_bf16", "bf16"]


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A folder that the package is said to be in."""
    (tmp_path / "fused_preact").mkdir()
    (tmp_path / "fused_preact" / "__init__.py").write_text("")
    monkeypatch.setattr(fused_preact, "__file__", str(tmp_path / "fused_preact" / "__init__.py"))
    return tmp_path


def git(folder, *arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_checkout(checkout):
    """With the changes of tracked files, but not with files beside them; none for a package outside of git."""
    assert environment.commit() is None
    git(checkout, "init", "--quiet")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message=first")
    (checkout / "bench.json").write_text("")
    expected = {"hash": git(checkout, "rev-parse", "HEAD"), "dirty": False}
    assert environment.commit() == expected
    (checkout / "fused_preact" / "__init__.py").write_text("changed")
    assert environment.commit() == {**expected, "dirty": True}


def test_a_checkout_that_git_cannot_read_does_not_stop_a_measurement(checkout):
    """The document says what git said."""
    (checkout / ".git").write_text("not git's")
    found = environment.commit()
    assert (found["hash"], found["dirty"]) == (None, None)
    assert "git" in found["error"]


def test_the_date_is_to_the_second_in_utc():
    """So that results of machines in different time zones are in order."""
    date = datetime.fromisoformat(environment.date())
    assert date.utcoffset() == timedelta(0)
    assert abs(datetime.now(timezone.utc) - date) < timedelta(minutes=1)
    assert date.microsecond == 0


STAT = """cpu  0 0 0 0 0 0 0 0 0 0
cpu0 {0} 10 10 {1} {1} 10 10 10 0 0
cpu1 90000 0 0 0 0 0 0 0 0 0
cpu2 {0} 0 0 0 0 0 0 {1} 0 0
intr 5 6
"""


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Seconds: of the clock, and of those the ones that this process worked; cores 0 and 2 of three are its own."""
    now = {"clock": 0.0, "own": 0.0}
    monkeypatch.setattr(environment, "_STAT", tmp_path / "stat")
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: {0, 2})
    monkeypatch.setattr(environment.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(environment.time, "perf_counter", lambda: now["clock"])
    monkeypatch.setattr(environment.time, "process_time", lambda: now["own"])
    environment._STAT.write_text(STAT.format(1000, 2000))
    return now


def test_other_work_is_what_this_process_did_not_do(clock):
    """On its cores: all time that is neither idle, waiting for a disk or not, nor its own; what a host took, too."""
    others = environment.watch()
    clock.update(clock=10.0, own=7.0)
    environment._STAT.write_text(STAT.format(1000 + 800, 2000 + 100))  # 8 s on each, and 1 s stolen: 17 s
    assert others() == pytest.approx(1.0, abs=0.01)
    clock.update(own=30.0)
    assert others() == 0.0


def test_a_tick_is_no_other_work(clock):
    """The system counts in hundredths of a second: in a short while one more or less would be half a core."""
    others = environment.watch()
    clock.update(clock=0.02)
    environment._STAT.write_text(STAT.format(1001, 2000))
    assert others() == pytest.approx(0.0, abs=1e-6)


def test_a_system_that_does_not_tell(monkeypatch):
    """Elsewhere than on Linux."""
    monkeypatch.setattr(environment, "_STAT", Path("/nowhere"))
    assert environment.busy(0.0) is None


@pytest.mark.skipif(not environment._STAT.exists(), reason="this system has no /proc/stat, which tells of other work")
def test_a_busy_neighbour_is_seen():
    """Beside whatever else the machine does."""
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as spinning:
        try:
            assert environment.busy() > 0.2
        finally:
            spinning.kill()
