"""Checkpoints: whole or not at all, and never run."""

import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_preact.errors import UserError
from fused_preact.train import checkpoint

from .trap import Trap

STATE = {
    "settings": {"model": "resnet20", "milestones": [1, 2], "amp": "none"},
    "dataset": "digits",
    "iteration": 7,
    "model": {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)},
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "rng": {"cpu": torch.get_rng_state()},
}

# Saves a state, one part of which kills the process while it is being written.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from fused_preact.train import checkpoint

class Killer:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save(Path(sys.argv[1]), {"model": torch.zeros(100_000), "settings": Killer()})
"""


def test_round_trip(tmp_path):
    """What is saved is what is loaded, to the bit; no temporary file stays behind."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"].pop("weight"), STATE["model"]["weight"])
    assert torch.equal(loaded["rng"]["cpu"], STATE["rng"]["cpu"])
    assert (loaded["settings"], loaded["iteration"]) == (STATE["settings"], 7)
    assert loaded["optimizer"]["param_groups"] == STATE["optimizer"]["param_groups"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_during_writing_leaves_the_checkpoint_before(tmp_path):
    """SIGKILL halfway through a save: the previous checkpoint is whole, and the next save works."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    before = path.read_bytes()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "checkpoint.pt.tmp").exists()
    assert path.read_bytes() == before
    checkpoint.save(path, {**STATE, "iteration": 8})
    assert checkpoint.load(path)["iteration"] == 8


def test_damaged(tmp_path):
    """Half a file is one clear error."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    for size in (0, 10, path.stat().st_size // 2):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match=r"checkpoint.pt: damaged, or not a checkpoint"):
            checkpoint.load(path)
        checkpoint.save(path, STATE)


def test_damaged_numbers(tmp_path):
    """A byte that a disk has changed is found, in a weight too."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    whole, number = path.read_bytes(), STATE["model"]["weight"].numpy().tobytes()
    assert whole.count(number) == 1
    path.write_bytes(whole.replace(number, number[:-1] + b"\x41"))
    with pytest.raises(UserError, match=r"checkpoint.pt: damaged, or not a checkpoint"):
        checkpoint.load(path)


def test_an_entry_that_passes_for_a_folder(tmp_path):
    """One bit in the zip's directory has torch read no numbers for an entry, which its checksum does not tell."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(b"/data/0"))
    content[entry + 38] |= 0x10
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint.pt: damaged, or not a checkpoint"):
        checkpoint.load(path)
    content[entry + 38 : entry + 42] = 0, 0, 0, 0x81  # a plain file of Unix, as other tools mark it
    path.write_bytes(content)
    assert checkpoint.load(path)["iteration"] == STATE["iteration"]


def test_missing(tmp_path):
    """No checkpoint: the message says how to start."""
    with pytest.raises(UserError, match="no such checkpoint; leave out --resume to start a run"):
        checkpoint.load(tmp_path / "checkpoint.pt")


def test_somebody_elses(tmp_path):
    """A file of torch.save with other contents is refused, also where it lacks or has one entry more."""
    path = tmp_path / "checkpoint.pt"
    lacking = {key: value for key, value in STATE.items() if key != "rng"}
    for state in STATE["model"], lacking, {**STATE, "scaler": 1.0}, [STATE]:
        torch.save(state, path)
        with pytest.raises(UserError, match="expected entries dataset, iteration, model"):
            checkpoint.load(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("settings", 5, "expected dict for settings, got int"),
        ("model", torch.ones(2), "expected dict for model, got Tensor"),
        ("rng", [], "expected dict for rng, got list"),
        ("iteration", "x", "expected int for iteration, got str"),
        ("iteration", -1, "expected an iteration of at least 0, got -1"),
    ],
)
def test_entries_of_another_type(name, value, message, tmp_path):
    """The right entries with something else in them are one clear error, too."""
    torch.save({**STATE, name: value}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=f"checkpoint.pt: damaged: {message}; start anew"):
        checkpoint.load(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("write", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap, 2))],
                         ids=["torch", "pickle"])  # fmt: skip
def test_code_in_a_checkpoint_does_not_run(write, tmp_path):
    """Loading builds tensors and plain values, nothing else."""
    path = tmp_path / "checkpoint.pt"
    write({"model": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(UserError, match="damaged, or not a checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    """No traceback where the disk says no."""
    Path(tmp_path, "file").touch()
    with pytest.raises(UserError, match=r"checkpoint.pt: cannot be written: (File exists|Not a directory)"):
        checkpoint.save(tmp_path / "file" / "checkpoint.pt", STATE)


def test_a_disk_that_is_full(tmp_path):
    """The checkpoint before stays, the half of the new one does not, and the message is what the system said."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint.pt: cannot be written: File too large"):
            checkpoint.save(path, {**STATE, "model": {"weight": torch.zeros(1 << 16)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_cannot_be_read(tmp_path):
    """A folder is not a damaged checkpoint."""
    Path(tmp_path, "checkpoint.pt").mkdir()
    with pytest.raises(UserError, match=r"checkpoint.pt: cannot be read: Is a directory"):
        checkpoint.load(tmp_path / "checkpoint.pt")
