"""The command line: exit codes and messages are what scripts and people rely on."""

import io
import signal
import subprocess
import sys
import threading

import pytest

import fused_preact
from fused_preact import cli, info
from fused_preact.errors import UserError


def test_version(capsys):
    """--version prints the package's own version and succeeds."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fused-preact {fused_preact.__version__}\n"


def test_runs_as_a_module():
    """python -m fused_preact is the same command, and its exit code reaches the shell."""
    result = subprocess.run([sys.executable, "-m", "fused_preact", "info"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert fused_preact.__version__ in result.stdout
    wrong = [sys.executable, "-m", "fused_preact", "bench", "--only=nothing"]
    assert subprocess.run(wrong, capture_output=True).returncode == 2


@pytest.mark.parametrize("arguments", [[], ["fly"], ["info", "--fly"]], ids=["none", "unknown", "unknown option"])
def test_wrong_usage_exits_with_2_and_names_the_commands(arguments, capsys):
    """Wrong usage ends with argparse's code 2 and a usage line, never a traceback."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: fused-preact" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    """Each subcommand's module exists, declares its options and prints its help."""
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: fused-preact {command}" in capsys.readouterr().out


def test_an_error_for_the_user_is_one_line(monkeypatch, capsys):
    """A UserError becomes its own text on stderr and exit code 2, without a traceback."""

    def fail(_arguments):
        raise UserError("--data: expected a folder, got a file")

    monkeypatch.setattr(info, "run", fail)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "fused-preact: --data: expected a folder, got a file\n"


def test_an_error_of_the_system_is_one_line(monkeypatch, capsys):
    """As of a full disk."""

    def fail(_arguments):
        raise OSError(28, "No space left on device", "a file")

    monkeypatch.setattr(info, "run", fail)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "fused-preact: [Errno 28] No space left on device: 'a file'\n"


@pytest.mark.parametrize(
    "said", ["CUDA out of memory. Tried to allocate", "[enforce] DefaultCPUAllocator: can't allocate memory:"]
)
def test_memory_that_runs_out_is_one_line(said, monkeypatch, capsys):
    """A batch that was too large; any other failure keeps its traceback."""

    def fail(_arguments):
        raise RuntimeError(f"{said} 8 GB\nand more")

    monkeypatch.setattr(info, "run", fail)
    assert cli.main(["info"]) == 2
    expected = f"fused-preact: memory ran out: ask for less, such as a smaller batch ({said} 8 GB)\n"
    assert capsys.readouterr().err == expected
    said = "a defect"
    with pytest.raises(RuntimeError, match=said):
        cli.main(["info"])


def test_what_cannot_be_encoded_is_escaped(monkeypatch):
    """A path is printed in a locale without its letters, and one that is no UTF-8 in any."""
    output = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(info, "run", lambda _arguments: print("\xfc/\u2713/\udcff") or 0)
    assert cli.main(["info"]) == 0
    output.flush()
    assert output.buffer.getvalue() == b"\xfc/\\u2713/\\udcff\n"


def test_without_standard_output(monkeypatch):
    """As in a process that was started without one."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(info, "run", lambda _arguments: print("nowhere") or 0)
    assert cli.main(["info"]) == 0


def test_only_the_command_that_is_asked_for_is_imported():
    """`info` answers where the libraries of the others are missing."""
    code = "import sys, fused_preact.cli as c; c.main(['info']); sys.exit('fused_preact.train.command' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_as_many_threads_as_there_may_be():
    """The limit itself is one of them."""
    assert cli.thread_count(str(cli.MOST_THREADS)) == cli.MOST_THREADS


def test_an_unknown_option_is_told_by_its_command(capsys):
    """The usage that is printed is that of the command, whose options the user wants to know."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune", "--nope"])
    error = capsys.readouterr().err
    assert error.startswith("usage: fused-preact tune")
    assert "fused-preact tune: error: unrecognized arguments: --nope" in error


def test_an_unknown_option_before_the_command(capsys):
    """It is of none."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--nope", "bench"])
    assert "fused-preact: error: unrecognized arguments: --nope" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "train", "tune"])
@pytest.mark.parametrize(("count", "said"), [("0", "a positive number"), ("10000000", "at most 1024"), ("x", "a pos")])
def test_threads_that_cannot_be_started(command, count, said, capsys):
    """A number beyond what the system can start would end the process without a word."""
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, "--threads", count])
    assert f"argument --threads: expected {said}" in capsys.readouterr().err


def test_interrupt_ends_quietly(monkeypatch):
    """Ctrl-C gives the shell's code for it, 130."""

    def interrupt(_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupt)
    assert cli.main(["info"]) == 130


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_a_signal_ends_a_command_in_order(number, code, monkeypatch):
    """What it holds is let go, whatever comes meanwhile, and afterwards signals act as before."""
    ended, before = [], [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def work(_arguments):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            ended.append(True)

    monkeypatch.setattr(info, "run", work)
    assert cli.main(["info"]) == code
    assert ended == [True]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.usefixtures("heard")
def test_a_signal_at_the_very_beginning(monkeypatch):
    """One that comes while the handlers are being set ends the command as any other does."""
    set_handler, raised, before = signal.signal, [], signal.getsignal(signal.SIGINT)

    def set_and_raise(number, handler):
        previous = set_handler(number, handler)
        if not raised:
            raised.append(number)
            signal.raise_signal(number)
        return previous

    monkeypatch.setattr(cli.signal, "signal", set_and_raise)
    assert cli.main(["info"]) == 130
    assert raised == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) == before


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    """As a shell does with Ctrl-C for a command in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(info, "run", lambda _: signal.raise_signal(signal.SIGINT) or 0)
    try:
        assert cli.main(["info"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_runs_in_any_thread(monkeypatch):
    """Signals are for the main one alone."""
    codes = []
    monkeypatch.setattr(info, "run", lambda _: 0)
    thread = threading.Thread(target=lambda: codes.append(cli.main(["info"])))
    thread.start()
    thread.join()
    assert codes == [0]
