"""Peak resident memory of a step, in a fresh process: what one contender freed would hide what the next one takes."""

import re
from pathlib import Path

import torch

from . import process
from .cases import Case
from .contenders import Contender, Problem, build, step

STATUS = Path("/proc/self/status")


def peak_rss(case: Case, contender: Contender) -> int | None:
    """Bytes by which one step of a net raises its process's resident memory; None where the system does not tell.

    The high-water mark (VmHWM) counts parameters and libraries too: what is there before the step is subtracted.

    Raises:
        UserError: the process was ended.
    """
    if not STATUS.exists():
        return None
    return process.call(f"the memory of {case.name}, {contender.name}", _measure, case, contender)


def _measure(case: Case, contender: Contender) -> int:
    module = case.make(backend="eager")
    target = torch.zeros(case.shape[0], dtype=torch.int64)
    problem = Problem(case, torch.randn(case.shape), target, module.state_dict())
    trial = step(contender, problem, build(contender, problem))
    before = _status("VmRSS")
    trial.run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)[1]) * 1024
