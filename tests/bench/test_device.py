"""The measurements on a CUDA device, as far as a machine without one can tell."""

import pytest
import torch

from fused_preact.bench import cuda
from fused_preact.cli import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_device_is_one_sentence(capsys):
    """Without a GPU the command says so, and fails."""
    assert main(["bench", "--device", "cuda"]) != 0
    assert "torch finds no CUDA device" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("void fused_preact::cuda::correlate<64, MmaTf32, ActivationSource, ForwardEpilogue>(...)", 7),
        ("void fused_preact::cuda::correlate<64, MmaTf32, GradientSource, DgradEpilogue>(...)", 9),
        ("void fused_preact::cuda::wgrad_kernel<MmaTf32>(...)", 7),
        ("void fused_preact::cuda::gradients_kernel<1, Fma>(..., DgradEpilogue<Fma>::Output, WgradParams<Fma>)", 9),
        ("void fused_preact::cuda::statistics_kernel<float>(...)", 2),
        ("void fused_preact::cuda::dx_kernel<float>(...)", 6),
        ("void at::native::elementwise_kernel<...>", None),
    ],
)
def test_least_bytes_of_a_kernel(kernel, expected):
    """dgrad reads dy and x and writes dz; dx reads dz and x and writes dx; and so on; what is not ours is left out."""
    assert cuda.minimum_bytes(kernel, x=2, y=5) == expected


def test_units_are_those_of_a_bottleneck():
    """Three convolutions a stage, whose outputs are what the next one reads."""
    labels = [case.label for case in cuda.units()]
    assert labels[:3] == ["64->16, 1x1, 32x32", "16->16, 3x3, 32x32", "16->64, 1x1, 32x32"]
    assert len(labels) == len(set(labels)) == 9
