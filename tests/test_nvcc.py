"""The CUDA compiler: where it is found, and what it compiles for."""

import importlib
from pathlib import Path

import pytest
from setuptools.errors import CompileError

from test_build import ROOT


@pytest.fixture
def nvcc(monkeypatch):
    """The module nvcc of build_backend, as on a machine that says nothing of CUDA."""
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("FUSED_PREACT_CUDA", raising=False)
    return importlib.import_module("nvcc")


@pytest.mark.parametrize(("machine", "target"), [("x86_64", "x86_64-linux"), ("aarch64", "sbsa-linux")])
def test_the_cuda_runtime_is_that_of_this_machine(nvcc, monkeypatch, tmp_path, machine, target):
    """A toolkit may hold the runtimes of several processors, in folders that do not all have the processor's name."""
    monkeypatch.setattr(nvcc.platform, "machine", lambda: machine)
    for name in "x86_64-linux", "sbsa-linux":
        (tmp_path / "targets" / name / "lib").mkdir(parents=True)
        (tmp_path / "targets" / name / "lib/libcudart_static.a").touch()
    assert nvcc.Cuda(tmp_path, "13.0", ("9.0",)).runtime() == tmp_path / "targets" / target / "lib"


def fake_nvcc(folder: Path, home: Path) -> Path:
    """A script, as packages put on PATH, in front of an nvcc that lives in `home`."""
    (folder / "bin").mkdir(parents=True)
    script = folder / "bin" / "nvcc"
    script.write_text(f"#!/bin/sh\necho '#$ _HERE_={home}/bin' >&2\necho 'Cuda compilation tools, release 13.0, V13'\n")
    script.chmod(0o755)
    return script


def test_nvcc_on_path_may_be_a_script(nvcc, monkeypatch, tmp_path):
    """The toolkit's own folder is used, not that of the link or script in front of its nvcc."""
    monkeypatch.setenv("PATH", f"{fake_nvcc(tmp_path / 'front', tmp_path / 'toolkit').parent}:/usr/bin:/bin")
    found = nvcc.find(("8.0",))
    assert found == nvcc.Cuda(tmp_path / "toolkit", "13.0", ("8.0",))
    assert found.flags()[0] == "-gencode=arch=compute_80,code=[sm_80,compute_80]"


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (("8.0", "9.0"), ["compute_80,code=[sm_80,compute_80]", "compute_90,code=[sm_90,compute_90]"]),
        (("8.6", "8.9"), ["compute_80,code=[sm_86,sm_89,compute_80]"]),
        (("12.0", "9.0"), ["compute_80,code=[compute_80]", "compute_90,code=[sm_120,sm_90,compute_90]"]),
    ],
)
def test_code_is_made_from_the_latest_ptx_that_an_architecture_has(nvcc, tmp_path, architectures, expected):
    """Any device runs the oldest; from 9.0 on launches overlap."""
    flags = nvcc.Cuda(tmp_path, "13.0", architectures).flags()
    assert [flag for flag in flags if "-gencode" in flag] == [f"-gencode=arch={flag}" for flag in expected]


def test_cuda_home_comes_before_path(nvcc, monkeypatch, tmp_path):
    """CUDA_HOME says which toolkit is meant, as everywhere."""
    fake_nvcc(tmp_path / "asked", tmp_path / "asked")
    monkeypatch.setenv("PATH", f"{fake_nvcc(tmp_path / 'other', tmp_path / 'other').parent}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "asked"))
    assert nvcc.find().home == tmp_path / "asked"


def test_cuda_home_without_nvcc_is_an_error_that_names_both_ways_out(nvcc, monkeypatch, tmp_path):
    """Another toolkit is not taken in its place; who has a folder of libraries there can leave the kernels out."""
    monkeypatch.setenv("PATH", f"{fake_nvcc(tmp_path / 'other', tmp_path / 'other').parent}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "runtime"))
    with pytest.raises(CompileError, match=r"^CUDA_HOME: expected .*bin/nvcc.* got '.*/runtime'.*FUSED_PREACT_CUDA=0"):
        nvcc.find()
    monkeypatch.setenv("FUSED_PREACT_CUDA", "0")
    assert nvcc.find() is None
    monkeypatch.delenv("FUSED_PREACT_CUDA")
    monkeypatch.setenv("CUDA_HOME", "")
    assert nvcc.find().home == tmp_path / "other"


def test_cuda_can_be_left_out(nvcc, monkeypatch, tmp_path):
    """FUSED_PREACT_CUDA=0 leaves the CUDA kernels out although nvcc is there."""
    monkeypatch.setenv("PATH", str(fake_nvcc(tmp_path, tmp_path).parent))
    monkeypatch.setenv("FUSED_PREACT_CUDA", "0")
    assert nvcc.find() is None


def test_without_nvcc_cuda_is_left_out_unless_asked_for(nvcc, monkeypatch):
    """Unset, a machine without nvcc builds the CPU kernels; FUSED_PREACT_CUDA=1 is an error that says what to do."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(nvcc.Path, "exists", lambda path: False)
    assert nvcc.find() is None
    monkeypatch.setenv("FUSED_PREACT_CUDA", "1")
    with pytest.raises(CompileError, match="no nvcc: put it on PATH, or set CUDA_HOME"):
        nvcc.find()
    monkeypatch.setenv("FUSED_PREACT_CUDA", "yes")
    with pytest.raises(CompileError, match="FUSED_PREACT_CUDA: expected 0, 1 or nothing, got 'yes'"):
        nvcc.find()
