import argparse
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_preact import _extension
from fused_preact.bench import command, environment, picture, report, suite
from fused_preact.errors import UserError


def parse(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def few(monkeypatch, block, small_net):
    """The default list is two tiny cases, and two rounds are enough."""
    modes = replace(small_net, memory=("fast", "lean"))
    monkeypatch.setattr(command, "default_cases", lambda: [block, modes])
    monkeypatch.setattr(command, "_settings", lambda arguments: suite.Settings(budget=0.0, rounds=(2, 2)))


@pytest.mark.usefixtures("few")
def test_writes_json_and_picture_and_prints_the_table(tmp_path, capsys):
    """One command leaves a table on the terminal, a result file and a picture."""
    stem = tmp_path / "new" / "result"
    assert command.run(parse(f"--output={stem}")) == 0
    document = json.loads(stem.with_suffix(".json").read_text())
    assert [case["label"] for case in document["cases"]] == ["block", "net"]
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "goal 1.5x" in out
    assert "x of fast" in out
    assert "malloc" in out


@pytest.mark.usefixtures("few", "broken")
def test_wrong_kernel_means_no_report(tmp_path, capsys):
    """A wrong answer: exit code 1, the reason, and no file that someone could quote."""
    assert command.run(parse(f"--output={tmp_path / 'result'}")) == 1
    assert "Wrong result" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("few")
def test_without_matplotlib_the_result_is_still_written(tmp_path, monkeypatch, capsys):
    """The picture is an extra: without matplotlib one line says what to install."""
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    assert command.run(parse(f"--output={tmp_path / 'result'}", "--only=block")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert "pip install matplotlib" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_show_draws_a_result_file_again(tmp_path):
    """A result from another machine can be looked at without measuring."""
    assert command.run(parse(f"--output={tmp_path / 'a'}", "--only=block")) == 0
    (tmp_path / "a.png").unlink()
    assert command.run(parse(f"--show={tmp_path / 'a.json'}")) == 0
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "content", [None, "{", "[]", "[" * 100_000, '{"schema": 99}', '{"schema": 1}', '{"schema": 1, "nets": []}']
)
def test_show_of_another_file_is_one_clear_error(tmp_path, content):
    """A missing, broken or foreign file is named in one line."""
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"x\.json"):
        command.run(parse(f"--show={path}"))


RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
RESULTS = [path for path in RESULTS if "cases" in json.loads(path.read_text())]  # not of a GPU, nor of a training


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_that_is_kept_can_be_shown(path, tmp_path):
    """Older files lack what was added since."""
    assert command.run(parse(f"--show={path}", f"--output={tmp_path / 'again'}")) == 0


@pytest.mark.parametrize("lost", ["device", "versions", "left_out", "malloc", "cases", "contenders", "rows", "label"])
def test_show_of_a_file_that_lacks_something_is_one_clear_error(lost, tmp_path):
    """One that was edited, or made by something else."""
    document = json.loads(RESULTS[0].read_text())
    holder = document if lost in document else document["cases"][0]
    holder[lost] = None
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"--show .*x\.json: expected a whole result file .* measure again"):
        command.run(parse(f"--show={path}"))


