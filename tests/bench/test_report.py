"""What a person reads of a result."""

import io

import pytest
from rich.console import Console

from fused_preact.bench import report
from fused_preact.errors import UserError

FUSED, EAGER = "fused channels_last", "eager NCHW"


def document(**changes):
    """A result of one net of which fused is three times as fast, and keeps half."""
    spread = {"median": 3.0, "low": 2.5, "high": 3.5}
    row = {"contender": FUSED, "baseline": EAGER, "ratio": spread, "goal": None, "reached": None}
    quantities = {
        "forward": {},
        "total": {"goal": 4.0, "reached": False},
        "saved_bytes": {"goal": 2.0, "reached": True},
    }
    rows = [{**row, "quantity": quantity, **more} for quantity, more in quantities.items()]
    seconds = {FUSED: 0.002, EAGER: 0.006}
    contenders = {
        name: {"forward": {"median": s}, "total": {"median": 2 * s}, "saved_bytes": s * 2**20 * 1000}
        for name, s in seconds.items()
    }
    case = {"group": "G", "label": "a net", "dtype": "fp32", "net": True, "contenders": contenders, "rows": rows}
    return {
        "device": {"model": "A processor", "cores": 4, "threads": 2, "isa": None, "bf16_instructions": []},
        "versions": {"torch": "2.13", "fused_preact": "0.1"},
        "commit": {"hash": "0123456789abcdef", "dirty": False},
        "malloc": {"setting": "default"},
        "left_out": [],
        "cases": [case],
        **changes,
    }


def shown(made):
    """What is printed, in one line."""
    text = io.StringIO()
    report.show(made, Console(file=text, width=200))
    return " ".join(text.getvalue().split())


def test_figures_have_their_units():
    """Milliseconds and MiB of the baseline and then of the contender, with the ratio and its spread."""
    text = shown(document())
    for part in "3.00x (2.50-3.50)", "6 to 2 ms", "12 to 4 ms", "6 to 2 MiB":
        assert part in text
    assert "forward, backward, update" in text


def test_goals_are_said_to_be_reached_or_not():
    """And what they are meant for; without goals neither."""
    text = shown(document())
    assert "goal 4x not reached" in text
    assert "goal 2x reached" in text
    assert "Goals are meant for two threads." in text
    made = document()
    for row in made["cases"][0]["rows"]:
        row["goal"] = None
    assert "goal" not in shown(made).lower()


@pytest.mark.parametrize(
    ("commit", "expected"),
    [
        ({"hash": "0123456789abcdef", "dirty": False}, ", 0123456789ab; "),
        ({"hash": "0123456789abcdef", "dirty": True}, ", 0123456789ab (modified); "),
        ({"hash": None, "dirty": None}, ", ?; "),
        (None, ", no commit; "),
    ],
    ids=["clean", "modified", "unknown", "none"],
)
def test_the_code_is_named(commit, expected):
    """By its commit, where there is one that git tells."""
    assert expected in report.headline(document(commit=commit))


def test_what_was_left_out_is_said_as_it_is():
    """In brackets too, which would else be taken for a color."""
    assert "Left out: torch.compile: [red] alert" in shown(document(left_out=["torch.compile: [red] alert"]))


def test_a_file_of_a_gpu_is_told_from_others(tmp_path):
    """It holds other figures, which are no error of the user's."""
    (tmp_path / "gpu.json").write_text('{"schema": 1, "nets": []}')
    with pytest.raises(UserError, match=r"gpu\.json is of a GPU: .* --show draws those of a CPU"):
        report.read(tmp_path / "gpu.json")


@pytest.mark.parametrize(
    ("busy", "threads", "said"),
    [
        ([0.1, None, 1.26], 4, True),
        ([0.1, 0.1], 4, False),
        ([None], 4, False),
        ([2.1], 2, False),
        ([2.3], 2, True),
        ([0.1], 8, False),
    ],
    ids=["busy once", "idle", "not told", "on other cores", "on more than those", "more threads than cores"],
)
def test_a_busy_machine_is_told(busy, threads, said):
    """Where the threads wanted the cores that other work took, eager is the slower for it."""
    made = document()
    made["device"]["threads"] = threads
    made["cases"] = [{**made["cases"][0], "busy": cores} for cores in busy]
    text = shown(made)
    assert ("ratios are too high" in text) is said
    assert (
        f"The machine was busy (other work took up to {max(filter(None, busy), default=0):.1f} of 4" in text
    ) is said


def test_a_busy_machine_is_told_before_it_is_measured(monkeypatch):
    """What is found is handed back, for the result."""
    text = io.StringIO()
    monkeypatch.setattr(report.environment, "busy", lambda: 1.5)
    monkeypatch.setattr(report.environment, "cpu", lambda: {"cores": 2, "threads": 7})
    console = Console(file=text, width=200)
    assert report.warn_if_busy(console, threads=2) == 1.5
    assert text.getvalue().startswith("The machine was busy (other work took up to 1.5 of 2 cores): ")
    text.truncate(0)
    monkeypatch.setattr(report.environment, "busy", lambda: 0.1)
    assert report.warn_if_busy(console, threads=2) == 0.1
    assert not text.getvalue()


def test_names_are_shown_as_they_are():
    """A file from elsewhere may have brackets in them, which would else be taken for a color or end the table."""
    made = document()
    made["cases"][0] |= {"group": "G [/]", "label": "a [red]net[/] b"}
    text = shown(made)
    assert "a [red]net[/] b" in text
    assert "G [/]" in text
