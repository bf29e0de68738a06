"""Quick runs of the command, in this process or in one of its own."""

import json
import os
import signal
import subprocess
import sys
import time

from fused_preact import cli

# A small net, a few iterations.
QUICK = ["--model", "resnet20", "--batch-size", "8", "--iterations", "8", "--threads", "1", "--no-tensorboard"]


def train(*arguments):
    return cli.main(["train", *map(str, arguments)])


def start(*arguments, **streams):
    """The same in a process of its own, which heeds signals and buffers its output, wherever the tests run."""

    def heed():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    argv = [sys.executable, "-m", "fused_preact", "train", *map(str, arguments)]
    streams = streams or {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(argv, text=True, preexec_fn=heed, env=environment, **streams)


def metrics(folder):
    """Its rows; one that is being written is left out."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]


def wait_until(process, happened):
    """Until something has happened; the process must not end before."""
    while not happened():
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.001)