@pytest.mark.parametrize(
    "option",
    [
        "--only=block",
        "--list",
        "--device=cpu",
        "--device=cuda",
        "--threads=2",
        "--budget=1",
        "--memory",
        "--malloc=tuned",
    ],
)
def test_show_refuses_what_it_would_not_hear(option, tmp_path):
    """--show measures nothing, so what changes a measurement is a mistake."""
    with pytest.raises(UserError, match="--show goes with --output alone"):
        command.run(parse(f"--show={tmp_path}", option))


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    """A minute of measurements is not lost for a wrong --output."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(suite, "run", None)
    with pytest.raises(UserError, match=r"result\.json: cannot be written"):
        command.run(parse(f"--output={tmp_path / 'file' / 'result'}"))


def test_unknown_case_is_one_clear_error():
    """A filter that matches nothing says how to see the names."""
    with pytest.raises(UserError, match=r"no case contains 'nothing'; --list"):
        command.run(parse("--only=nothing"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--threads", "0"),
        ("--budget", "-1"),
        ("--budget", "soon"),
        ("--budget", "inf"),
        ("--output", "."),
        ("--output", "a/.."),
    ],
)
def test_options_are_checked(option, value, capsys):
    """Threads and seconds have to be positive numbers, and a folder is no name of files."""
    with pytest.raises(SystemExit) as stop:
        parse(f"{option}={value}")
    assert stop.value.code == 2
    assert f"argument {option}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--full", "--only=block", "--threads=2", "--malloc=tuned"])
def test_options_that_a_gpu_does_not_hear_are_refused(option):
    """Rather than left out without a word."""
    with pytest.raises(UserError, match=f"{option.partition('=')[0]}: is for the CPU; --device cuda goes with"):
        command.run(parse("--device=cuda", option))


def test_a_grid_without_the_kernels_for_it(monkeypatch):
    """It asks for each backend by name, so one that is not built is told before anything is measured."""
    monkeypatch.setattr(_extension, "unavailable", "_C.abi3.so is not built")
    with pytest.raises(UserError, match=r"--table: _C.abi3.so is not built"):
        command.run(parse("--table", "--only=unit 1x1"))


def test_list_names_the_cases(capsys):
    """--list --only says what would be measured, and measures nothing."""
    assert command.run(parse("--list", "--only=training step")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Training step, ResNet-1001, N=8, fp32" in lines
    assert all(line.startswith("Training step") for line in lines)


@pytest.mark.parametrize(
    ("variables", "setting"),
    [({}, "default"), (environment.TUNED_MALLOC, "tuned"), ({"MALLOC_ARENA_MAX": "1"}, "custom")],
    ids=["default", "tuned", "custom"],
)
def test_malloc_setting_is_told_from_the_environment(monkeypatch, variables, setting):
    """A result says which malloc it was measured with, and the variables that made it so."""
    for name in environment.malloc()["variables"]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.malloc() == {"setting": setting, "variables": variables}


def test_another_malloc_runs_in_a_child(monkeypatch, tmp_path):
    """glibc reads its setting at start, so the same command runs again with the variables set, and both mean two."""
    calls, codes = [], iter([0, 0, 1])

    def fake(argv, env):
        calls.append((argv, env))
        return next(codes)

    monkeypatch.setattr(command, "_code", fake)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    options = "--only=resnet-110", "--threads=2", "--memory", "--budget=0.5"
    assert command.run(parse("--malloc=both", *options, f"--output={tmp_path / 'r'}")) == 0
    for (argv, env), malloc, stem in zip(calls, ("default", "tuned"), ("r", "r-tuned"), strict=True):
        assert argv[1:4] == ["-m", "fused_preact", "bench"]
        assert {f"--malloc={malloc}", f"--output={tmp_path / stem}", *options} == set(argv[4:])
        assert environment.TUNED_MALLOC.items() <= env.items() or malloc == "default"
        assert "MALLOC_ARENA_MAX" not in env
    assert command.run(parse("--full", f"--output={tmp_path / 'r.1'}")) == 1  # both; wrong in the first
    assert [argv[4:] for argv, _ in calls[2:]] == [["--malloc=default", f"--output={tmp_path / 'r.1'}", "--full"]]


def test_a_child_that_is_killed_is_one_clear_error(monkeypatch, tmp_path):
    """Where the system ends the child, as for want of memory, what it left is named, and nothing else is started."""
    calls = []

    def killed(argv, env):
        calls.append(argv)
        return -9

    monkeypatch.setattr(command, "_code", killed)
    with pytest.raises(UserError, match=r"ended by SIGKILL, as .* memory runs out; .*r\.json has the cases before"):
        command.run(parse("--malloc=both", f"--output={tmp_path / 'r'}"))
    assert len(calls) == 1


@pytest.mark.usefixtures("heard")
def test_a_child_ends_with_this_process(tmp_path):
    """One that went on would measure beside whatever the user does next."""
    started, ended = tmp_path / "started", tmp_path / "ended"
    code = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(ended)!r}).touch() or sys.exit(9))\n"
        f"pathlib.Path({str(started)!r}).write_text('')\n"
        "time.sleep(600)"
    )

    def interrupt():
        while not started.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        command._code([sys.executable, "-c", code], dict(os.environ))
    assert ended.exists()  # it was waited for


def test_the_exit_code_of_a_child_is_told():
    """A wrong contender is one there, too."""
    assert command._code([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)) == 3


@pytest.mark.usefixtures("few")
def test_each_case_is_told_when_it_is_done(tmp_path, capsys):
    """Where the output goes to a file there is no bar, and a long run is not to be silent."""
    assert command.run(parse(f"--output={tmp_path / 'r'}")) == 0
    assert [line.strip() for line in capsys.readouterr().out.splitlines() if " of 2: " in line] == [
        "1 of 2: Tiny, block",
        "2 of 2: Tiny, net",
    ]


@pytest.mark.usefixtures("few")
def test_an_interrupted_run_without_a_case_says_so(monkeypatch, tmp_path, capsys):
    """There is no file to show."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run(parse(f"--output={tmp_path / 'result'}"))
    assert capsys.readouterr().err == f"{tmp_path / 'result.json'}: no case was done\n"


