"""What was measured on a device: how it is kept, and that what comes with the package can be used."""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fused_preact
from fused_preact import PreActBlock, backends, models, tables
from fused_preact.errors import UserError

SHIPPED = sorted(Path(fused_preact.__file__).with_name("measured").glob("*.json"))


def problem(N: int, *convolutions: tuple[int, int]) -> backends.Problem:
    conv = fused_preact.kernels.Conv(1, 1, 0, 0, 1, 1, 1)
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


def test_compiled_code_goes_by_the_size_and_the_largest_batch(folder):
    """It is to serve any batch. A convolution more, another type or purpose is another call."""
    best = {(8, 6): ["eager", "library"], (16, 16): ["library", "eager"]}
    calls = {}
    for (H, W), names in best.items():
        asked = problem(1, (4, 4))._replace(shape=(1, 4, H, W))
        calls[tables.call_key(asked)] = {N: {"best": name} for N, name in zip(("4", "64"), names, strict=True)}
        for other in problem(1, (4, 4), (8, 4)), asked._replace(inference=True), asked._replace(dtype=torch.float64):
            calls[tables.call_key(other._replace(shape=(1, 4, 32, 32)))] = {"4": {"best": "reference"}}
    tables.save({"device": tables.device_name("cpu"), "calls": calls, "tiles": {}})

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def choose(x):
        found = tables.best(problem(1, (4, 4))._replace(shape=x.shape))
        return x + {"library": 1, "eager": 2, None: 3}[found]

    sizes = [(8, 6), (16, 16), (32, 32), (6, 8), (16, 6)]
    assert [int(choose(torch.zeros(2, 4, *size))[0, 0, 0, 0]) for size in sizes] == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("measured", [[], [11, 13]], ids=["no table", "table"])
def test_compiled_code_takes_images_of_any_size(folder, measured):
    """Each size by itself would be compiled, and from the eighth on nothing would be."""

    def images(H: int) -> torch.Tensor:
        return torch.randn(2, 4, H, 9)

    block, calls = PreActBlock(4, 4), {}
    for H in measured:
        [choice] = fused_preact.explain(block, images(H))
        calls[tables.call_key(choice.problem)] = {"2": {"best": "library"}}
    tables.save({"device": tables.device_name("cpu"), "calls": calls, "tiles": {}})
    counter = CompileCounter()
    call = torch.compile(block.eval(), backend=counter, fullgraph=True, dynamic=True)
    for H in range(5, 17):
        torch.testing.assert_close(call(images(H).fill_(H)), block(images(H).fill_(H)))
    assert counter.frame_count <= len(measured) + 2  # measured or not, and whichever size comes first


