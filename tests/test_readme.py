"""README.md and docs/results.md: their Python runs as it stands, and their figures are those of the result files."""

import importlib.util
import re
from pathlib import Path

import pytest
from torch import nn

from fused_preact import PreActBlock, PreActStage

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


class TheirPreActBlock(nn.Module):
    """A block as pytorch-cifar has it, for the example that fuses a net of such blocks."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        for name, child in PreActBlock(in_planes, planes, stride).named_children():
            self.add_module(name, child)

    def forward(self, x):
        out = self.bn1(x).relu()
        across = self.shortcut(out) if hasattr(self, "shortcut") else x
        return self.conv2(self.bn2(self.conv1(out)).relu()) + across


def test_its_python_runs(capsys):
    """Block after block in one namespace, as a reader would try them, with a net of theirs."""
    code = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    units, exchange, stages = (compile(text, README.name, "exec") for text in code)
    space = {"YourNet": lambda: nn.Sequential(TheirPreActBlock(64, 64), TheirPreActBlock(64, 128, 2))}
    exec(units, space)
    assert "layer1" in capsys.readouterr().out
    exec(exchange, space)
    assert (type(space["net"]), space["net"].memory) == (PreActStage, "lean")
    assert [type(child) for child in space["net"]] == [PreActBlock, PreActBlock]
    assert space["unit"].conv is space["conv"]
    exec(stages, space)
    assert (space["stage"].memory, space["net"].layer1.memory) == ("lean", "min")


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_its_tables_are_made_of_the_result_files(page):
    """`python benchmarks/tables.py` would write them as they are: there is one, and no figure is by hand."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (ROOT / page).read_text()
    assert "<!-- table: " in text
    assert tables.filled(text) == text
