"""Fused BatchNorm-ReLU-Conv2d units, blocks and networks for training pre-activation ResNets."""

from . import models
from ._extension import empty_cache
from ._version import __version__ as __version__
from .blocks import PreActBlock, PreActBottleneck
from .dense import DenseLayer, Transition
from .exchange import fuse
from .explaining import explain
from .functional import bn_relu_conv2d
from .modules import BNReLUConv2d
from .stage import PreActStage

__all__ = [
    "BNReLUConv2d",
    "DenseLayer",
    "PreActBlock",
    "PreActBottleneck",
    "PreActStage",
    "Transition",
    "bn_relu_conv2d",
    "empty_cache",
    "explain",
    "fuse",
    "models",
]
