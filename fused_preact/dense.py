"""What DenseNets are made of; signatures and state_dict keys are torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Branch
from .checks import flag, number, one_of, positive, tensor

RETURNS = ("new", "new+x", "x+new")


class DenseLayer(Branch):
    """conv2(relu(norm2(conv1(relu(norm1(x)))))), a 1x1 and a 3x3 convolution, of all features so far, as one node.

    It keeps x and what conv1 gives, half of what the plain layers keep. With ``memory_efficient`` it keeps the features
    that x is made of, which the layers share, and joins them again in backward: memory grows with the depth and not
    with its square, and nothing is done twice but the copy.

    Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", 2017, arXiv 1608.06993:
    DenseNet-BC.

    Args:
        num_input_features: channels of x.
        growth_rate: channels of the new features.
        bn_size: conv1 has bn_size*growth_rate channels out.
        drop_rate: of a dropout behind conv2.
        memory_efficient: keep the features that x is made of in its place, where they come in parts and the layers
            are fused; plain layers, as `explain` names them, keep all.
        returns: "new", the new features; or with x "new+x", "x+new", in this order.
        backend: one of `backends.NAMES`; "eager" is the plain layers.
        device, dtype: of the parameters.

    Raises:
        TypeError: a number of channels is no integer, drop_rate no number, or memory_efficient neither True nor False.
        ValueError: one of these is less than 1, drop_rate is not in [0, 1], or an option is none of those named.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
        *,
        returns: str = "new",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(backend)
        channels = positive("num_input_features", num_input_features)
        growth = positive("growth_rate", growth_rate)
        width = positive("bn_size", bn_size) * growth
        drop_rate = number("drop_rate", drop_rate)
        flag("memory_efficient", memory_efficient)
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"drop_rate must be between 0 and 1, got {drop_rate!r}")
        one_of("returns", returns, RETURNS)
        self.drop_rate, self.memory_efficient, self.returns = drop_rate, memory_efficient, returns
        self._names = [("norm1", "conv1"), ("norm2", "conv2")]
        like = {"device": device, "dtype": dtype}
        self.norm1 = nn.BatchNorm2d(channels, **like)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False, **like)
        self.norm2 = nn.BatchNorm2d(width, **like)
        self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=False, **like)

    def forward(self, x: Tensor | Sequence[Tensor], *more: Tensor) -> Tensor:
        """[N, growth_rate, H, W], or with the channels of x, of x [N, num_input_features, H, W] or of parts of it.

        Of the dtype of x where autocast is off.

        Args:
            x: the features, or a list or tuple of tensors that are joined along the channels.
            more: further parts.

        Raises:
            TypeError, ValueError: x does not fit.
        """
        parts = [*(x if isinstance(x, (list, tuple)) else [x]), *more]
        x = _joined(parts)
        y = self._dispatch(x, parts=parts if self.memory_efficient and len(parts) > 1 else ())
        if self.drop_rate:
            y = F.dropout(y, self.drop_rate, self.training)
        return y if self.returns == "new" else torch.cat((y, x) if self.returns == "new+x" else (x, y), 1)

    def extra_repr(self) -> str:
        """The options that are not the default."""
        options = [super().extra_repr()]
        options += [f"drop_rate={self.drop_rate}"] if self.drop_rate else []
        options += ["memory_efficient=True"] if self.memory_efficient else []
        options += [f"returns={self.returns!r}"] if self.returns != "new" else []
        return ", ".join(filter(None, options))


class Transition(Branch):
    """conv(relu(norm(x))), a 1x1 convolution, as one node, and the mean over squares of 2x2: half of height and width.

    Of the paper that `DenseLayer` names.

    Args:
        num_input_features, num_output_features: channels of x and of y.
        backend: one of `backends.NAMES`; "eager" is the plain layers.
        device, dtype: of the parameters.

    Raises:
        TypeError: a number of channels is no integer.
        ValueError: one of these is less than 1, or there is no backend of that name.
    """

    def __init__(
        self,
        num_input_features: int,
        num_output_features: int,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(backend)
        channels = positive("num_input_features", num_input_features)
        width = positive("num_output_features", num_output_features)
        self._names = [("norm", "conv")]
        self.norm = nn.BatchNorm2d(channels, device=device, dtype=dtype)
        self.conv = nn.Conv2d(channels, width, 1, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """y [N, num_output_features, H//2, W//2] of x [N, num_input_features, H, W], its dtype where autocast is off.

        Raises:
            TypeError, ValueError: x does not fit.
            RuntimeError: x has a single row or column.
        """
        return F.avg_pool2d(self._dispatch(x), 2)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Features [N, C, H, W] one behind the other along the channels."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        raise ValueError("x must be a tensor, or a list of one and more; got an empty one")
    for i, part in enumerate(parts):
        if isinstance(part, torch.fx.Proxy):  # symbolic tracing, which calls with no tensors
            continue
        tensor(f"x[{i}]", part)
        if part.dim() != 4 or part.shape[0] != parts[0].shape[0] or part.shape[2:] != parts[0].shape[2:]:
            raise ValueError(
                f"x[{i}] must have 4 dimensions (N, C, H, W), and N, H and W of x[0], which is of shape "
                f"{tuple(parts[0].shape)}; got {tuple(part.shape)}"
            )
    return torch.cat(parts, 1)
