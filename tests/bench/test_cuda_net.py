"""The nets on a CUDA device, with a device that is the CPU."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_preact import PreActBottleneck, PreActStage
from fused_preact.bench import cases, cuda_net, device
from fused_preact.bench.contenders import Contender, Problem

PEAKS = {"fused fast": 40, "fused lean": 20, "fused min": 10, "eager": 80}  # bytes an image


def make_net(backend):
    """A small net with a stage."""
    blocks = (PreActBottleneck(16, 4, backend=backend) for _ in range(2))
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), PreActStage(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


@pytest.fixture
def on_cpu(monkeypatch):
    """A stage of two blocks, on the CPU; a graph is the call itself, and memory is what `PEAKS` says."""

    def call_of(contender, problem, module):
        each = PEAKS.get(cuda_net.name(contender), 80)
        return Call(real_call_of(contender, problem, module), 1000 + each * problem.case.shape[0])

    def small_net(batch, dtype):
        net = cases.resnet1001(batch, dtype)
        return replace(net, make=make_net, shape=(batch, 3, 8, 8))

    def no_compiler(*_, **__):
        raise RuntimeError("no compiler here\nand more")

    real_call_of = device.call_of
    monkeypatch.setattr(device, "call_of", call_of)
    monkeypatch.setattr(device, "captured", lambda call: call)
    monkeypatch.setattr(device, "release", lambda: None)
    monkeypatch.setattr(device, "peak_bytes", lambda call: call() or call.bytes)
    monkeypatch.setattr(device, "fits", lambda call, limit: (call(), call.bytes <= limit)[1])
    monkeypatch.setattr(device, "seconds", lambda runs, rounds, repeats: [[1.0 + i] * rounds for i in range(len(runs))])
    monkeypatch.setattr(nn.Module, "compile", no_compiler)
    monkeypatch.setattr(cuda_net, "resnet1001", small_net)
    other = replace(cases.net("Another", "resnet20", 3, "bf16"), make=make_net, shape=(3, 3, 8, 8))
    monkeypatch.setattr(cuda_net, "others", lambda: [other])
    monkeypatch.setattr(cuda_net, "BATCHES", (2, 4))
    monkeypatch.setattr(cuda_net, "GIGABYTES", (1.2e-6, 1.5e-6))
    eager = Contender("eager", "channels_last")
    modes = ("fast", "lean", "min")
    monkeypatch.setattr(
        cuda_net, "entrants", lambda: [eager, *(replace(eager, backend="library", memory=mode) for mode in modes)]
    )


class Call:
    """A step, and the bytes it is said to need."""

    def __init__(self, call, needed):
        self.call, self.bytes = call, needed

    def __call__(self):
        return self.call()


def test_nets_and_capacities(on_cpu):
    """Every contender's time in and out of a graph, its ratios, its peak, and the largest batch that ran."""
    document = {"nets": [], "capacity": [], "compiled": []}
    for kind, found in cuda_net.run():
        document[kind].append(found)
    assert json.loads(json.dumps(document)) == document
    assert document["capacity"] == [
        {"gigabytes": 1.2e-6, "batch": {"eager": 2, "fused fast": 5, "fused lean": 10, "fused min": 20}},
        {"gigabytes": 1.5e-6, "batch": {"eager": 6, "fused fast": 12, "fused lean": 25, "fused min": 50}},
    ]
    assert [net["case"].split(", ")[2] for net in document["nets"]] == ["N=2", "N=4", "N=3"]
    assert set(document["nets"][2]["peak_bytes"]) == {"eager", "fused fast"}
    for net in document["nets"][:2]:
        assert set(net["seconds"]) == set(PEAKS) | {f"{label} in a graph" for label in PEAKS}
        assert set(net["ratios"]) == set(net["seconds"]) - set(cuda_net.BASELINES)
        assert net["ratios"]["fused fast"]["eager"]["median"] == 1 / 2
    assert document["nets"][1]["peak_bytes"] == {label: 1000 + 4 * each for label, each in PEAKS.items()}
    assert [net["left_out"] for net in document["compiled"]] == ["no compiler here"] * 2
    table = io.StringIO()
    cuda_net.show(document, Console(file=table, width=120))
    assert "fused lean in a graph" in table.getvalue()


@pytest.mark.parametrize(
    ("limit", "most", "expected"),
    [(10_000, 1000, 90), (10_000, 88, 87), (10_000, 1, 0), (900, 1000, 0)],
    ids=["as promised", "less than promised", "none of those tried", "too little for one"],
)
def test_largest_batch(limit, most, expected):
    """The line through the peaks says where to begin; only what ran is reported."""
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= most

    peaks = [1000 + 100 * batch for batch in cuda_net.BATCHES]
    assert cuda_net.largest_batch(peaks, limit, fits) == expected
    assert len(tried) <= cuda_net.TRIALS
    assert all(batch <= 90 for batch in tried)


def test_compiled_is_not_asked_for_a_graph(monkeypatch):
    """It makes one of its own; its ratios are to plain layers in and out of one."""
    monkeypatch.setattr(cuda_net, "_call", lambda contender, problem: contender.backend)
    monkeypatch.setattr(device, "captured", lambda call: f"captured {call}")
    took = {"eager": 6.0, "captured eager": 4.0, "compiled": 2.0}
    monkeypatch.setattr(device, "seconds", lambda runs, rounds, repeats: [[took[run]] * rounds for run in runs])
    problem = Problem(cases.resnet1001(64, "bf16"), torch.empty(0), torch.empty(0), {})
    eager = Contender("eager", "channels_last")
    found = cuda_net._times(problem, [eager, replace(eager, backend="compiled")])
    assert set(found["seconds"]) == {"eager", "eager in a graph", "compiled"}
    ratios = {label: {name: r["median"] for name, r in each.items()} for label, each in found["ratios"].items()}
    assert ratios == {"compiled": {"eager": 3.0, "eager in a graph": 2.0}}


def test_the_other_nets_are_those_that_they_are_called():
    """Each can be made, and takes the images of its case."""
    for case in cuda_net.others():
        with FakeTensorMode():
            assert case.make(backend="auto")(torch.empty(2, *case.shape[1:])).shape == (2, 10)
