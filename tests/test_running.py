"""running.py: buffers move as nn.BatchNorm2d's do, by an operator or by torch's lists."""

import copy
import functools
import itertools
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from cases import BACKENDS, needs_cpu
from fused_preact import BNReLUConv2d, PreActBlock, PreActStage, bn_relu_conv2d, running
from fused_preact.kernels import MEAN, VARIANCE

CHANNELS = (1, 7, 32)


@pytest.fixture(
    params=[pytest.param(running.update, marks=needs_cpu, id="native"), pytest.param(running._update, id="torch")]
)
def update(request: pytest.FixtureRequest):
    """What moves buffers: the operator, and torch's functions."""
    return request.param


def norms(dtype: torch.dtype, step: int = 1) -> tuple[list, list, list, list]:
    """Buffers of three batch norms, ``step`` elements apart, counts, and rows of four units."""
    torch.manual_seed(0)
    mean, var = ([torch.rand(C * step).to(dtype)[::step] for C in CHANNELS] for _ in range(2))
    rows = [torch.randn(5, C, dtype=torch.promote_types(dtype, torch.float32)) for C in (3, *CHANNELS)]
    return mean, var, [torch.tensor(4) for _ in CHANNELS], rows


@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_buffers_move_towards_the_batch(update, momentum, dtype):
    """(1 - momentum)*buffer + momentum*batch to the last bits of the buffer's type; None weighs by the count."""
    mean, var, counts, rows = norms(dtype)
    if momentum is None:
        mean, var, counts = mean[:1], var[:1], counts[:1]
    units = list(range(1, 1 + len(mean)))
    weight = 1 / 5 if momentum is None else momentum

    def moved(buffers: list, row: int) -> list:
        return [(1 - weight) * b.double() + weight * rows[i][row].double() for b, i in zip(buffers, units, strict=True)]

    expected = moved(mean, MEAN), moved(var, VARIANCE)
    update(mean, var, counts, rows, units, momentum)
    few = 4 * torch.finfo(dtype).eps
    for buffers, values in zip((mean, var), expected, strict=True):
        for buffer, value in zip(buffers, values, strict=True):
            assert buffer.dtype == dtype
            assert_close(buffer.double(), value, rtol=few, atol=few)
    assert all(count == 5 for count in counts)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_buffers_of_several_types(update, momentum):
    """A net in 16 bits may have a batch norm in float32: each buffer moves in the type that it has."""
    types = torch.bfloat16, torch.float32, torch.float64
    mean, var, counts, rows = norms(torch.float32)
    mean, var = (list(map(Tensor.to, buffers, of)) for buffers, of in ((mean, types), (var, types[::-1])))
    if momentum is None:
        mean, var, counts = mean[:1], var[:1], counts[:1]
    units, weight = list(range(1, 1 + len(mean))), momentum or 1 / 5
    buffers, batch = mean + var, [rows[i][row] for row in (MEAN, VARIANCE) for i in units]
    expected = [
        (b.double() + weight * (t.double() - b.double())).to(b.dtype) for b, t in zip(buffers, batch, strict=True)
    ]
    update(mean, var, counts, rows, units, momentum)
    assert_close(buffers, expected)


def test_it_is_what_batch_norm_does(update):
    """Over some batches, means and variances of nn.BatchNorm2d, within float32's rounding."""
    bn, ours = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    for x in torch.randn(4, 3, 6, 2, 2):
        bn(x)
        rows = torch.stack([x.mean((0, 2, 3)), *[x.var((0, 2, 3))] * 4])
        update([ours.running_mean], [ours.running_var], [ours.num_batches_tracked], [rows], [0], 0.1)
    assert_close(ours.state_dict(), bn.state_dict(), rtol=1e-6, atol=1e-7)


def test_buffers_of_any_stride(update):
    """A buffer may be a column of something, each of another; what lies between its values stays."""
    mean, _, counts, rows = norms(torch.float32, step=3)
    _, var, *_ = norms(torch.float32, step=2)
    around = mean[2]._base.clone()
    dense = [[b.clone() for b in buffers] for buffers in (mean, var)]
    update(mean, var, counts, rows, [1, 2, 3], 0.1)
    update(*dense, [], rows, [1, 2, 3], 0.1)
    assert_close([mean, var], dense, rtol=0, atol=0)
    around[::3] = mean[2]
    assert torch.equal(mean[2]._base, around)


def test_counts_alone(update):
    """Batch norms that count batches and keep no statistics."""
    counts = [torch.tensor(0), torch.tensor(7)]
    update([], [], counts, [torch.zeros(5, 2)], [], 0.1)
    assert counts == [torch.tensor(1), torch.tensor(8)]


