"""What a fused call reads of plain layers; most of it is tested by the modules that do so."""

import copy
import functools
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fused_preact import BNReLUConv2d, PreActBlock, bn_relu_conv2d, explain, layers, running
from fused_preact.layers import add


def x_of(C: int = 8) -> torch.Tensor:
    return torch.randn(2, C, 5, 5)


def test_a_sum_has_the_type_of_what_the_layers_returned():
    """In place or not, and where vmap maps the residual alone."""
    y, residual = torch.ones(3, dtype=torch.bfloat16), torch.rand(2, 3)
    expected = (1 + residual).bfloat16()
    for sums in torch.vmap(lambda r: add(y, r, True))(residual), torch.stack([add(y, r, False) for r in residual]):
        assert torch.equal(sums, expected)
    assert torch.equal(add(y, residual[0], True), expected[0])


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_a_buffer_that_is_a_plain_attribute(name):
    """The plain layers run, which find and move it there."""
    block = PreActBlock(8, 8)
    buffer = block.bn2._buffers.pop(name)
    setattr(block.bn2, name, buffer)
    before, plain, x = buffer.clone(), copy.deepcopy(block), x_of()
    plain.backend = "eager"
    assert torch.equal(block(x), plain(x))
    assert torch.equal(buffer, getattr(plain.bn2, name))
    assert not torch.equal(buffer, before)
    assert f"bn2.{name} is a plain attribute" in str(explain(block, x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("size", "backend"), [(3, "library"), ((3, 2), "eager"), ((2, 3), "eager")])
def test_padding_by_name_is_fused_where_it_is_equal_on_both_sides(size, backend):
    """Only where one side has more do the plain layers run."""
    module = BNReLUConv2d(8, 8, size, padding="same", backend="library")
    assert [choice.backend for choice in explain(module, x_of())] == [backend]


def unit(x: torch.Tensor, backend: str) -> torch.Tensor:
    return bn_relu_conv2d(x, torch.ones(8, 8, 1, 1), residual=x, training=True, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_who_watches_does_not_change_a_type(backend):
    """Under autocast it is that of the convolutions, also where a hook or a mode keeps what they return."""
    block, hooked = PreActBlock(8, 8, backend=backend), PreActBlock(8, 8, backend=backend)
    hooked.conv2.register_forward_hook(lambda *_: None)
    policy = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    with torch.autocast("cpu", torch.bfloat16):
        for call in block, hooked, functools.partial(unit, backend=backend):
            assert call(x_of()).dtype == torch.bfloat16
            assert checkpoint(call, x_of(), use_reentrant=False, context_fn=policy).dtype == torch.bfloat16


def test_a_residual_in_symbolic_tracing():
    """A tracer calls with no tensors, of which there is no shape to check."""
    module = BNReLUConv2d(8, 8, 1).eval()
    traced, x, residual = torch.fx.symbolic_trace(module), x_of(), x_of()
    torch.testing.assert_close(traced(x, residual), module(x, residual))


class Turn:
    """A lock that tells when a thread comes which has to wait for it."""

    def __init__(self, waiting: threading.Event) -> None:
        self.lock, self.waiting = threading.Lock(), waiting

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            self.waiting.set()
            self.lock.acquire()

    def __exit__(self, *_) -> None:
        self.lock.release()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_threads_repeat_a_call_of_the_same_layers(use_reentrant):
    """The batch norm keeps its own buffers, and they move in the first calls alone."""
    block, calls = PreActBlock(8, 8, backend="eager"), itertools.count()
    first_came, second_came, first_went = (threading.Event() for _ in range(3))

    def meet(*_) -> None:
        """Let the second thread come before the first goes, and the first go before the second."""
        if running.recomputing():
            came, other = (first_came, second_came) if next(calls) == 0 else (second_came, first_went)
            came.set()
            assert other.wait(60)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        first_went.set()

    buffers = dict(block.named_buffers())
    layers._turns[block.bn1] = Turn(second_came)
    block.bn1.register_forward_hook(meet)
    losses = [checkpoint(block, x_of().requires_grad_(), use_reentrant=use_reentrant).sum() for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(backward, losses[0])
        assert first_came.wait(60)
        pool.submit(backward, losses[1]).result()
        first.result()
    assert all(t is buffers[name] for name, t in block.named_buffers())
    assert block.bn1.num_batches_tracked == 2
