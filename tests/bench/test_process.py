"""What a process of its own has of this one, and what it has not."""

import os
import resource
import signal

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
