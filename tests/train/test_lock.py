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


def test_what_has_no_locks_is_used_without(tmp_path, monkeypatch):
    """A file system, or a system, that has none does not keep anybody from training."""

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.alone(tmp_path):
        pass
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.alone(tmp_path), lock.alone(tmp_path):
        pass
