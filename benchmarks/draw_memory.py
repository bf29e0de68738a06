"""Draws docs/memory.png: what ResNet-1001 keeps for backward of each image, eager and in each memory mode.

    python benchmarks/draw_memory.py [PICTURE]

Counts the storages that autograd saves in a forward pass of eight 32x32 images, each once, without parameters.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from fused_preact import models
from fused_preact.bench.measure import saved_bytes
from fused_preact.bench.picture import FORWARD, GRID, TEXT, TOTAL

IMAGES, MIB = 8, 2**20
COLORS = {"fp32": TOTAL, "bf16": FORWARD}
LABELS = {"fp32": "float32", "bf16": "bf16 autocast"}
MODES = {"eager": {"backend": "eager"}, **{memory: {"memory": memory} for memory in ("fast", "lean", "min")}}


def measure(options: dict[str, str], dtype: str) -> float:
    """MiB an image; bf16 means autocast."""
    torch.manual_seed(0)
    net = models.create("resnet1001", **options).to(memory_format=torch.channels_last).train()
    x = torch.randn(IMAGES, 3, 32, 32)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return net(x)

    return saved_bytes(forward, net) / IMAGES / MIB


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    """Writes a PNG with a transparent background, legible on light and on dark pages."""
    figure = Figure(figsize=(7.5, 3.2), dpi=150)
    axes = figure.subplots()
    thickness = 0.36
    for shift, (dtype, sizes) in zip((-0.5, 0.5), found.items(), strict=True):
        for row, size in enumerate(sizes.values()):
            y = row + shift * thickness
            axes.barh(y, size, thickness, color=COLORS[dtype], label=LABELS[dtype] if row == 0 else None)
            ratio = "" if row == 0 else f"   {sizes['eager'] / size:.2f}x less"
            axes.text(size + 1, y, f"{size:.1f} MiB{ratio}", color=TEXT, fontsize=8, va="center")
    axes.set_yticks(range(len(MODES)), MODES)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(max(sizes.values()) for sizes in found.values()))
    axes.set_title("ResNet-1001, kept for backward for each 32x32 image", color=TEXT, fontsize=10, loc="left")
    axes.set_xlabel("MiB", color=TEXT, fontsize=8.5)
    axes.tick_params(colors=TEXT, labelsize=9, length=0)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.legend(loc="lower right", frameon=False, labelcolor=TEXT, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, transparent=True)


if __name__ == "__main__":
    sizes = {dtype: {name: measure(options, dtype) for name, options in MODES.items()} for dtype in COLORS}
    for dtype, by_mode in sizes.items():
        print(
            dtype,
            *(f"{name} {size * IMAGES:.1f} MiB ({by_mode['eager'] / size:.2f}x)" for name, size in by_mode.items()),
        )
    draw(sizes, Path(sys.argv[1] if len(sys.argv) > 1 else "docs/memory.png"))
