"""Recorded steps: with a stand-in for the CUDA graph on any machine, and with a graph where there is a GPU."""

import pytest
import torch

from fused_preact.errors import UserError
from fused_preact.train.graph import WARM_UP, Recorded
from fused_preact.train.loop import Trainer

from .trainers import same, trainer

STEPS = WARM_UP + 4


class HostTape:
    """Records like a CUDA graph: computes nothing then, and replays on the same memory, in and out."""

    def warm_up(self, function, inputs):
        return function(*inputs)

    def record(self, function, inputs):
        outputs = [torch.full((), torch.nan) for _ in range(2)]

        def replay():
            for output, result in zip(outputs, function(*inputs), strict=True):
                output.copy_(result)

        return outputs, replay


def recorded(one: Trainer) -> Trainer:
    """The same trainer, its steps from a tape."""
    one.recorded = Recorded(one._update, HostTape())
    return one


def run(one: Trainer, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [tuple(one.step()) for _ in range(steps)]


def test_the_first_calls_and_the_replays_each_happen_once():
    """A call changes what the function changes once, and its results are its own, whichever way it runs."""
    total, warm_ups = torch.zeros(()), []

    class Counting(HostTape):
        def warm_up(self, function, inputs):
            warm_ups.append(inputs)
            return super().warm_up(function, inputs)

    def function(x, y):
        total.add_(x.sum())
        return x * y, total + 0

    replay = Recorded(function, Counting())
    results = [replay(torch.tensor(float(i)), torch.tensor(2.0)) for i in range(STEPS)]
    assert [product.item() for product, _ in results] == [2.0 * i for i in range(STEPS)]
    assert [result.item() for _, result in results] == [sum(range(i + 1)) for i in range(STEPS)]
    assert len(warm_ups) == WARM_UP


def test_an_input_of_another_shape_is_refused():
    """A batch of one image would else be taken for as many as were recorded."""
    replay = Recorded(lambda x: (x.sum(), x.mean()), HostTape())
    for _ in range(STEPS):
        replay(torch.zeros(4))
    with pytest.raises(ValueError, match=r"inputs must keep the shape \(4,\), got \(1,\)"):
        replay(torch.zeros(1))


@pytest.mark.parametrize(
    "given",
    [{}, {"amp": "bf16", "nesterov": True, "memory": "lean"}, {"backend": "eager"}],
    ids=["default", "bf16-nesterov-lean", "eager"],
)
def test_recorded_steps_are_the_steps(given, dataset):
    """Losses, weights, momenta and batch statistics are those of the ordinary loop, to the bit."""
    given = {"milestones": [2, STEPS - 2], "iterations": STEPS, **given}
    plain, other = trainer(dataset, **given), recorded(trainer(dataset, **given))
    assert same(run(plain, STEPS), run(other, STEPS))
    assert same(plain.state_dict(), other.state_dict())
    counts = [v for name, v in other.model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(count == STEPS for count in counts)


def test_what_was_recorded_is_what_a_step_calls(dataset):
    """The ordinary update in its place would give the same."""
    one = trainer(dataset)
    one.recorded = lambda images, labels: (len(images), len(labels))
    assert one.step() == (8, 8)
    assert one.iteration == 1


def test_a_recorded_run_goes_on_from_its_checkpoint(dataset, tmp_path):
    """Stopped and resumed, both times while it replays, it ends with the bits of an undisturbed run."""
    whole, first = (recorded(trainer(dataset, iterations=2 * STEPS)) for _ in range(2))
    losses = run(whole, 2 * STEPS)
    before = run(first, STEPS)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = trainer(dataset, iterations=2 * STEPS)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), tmp_path)
    assert same(losses, before + run(recorded(second), STEPS))
    assert same(whole.state_dict(), second.state_dict())


def test_loading_a_checkpoint_drops_the_recording(dataset, tmp_path):
    """It would go on with the momenta of before."""
    one = recorded(trainer(dataset))
    one.load_state_dict(trainer(dataset).state_dict(), tmp_path)
    assert one.recorded is None


def test_a_graph_needs_a_gpu(dataset):
    """On the CPU the flag is one clear error."""
    with pytest.raises(UserError, match="--cuda-graph: expected --device cuda with it, got --device cpu"):
        trainer(dataset, cuda_graph=True, device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine")
@pytest.mark.parametrize("given", [{"memory": "fast"}, {"amp": "bf16", "memory": "lean"}], ids=["fp32", "bf16-lean"])
def test_a_graph_replays_the_steps(given, dataset, tmp_path, monkeypatch):
    """On a GPU: the losses and the state of the ordinary loop, before and after a checkpoint."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    given = {"iterations": 2 * STEPS, "milestones": [2, STEPS + 1], "device": "cuda", **given}
    plain, first, second = trainer(dataset, **given), *(trainer(dataset, cuda_graph=True, **given) for _ in range(2))
    expected = run(plain, 2 * STEPS)
    got = run(first, STEPS)
    first.evaluate()
    second.load_state_dict(first.state_dict(), tmp_path)
    got += run(second, STEPS)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(second.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    counts = [v for name, v in second.model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert all(count == 2 * STEPS for count in counts)
