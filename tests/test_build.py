"""The build: decisions of the in-tree backend, and what the compiled objects and the binary promise."""

import fcntl
import importlib
import os
import platform
import re
import shlex
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


def test_the_environment_is_not_what_the_build_puts_first(torch_location, monkeypatch, tmp_path):
    """pip's isolated build names its own folders in PYTHONPATH, and the question is what lies behind them."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert not torch_location._origin_in_environment().startswith(str(tmp_path))


def test_no_compiler_is_one_sentence_before_any_download(backend, pretend, monkeypatch):
    """A machine without a C++ compiler is told so at once, not after gigabytes of torch."""
    pretend(None, None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        SystemExit, match=r"^fused_preact needs a C\+\+17 compiler .* install g\+\+ or clang\+\+"
    ) as stop:
        backend.get_requires_for_build_wheel()
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_other_systems_than_linux_are_told_at_once(backend, toolchain, pretend, monkeypatch, system):
    """Not by flags that their linker does not know, after minutes, nor by a module that Python lacks there."""
    pretend(None, None)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    importlib.reload(toolchain)
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(SystemExit, match=f"^fused_preact installs on Linux alone, and this is {system}: .*WSL"):
        backend.get_requires_for_build_wheel()


def test_a_build_without_isolation_is_on_linux_too():
    """`python setup.py` asks no backend: the command itself says so, before it compiles anything."""
    script = (
        "import runpy, sys, sysconfig, setuptools\n"
        "sysconfig.get_config_vars()\n"  # those of Linux; they are read once
        "sys.platform, sys.argv = 'darwin', ['setup.py', '-q', 'build_ext', '--inplace']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = os.environ | {"CXX": "none"}  # nor does this test, whatever the command does
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "error: fused_preact installs on Linux alone, and this is darwin" in result.stderr
    assert result.returncode != 0


@pytest.mark.parametrize(("torch", "found"), [(None, "none"), ("torch_location.Torch(None, '2.10.1')", "2.10.1")])
def test_a_build_without_isolation_says_which_torch_it_found(torch, found):
    """`python setup.py` brings no torch: an older one, or none, is an error that names it."""
    script = (
        "import runpy, sys; sys.path.insert(0, 'build_backend'); import torch_location\n"
        f"torch_location.find = lambda: {torch}\n"
        "sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = os.environ | {"CXX": "none"}  # nothing is compiled, whatever the command does
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"error: building without isolation needs torch>=2.11 installed first, got {found}\n" in result.stderr
    assert result.returncode != 0


def test_cxx_that_is_not_there_is_named(toolchain, monkeypatch):
    """A wrong CXX is named, rather than replaced by another compiler in silence."""
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(CompileError, match="no-such-compiler -v"):
        toolchain.find_compiler()


def test_a_compiler_in_a_folder_with_a_blank(toolchain, monkeypatch, tmp_path):
    """It is one word of a command still."""
    folder = tmp_path / "my tools"
    folder.mkdir()
    (folder / "c++").symlink_to(shutil.which("c++"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    assert shlex.split(toolchain.find_compiler()) == [str(folder / "c++")]


def test_a_compiler_with_arguments(toolchain, monkeypatch):
    """CXX may have some, as behind a cache."""
    monkeypatch.setenv("CXX", "c++ -m64 '-DA=b c'")
    assert shlex.split(toolchain.find_compiler()) == ["c++", "-m64", "-DA=b c"]


@pytest.mark.parametrize(
    ("machine", "expected"),
    [("x86_64", ["amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline"]), ("aarch64", ["baseline"])],
)
def test_instruction_sets_are_those_of_the_machine(toolchain, monkeypatch, machine, expected):
    """The widest first; flags of one processor are errors of the compiler on another."""
    monkeypatch.setattr(toolchain.platform, "machine", lambda: machine)
    assert toolchain.instruction_sets() == expected


@pytest.mark.parametrize("refuses", ['case "$*" in *-mamx-tile*) exit 1;; esac', "! grep -q tdpbf16ps"])
def test_an_old_compiler_serves_what_it_knows(toolchain, tmp_path, refuses):
    """Sets of which it knows no flags, or its assembler no instructions, are left out; the log of the build says so."""
    compiler = tmp_path / "old c++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo "old 1.0"; exit;; esac\n{refuses}\n')
    compiler.chmod(0o755)
    command = shlex.quote(str(compiler))
    isas = toolchain.known_to(command, ["amx_bf16", "avx2", "baseline"])
    assert isas == ["avx2", "baseline"]
    torch = toolchain.Torch(tmp_path, "2.13.0")
    tools = toolchain.Toolchain(torch, command, ROOT / "csrc", tmp_path, isas, None, ("amx_bf16",))
    assert "avx2, baseline (not amx_bf16, which this compiler or its assembler is too old for)" in tools.describe()


def test_a_build_waits_for_another_and_says_when_it_failed(toolchain, monkeypatch, tmp_path):
    """Both write into one folder; MAX_JOBS is heard, as by torch's own extensions."""
    log, codes = [], iter([0, 1])

    def run(command, check):
        log.append(list(map(str, command[1:])))
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(toolchain, "_find_ninja", lambda: "ninja")
    monkeypatch.setattr(fcntl, "flock", lambda file, how: log.append(how))
    monkeypatch.setattr(toolchain.subprocess, "run", run)
    objects = tmp_path / "objects"
    tools = toolchain.Toolchain(toolchain.Torch(tmp_path, "2.13.0"), "g++", ROOT / "csrc", objects, ["baseline"])
    monkeypatch.delenv("MAX_JOBS", raising=False)
    tools.build(tmp_path / "new" / "C.so")
    assert log == [fcntl.LOCK_EX, ["-C", str(objects)]]
    assert (objects / "build.ninja").read_text() == tools.ninja_file(tmp_path / "new" / "C.so")
    monkeypatch.setenv("MAX_JOBS", "3")
    with pytest.raises(CompileError, match="fused_preact did not compile: the compiler's own message stands above"):
        tools.build(tmp_path / "new" / "C.so")
    assert log[-1] == ["-C", str(objects), "-j", "3"]


