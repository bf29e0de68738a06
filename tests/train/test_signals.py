"""What asks a run to stop, and what must not."""

import os
import signal

import pytest

from fused_preact.train import checkpoint, command

from .runs import QUICK, metrics, start, wait_until


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    """`fused-preact train | head -1` trains to the end, quietly."""
    process = start(*QUICK, "--eval-every", 1, "--out", tmp_path / "run")
    assert process.stdout.readline().startswith("resnet20")
    process.stdout.close()
    assert process.wait() == 0
    assert metrics(tmp_path / "run")[-1]["iteration"] == 8


def test_a_terminal_that_goes_away_is_as_a_signal(tmp_path):
    """SIGHUP is noted, and what cannot be printed any more does not come between the run and its checkpoint."""
    reader, terminal = os.openpty()
    folder = tmp_path / "run"
    process = start(*QUICK, "--iterations", 400, "--out", folder, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    wait_until(process, (folder / "metrics.jsonl").exists)
    os.close(reader)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 128 + signal.SIGHUP
    assert checkpoint.load(folder / "checkpoint.pt")["iteration"] == metrics(folder)[-1]["iteration"]


def test_an_ignored_signal_stays_ignored():
    """nohup has SIGHUP ignored, and a shell SIGINT for what a script runs in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with command._signals() as received:
            signal.raise_signal(signal.SIGHUP)
            assert (received, signal.getsignal(signal.SIGHUP)) == ([], signal.SIG_IGN)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_acts_as_usual(number):
    """The first one is noted; who asks again wants it now, and after the run all is as it was."""
    usual = []
    before = signal.signal(number, lambda *_: usual.append(number))
    try:
        with command._signals() as received:
            signal.raise_signal(number)
            assert (received, usual) == ([number], [])
            signal.raise_signal(number)
            assert (received, usual) == ([number], [number])
        with command._signals() as received:
            pass
        signal.raise_signal(number)
        assert (received, usual) == ([], [number] * 2)
    finally:
        signal.signal(number, before)
