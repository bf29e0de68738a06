"""Work in a process of its own, whose malloc, caches and memory know nothing of what was measured before.

glibc's malloc learns from the blocks that it frees which sizes to give back to the system at once. After a check in
float64 it would keep what it gives back in a program that only trains, and each case would depend on those before it.
"""

import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

import torch

from fused_preact.errors import UserError

R = TypeVar("R")

# A server that has imported torch and done nothing else is forked; elsewhere than on Linux that is not safe.
_CONTEXT = get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    _CONTEXT.set_forkserver_preload(["fused_preact.bench.suite"])


def call(what: str, function: Callable[..., R], *arguments: object) -> R:
    """function(*arguments), in a new process with as many threads as this one has.

    Args:
        what: what is measured, for messages.
        function: of a module, as it goes to the process by its name.
        arguments: which can be pickled; they go by a file that is mapped, so that malloc has no part in it.

    Raises:
        UserError: the process was ended from outside.
    """
    with tempfile.NamedTemporaryFile() as file, ProcessPoolExecutor(1, mp_context=_CONTEXT) as pool:
        torch.save(arguments, file)
        file.flush()
        try:
            return pool.submit(_threaded, torch.get_num_threads(), function, file.name).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"the process that measures {what} was ended, as the system does where memory runs out; measure "
                "smaller cases with --only"
            ) from error


def _threaded(threads: int, function: Callable[..., R], arguments: str) -> R:
    torch.set_num_threads(threads)
    return function(*torch.load(arguments, mmap=True, weights_only=False))  # this package has just written it