@pytest.mark.usefixtures("few")
def test_each_case_is_on_disk_when_it_is_done(monkeypatch, tmp_path, capsys):
    """Of a run that is interrupted, the file has what was measured, and the user is told of it."""
    measure = suite.measure

    def interrupted(case, settings):
        if case.net:
            raise KeyboardInterrupt
        return measure(case, settings)

    monkeypatch.setattr(suite, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run(parse(f"--output={tmp_path / 'result'}"))
    path = tmp_path / "result.json"
    assert [case["label"] for case in json.loads(path.read_text())["cases"]] == ["block"]
    assert capsys.readouterr().err == f"{path}: 1 case; fused-preact bench --show {path} prints them\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], suite.Settings()),
        (["--full"], suite.Settings("full", 5.0, compiled=True, memory=True)),
        (["--table"], suite.Settings("table", 0.5, strict=False)),
        (["--memory", "--budget=2"], suite.Settings(budget=2.0, memory=True)),
    ],
    ids=["default", "full", "table", "options"],
)
def test_what_the_options_mean(arguments, expected):
    """The time of a case, and what is measured besides, follow from how much was asked for."""
    assert command._settings(parse(*arguments)) == expected


def test_the_budget_of_each_extent_is_in_the_help(capsys):
    """It says how long each takes without the option."""
    budgets = {extent: command._settings(parse(f"--{extent}")).budget for extent in ("full", "table")}
    with pytest.raises(SystemExit):
        parse("--help")
    expected = ", ".join(f"{extent}: {budget:g}" for extent, budget in budgets.items())
    assert f"(default: {suite.Settings().budget:g}, {expected})" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("broken")
def test_a_grid_goes_on_without_a_wrong_case(monkeypatch, tmp_path, block):
    """It has no picture; the exit code says that something is missing, and the file says what."""
    monkeypatch.setattr(command, "table_cases", lambda: [block, replace(block, backends=("eager",))])
    assert command.run(parse("--table", "--budget=0.01", f"--output={tmp_path / 'v1.2'}")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["v1.2.json"]
    document = json.loads((tmp_path / "v1.2.json").read_text())
    assert len(document["cases"]) == len(document["left_out"]) == 1


def test_threads_are_those_asked_for(monkeypatch, tmp_path):
    """Of torch, while a case is measured."""
    before, seen = torch.get_num_threads(), []

    def interrupted(*_):
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "measure", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            command.run(parse(f"--threads={before + 1}", f"--output={tmp_path / 'r'}"))
    finally:
        torch.set_num_threads(before)
    assert seen == [before + 1]


def test_slow_bf16_is_explained():
    """Where the processor has no bf16 instructions, the report says what that does to the ratios."""
    document = {
        "cases": [{"dtype": "bf16", "rows": []}],
        "device": {"bf16_instructions": []},
        "left_out": [],
    }
    assert "no bf16 instructions" in next(report.notes(document))
    assert list(report.notes({**document, "device": {"bf16_instructions": ["avx512_bf16"]}})) == []
