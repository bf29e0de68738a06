"""Runs pytest with the emulation built for a sanitizer: python -m emulation address|thread [arguments of pytest]."""

import os
import sys

from . import build

sanitizer, *arguments = sys.argv[1:]
command = build.command(sanitizer, [sys.executable, "-m", "pytest", f"--sanitizer={sanitizer}", *arguments])
build.build("kernels", sanitizer)  # before the sanitizer is in the process, and in all that it starts
os.execvpe(command[0], command, os.environ | build.environment(sanitizer))
