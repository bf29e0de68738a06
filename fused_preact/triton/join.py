"""What runs from block to block where it is float32 and the convolutions are not: stream + branch, or minus it.

One pass of `dx.combine` writes it and the same in the type of the convolutions; the statistics of that are a pass of
their own. Bytes: each tensor once, the narrower sum once more.
"""

import torch
from torch import Tensor

from ..kernels import Affine, Gradient
from . import launch
from .dx import launch_combine
from .statistics import statistics


def join(
    stream: Tensor, branch: Gradient, subtract: bool, narrow: bool, following: Affine | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The joined stream, the narrower sum, and rows [5, C]; as `fused_preact.reference.join`."""
    joined = torch.empty_like(stream)
    narrowed = launch.empty_nhwc(stream.shape, branch.g) if narrow or following is not None else None
    launch_combine(branch, stream, joined, narrowed, subtract)
    return joined, narrowed, None if following is None else statistics(narrowed, following)
