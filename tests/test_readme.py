"""README.md: its Python runs as it stands."""

import re
from pathlib import Path

import torch
from torch import nn

from fused_preact import PreActBlock, PreActStage

README = Path(__file__).resolve().parents[1] / "README.md"


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
    """Block after block in one namespace, as a reader would try them; for the second ``net`` is one of theirs."""
    code = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    units, exchange, stages = (compile(text, README.name, "exec") for text in code)
    space = {"images": torch.randn(2, 64, 8, 8)}
    exec(units, space)
    assert "layer1" in capsys.readouterr().out
    space["net"] = nn.Sequential(TheirPreActBlock(64, 64), TheirPreActBlock(64, 128, 2))
    exec(exchange, space)
    assert (type(space["net"]), space["net"].memory) == (PreActStage, "lean")
    assert [type(child) for child in space["net"]] == [PreActBlock, PreActBlock]
    assert space["unit"].conv is space["conv"]
    exec(stages, space)
    assert (space["stage"].memory, space["net"].layer1.memory) == ("lean", "min")
