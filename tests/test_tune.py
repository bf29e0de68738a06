import json

import pytest
import torch

import fused_preact
from fused_preact import PreActBlock, PreActStage, backends, cli, tables, tune
from fused_preact.bench import environment
from fused_preact.bench.measure import Step, Times, ratio


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


def test_a_file_that_is_no_table_is_told_before_anything_is_measured(folder, monkeypatch, capsys):
    """An hour of measurements is not lost for a wrong --output."""
    path = folder / "package.json"
    path.write_text('{"name": "mine"}')
    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("measured"))
    assert cli.main(["tune", "--models=resnet20", "--device=cpu", "--batch=1", f"--output={path}"]) == 2
    assert "package.json: holds no table of fused-preact tune" in capsys.readouterr().err


def test_a_busy_machine_is_told_before_anything_is_measured(folder, monkeypatch, capsys):
    """A table of ratios that are too high would decide for `auto` for good."""
    monkeypatch.setattr(tune, "_calls", lambda *_: [(block_problem(), None)])
    monkeypatch.setattr(tune, "measure", lambda *_: {"best": "eager", "seconds": {"eager": 1.0}})
    monkeypatch.setattr(environment, "busy", lambda: 1000.0)
    assert cli.main(["tune", "--device=cpu", "--dtypes=fp32"]) == 0
    assert capsys.readouterr().out.startswith("The machine was busy (other work took up to 1000.0 of ")


def test_another_backend_wins_only_if_it_is_faster_nearly_always():
    """A lead within the noise leaves the call to plain layers."""
    eager = Times((1.0,) * 5, (1.0,) * 5)
    noisy, faster = Times((1.0,) * 5, (0.5, 0.5, 0.9, 1.1, 1.2)), Times((1.0,) * 5, (0.8,) * 5)
    assert tune._best({"eager": eager, "cpu": noisy}) == "eager"
    assert tune._best({"eager": eager, "cpu": noisy, "library": faster}) == "library"
    fastest = Times((1.0,) * 5, (0.5,) * 5)
    assert tune._best({"eager": eager, "cpu": fastest, "library": faster}) == "cpu"


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