def test_each_gpu_has_its_own_table(folder, monkeypatch):
    """Two of one machine may be of different kinds; without an index it is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    tables._gpu.cache_clear()
    try:
        assert [tables.device_name("cuda", index) for index in (0, 1, None)] == ["GPU 0", "GPU 1", "GPU 2"]
        asked = problem(4)._replace(device=torch.device("cuda", 1))
        for index, best in (1, "cuda"), (2, "eager"):
            calls, tiles = {tables.call_key(asked): {"4": {"best": best}}}, {"k": {"4": [index] * 5}}
            tables.save({"device": f"GPU {index}", "calls": calls, "tiles": tiles})
        assert tables.best(asked) == "cuda"
        assert tables.best(asked._replace(device=torch.device("cuda"))) == "eager"
        assert tables.tile(torch.device("cuda", 1), "k", 4) == [1] * 5
    finally:
        tables._gpu.cache_clear()


def test_tiles_are_added_to_those_of_the_file(folder):
    """As calls are, those of other batches too."""
    for key, N in ("a", "16"), ("b", "16"), ("a", "64"):
        tables.save({"device": "d", "calls": {}, "tiles": {key: {N: [1, 2, 3, 4, 5]}}})
    assert {key: set(batches) for key, batches in tables.load("d")["tiles"].items()} == {"a": {"16", "64"}, "b": {"16"}}


def test_the_tile_of_the_nearest_batch_is_taken(folder):
    """As the backend is: the tiles of a table that was measured at one batch serve the others."""
    tiles = {"k": {"4": [4] * 5, "64": [64] * 5}}
    tables.save({"device": tables.device_name("cpu"), "calls": {}, "tiles": tiles})
    found = {N: tables.tile(torch.device("cpu"), "k", N) for N in (0, 4, 15, 17, 1000)}
    assert found == {0: [4] * 5, 4: [4] * 5, 15: [4] * 5, 17: [64] * 5, 1000: [64] * 5}
    assert tables.tile(torch.device("cpu"), "another", 4) is None


def test_names_of_files_are_plain():
    """Letters, digits and single hyphens, whatever a device is called."""
    assert tables.file_name("A(R) GPU: 80 GB (PCIe)") == "a-r-gpu-80-gb-pcie.json"


def test_where_the_user_s_tables_are(monkeypatch):
    """In the cache folder of the platform; an empty variable counts as none."""
    spec = importlib.util.find_spec("fused_preact.tables")
    fresh = importlib.util.module_from_spec(spec)  # the one that is imported has an empty folder in all tests
    spec.loader.exec_module(fresh)
    for value, expected in ("/somewhere", "/somewhere"), ("", "/home/a/.cache"), (None, "/home/a/.cache"):
        monkeypatch.setenv("HOME", "/home/a")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if value is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert fresh.folder() == Path(expected, "fused_preact")


def test_the_key_tells_calls_apart():
    """By every convolution and how often it occurs, but not by N."""
    calls = [(), ((4, 4),), ((4, 4), (4, 4)), ((8, 4), (4, 8)), ((8, 4), (4, 8), (8, 4), (4, 8))]
    assert len({tables.call_key(problem(2, *convolutions)) for convolutions in calls}) == len(calls)
    assert tables.call_key(problem(2, (4, 4))) == tables.call_key(problem(3, (4, 4)))
    for change in dict(inference=True), dict(dtype=torch.bfloat16), dict(format="contiguous"), dict(shape=(2, 5, 8, 8)):
        assert tables.call_key(problem(2)._replace(**change)) != tables.call_key(problem(2))
    (conv, weight), *_ = problem(2, (4, 4)).convolutions
    strided = problem(2)._replace(convolutions=((conv._replace(stride_h=2), weight),))
    assert tables.call_key(strided) != tables.call_key(problem(2, (4, 4)))


DAMAGED = {
    "empty": "",
    "cut": '{"calls": {',
    "bare": "{}",
    "a list": "[]",
    "no tiles": '{"calls": {}, "tiles": []}',
    "no images": '{"calls": {"a": {"0": {"best": "cpu"}}}, "tiles": {}}',
    "best of two": '{"calls": {"a": {"16": {"best": ["cpu"]}}}, "tiles": {}}',
    "no best": '{"calls": {"a": {"16": {}}}, "tiles": {}}',
    "a short tile": '{"calls": {}, "tiles": {"k": {"16": [64, 64]}}}',
    "an empty tile": '{"calls": {}, "tiles": {"k": {"16": [64, 0, 16, 4, 2]}}}',
    "a tile of no batch": '{"calls": {}, "tiles": {"k": [64, 64, 16, 4, 2]}}',
    "deep": "[" * 100_000,
    "more images than there can be": '{"calls": {"a": {"%s": {"best": "cpu"}}}, "tiles": {}}' % ("1" * 500),
    "versions of another kind": '{"versions": ["0.1"], "calls": {}, "tiles": {}}',
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


@pytest.mark.parametrize("text", ['{"name": "mine"}', "words", "{}", "[" * 100_000])
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


def test_a_cache_folder_that_cannot_be_is_no_table(folder, monkeypatch):
    """A user without a home folder may have a device in its place; nothing is warned of in every process."""
    monkeypatch.setattr(tables, "folder", lambda: Path("/dev/null/.cache/fused_preact"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.load("d")["calls"] == {}


def test_what_another_version_measured_does_not_count(folder, tmp_path_factory, monkeypatch):
    """It was of other kernels, and would go before the newer table that came with the package."""
    shipped = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr(tables, "SHIPPED", shipped)

    def document(key: str, best: str) -> dict:
        return {"device": "d", "calls": {key: {"16": {"best": best}}}, "tiles": {}}

    monkeypatch.setattr(tables, "__version__", "1.0")
    tables.save(document("a", "cpu"), shipped / tables.file_name("d"))
    path = tables.save(document("a", "eager"))
    tables.save(document("b", "eager"))
    assert tables.load("d")["calls"]["a"]["16"]["best"] == "eager"
    monkeypatch.setattr(tables, "__version__", "2.0")
    tables.load.cache_clear()
    with pytest.warns(
        UserWarning, match=rf"2\.0 leaves out .* in {path}, which are of version 1\.0; `fused-preact tune`"
    ):
        found = tables.load("d")["calls"]
    assert {key: batches["16"]["best"] for key, batches in found.items()} == {"a": "cpu"}
    tables.save(document("c", "eager"))
    assert set(json.loads(path.read_text())["calls"]) == {"c"}  # nothing of the other version is mixed in
    assert set(tables.load("d")["calls"]) == {"a", "c"}


def test_a_table_of_no_version_does_not_count(folder):
    """Whatever wrote it, it was not this one."""
    path = tables.place("d")
    path.write_text('{"calls": {"a": {"16": {"best": "cpu"}}}, "tiles": {}}')
    with pytest.warns(UserWarning, match="which are of version unknown"):
        assert tables.load("d")["calls"] == {}


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
