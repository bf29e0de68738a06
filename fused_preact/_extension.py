"""Loads the compiled operators into `torch.ops.fused_preact`, once, when imported.

`unavailable` is None where they are there, else the reason in one sentence. The binary has no Python module in it: it
registers operators with torch when it is loaded.
"""

from pathlib import Path
from typing import NamedTuple

import torch

BINARY = Path(__file__).with_name("_C.abi3.so")


def _load() -> str | None:
    if not BINARY.exists():
        return f"{BINARY.name} is not built: run `pip install -e .` in the source folder"
    try:
        torch.ops.load_library(BINARY)
    except OSError as error:
        return f"torch {torch.__version__} cannot load {BINARY.name}: {error}"
    return None


unavailable: str | None = _load()
# Compute capabilities that the CUDA kernels were compiled for; none where they were left out. Asked for once: a call
# that returns names could not be traced by torch.compile.
cuda_architectures: tuple[str, ...] = () if unavailable else tuple(torch.ops.fused_preact._cuda_architectures())


class InstructionSets(NamedTuple):
    """Instruction sets of the CPU kernels by name, the widest first."""

    chosen: str
    built: list[str]
    supported: list[str]  # those built that this machine can run


def instruction_sets() -> InstructionSets:
    """What the binary was built for, and the one in use.

    Raises:
        AttributeError: the operators are not there (see `unavailable`).
    """
    return InstructionSets(*torch.ops.fused_preact._cpu_isas())


def empty_cache() -> None:
    """Give the memory that the CPU kernels keep for the next step back to the system, as far as no tensor is in it.

    What activations and gradients were in waits to be used again, at most twice what was in use at a time. When it has
    waited for ten seconds it goes back, but only when another tensor is freed: so a part stays after the last step. For
    the memory of a GPU there is `torch.cuda.empty_cache`.
    """
    if unavailable is None:
        torch.ops.fused_preact._empty_cache()
