"""One run in a folder at a time: two would take turns at overwriting one checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none, and opens no folders
    fcntl = None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder meanwhile; the system lets them in again if this process is killed.

    Does nothing where the folder is not there, or on a system or a file system without locks.
    Raises UserError if another run is in it.
    """
    if fcntl is None or not folder.is_dir():
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
    except OSError:
        pass
