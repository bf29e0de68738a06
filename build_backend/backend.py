"""PEP 517 backend: setuptools, that asks for torch as a build requirement only where the environment has none.

Plain `pip install -e .` builds in an isolated environment, where a torch that is installed cannot be imported. The
build needs its headers and libraries alone, so it looks for their folder (`torch_location`) instead of downloading
several gigabytes a second time.
"""

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks that setuptools answers alone)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.errors import CompileError

import toolchain
import torch_location


def _requirements() -> list[str]:
    """What building needs beyond pyproject.toml; stops before any download where it cannot succeed."""
    try:
        toolchain.check_system()
        toolchain.find_compiler()
    except CompileError as error:
        raise SystemExit(str(error)) from None
    torch = torch_location.find()
    if torch is not None and torch.is_new_enough():
        return []
    return [torch_location.REQUIREMENT]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """Requirements of `pip install .` and `pip wheel .`."""
    return _requirements() + build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    """Requirements of `pip install -e .`."""
    return _requirements() + build_meta.get_requires_for_build_editable(config_settings)
