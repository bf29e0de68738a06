"""Work in a process of its own, whose malloc, caches and memory know nothing of what was measured before.

glibc's malloc learns from the blocks that it frees which sizes to give back to the system at once. After a check in
float64 it would keep what it gives back in a program that only trains, and each case would depend on those before it.
"""

import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback
from typing import TypeVar

import torch

from fused_preact.errors import UserError

R = TypeVar("R")

# A server that has imported torch and done nothing else is forked.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["fused_preact.bench.suite"])


def call(what: str, function: Callable[..., R], *arguments: object) -> R:
    """function(*arguments), in a new process with as many threads as this one has, which does not outlive the call.

    Args:
        what: what is measured, for messages.
        function: of a module, as it goes to the process by its name.
        arguments: which can be pickled; they go by a file that is mapped, so that malloc has no part in it.

    Raises:
        UserError: the process was ended from outside.
    """
    reader, writer = _CONTEXT.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as file, reader:
        torch.save(arguments, file)
        file.flush()
        worker = _CONTEXT.Process(target=_work, args=(writer, torch.get_num_threads(), function, file.name))
        worker.start()
        writer.close()  # the worker's is the only one left: the pipe ends with it
        try:
            result, failure = pickle.loads(reader.recv_bytes())
        except (EOFError, OSError) as error:
            raise UserError(
                f"the process that measures {what} was ended, as the system does where memory runs out; measure "
                "smaller cases with --only"
            ) from error
        finally:
            worker.kill()
            worker.join()
    if failure is not None:
        raise failure
    return result


def _work(answer: Connection, threads: int, function: Callable[..., object], arguments: str) -> None:
    """Sends (result, None), or (None, the exception), pickled here: torch sends tensors by a process that stays."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it here too, but the caller ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        # This package has just written the file.
        found = function(*torch.load(arguments, mmap=True, weights_only=False)), None
    except Exception as error:
        found = None, ExceptionWithTraceback(error, error.__traceback__)
    answer.send_bytes(pickle.dumps(found))


def _end_with_parent() -> None:
    """A parent that is killed cannot end its worker."""
    parent_process().join()
    os._exit(1)
