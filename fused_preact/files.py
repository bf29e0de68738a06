"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import UserError


@contextlib.contextmanager
def replacing(path: Path, suffix: str | None = None) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of path, through a power cut too, when the block is left without an error.

    Whatever interrupts it, path holds either what it held before or all that was written. ``suffix`` makes the name
    that the file has until then; by default it is this process's own, for others may write at the same time.

    Raises:
        UserError: it cannot be written.
    """
    path = path.resolve()  # of a link, what it points at
    temporary = path.with_name(path.name + (suffix or f".{os.getpid()}.tmp"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as error:
        # torch's writer, where it cannot finish a file, puts a RuntimeError in place of what the system said.
        said = error if isinstance(error, OSError) else error.__context__
        if not isinstance(said, OSError):
            raise
        raise _unwritten(path, said) from error
    with contextlib.suppress(OSError):  # the file is in its place, though some systems sync no folder
        _sync_folder(path.parent)


@contextlib.contextmanager
def naming(what: Path | str) -> Iterator[None]:
    """What the system says of a file that cannot be written, with its name, which it leaves out of a full disk.

    Raises:
        UserError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise _unwritten(what, error) from error


def check_writable(path: Path) -> None:
    """Find out before the work whose result is to go to path whether it can be written.

    Raises:
        UserError: it cannot.
    """
    path = path.resolve()
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    if path.is_dir():
        raise UserError(f"{path}: cannot be written: it is a folder")


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write a document as JSON, creating the folder.

    Raises:
        UserError: it cannot be written.
    """
    with replacing(path) as file:
        file.write((json.dumps(document, indent=1) + "\n").encode())


def _unwritten(what: Path | str, said: OSError) -> UserError:
    return UserError(f"{what}: cannot be written: {said.strerror or said}")


def _sync_folder(folder: Path) -> None:
    """Make a rename in folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
