"""csrc/cpu/parallel.cpp: whichever thread does a job, the result is that of the thread that calls."""

import pytest
import torch

from fused_preact import BNReLUConv2d


@pytest.fixture
def threads():
    """Two, which are there before a test changes how its own rounds."""
    torch.set_num_threads(2)
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)


def test_small_numbers_are_zero_for_every_thread(threads):
    """torch.set_flush_denormal is for the thread that calls it: of another thread a result would have other bits."""
    unit = BNReLUConv2d(16, 16, 1, backend="cpu").eval()
    x = torch.randn(64, 16, 16, 16).to(memory_format=torch.channels_last)

    def bits():
        return unit(x).view(torch.int32)  # as numbers, the smallest ones would be equal to zero

    with torch.no_grad():
        unit.conv.weight.copy_(torch.randn(16, 16, 1, 1) * 3e-38)
        kept = bits()
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot take small numbers for zero")
        results = [bits() for _ in range(20)]
        torch.set_num_threads(1)
        sizes = bits() & 0x7FFFFFFF
        assert (sizes == 0).any()
        assert sizes[sizes > 0].min() >= 0x00800000  # the least normal number
        assert all(torch.equal(result, bits()) for result in results)
        torch.set_flush_denormal(False)
        torch.set_num_threads(2)
        assert torch.equal(bits(), kept)


def test_other_threads_round_as_before_after_a_call(threads):
    """They take what the caller wants for the call alone, and are torch's for everything else."""
    unit, small = BNReLUConv2d(16, 16, 1, backend="cpu").eval(), torch.full((1 << 20,), 1e-39)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot take small numbers for zero")
    with torch.no_grad():
        unit(torch.randn(64, 16, 16, 16))
    torch.set_flush_denormal(False)
    assert (small * 2).view(torch.int32).all()  # as numbers, a thread that flushes would count them as zero
