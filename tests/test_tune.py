import json

import pytest
import torch

import fused_preact
from fused_preact import PreActBlock, PreActStage, backends, cli, tables, tune
from fused_preact.bench.measure import Times, ratio


def test_auto_follows_what_was_measured(folder):
    """The table that the command writes decides for exactly the calls it holds, and says so."""
    arguments = [
        "tune",
        "--device=cpu",
        "--models",
        "resnet20",
        "--dtypes",
        "fp32",
        "--batch=2",
        "--size=8",
        "--budget=0.01",
    ]
    assert cli.main(arguments) == 0
    (path,) = folder.iterdir()
    document = json.loads(path.read_text())
    assert document["device"] == tables.device_name("cpu")
    assert document["versions"]["torch"] == torch.__version__
    for entries in document["calls"].values():
        (entry,) = entries.values()
        assert entry["best"] in entry["seconds"]
        assert {"eager", "library"} <= entry["seconds"].keys()
    block, x = PreActBlock(16, 16), torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    (choice,) = fused_preact.explain(block, x)
    document["calls"][tables.call_key(choice.problem)]["2"]["best"] = "library"
    tables.save(document)
    (choice,) = fused_preact.explain(block, x)
    assert choice.backend == "library"
    assert "measured fastest" in choice.others["eager"]
    (other,) = fused_preact.explain(block, x.contiguous())
    assert other.backend != "library"


@pytest.mark.parametrize("backend", ["library", "eager"])
def test_what_is_timed_is_the_backend_itself(backend):
    """A stage and its blocks, one by one, are handed to the backend; the model keeps its own."""
    calls = list(tune._calls(["resnet20"], "cpu", torch.float32, 2, 8))
    kinds = [type(module) for _, module in calls]
    # Each is called for training and for inference. The first block is of a third kind.
    assert (kinds.count(PreActStage), kinds.count(PreActBlock)) == (6, 16)
    for problem, module in calls:
        x = torch.randn(problem.shape).contiguous(memory_format=torch.channels_last)
        served = tune._served_by(backend, module).train(not problem.inference)
        with torch.set_grad_enabled(not problem.inference):
            choices = fused_preact.explain(served, x)
        assert {choice.backend for choice in choices} == {backend}
        assert backend == "eager" or [choice.problem for choice in choices] == [problem]
        assert {part.backend for part in module.modules() if isinstance(part, PreActBlock)} == {"auto"}


def test_a_measured_backend_that_cannot_serve_is_passed_over(folder):
    """A table from another installation does not make a call fail."""
    problem = backends.Problem(torch.device("cpu"), torch.float16, (1, 4, 4, 4), ())
    entry = {tables.call_key(problem): {"1": {"best": "cpu", "seconds": {}}}}
    tables.save({"device": tables.device_name("cpu"), "calls": entry, "tiles": {}})
    assert backends.choose("auto", problem) == "eager"


def test_a_table_is_as_it_was_until_something_is_measured(folder, monkeypatch):
    """The date of numbers is that of the day they were measured on; a place that cannot be written is told before."""
    path = tables.save({"device": tables.device_name("cpu"), "date": "then", "calls": {}, "tiles": {}})
    before = path.read_text()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "measure", interrupted)
    command = ["tune", "--models", "resnet20", "--dtypes", "fp32", "--device", "cpu", "--batch", "1"]
    assert cli.main(command) == 130
    assert path.read_text() == before
    assert cli.main([*command, "--output", str(path / "x.json")]) == 2


def test_another_backend_wins_only_if_it_is_faster_nearly_always():
    """A lead within the noise leaves the call to plain layers."""
    eager = Times((1.0,) * 5, (1.0,) * 5)
    noisy, faster = Times((1.0,) * 5, (0.5, 0.5, 0.9, 1.1, 1.2)), Times((1.0,) * 5, (0.8,) * 5)
    assert tune._best({"eager": eager, "cpu": noisy}) == "eager"
    assert tune._best({"eager": eager, "cpu": noisy, "library": faster}) == "library"


def test_another_backend_wins_only_if_its_median_is_lower():
    """The line that is printed shows medians: what it calls best is not to be the slower one there."""
    eager = Times((1.0,) * 10, (1.0,) * 6 + (3.0,) * 4)
    slower = Times((1.0,) * 10, (0.9,) * 5 + (1.5,) + (2.9,) * 4)
    assert ratio(eager.total, slower.total).low > 1
    assert tune._best({"eager": eager, "cpu": slower}) == "eager"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(capsys):
    """Asking for a GPU without one is one sentence."""
    assert cli.main(["tune", "--device=cuda"]) == 2
    assert "torch finds no cuda device" in capsys.readouterr().err
