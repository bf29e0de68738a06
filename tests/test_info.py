"""`fused-preact info`: what a report of a problem rests on must be true."""

import argparse

import pytest
import torch

import fused_preact
from fused_preact import _extension, backends, info, tables


def test_facts_are_those_of_this_process(use_isa):
    """The versions, threads and instruction set shown are the ones in use, not those at import."""
    use_isa("baseline")
    facts = info.facts()
    assert facts["fused_preact"] == fused_preact.__version__
    assert facts["torch"] == torch.__version__
    assert facts["threads"].startswith(f"{torch.get_num_threads()} ")
    assert facts["instruction set"].startswith("baseline (built: ")


def test_every_backend_is_shown_with_its_reason(monkeypatch, capsys):
    """A backend that cannot be used is listed with the reason in full, and the command still succeeds."""
    reasons = {"cpu": "no compiler was there", "library": None}
    monkeypatch.setattr(backends, "status", lambda: reasons)
    assert info.run(argparse.Namespace()) == 0
    shown = capsys.readouterr().out
    assert "no compiler was there" in shown
    assert "usable" in shown


def test_what_is_measured_here_is_said(folder):
    """With nothing measured it names the command; else how much is, and of which device."""
    device = tables.device_name("cuda") or tables.device_name("cpu")
    assert "fused-preact tune" in info.facts()["measured calls"]
    tables.save({"device": device, "calls": {"a": {}, "b": {}}, "tiles": {}})
    assert info.facts()["measured calls"] == f"2 on {device}"


def test_without_the_binary_it_says_how_to_get_it(monkeypatch):
    """A source folder that was never built is told which command builds it."""
    monkeypatch.setattr(_extension, "unavailable", "_C.abi3.so is not built: run `pip install -e .`")
    facts = info.facts()
    assert "pip install -e ." in facts["extension"]
    assert facts["instruction set"].startswith("none")


def test_the_table_is_that_of_the_gpu_where_there_is_one(monkeypatch):
    """It is what `auto` goes by there."""
    monkeypatch.setattr(tables, "device_name", lambda kind: f"a {kind}")
    assert "on a cuda: " in info.facts()["measured calls"]


def test_built_and_supported_are_told_apart(monkeypatch):
    """What this processor lacks is seen by comparing the two."""
    sets = _extension.InstructionSets("avx2", ["avx512", "avx2", "baseline"], ["avx2", "baseline"])
    monkeypatch.setattr(_extension, "unavailable", None)
    monkeypatch.setattr(_extension, "instruction_sets", lambda: sets)
    expected = "avx2 (built: avx512, avx2, baseline; this processor: avx2, baseline)"
    assert info.facts()["instruction set"] == expected


def test_a_binary_that_is_not_there_or_cannot_be_loaded(monkeypatch, tmp_path):
    """Each has its own sentence, in place of an error of the import."""
    monkeypatch.setattr(_extension, "BINARY", tmp_path / "_C.abi3.so")
    assert _extension._load() == "_C.abi3.so is not built: run `pip install -e .` in the source folder"
    _extension.BINARY.write_text("no binary")
    assert _extension._load().startswith(f"torch {torch.__version__} cannot load _C.abi3.so: ")


def test_widest_supported_instruction_set_is_chosen_first():
    """Built and supported are in one order, widest first; the baseline runs everywhere."""
    sets = _extension.instruction_sets()
    assert sets.supported == [name for name in sets.built if name in sets.supported]
    assert sets.built[-1] == sets.supported[-1] == "baseline"


def test_an_instruction_set_that_cannot_run_is_refused():
    """The override for tests never lets an illegal instruction through: it names the sets that can be used."""
    with pytest.raises(RuntimeError, match=r'instruction set: expected .*baseline.*, got "avx1024"'):
        torch.ops.fused_preact._set_cpu_isa("avx1024")
