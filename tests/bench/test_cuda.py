"""The measurements of blocks and kernels on a CUDA device, as far as a machine without one can tell."""

import io

import pytest
import torch
from rich.console import Console

from fused_preact.bench import cuda, device
from fused_preact.bench.check import CheckError
from fused_preact.cli import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_device_is_one_sentence(capsys):
    """Without a GPU the command says so, and fails."""
    assert main(["bench", "--device", "cuda"]) != 0
    assert "torch finds no CUDA device" in "".join(capsys.readouterr())


def test_kernels_that_were_left_out_are_one_sentence(tmp_path, monkeypatch, capsys):
    """Before anything is measured, and with what to do."""
    monkeypatch.setattr(cuda.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda.backends, "status", lambda: {"cuda": "the CUDA kernels were left out"})
    assert main(["bench", "--device", "cuda", f"--output={tmp_path / 'r'}"]) == 2
    assert capsys.readouterr().err == "fused-preact: --device cuda: the CUDA kernels were left out\n"


def test_a_wrong_result_on_a_gpu_is_not_reported(tmp_path, monkeypatch, capsys):
    """It ends as on a processor: exit code 1, and the reason in one line."""

    def wrong(*_):
        raise CheckError("the error of dx")

    monkeypatch.setattr(cuda, "run", wrong)
    assert main(["bench", "--device", "cuda", f"--output={tmp_path / 'r'}"]) == 1
    assert "Wrong result, it is not reported. the error of dx" in capsys.readouterr().out


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


def test_a_kernel_counts_from_the_end_of_the_one_in_front():
    """From SM 9.0 on it has begun before that, and waits; where it began later, the time between is nobody's."""
    kernels = [("b", 3.0, 14.0), ("a", 2.0, 10.0), ("a", 20.0, 26.0), ("b", 21.0, 32.0)]
    assert cuda.kernel_seconds(kernels) == pytest.approx({"a": 7e-6, "b": 5e-6})


def test_units_are_those_of_a_bottleneck():
    """Three convolutions a stage, whose outputs are what the next one reads."""
    labels = [case.label for case in cuda.units()]
    for case in cuda.units():
        N, C, H, W = case.shape
        assert N == cuda.BATCH
        assert case.label.startswith(f"{C}->")
        assert case.label.endswith(f" {H}x{W}")
    assert labels[:3] == ["64->16, 1x1, 32x32", "16->16, 3x3, 32x32", "16->64, 1x1, 32x32"]
    assert len(labels) == len(set(labels)) == 9


def test_a_copy_reads_and_writes(monkeypatch):
    """Its bytes count twice, as those of a kernel that reads and writes do."""
    monkeypatch.setattr(cuda.torch, "ones", lambda *_, **__: None)
    monkeypatch.setattr(cuda, "seconds", lambda runs, *_: [[0.5, 0.25, 1.0] for _ in runs])
    assert cuda.copy_bandwidth() == 2 * cuda.COPIED / 0.5


def test_each_ratio_is_of_two_runs_of_one_kind(monkeypatch):
    """Eager over fused: both launched by the host, or both replayed from a graph. The table shows the same figures."""
    took = {"eager": 6e-3, "cuda": 2e-3, "eager in a graph": 4e-3, "cuda in a graph": 1e-3}
    monkeypatch.setattr(cuda, "pose", lambda case, device: case)
    monkeypatch.setattr(cuda, "verify", lambda problem, device: {"eager": {"y": 1e-6}})
    monkeypatch.setattr(cuda, "build", lambda contender, problem: None)
    monkeypatch.setattr(cuda, "call_of", lambda contender, problem, module: contender.backend)
    monkeypatch.setattr(device, "captured", lambda call: f"{call} in a graph")
    monkeypatch.setattr(device, "seconds", lambda runs, rounds, repeats: [[took[run]] * rounds for run in runs])
    block = cuda._block(cuda.units()[0])
    assert block["case"] == cuda.units()[0].name
    assert {name: found["median"] for name, found in block["seconds"].items()} == took
    assert {name: found["median"] for name, found in block["ratios"].items()} == {"eager": 3.0, "graph": 4.0}
    kernel = {"case": "a unit", "kernel": "dx_kernel", "bytes": 3_000_000, "seconds": 2e-6, "of_copy": 0.75}
    table = io.StringIO()
    document = {"gpu": {"name": "A GPU"}, "copy": 2e12, "blocks": [block], "kernels": [kernel]}
    cuda.show(document, Console(file=table, width=160))
    cells = [[cell.strip() for cell in line.split("\u2502")] for line in table.getvalue().splitlines()]
    assert "A GPU: a copy moves 2000 GB/s" in table.getvalue()
    figures = [block["case"], "6.000", "2.000", "3.00", "4.000", "1.000", "4.00"]
    assert ["", *figures, ""] in cells
    assert ["", "dx_kernel", "a unit", "2.0", "1500", "75 %", ""] in cells


def test_a_busy_host_is_told_before_anything_is_measured(monkeypatch):
    """It launches what a GPU does, and is slower where it has to share its cores."""
    text = io.StringIO()
    monkeypatch.setattr(cuda.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda.backends, "status", lambda: {"cuda": None})
    monkeypatch.setattr(cuda.environment, "busy", lambda: 1000.0)

    def measuring():
        raise CheckError(text.getvalue())

    monkeypatch.setattr(cuda, "_gpu", measuring)
    with pytest.raises(CheckError, match="The machine was busy"):
        cuda.run(Console(file=text, width=160), lambda document: None)
