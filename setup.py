"""Declares the extension `fused_preact._C`; everything else about the project stands in pyproject.toml."""

import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import nvcc  # noqa: E402  (found by the path above)
import torch_location  # noqa: E402  (found by the path above)
from toolchain import (  # noqa: E402  (found by the path above)
    Toolchain,
    check_system,
    find_compiler,
    instruction_sets,
    known_to,
)


class BuildExtension(build_ext):
    """Builds by ninja: one source becomes several objects, one for each instruction set."""

    user_options = [  # noqa: RUF012  (setuptools asks for a list)
        *build_ext.user_options,
        ("isas=", None, f"instruction sets, of {','.join(instruction_sets())} (default: all); baseline must be one"),
        ("cuda-archs=", None, f"compute capabilities of the CUDA kernels (default: {','.join(nvcc.ARCHITECTURES)})"),
    ]

    def initialize_options(self) -> None:
        """Sets the default of each option."""
        super().initialize_options()
        self.isas = None
        self.cuda_archs = None

    def finalize_options(self) -> None:
        """Checks the options."""
        super().finalize_options()
        asked = instruction_sets() if self.isas is None else self.isas.split(",")
        if not {"baseline"} <= set(asked) <= set(instruction_sets()):
            raise OptionError(f"--isas: expected baseline and any of {','.join(instruction_sets())}, got {self.isas}")
        self.cuda_archs = nvcc.ARCHITECTURES if self.cuda_archs is None else tuple(self.cuda_archs.split(","))
        if not all(re.fullmatch(r"\d+\.\d", name) and float(name) >= float(nvcc.OLDEST) for name in self.cuda_archs):
            raise OptionError(
                f"--cuda-archs: expected numbers like 9.0, from {nvcc.OLDEST} on, got {','.join(self.cuda_archs)}"
            )
        self.isas = [isa for isa in instruction_sets() if isa in asked]

    def build_extension(self, ext: Extension) -> None:
        """Prints the resolved configuration and builds `ext`; objects stay in build/objects for the next time."""
        check_system()
        torch = torch_location.find()
        if torch is None or not torch.is_new_enough():
            found = "none" if torch is None else torch.version
            raise CompileError(
                f"building without isolation needs {torch_location.REQUIREMENT} installed first, got {found}"
            )
        objects = ROOT / self.get_finalized_command("build").build_base / "objects"
        cuda = nvcc.find(self.cuda_archs)
        compiler = find_compiler()
        isas = known_to(compiler, self.isas)
        unknown = tuple(isa for isa in self.isas if isa not in isas)
        toolchain = Toolchain(torch, compiler, ROOT / "csrc", objects, isas, cuda, unknown)
        print(toolchain.describe(), flush=True)
        toolchain.build(Path(self.get_ext_fullpath(ext.name)))


setup(
    ext_modules=[Extension("fused_preact._C", sources=[], py_limited_api=True)],  # toolchain.py has the sources
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