def test_nvcc_is_told_of_the_compiler_behind_a_cache(toolchain, tmp_path):
    """And not of its options."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libcudart_static.a").touch()
    cuda, torch = toolchain.Cuda(tmp_path, "13.0", ("9.0",)), toolchain.Torch(tmp_path, "2.13.0")
    tools = toolchain.Toolchain(torch, "ccache g++ -isystem /opt/include", ROOT / "csrc", tmp_path, ["baseline"], cuda)
    assert "-ccbin g++\n" in tools.ninja_file(tmp_path / "C.so")


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


def test_every_source_is_compiled(toolchain, tmp_path):
    """A new file in csrc that the build does not know is an error here, not an undefined symbol for a user."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libcudart_static.a").touch()
    cuda = toolchain.Cuda(tmp_path, "13.0", ("9.0",))
    torch = toolchain.Torch(tmp_path, "2.13.0")
    text = toolchain.Toolchain(torch, "g++", ROOT / "csrc", tmp_path, ["baseline"], cuda).ninja_file(tmp_path / "C.so")
    compiled = set(re.findall(r"^build \S+\.o: (?:compile|cuda) (\S+)$", text, re.MULTILINE))
    # ninja reads which headers each one includes, and compiles what a change of one of them concerns.
    assert text.count(" -MMD -MF $out.d ") == text.count("  depfile = $out.d\n  deps = gcc\n") == 2
    assert compiled == {str(path) for path in (ROOT / "csrc").rglob("*.c*") if path.suffix in (".cpp", ".cu")}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--cuda-archs", "9.0,7.5", "expected numbers like 9.0, from 8.0 on"),
        ("--cuda-archs", "9.05", "expected numbers like 9.0, from 8.0 on"),
        ("--cuda-archs", "sm_90", "expected numbers like 9.0, from 8.0 on"),
        ("--isas", "avx1024,baseline", "expected baseline and any of "),
        ("--isas", "", "expected baseline and any of "),
    ],
)
def test_options_are_checked(option, value, expected):
    """What is not known, too old, or lacks the part that runs everywhere is named before anything is compiled."""
    command = [sys.executable, "setup.py", "-q", "build_ext", f"{option}={value}", "--inplace"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"{option}: {expected}" in result.stderr
    assert f", got {value}\n" in result.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there is one instruction set here")
def test_the_baseline_is_not_left_out():
    """The binary would not load on a processor without the others."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--isas=avx2", "--inplace"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "--isas: expected baseline and any of amx_bf16,avx512_bf16,avx512,avx2,baseline, got avx2" in result.stderr


has_cuda = pytest.mark.skipif(
    not _extension.cuda_architectures,
    reason="the extension was built without CUDA",
)


@has_cuda
def test_one_binary_serves_a_torch_without_cuda():
    """What only a CUDA torch has is asked for weakly, so the binary with the CUDA kernels loads on every torch."""
    symbols = elf_symbols(_extension.BINARY, ".dynsym")
    shims = {name: entry for name, entry in symbols if entry["st_shndx"] == "SHN_UNDEF" and "cuda_stream" in name}
    assert set(shims) == {"aoti_torch_get_current_cuda_stream"}
    assert all(entry["st_info"]["bind"] == "STB_WEAK" for entry in shims.values()), shims


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
    for source in toolchain.CPU_SOURCES:
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


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says which files are the project's")
def test_source_archive_is_the_whole_project(tmp_path):
    """From a source archive one can build, run the tests and read the documentation: it has every tracked file."""
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    copy = tmp_path / "copy"
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar"))) as archive:
        listed = {name.partition("/")[2] for name in archive.getnames()}
    assert set(files) - listed == set()
