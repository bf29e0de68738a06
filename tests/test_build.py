"""The build: decisions of the in-tree backend, and what the compiled objects and the binary promise."""

import importlib
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from elftools.elf.elffile import ELFFile
from setuptools.errors import CompileError

from fused_preact import _extension

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / "objects"


@pytest.fixture
def backend(monkeypatch):
    """The modules backend, toolchain and torch_location of build_backend, as a build sees them."""
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    monkeypatch.delenv("CXX", raising=False)
    return importlib.import_module("backend")


@pytest.fixture
def torch_location(backend):
    return importlib.import_module("torch_location")


@pytest.fixture
def toolchain(backend):
    return importlib.import_module("toolchain")


@pytest.fixture
def pretend(monkeypatch, torch_location, tmp_path):
    """A function that makes a torch of one version (None: no torch) be what this process, or its environment, has."""

    def install(here: str | None, environment: str | None) -> None:
        for where, version in ("_origin_here", here), ("_origin_in_environment", environment):
            folder = tmp_path / where
            folder.mkdir()
            (folder / "version.py").write_text(f"__version__ = '{version}'\n")
            origin = "" if version is None else str(folder / "__init__.py")
            monkeypatch.setattr(torch_location, where, lambda origin=origin: origin)

    return install


def requirements(backend) -> list[str]:
    """What the backend asks of pip beyond pyproject.toml, the same for a wheel and an editable install."""
    wheel = backend.get_requires_for_build_wheel()
    assert backend.get_requires_for_build_editable() == wheel
    return wheel


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0a0+git1234"])
def test_an_installed_torch_is_not_downloaded_again(backend, pretend, version):
    """A new enough torch in the environment is all the build needs."""
    pretend(None, version)
    assert requirements(backend) == []


@pytest.mark.parametrize("version", [None, "2.10.1", "1.13.0"])
def test_without_a_usable_torch_the_build_asks_for_one(backend, pretend, version):
    """No torch, or one without the stable ABI that is needed: pip brings one into the build environment."""
    pretend(None, version)
    assert requirements(backend) == ["torch>=2.11"]


def test_the_torch_of_the_build_environment_comes_first(backend, torch_location, pretend):
    """What pip brought for the build is used, even where the environment has an older torch."""
    pretend("2.14.0", "2.10.0")
    assert torch_location.find().version == "2.14.0"


def test_finds_the_torch_that_isolation_hides(torch_location, tmp_path):
    """In pip's isolated build a torch cannot be imported, yet its folder is found."""
    script = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.path.append({str(ROOT / 'build_backend')!r})\n"
        "import importlib.util, torch_location\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "print(torch_location.find().folder)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True
    ).stdout
    assert Path(out.strip()) == Path(torch.__file__).parent


def test_no_compiler_is_one_sentence_before_any_download(backend, pretend, monkeypatch):
    """A machine without a C++ compiler is told so at once, not after gigabytes of torch."""
    pretend(None, None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        SystemExit, match=r"^fused_preact needs a C\+\+17 compiler .* install g\+\+ or clang\+\+"
    ) as stop:
        backend.get_requires_for_build_wheel()
    assert "\n" not in str(stop.value)


def test_cxx_that_is_not_there_is_named(toolchain, monkeypatch):
    """A wrong CXX is named, rather than replaced by another compiler in silence."""
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(CompileError, match="no-such-compiler -v"):
        toolchain.find_compiler()


def test_flags_of_the_environment_reach_the_compiler(toolchain, torch_location, monkeypatch, tmp_path):
    """CXXFLAGS and LDFLAGS are heard, and paths with blanks, colons and dollars survive ninja's syntax."""
    monkeypatch.setenv("CXXFLAGS", "-fsanitize=address")
    monkeypatch.setenv("LDFLAGS", "-Wl,-z,now")
    torch = torch_location.Torch(tmp_path / "a b", "2.13.0")
    text = toolchain.Toolchain(torch, "g++", tmp_path / "a b:$c", tmp_path, ["baseline"]).ninja_file(
        tmp_path / "d e.so"
    )
    assert text.count("-fsanitize=address") == text.count(": compile ")
    assert "-Wl,-z,now" in text.splitlines()[-1]
    assert "a$ b$:$$c/ops.cpp" in text
    assert "/d$ e.so: link " in text


def test_every_source_is_compiled(toolchain):
    """A new file in csrc that the build does not know is an error here, not an undefined symbol for a user."""
    sources = {str(path.relative_to(ROOT / "csrc").with_suffix("")) for path in (ROOT / "csrc").rglob("*.cpp")}
    kernels = {f"cpu/{name}" for name in toolchain.KERNEL_SOURCES}
    assert sources == {*toolchain.HOST_SOURCES, *kernels}


def elf_symbols(path: Path, section: str) -> list:
    with path.open("rb") as file:
        return [(s.name, dict(s.entry)) for s in ELFFile(file).get_section_by_name(section).iter_symbols()]


def defined_globals(path: Path) -> list[str]:
    """Names that the linker may share with another object: global and weak ones, defined here."""
    return [
        name
        for name, entry in elf_symbols(path, ".symtab")
        if entry["st_info"]["bind"] != "STB_LOCAL" and entry["st_shndx"] != "SHN_UNDEF"
    ]


@pytest.mark.parametrize("isa", _extension.instruction_sets().built)
def test_kernel_objects_define_only_their_own_names(isa, toolchain):
    """No function compiled for a newer processor can be merged into code that runs on an older one."""
    own = re.compile(rf"_Z[A-Z]*12fused_preact3cpu{len(isa)}{isa}")
    for source in toolchain.KERNEL_SOURCES:
        names = defined_globals(OBJECTS / isa / f"{source}.o")
        assert names, f"{isa}/{source}.o defines nothing"
        assert [name for name in names if not own.match(name)] == []


def test_binary_uses_the_stable_abi_alone():
    """One binary serves every torch from 2.11 on: it imports C functions of torch, and no C++ symbol of it."""
    imported = [name for name, entry in elf_symbols(_extension.BINARY, ".dynsym") if entry["st_shndx"] == "SHN_UNDEF"]
    assert any(name.startswith("aoti_torch_") for name in imported)
    assert [name for name in imported if re.search(r"c10|2at|5torch|^Py", name)] == []


def test_binary_names_libtorch():
    """The linker has kept libtorch, so that torch's functions are found however the binary is loaded."""
    with _extension.BINARY.open("rb") as file:
        needed = [tag.needed for tag in ELFFile(file).get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
    assert "libtorch.so" in needed


def test_symbols_are_hidden():
    """Nothing of ours can clash with another library in the same process."""
    exported = [
        name
        for name, entry in elf_symbols(_extension.BINARY, ".dynsym")
        if entry["st_shndx"] != "SHN_UNDEF" and entry["st_info"]["bind"] == "STB_GLOBAL"
    ]
    assert [name for name in exported if "fused_preact" in name] == []


def test_source_archive_holds_what_a_build_needs(tmp_path):
    """pip can build from a source archive: kernels, headers and the build backend are in it."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("build", ".git", "*.so", "*.egg-info", "__pycache__", "tests", "runs")
    shutil.copytree(ROOT, copy, ignore=ignored)
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar"))) as archive:
        names = archive.getnames()
    listed = {name.split("/", 1)[1] for name in names if "/" in name}
    wanted = [*(copy / "csrc").rglob("*.*"), *(copy / "build_backend").glob("*.py"), *copy.glob("fused_preact/**/*.py")]
    assert {str(path.relative_to(copy)) for path in wanted if path.is_file()} - listed == set()
