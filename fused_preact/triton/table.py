"""The table of the Triton kernels for `fused_preact.schedule`."""

from ..reference import running
from .dgrad import dgrad
from .dx import dx
from .forward import forward
from .join import join
from .statistics import statistics
from .wgrad import wgrad

__all__ = ["dgrad", "dx", "forward", "join", "running", "statistics", "wgrad"]
