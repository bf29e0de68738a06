"""Files that are written whole or not at all: whoever reads one finds the one before or the new one."""

import json
import os
import stat

import pytest

from fused_preact import files
from fused_preact.errors import UserError


def test_the_file_before_is_there_until_the_new_one_is_whole(tmp_path):
    """Meanwhile what is written has a name of this process's own, for another may write the same file."""
    path = tmp_path / "new" / "file"
    with files.replacing(path) as file:
        file.write(b"one")
        assert [found.name for found in path.parent.iterdir()] == [f"file.{os.getpid()}.tmp"]
    with files.replacing(path, ".part") as file:
        file.write(b"two")
        assert path.read_bytes() == b"one"
        assert path.with_name("file.part").exists()
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RuntimeError])
def test_what_is_interrupted_leaves_the_file_before(error, tmp_path):
    """And nothing beside it; the error is that which came."""
    path = tmp_path / "file"
    path.write_text("before")

    def write():
        with files.replacing(path) as file:
            file.write(b"half")
            raise error("now")

    with pytest.raises(error, match=r"^now$"):
        write()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_on_the_disk_before_it_takes_the_name(monkeypatch, tmp_path):
    """All of it, and then the name itself: after a power cut there is no empty file under the name."""
    path, synced = tmp_path / "file", []

    def fsync(descriptor):
        status = os.fstat(descriptor)
        synced.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        assert path.exists() == (synced[-1] == "folder")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with files.replacing(path) as file:
        file.write(b"12345")
    assert synced == [5, "folder"]


def test_a_folder_that_cannot_be_synced(monkeypatch, tmp_path):
    """As on some systems: the file is there, and that is no error."""

    def refused(_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(files, "_sync_folder", refused)
    files.write_json({"a": 1}, tmp_path / "file")
    assert json.loads((tmp_path / "file").read_text()) == {"a": 1}


def test_a_link_and_the_permissions_stay(tmp_path):
    """What a link points at is replaced, and who may read it stays as it was."""
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to(path)
    files.write_json({}, link)
    assert link.is_symlink()
    assert path.read_text() == "{}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_what_the_system_said_is_told(tmp_path):
    """By the error itself, or by the one in its place that torch's writer raises."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"x: cannot be written: (File exists|Not a directory)"),
        files.replacing(tmp_path / "file" / "x"),
    ):
        pass

    def full():
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos")  # noqa: B904  (as torch does)

    with (
        pytest.raises(UserError, match="y: cannot be written: No space left on device"),
        files.replacing(tmp_path / "y"),
    ):
        full()


def test_whether_a_file_can_be_written_is_found_out_before(tmp_path):
    """The folder is made, nothing is left in it, and what is there already stays."""
    files.check_writable(tmp_path / "new" / "folder" / "x.json")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("before")
    files.check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "before"
    with pytest.raises(UserError, match="new: cannot be written: it is a folder"):
        files.check_writable(tmp_path / "new")
    with pytest.raises(UserError, match=r"x: cannot be written: (File exists|Not a directory)"):
        files.check_writable(tmp_path / "file" / "x")
