"""Where torch's headers and libraries are, found without importing torch."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OLDEST = (2, 11)
REQUIREMENT = f"torch>={OLDEST[0]}.{OLDEST[1]}"
_FIND = "import importlib.util as u; s = u.find_spec('torch'); print(s and s.origin or '')"


@dataclass(frozen=True)
class Torch:
    """An installed torch: its package folder and its version."""

    folder: Path
    version: str

    def is_new_enough(self) -> bool:
        """Whether it has the stable ABI that the extension is written against."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:2]) >= OLDEST


def find() -> Torch | None:
    """The torch of this process, else that of the environment that an isolated build hides from this process."""
    return _read(_origin_here()) or _read(_origin_in_environment())


def _origin_here() -> str:
    spec = importlib.util.find_spec("torch")
    return (spec and spec.origin) or ""


def _origin_in_environment() -> str:
    """Asks an interpreter that ignores PYTHONPATH, by which pip's isolated build puts its own packages first."""
    return subprocess.run(
        [sys.executable, "-I", "-c", _FIND], capture_output=True, text=True, check=True
    ).stdout.strip()


def _read(origin: str) -> Torch | None:
    if not origin:
        return None
    folder = Path(origin).parent
    version = re.search(r"^__version__ = '([^']+)'", (folder / "version.py").read_text(), re.MULTILINE)
    if version is None:
        raise RuntimeError(f"{folder / 'version.py'} does not say which version of torch it belongs to")
    return Torch(folder, version[1])