def test_what_is_asked_for_is_measured(folder, monkeypatch):
    """Without options some models on images of 32x32: sixteen on a processor, more on a GPU."""
    asked = []
    monkeypatch.setattr(tune, "_calls", lambda *arguments: asked.append(arguments) or [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 0
    assert asked == [(tune.MODELS, "cpu", dtype, 16, 32) for dtype in (torch.float32, torch.bfloat16)]
    monkeypatch.setattr(tables, "device_name", lambda kind, *_: f"a {kind}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "status", lambda: {"triton": "not here"})
    asked.clear()
    assert cli.main(["tune", "--models", "resnet20", "--dtypes", "fp16", "--size=8"]) == 0
    assert asked == [(["resnet20"], "cuda", torch.float16, 128, 8)]


@pytest.mark.parametrize("option", ["--batch=0", "--size=0", "--size=x", "--budget=0", "--budget=nan", "--budget=inf"])
def test_options_are_checked(option, capsys):
    """The one that makes no sense is named, with what came."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune", option])
    name, value = option.split("=")
    assert f"argument {name}: expected a positive number, got {value!r}" in capsys.readouterr().err


def test_images_that_a_model_does_not_take(folder, capsys):
    """A single pixel of a single image has no batch statistics: one sentence, and no table."""
    assert cli.main(["tune", "--device=cpu", "--models=preactresnet18", "--batch=1", "--size=8"]) == 2
    error = capsys.readouterr().err
    assert "--models preactresnet18 --batch 1 --size 8: the input of 0.bn2 must have more than one value" in error
    assert error.count("\n") == 1
    assert not list(folder.iterdir())


def test_the_table_is_for_the_threads_that_were_asked_for(folder, monkeypatch, capsys):
    """And goes to the file that was asked for, whatever its name; its versions and threads are said in it."""
    monkeypatch.setattr(tune, "_calls", lambda *_: [(block_problem(), None)])
    monkeypatch.setattr(tune, "measure", lambda *_: {"best": "eager", "seconds": {"eager": 1.0}})
    before, output = torch.get_num_threads(), folder / "[b]own.json"
    arguments = ["tune", "--device=cpu", "--dtypes=fp32", "--batch=3", f"--threads={before + 1}", f"--output={output}"]
    try:
        assert cli.main(arguments) == 0
    finally:
        torch.set_num_threads(before)
    assert list(folder.iterdir()) == [output]
    assert capsys.readouterr().out.endswith(f"Table in {output}\n")
    document = json.loads(output.read_text())
    assert document["threads"] == before + 1
    assert document["device"].endswith(f", {before + 1} threads")
    assert document["calls"] == {tables.call_key(block_problem()): {"3": {"best": "eager", "seconds": {"eager": 1.0}}}}


def block_problem(**changes) -> backends.Problem:
    """That of a small block."""
    (choice,) = fused_preact.explain(PreActBlock(4, 4), torch.randn(2, 4, 5, 5))
    return choice.problem._replace(**changes)


def test_the_line_of_a_call():
    """Milliseconds, and how many times as fast as plain layers."""
    found = {"best": "cpu", "seconds": {"eager": 0.006, "cpu": 0.002}}
    expected = "training float32 contiguous 2x4x5x5, 2 convolutions: eager 6.00 ms, cpu 2.00 ms (3.00x)"
    assert tune._line(block_problem(), found) == f"     cpu  {expected}"


def test_calls_are_of_the_type_that_autocast_gives():
    """Training and inference are apart, and the two ways to take a net apart."""
    problems = [problem for problem, _ in tune._calls(["resnet20"], "cpu", torch.bfloat16, 2, 8)]
    assert {problem.dtype for problem in problems} == {torch.bfloat16}
    assert [problem.inference for problem in problems] == [False, True] * (len(problems) // 2)
    large = next(iter(tune._calls(["preactresnet18"], "cpu", torch.float32, 1, 128)))[0]
    assert large.shape[2:] == (32, 32)  # behind the stem for images of that size


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("format", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_timed_is_the_call(dtype, format, inference):
    """An x of the call's type and order; a training step has all gradients, each once, and inference none."""
    block, seen = PreActBlock(4, 4), []
    block.register_forward_pre_hook(lambda module, given: seen.append((module, given[0])))
    problem = block_problem(dtype=dtype, format=format, inference=inference)
    step = tune._step(problem, block, "library")
    step.run()
    module, x = seen[-1]
    assert x.dtype == dtype
    assert x.is_contiguous(
        memory_format=getattr(torch, "channels_last" if format == "channels_last" else "contiguous_format")
    )
    assert module.training is x.requires_grad is not inference
    gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
    assert all((gradient is None) == inference for gradient in gradients)
    step.prepare()
    assert all(leaf.grad is None for leaf in (x, *module.parameters()))
    assert all(parameter.grad is None for parameter in block.parameters())


def test_every_backend_that_serves_is_measured(monkeypatch):
    """But the reference, which is not made for speed; by forward and backward together."""
    timed = []
    monkeypatch.setattr(tune, "_step", lambda problem, block, name: name)

    def alternate(names, budget, rounds):
        timed.extend(names)
        return [Times((9.0 - i,) * 5, (1.0 + i,) * 5) for i, _ in enumerate(names)]

    monkeypatch.setattr(tune, "alternate", alternate)
    found = tune.measure(block_problem(), PreActBlock(4, 4), 1.0)
    served = [name for name in ("cpu", "cuda", "triton", "library") if backends.obstacle(name, block_problem()) is None]
    assert timed == ["eager", *served]
    assert found == {"best": "eager", "seconds": {name: 1.0 + i for i, name in enumerate(timed)}}


def test_the_fastest_tile_of_each_kernel_is_taken(monkeypatch):
    """Of the kernels that the call itself asks for, one after the other, each with the tiles found before."""
    configurations = pytest.importorskip("fused_preact.triton.configurations")
    small, large = configurations.Config(32, 32, 32, 4, 2), configurations.Config(64, 64, 32, 4, 2)
    fastest = {"dgrad": small, "forward": large}
    monkeypatch.setattr(configurations, "asked", {"of another call"})
    monkeypatch.setattr(configurations, "trial", {})
    monkeypatch.setattr(configurations, "candidates", lambda *_: (small, large))
    step = Step(lambda: None, lambda: configurations.asked.add("forward"), lambda y: configurations.asked.add("dgrad"))
    monkeypatch.setattr(tune, "_step", lambda *_: step)

    def alternate(steps, budget, rounds):
        took = sum(configurations.trial.get(key) != tile for key, tile in fastest.items())
        return [Times((1.0 + took,), (1.0 + took,))]

    monkeypatch.setattr(tune, "alternate", alternate)
    assert tune._tiles(block_problem(), None, 1.0) == {key: {"2": list(tile)} for key, tile in fastest.items()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine")
def test_times_on_a_gpu_are_those_of_its_kernels():
    """Not those of their launches."""
    assert tune._step(block_problem(device=torch.device("cuda")), PreActBlock(4, 4).cuda(), "eager").wait is (
        torch.cuda.synchronize
    )