@needs_cpu
def test_which_devices_the_operator_serves(monkeypatch):
    """The CPU, and the GPUs that the kernels serve: on others, as those of AMD, the operator would be an error."""
    monkeypatch.setattr(running, "_serves_cuda", running._serves_cuda.__wrapped__)  # what is found here is not kept
    monkeypatch.setattr(running.backends, "cuda_unavailable", lambda gpu: None if gpu.index == 1 else "it is too old")
    served = [name for name in ("cpu", "cuda:0", "cuda:1", "xpu:1") if running._has_operator(torch.device(name))]
    assert served == ["cpu", "cuda:1"]


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_cpu, id="native"), pytest.param(False, id="torch")])
def test_plain_layers_may_be_differentiated_after_a_fused_call(native, monkeypatch):
    """As after another call of theirs: "auto" may give images of one size to them and of another to a backend."""
    if not native:
        monkeypatch.setattr(running, "_has_operator", lambda _: False)
    bn, x = nn.BatchNorm2d(2), torch.randn(3, 2, 4, 4, requires_grad=True)
    y = bn(x)
    running.update([bn.running_mean], [bn.running_var], [bn.num_batches_tracked], [torch.ones(5, 2)], [0], 0.1)
    y.square().sum().backward()
    assert bn.num_batches_tracked == 2
    assert bn.running_mean.sum() > 0.1


def test_an_average_without_a_count_stays(update):
    """As in nn.BatchNorm2d, whose momentum is then zero."""
    mean, var = torch.zeros(2), torch.ones(2)
    update([mean], [var], [], [torch.full((5, 2), 9.0)], [0], None)
    assert (mean.tolist(), var.tolist()) == ([0, 0], [1, 1])


