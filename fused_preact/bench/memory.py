"""Peak resident memory of a step, in a fresh process: what one contender freed would hide what the next one takes."""

import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from fused_preact.errors import UserError

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
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, case, contender, torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"--memory: the process that measures {case.name}, {contender.name} was ended, as the system does "
                "where memory runs out; leave it out, or measure smaller cases with --only"
            ) from error


def _measure(case: Case, contender: Contender, threads: int) -> int:
    torch.set_num_threads(threads)
    module = case.make("eager")
    target = torch.zeros(case.shape[0], dtype=torch.int64)
    problem = Problem(case, torch.randn(case.shape), target, module.state_dict())
    trial = step(contender, problem, build(contender, problem))
    before = _status("VmRSS")
    trial.run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)[1]) * 1024
