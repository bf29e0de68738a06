"""The lock of a run's folder."""

import errno

import pytest

from fused_preact.errors import UserError
from fused_preact.train import lock


def test_one_run_at_a_time(tmp_path):
    """A second one is refused while the first is there, and let in after it, also where that failed."""
    first = lock.alone(tmp_path)
    first.__enter__()
    with pytest.raises(UserError, match="another run is going on there"), lock.alone(tmp_path):
        pass
    assert not first.__exit__(ValueError, ValueError(), None)
    with lock.alone(tmp_path):
        pass


def refuse(number):
    """A flock that the system refuses."""

    def flock(*_):
        raise OSError(number, "no lock")

    return flock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_what_has_no_locks_is_used_without(number, tmp_path, monkeypatch):
    """A file system that has none does not keep anybody from training."""
    monkeypatch.setattr(lock.fcntl, "flock", refuse(number))
    with lock.alone(tmp_path), lock.alone(tmp_path):
        pass


def test_a_lock_that_fails_is_told(tmp_path, monkeypatch):
    """Where there are locks, no run goes on without one."""
    monkeypatch.setattr(lock.fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="no lock"), lock.alone(tmp_path):
        pass
