"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import UserError


@contextlib.contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of path, through a power cut too, when the block is left without an error.

    Whatever interrupts it, path holds either what it held before or all that was written. ``suffix`` makes the name
    that the file has until then; writers that run at the same time need one each.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(path.name + suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch's writer, where it cannot finish a file, puts a RuntimeError in place of what the system said.
        said = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"{path}: cannot be written: {getattr(said, 'strerror', None) or said}") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
