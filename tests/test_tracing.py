"""What is told to torch.compile is what torch.compile hears, and telling it does not load the compiler."""

import subprocess
import sys

import torch

from fused_preact import tracing


def test_constant_sets_the_mark_that_torch_sets():
    """Another name in a later torch would have compiled code trace what it cannot."""
    assert vars(tracing.constant(lambda: 1)) == vars(torch.compiler.assume_constant_result(lambda: 1)) != {}


def test_import_leaves_the_compiler_alone():
    """It would double the time that importing takes, for those too who compile nothing."""
    code = (
        "import sys, torch; sys.modules.setdefault('torch._dynamo', None); import fused_preact, fused_preact.cli, "
        "fused_preact.info, fused_preact.train.command, fused_preact.bench.command, fused_preact.tune"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
