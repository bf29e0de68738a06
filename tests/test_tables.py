"""What was measured on a device: how it is kept, and that what comes with the package can be used."""

import json
from pathlib import Path

import pytest
import torch

import fused_preact
from fused_preact import backends, models, tables
from fused_preact.errors import UserError

SHIPPED = sorted(Path(fused_preact.__file__).with_name("measured").glob("*.json"))


def problem(N: int, *convolutions: tuple[int, int]) -> backends.Problem:
    conv = fused_preact.schedule.Conv(1, 1, 0, 0, 1, 1, 1)
    shapes = tuple((conv, (K, C, 1, 1)) for K, C in convolutions)
    return backends.Problem(torch.device("cpu"), torch.float32, (N, 4, 8, 8), shapes)


def test_saving_adds_to_what_the_file_has(folder):
    """Two runs over different models make one table."""
    for key in "ab":
        path = tables.save({"device": "Some GPU", "calls": {key: {"16": {"best": "eager"}}}, "tiles": {}})
    assert path.name == "some-gpu.json"
    assert set(tables.load("Some GPU")["calls"]) == {"a", "b"}


def test_a_second_batch_is_kept_beside_the_first(folder):
    """Tuning for another batch takes nothing away."""
    for N in "16", "64":
        tables.save({"device": "Some GPU", "calls": {"a": {N: {"best": "eager"}}}, "tiles": {}})
    assert set(tables.load("Some GPU")["calls"]["a"]) == {"16", "64"}


def test_what_the_user_measured_counts_before_what_was_shipped(folder, tmp_path_factory, monkeypatch):
    """Call by call and batch by batch."""
    shipped = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr(tables, "SHIPPED", shipped)
    calls = {"a": {"16": {"best": "cpu"}, "64": {"best": "cpu"}}, "b": {"16": {"best": "cpu"}}}
    tables.save({"device": "d", "calls": calls, "tiles": {}}, shipped / tables.file_name("d"))
    tables.save({"device": "d", "calls": {"a": {"16": {"best": "eager"}}}, "tiles": {}})
    found = tables.load("d")["calls"]
    assert {key: {N: entry["best"] for N, entry in batches.items()} for key, batches in found.items()} == {
        "a": {"16": "eager", "64": "cpu"},
        "b": {"16": "cpu"},
    }


def test_the_nearest_batch_decides(folder):
    """Nearest as a ratio: the last, smaller batch of an epoch goes where the others go."""
    key = tables.call_key(problem(1))
    calls = {key: {"4": {"best": "eager"}, "64": {"best": "library"}}}
    tables.save({"device": tables.device_name("cpu"), "calls": calls, "tiles": {}})
    found = {N: tables.best(problem(N)) for N in (0, 1, 4, 15, 17, 64, 1000)}
    assert found == {0: "eager", 1: "eager", 4: "eager", 15: "eager", 17: "library", 64: "library", 1000: "library"}
    assert tables.best(problem(4, (4, 4))) is None


def test_the_key_tells_calls_apart():
    """By every convolution and how often it occurs, but not by N."""
    calls = [(), ((4, 4),), ((4, 4), (4, 4)), ((8, 4), (4, 8)), ((8, 4), (4, 8), (8, 4), (4, 8))]
    assert len({tables.call_key(problem(2, *convolutions)) for convolutions in calls}) == len(calls)
    assert tables.call_key(problem(2, (4, 4))) == tables.call_key(problem(3, (4, 4)))
    assert tables.call_key(problem(2)._replace(inference=True)) != tables.call_key(problem(2))


