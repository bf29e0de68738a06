"""A stage as a container of its blocks: keys, copies, slices, sums and multiples."""

import copy
import io

import torch
from torch import nn

from fused_preact import PreActBlock, PreActStage
from test_stage import FUSED, bottlenecks, make, x_of


def test_keys_are_those_of_nn_sequential():
    """state_dict goes to nn.Sequential of the same blocks and back."""
    stage = make(bottlenecks)
    plain = nn.Sequential(*bottlenecks("eager")).double()
    plain.load_state_dict(stage.state_dict())
    stage.load_state_dict(plain.state_dict())
    assert list(stage.state_dict()) == list(plain.state_dict())


def test_copies():
    """deepcopy, pickle and slices keep blocks and mode."""
    stage = make(bottlenecks, "lean", FUSED)
    buffer = io.BytesIO()
    torch.save(stage, buffer)
    buffer.seek(0)
    expected = copy.deepcopy(stage)(x_of())
    for other in (copy.deepcopy(stage), torch.load(buffer, weights_only=False)):
        assert other.memory == "lean"
        assert torch.equal(other(x_of()), expected)
    assert stage[1:3].memory == "lean"
    assert list(stage[1:3]) == [stage[1], stage[2]]


def test_sums_and_multiples_of_a_stage_keep_its_mode():
    """stage + stage and stage * 2 are stages, as slices are."""
    stage = PreActStage(PreActBlock(8, 8), memory="lean")
    for longer in stage + PreActStage(PreActBlock(8, 8)), stage * 2, 2 * stage:
        assert isinstance(longer, PreActStage)
        assert (len(longer), longer.memory) == (2, "lean")


def test_runs_of_a_stage_keep_its_mode():
    """What they keep for backward is what the stage keeps."""
    stage = make(bottlenecks, "lean", FUSED)
    stage[2].register_forward_hook(lambda *_: None)
    assert [run.memory for run in stage.runs() if isinstance(run, PreActStage)] == ["lean", "lean"]
