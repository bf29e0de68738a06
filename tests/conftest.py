"""What all tests share: one thread each, for pytest-xdist already keeps every core busy."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import interpreted
from cases import PYTHON_BACKENDS
from fused_preact import _extension, functional, tables
from tf32 import PRODUCTS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sanitizer",
        choices=("none", "address", "thread"),
        default="none",
        help="how the CUDA kernels of test_cuda*.py are built; see the targets of the Makefile",
    )


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if "triton" in PYTHON_BACKENDS:
        interpreted.without_overflow_checks()
        interpreted.products_as_on_a_gpu()
        interpreted.memory_as_on_a_gpu()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "triton" not in PYTHON_BACKENDS:
        return
    chosen = {keep: [item for item in items if interpreted.left_out(item) != keep] for keep in (True, False)}
    config.hook.pytest_deselected(items=chosen[False])
    items[:] = chosen[True]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers whichever tests its process ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """What other tests of the process compiled, or could not, does not decide what a test compiles."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()


@pytest.fixture(scope="session")
def emulated_device(pytestconfig: pytest.Config) -> Any:
    from emulation.kernels import EmulatedKernels  # needs what the test extra alone installs

    return EmulatedKernels(pytestconfig.getoption("sanitizer"))


@pytest.fixture
def emulated(emulated_device: Any) -> Any:
    """The CUDA kernels on the emulated device, in the first schedule."""
    emulated_device.tf32, emulated_device.offset, emulated_device.alone = False, 0, None
    emulated_device.use_schedule(0)
    return emulated_device


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest, emulated: Any) -> str:
    """Each way in which the emulated kernels multiply."""
    emulated.tf32 = request.param == "tf32"
    return request.param


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C and SIGTERM act as in a terminal, also where a shell lets the tests ignore them in its background."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def nothing_measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was measured on this machine does not decide what the tests run on."""
    empty = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "SHIPPED", empty)
        patch.setattr(tables, "folder", lambda: empty)
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of measured tables, in which the user's are."""
    monkeypatch.setattr(tables, "folder", lambda: tmp_path)
    tables.load.cache_clear()
    functional._plans.clear()
    yield tmp_path
    tables.load.cache_clear()
    functional._plans.clear()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that holds half of a picture."""
    from matplotlib.figure import Figure

    def savefig(_figure, file, **_options) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)


def instruction_sets() -> list[str]:
    """Those that this machine can run, to parametrize tests with."""
    return _extension.instruction_sets().supported if _extension.unavailable is None else []


@pytest.fixture
def use_isa() -> Iterator:
    """A function that makes the CPU kernels of one instruction set serve the rest of the test."""
    before = _extension.instruction_sets().chosen
    yield torch.ops.fused_preact._set_cpu_isa
    torch.ops.fused_preact._set_cpu_isa(before)


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest, use_isa) -> str:
    """Each instruction set that this machine can run, one after the other, in use for the test."""
    use_isa(request.param)
    return request.param


@pytest.fixture(params=[*PYTHON_BACKENDS, *(f"cpu-{name}" for name in instruction_sets())])
def backend(request: pytest.FixtureRequest) -> str:
    """Each fused backend; the CPU kernels once for every instruction set."""
    name, _, instruction_set = request.param.partition("-")
    if instruction_set:
        request.getfixturevalue("use_isa")(instruction_set)
    return name