DAMAGED = {
    "empty": "",
    "cut": '{"calls": {',
    "bare": "{}",
    "a list": "[]",
    "no tiles": '{"calls": {}, "tiles": []}',
    "no images": '{"calls": {"a": {"0": {"best": "cpu"}}}, "tiles": {}}',
    "best of two": '{"calls": {"a": {"16": {"best": ["cpu"]}}}, "tiles": {}}',
    "no best": '{"calls": {"a": {"16": {}}}, "tiles": {}}',
    "no number": '{"calls": {"a": {"x": {"best": "cpu"}}}, "tiles": {}}',
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_left_out(text, folder):
    """It stops no call: a warning names the file, and the rule decides."""
    path = folder / tables.file_name(tables.device_name("cpu"))
    path.write_text(text)
    with pytest.warns(UserWarning, match=f"{path.name}, which cannot be read"):
        assert tables.best(problem(2, (4, 4))) is None
    backends.choose("auto", problem(2, (4, 4)))


@pytest.mark.parametrize("text", ['{"name": "mine"}', "words"])
def test_another_file_is_not_overwritten(text, tmp_path):
    """Who names the wrong file after --output keeps it."""
    path = tmp_path / "package.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"package\.json: holds no table of fused-preact tune, and is not overwritten"):
        tables.save({"device": "d", "calls": {}, "tiles": {}}, path)
    assert path.read_text() == text


def test_a_table_that_cannot_be_read_or_found(monkeypatch, folder):
    """A folder in its place, and a user without a home."""
    path = folder / tables.file_name(tables.device_name("cpu"))
    path.mkdir()
    with pytest.warns(UserWarning, match="IsADirectoryError"):
        assert tables.best(problem(2, (4, 4))) is None

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tables, "folder", homeless)
    tables.load.cache_clear()
    assert tables.best(problem(2, (4, 4))) is None
    with pytest.raises(UserError, match="--output: expected a file for the table"):
        tables.save({"device": "d", "calls": {}, "tiles": {}})


def test_a_backend_of_another_version_is_passed_over(folder):
    """A table that was written by a newer version may name what this one does not have."""
    key = tables.call_key(problem(2, (4, 4)))
    calls = {key: {"2": {"best": "metal", "seconds": {}}}}
    tables.save({"device": tables.device_name("cpu"), "calls": calls, "tiles": {}})
    assert backends.choose("auto", problem(2, (4, 4))) in ("cpu", "eager")


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n", "AMD EPYC, cpu family 25, model 17"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd4f\n", "aarch64, CPU implementer 0x41, CPU part 0xd4f"),
        ("", "aarch64"),
    ],
    ids=["x86", "Arm", "elsewhere"],
)
def test_a_processor_is_told_from_others_of_its_name(monkeypatch, cpuinfo, name):
    """A table must not be read on another processor than it was measured on; Arm processors have no name to go by."""
    monkeypatch.setattr(tables.platform, "processor", lambda: "")
    monkeypatch.setattr(tables.platform, "machine", lambda: "aarch64")
    assert tables._processor(tables._fields(cpuinfo)) == name


def test_a_table_of_a_processor_is_for_its_threads():
    """What is fastest with two threads need not be with sixty."""
    before = torch.get_num_threads()
    try:
        names = set()
        for threads in 1, 2:
            torch.set_num_threads(threads)
            names.add(tables.file_name(tables.device_name("cpu")))
        assert len(names) == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_shipped_can_be_used(path, folder, monkeypatch):
    """The file is found by its device, it chose by its own numbers, and its keys are those of the models' calls."""
    document = json.loads(path.read_text())
    assert path.name == tables.file_name(document["device"])
    for batches in document["calls"].values():
        for entry in batches.values():
            assert entry["seconds"][entry["best"]] <= entry["seconds"]["eager"]
    monkeypatch.setattr(tables, "SHIPPED", path.parent)
    monkeypatch.setattr(tables, "device_name", lambda *_: document["device"])
    net = models.create("resnet1001").to(memory_format=torch.channels_last)
    narrow = not any(key.startswith("float32") for key in document["calls"])
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        choices = fused_preact.explain(net, torch.empty(16, 3, 32, 32))
    assert [tables.best(choice.problem) is not None for choice in choices] == [True] * 3


def test_a_table_is_shipped():
    """Else the test above would hold of nothing."""
    assert SHIPPED
