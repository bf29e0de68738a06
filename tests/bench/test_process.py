"""What a process of its own has of this one, and what it has not."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fused_preact.bench import process
from fused_preact.errors import UserError


def _seen(x):
    return os.getpid(), torch.get_num_threads(), x * 2


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def test_threads_and_tensors_go_there_and_back():
    """The times of a process with another number of threads would be those of another machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        pid, threads, doubled = process.call("twice", _seen, torch.arange(3))
    finally:
        torch.set_num_threads(before)
    assert pid != os.getpid()
    assert threads == before + 1
    assert doubled.tolist() == [0, 2, 4]


def _count(tensors):
    return len(tensors)


def test_a_net_of_many_tensors_goes_there():
    """Shared one by one they would need more descriptors than a process usually may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert process.call("many", _count, [torch.ones(3) for _ in range(1000)]) == 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_each_call_has_a_process_of_its_own():
    """What malloc learned in one would count in the next."""
    assert process.call("a", _seen, torch.ones(1))[0] != process.call("b", _seen, torch.ones(1))[0]


def test_a_process_that_is_killed_is_one_clear_error():
    """As the system does where memory runs out; what was measured is named."""
    with pytest.raises(UserError, match=r"the process that measures a net was ended, as the system does .* --only"):
        process.call("a net", _kill)


def _fail():
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_an_error_there_is_raised_here():
    """The command tells by it that memory ran out; where it came from is seen, too."""
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        process.call("a net", _fail)
    assert "in _fail" in str(caught.value.__cause__)


JOB = """
import os, pathlib, sys, time

def forever(path):
    pathlib.Path(path + ".new").write_text(str(os.getpid()))
    os.rename(path + ".new", path)
    time.sleep(600)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A function that tells its process's number in a file, and works for ever; and the file."""
    (tmp_path / "endless_job.py").write_text(JOB)
    monkeypatch.syspath_prepend(tmp_path)
    import endless_job

    yield endless_job.forever, tmp_path / "number"
    del sys.modules["endless_job"]


def wait_until(condition):
    """For something that another process does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(number):
    """Whether there is no such process any more, but for a dead one that nobody asked for."""
    try:
        os.kill(int(number), 0)
        status = Path("/proc", number, "stat")
        return status.exists() and ") Z " in status.read_text()
    except (ProcessLookupError, FileNotFoundError):
        return True


@pytest.mark.usefixtures("heard")
def test_a_call_that_is_interrupted_leaves_no_process(job):
    """It would measure on beside whatever the user does next."""
    forever, path = job

    def interrupt():
        wait_until(path.exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        process.call("for ever", forever, str(path))
    wait_until(lambda: is_gone(path.read_text()))


def test_a_process_ends_with_its_parent(job):
    """Also where that is killed, and can end nothing itself."""
    _, path = job
    code = (
        f"import endless_job as j; from fused_preact.bench import process; process.call('', j.forever, {str(path)!r})"
    )
    paths = os.pathsep.join([str(path.parent), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})
    wait_until(path.exists)
    assert not is_gone(path.read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: is_gone(path.read_text()))