def test_autograd_hears_of_counts(update):
    """As from nn.BatchNorm2d: what was saved for a backward is not changed in silence."""
    count, x = torch.tensor(1), torch.ones(2, requires_grad=True)
    y = x * count
    update([torch.zeros(2)], [torch.ones(2)], [count], [torch.ones(5, 2)], [0], 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_moves_in_a_forward_that_is_repeated():
    """Inside of a backward the statistics of the batch have entered already."""
    mean, var, count = torch.zeros(2), torch.ones(2), torch.tensor(3)

    class Repeat(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            running.update([mean], [var], [count], [torch.full((5, 2), 9.0)], [0], 0.1)
            return dy

    Repeat.apply(torch.ones(1, requires_grad=True)).backward()
    assert mean.tolist() == [0, 0]
    assert var.tolist() == [1, 1]
    assert count == 3


WRONG = {
    "rows are short": (dict(rows=[torch.zeros(4, 2)]), r"rows\[0\]: expected contiguous .*\[5, C\].*\[4, 2\]"),
    "rows are of another type": (dict(rows=[torch.zeros(5, 2).half()]), r"rows\[0\]: expected .*float64.*got Half"),
    "rows are strided": (dict(rows=[torch.zeros(2, 5).t()]), r"rows\[0\]: expected contiguous"),
    "units are out of range": (dict(units=[1]), "units: expected from 0 to below 1, got 1"),
    "units are negative": (dict(units=[-1]), "units: expected from 0 to below 1, got -1"),
    "mean is missing": (dict(mean=[]), "mean: expected 1 tensors, got 0"),
    "nothing but var": (dict(mean=[], counts=[], units=[]), "var: expected 0 tensors, got 1"),
    "var is missing": (dict(var=[]), "var: expected 1 tensors, got 0"),
    "mean is long": (dict(mean=[torch.zeros(3)]), r"mean\[0\]: expected .* shape \[2\], got .* \[3\]"),
    "var has two dimensions": (dict(var=[torch.zeros(2, 1)]), r"var\[0\]: expected .* shape \[2\], got .* \[2, 1\]"),
    "var is integer": (dict(var=[torch.zeros(2).int()]), r"var\[0\]: expected Float .*, got Int"),
    "count is a list": (dict(counts=[torch.zeros(2).long()]), r"counts\[0\]: expected one int64, .*shape \[2\]"),
    "count is empty": (dict(counts=[torch.zeros(0).long()]), r"counts\[0\]: expected one int64, .*shape \[0\]"),
    "several batch norms are averaged": (
        dict(mean=[torch.zeros(2)] * 2, var=[torch.ones(2)] * 2, units=[0, 0], momentum=None),
        "momentum: expected a number for 2 batch norms, got None",
    ),
    "count is a float": (dict(counts=[torch.tensor(1.0)]), r"counts\[0\]: expected one int64, .*got Float"),
}


@needs_cpu
@pytest.mark.parametrize("name", WRONG)
def test_the_operator_reads_nothing_out_of_bounds(name):
    """Anyone can call it: what does not fit is named, before anything is read, and nothing has moved then."""
    changed, message = WRONG[name]
    given = dict(
        mean=[torch.zeros(2)], var=[torch.ones(2)], counts=[torch.tensor(0)], rows=[torch.full((5, 2), 9.0)], units=[0],
        momentum=0.1,
    )  # fmt: skip
    before = copy.deepcopy(given)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_preact._update_running(*(given | changed).values())
    assert_close(given, before, rtol=0, atol=0)


@needs_cpu
def test_the_operator_is_what_it_says():
    """Its schema, its fake kernel and what it changes agree; likewise of the one in compiled code."""
    mean, var, counts, rows = norms(torch.float32)
    arguments = mean, var, counts, rows, [1, 2, 3], 0.1
    for operator in "_update_running", "_move_running":
        torch.library.opcheck(getattr(torch.ops.fused_preact, operator).default, arguments)


def test_counts_that_are_no_int64():
    """Averaged checkpoints have counts in floating point: they count on, as those of plain layers do."""
    for dtype in torch.float32, torch.int32:
        bn = torch.nn.BatchNorm2d(4)
        unit = BNReLUConv2d.from_layers(bn, torch.nn.Conv2d(4, 4, 1))
        bn.num_batches_tracked = torch.tensor(3, dtype=dtype)
        unit(torch.randn(2, 4, 3, 3))
        assert torch.equal(bn.num_batches_tracked, torch.tensor(4, dtype=dtype))
        assert bn.running_mean.abs().sum() > 0


def test_an_average_by_a_count_that_is_a_list_of_one():
    """Of whatever type: the mean of all batches, as in plain layers."""
    mean, var, count = torch.zeros(2), torch.ones(2), torch.tensor([3.0])
    running.update([mean], [var], [count], [torch.full((5, 2), 8.0)], [0], None)
    assert (mean.tolist(), var.tolist(), count.tolist()) == ([2.0, 2.0], [2.75, 2.75], [4.0])


def test_a_count_on_another_device():
    """It counts where it is, and the buffers beside it move, as those of plain layers do."""
    mean, var = torch.zeros(2), torch.ones(2)
    running.update([mean], [var], [torch.tensor(3, device="meta")], [torch.full((5, 2), 9.0)], [0], 0.5)
    assert (mean.tolist(), var.tolist()) == ([4.5, 4.5], [5.0, 5.0])


def test_a_count_of_several_numbers():
    """Each of them counts on, as in plain layers."""
    bn = torch.nn.BatchNorm2d(4)
    unit = BNReLUConv2d.from_layers(bn, torch.nn.Conv2d(4, 4, 1))
    bn.num_batches_tracked = torch.tensor([3, 5])
    unit(torch.randn(2, 4, 3, 3))
    assert bn.num_batches_tracked.tolist() == [4, 6]
    assert bn.running_mean.abs().sum() > 0


def test_many_batch_norms(update):
    """More than a launch takes."""
    mean, var, rows = ([fill(2) for _ in range(130)] for fill in (torch.zeros, torch.ones, lambda C: torch.rand(5, C)))
    counts = [torch.tensor(i) for i in range(150)]
    update(mean, var, counts, rows, list(range(130)), 0.5)
    assert_close(mean, [0.5 * r[MEAN] for r in rows])
    assert_close(var, [0.5 + 0.5 * r[VARIANCE] for r in rows])
    assert [int(count) for count in counts] == list(range(1, 151))


def test_what_is_infinite_stays_so(update):
    """As in nn.BatchNorm2d, whose eval mode then gives beta, where a NaN would give NaN."""
    mean, var = torch.tensor([torch.inf, -torch.inf, 1.0]), torch.tensor([torch.inf, 1.0, torch.inf])
    update([mean], [var], [], [torch.ones(5, 3)], [0], 0.1)
    assert mean.tolist() == [torch.inf, -torch.inf, 1.0]
    assert var.tolist() == [torch.inf, 1.0, torch.inf]


@needs_cpu
def test_a_momentum_of_one_gives_the_batch():
    """Exactly, however far the buffer was."""
    mean, var = torch.full((3,), 1e8), torch.full((3,), 1e8)
    rows = torch.rand(5, 3)
    running.update([mean], [var], [], [rows], [0], 1.0)
    assert torch.equal(mean, rows[MEAN])
    assert torch.equal(var, rows[VARIANCE])


@needs_cpu
def test_an_interrupt_leaves_gradients_on():
    """Wherever it comes between two calls of the update on the CPU."""

    def update_until(call: int) -> bool:
        calls, buffers = itertools.count(), norms(torch.float32)

        def interrupt(_frame, event: str, _arg) -> None:
            if event.endswith("return") and next(calls) == call:
                sys.setprofile(None)
                raise KeyboardInterrupt

        before = sys.getprofile()
        sys.setprofile(interrupt)
        try:
            running.update(*buffers, [1, 2, 3], 0.1)
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(before)
        return False

    for call in itertools.count():
        interrupted = update_until(call)
        on = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        assert on
        if not interrupted:
            break


@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
def test_checkpoint_of_plain_layers_around_a_block(backend):
    """Backward of the block is where the forward is repeated, of the layers in front of it too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), PreActBlock(8, 8, backend=backend), PreActBlock(8, 8, backend=backend))
    plain = copy.deepcopy(net)
    grads = []
    for model, call in (net, lambda x: checkpoint(net, x, use_reentrant=False)), (plain, plain):
        x = torch.randn(2, 8, 7, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
        call(x).square().sum().backward()
        grads.append({"dx": x.grad, **{name: p.grad for name, p in model.named_parameters()}, **model.state_dict()})
    assert_close(*grads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_selective_checkpoint(backend):
    """A checkpoint that keeps what convolutions return, and repeats the rest, finds all that it kept."""
    policy = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    results = []
    for kept in False, True:
        torch.manual_seed(0)
        net = nn.Sequential(PreActStage(PreActBlock(8, 12, 2, backend=backend)), nn.BatchNorm2d(12), nn.ReLU())
        hooked = PreActBlock(12, 12, backend=backend)
        hooked.conv1.register_forward_hook(lambda *_: None)
        net.append(hooked)
        x = torch.randn(2, 8, 8, 8).requires_grad_()
        y = checkpoint(net, x, use_reentrant=False, context_fn=policy) if kept else net(x)
        y.square().sum().backward()
        own = {name: t for name, t in net.state_dict().items() if not name.startswith("1.")}
        results.append([y.detach(), x.grad, *(p.grad for p in net.parameters()), *own.values()])
    assert_close(results[1], results[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_that_require_a_gradient_are_refused(backend, training):
    """There is none for them, and a constant in silence would be a wrong one; without gradients they are data."""
    x, weight, mean, var = torch.randn(2, 8, 4, 4), torch.randn(4, 8, 1, 1), torch.zeros(8), torch.ones(8)
    mean.requires_grad_()
    unit = BNReLUConv2d(8, 4, 1, backend=backend).train(training)
    unit.bn.running_var.requires_grad_()
    for call in (
        lambda: bn_relu_conv2d(x, weight, running_mean=mean, running_var=var, training=training, backend=backend),
        lambda: unit(x),
    ):
        with pytest.raises(ValueError, match="running_mean and running_var must not require a gradient"):
            call()
        with torch.no_grad():
            call()


def test_an_update_changes_a_buffer_once():
    """On a GPU all of an update is one launch: a layer that is used twice takes its batches in two."""
    first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    updates = running.updates((first, second, first, second))
    assert [update.units for update in updates] == [[0, 1], [2, 3]]
    for update in updates:
        assert list(map(id, update.mean)) == [id(first.running_mean), id(second.running_mean)]
    second.running_var = first.running_var
    updates = running.updates((first, second))
    assert [update.units for update in updates] == [[0], [1]]


def test_batch_norms_of_one_momentum_are_updated_together():
    """Each average of all batches by itself, and those that are not trained or not tracked not at all."""
    norms = [nn.BatchNorm2d(4, momentum=momentum) for momentum in (0.1, 0.5, 0.1, None, None, 0.1, 0.1)]
    norms[5].eval()
    norms[6].track_running_stats = False
    updates = running.updates(norms)
    found = [(update.momentum, update.units) for update in updates]
    assert found == [(0.1, [0, 2]), (0.5, [1]), (None, [3]), (None, [4])]


@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
def test_a_batch_norm_that_was_made_without_statistics_may_be_told_to_track_them(backend):
    """It has nothing that could move, and normalises by the batch, as in plain layers."""
    unit, x = BNReLUConv2d(4, 4, 1, track_running_stats=False, backend=backend), torch.randn(2, 4, 3, 3)
    expected = unit(x)
    unit.bn.track_running_stats = True
    assert torch.equal(unit(x), expected)
