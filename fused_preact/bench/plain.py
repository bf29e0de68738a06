"""The baseline: the layers of fused modules in ordinary ones, as a net without this package has them."""

import torch.nn.functional as F
from torch import Tensor, nn

from fused_preact import PreActStage
from fused_preact.blocks import Branch
from fused_preact.models import FirstPreActBlock
from fused_preact.modules import Fused


def plain(module: nn.Module) -> nn.Module:
    """The module with ordinary ones in the place of all that are fused; parameters, buffers and keys are the same.

    Not for a `Transition`, nor a `DenseLayer` of other options than the default: what they do beside is left out.
    """
    if isinstance(module, Fused):
        return Plain(module)
    if isinstance(module, PreActStage):
        return nn.Sequential(*map(plain, module))
    for name, child in module.named_children():
        module.add_module(name, plain(child))
    return module


class Plain(nn.Module):
    """Batch norm, ReLU in place and convolution, unit by unit, and the addition in place.

    Nothing is looked up or compared in a call: what `backend="eager"` does beside its layers is no part of a baseline.
    """

    def __init__(self, fused: Fused) -> None:
        super().__init__()
        for name, child in fused.named_children():
            self.add_module(name, child)
        self.training = fused.training  # and of the children what each has
        layers = fused._layers()
        pairs, shortcut, project = layers.pairs, layers.shortcut, layers.container
        if isinstance(fused, FirstPreActBlock):  # its shortcut is its first activation, as that of a projection is
            pairs, shortcut, project = Branch._layers(fused).pairs, "activated", nn.Identity()
        # Where nn.Module does not look for children: they are there already.
        self._plan = [(pair.bn, pair.conv) for pair in pairs], shortcut, (project,)

    def forward(self, x: Tensor) -> Tensor:
        """y of x."""
        units, shortcut, (project,) = self._plan
        across = out = x
        for i, (bn, conv) in enumerate(units):
            out = F.relu(bn(out), inplace=True)
            if i == 0 and project is not None:
                across = project(out if shortcut == "activated" else x)
            out = conv(out)
        return out if shortcut == "none" else out.add_(across)
