"""How far inputs rebuilt by subtraction are off, and what that does to gradients: the tables of docs/memory.md.

    python benchmarks/rebuilt_inputs.py

Runs 111 bottlenecks of 32 channels, width 8, on four images of 8x8; a few seconds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_preact import PreActBottleneck, PreActStage
from fused_preact.bench.cases import Case
from fused_preact.bench.check import pose, verify

BLOCKS, SHAPE = 111, (4, 32, 8, 8)


def make_stage(backend: str) -> PreActStage:
    """The stage, of the backend's blocks."""
    return PreActStage(*(PreActBottleneck(SHAPE[1], SHAPE[1] // 4, backend=backend) for _ in range(BLOCKS)))


def branch(block: PreActBottleneck, x: Tensor) -> Tensor:
    """What a block adds to x."""
    for pair in block._layers().pairs:
        x = pair.conv(F.relu(pair.bn(x)))
    return x


@torch.no_grad()
def rebuilt_errors(stream: torch.dtype) -> tuple[list[float], float]:
    """Relative error of x rebuilt through 1, 2, ... blocks, and the share of additions that leave x as it was.

    Convolutions compute in float32; what runs from block to block is stored as `stream`.
    """
    torch.manual_seed(0)
    x, inputs, branches, absorbed = torch.randn(SHAPE).to(stream), [], [], 0.0
    for block in make_stage("eager").train():
        b = branch(block, x.float())
        inputs.append(x)
        branches.append(b)  # backward has its bits again: they follow from what is kept
        x = (x.float() + b).to(stream)
        absorbed += ((x == inputs[-1]) & (b != 0)).float().mean().item() / BLOCKS
    errors = []
    for exact, b in zip(reversed(inputs), reversed(branches), strict=True):
        x = (x.float() - b).to(stream)
        errors.append(((x.double() - exact.double()).norm() / exact.double().norm()).item())
    return errors, absorbed


def main() -> None:
    """Prints both tables."""
    print("stream     relative error of x rebuilt through 1, 10, 50, 111 blocks    additions without effect")
    for stream in (torch.float32, torch.bfloat16):
        errors, absorbed = rebuilt_errors(stream)
        chosen = "".join(f"{errors[n - 1]:12.1e}" for n in (1, 10, 50, BLOCKS))
        print(f"{str(stream).removeprefix('torch.'):9}{chosen}{absorbed:12.2%}")
    modes, layouts = ("fast", "lean", "min"), ("channels_last",)
    for dtype in ("fp32", "bf16"):
        case = Case("Rebuilt inputs", dtype, make_stage, SHAPE, dtype, layouts=layouts, memory=modes)
        print(f"\n{dtype}: relative error against float64 of   y        dx        dW       dbn")
        for name, found in verify(pose(case)).items():
            print(f"{name:37}" + "".join(f"{value:10.1e}" for value in found.values()))


if __name__ == "__main__":
    main()
