"""What a result says of the machine and the code that it was measured on."""

import subprocess
from datetime import datetime, timedelta, timezone

import pytest

import fused_preact
from fused_preact import tables
from fused_preact.bench import environment


@pytest.mark.parametrize("field", ["flags", "Features"], ids=["x86", "Arm"])
def test_bf16_instructions_are_those_of_the_processor(field, monkeypatch):
    """Linux names the list of instructions by the architecture."""
    fields = {"model name": "A processor", field: "fp asimd bf16 avx512_bf16"}
    monkeypatch.setattr(tables, "cpuinfo", lambda: fields)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
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
