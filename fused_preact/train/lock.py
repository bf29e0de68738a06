"""One run in a folder at a time: two would take turns at overwriting one checkpoint."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

# What a file system without locks says.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder meanwhile; the system lets them in again if this process is killed.

    Does nothing where the folder is not there, or on a file system without locks.

    Raises:
        UserError: another run is in it.
        OSError: it cannot be locked for another reason.
    """
    if not folder.is_dir():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{folder}: another run is going on there; wait for its end, or choose another --out"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
