"""The dilated context aggregation module of Yu & Koltun (2016), section 3.

It gathers context exponentially with depth without losing resolution, maps C channels to C channels, and starts as
the identity (on non-negative features), so it can be put into any network that answers every pixel.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.nn.norm import make_norm


class Context(nn.Module, ABC):
    """What stands between the projected features and the heads: (B, C, h, w) -> (B, C, h, w)."""

    @property
    @abstractmethod
    def receptive_field(self) -> float:
        """Side of the square of cells that one output cell sees; infinite where something is global."""


@final
class NoContext(Context):
    """The identity, for ablations.

    Args:
        in_channels: C, given by the model.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()

    @property
    def receptive_field(self) -> float:
        """1 cell."""
        return 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same tensor."""
        return x


@final
class ContextModule(Context):
    """A stack of dilated 3x3 convolutions and one 1x1 convolution: (B, C, h, w) -> (B, C, h, w).

    Every 3x3 layer is followed by max(., 0), the last 1x1 layer is not (Yu & Koltun 2016, table 1). With
    ``init_noise=0`` the module computes exactly ``max(x, 0)`` at the start (equations 4 and 5), or ``x`` in the
    residual form.

    Args:
        in_channels: C, given by the model.
        dilations: dilation of each 3x3 layer.
        widths: channels of each 3x3 layer as multiples of C (all 1: Basic).
        init_noise: standard deviation of the noise on the initial weights, relative to the identity's own weight
            1 / width. With 0, the grouped channels of wide layers stay tied for ever.
        residual: ``x + f(x)`` with f starting at zero, for signed features.
        init: ``identity``, or ``random`` for comparison (He et al. 2015; a residual branch then starts anywhere).
        norm: ``batch``, ``group`` or null after each 3x3 convolution; the start is the identity only without. With
            ``group`` each cell sees all of them, by their mean and variance, and exact tiling is impossible.
        padding: ``each`` layer by its dilation, or ``once`` by the sum of all dilations before the first layer (the
            paper's VOC network); the two differ near borders only. Both pad with zeros.

    Raises:
        ConfigError: dilations and widths of different length, empty, or not positive.
    """

    def __init__(
        self,
        in_channels: int,
        dilations: Sequence[int] = (1, 1, 2, 4, 8, 16, 1),
        widths: Sequence[int] | None = None,
        *,
        init_noise: float = 0.01,
        residual: bool = False,
        init: Literal["identity", "random"] = "identity",
        norm: Literal["batch", "group"] | None = None,
        padding: Literal["each", "once"] = "each",
    ) -> None:
        super().__init__()
        widths = tuple(widths) if widths is not None else (1,) * len(dilations)
        if not dilations or len(dilations) != len(widths) or min(*dilations, *widths) < 1:
            raise ConfigError(
                f"context: dilations {tuple(dilations)} and widths {widths} must be equally many positive integers."
            )
        if not 0 <= init_noise < math.inf:
            raise ConfigError(f"context: init_noise {init_noise} is negative or no finite number.")
        if padding not in ("each", "once"):
            raise ConfigError(f"context: padding {padding!r} is not 'each' or 'once'.")
        if init not in ("identity", "random"):
            raise ConfigError(f"context: init {init!r} is not 'identity' or 'random'.")
        self.residual = residual
        self.margin = sum(dilations) if padding == "once" else 0
        self._receptive_field = math.inf if norm == "group" else 1 + 2 * sum(dilations)
        channels = [in_channels, *(in_channels * width for width in widths)]

        def start(conv: nn.Conv2d, *, zero: bool = False) -> None:
            if init == "identity":
                identity_(conv, in_channels, init_noise, zero=zero)
                return
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # Conv2d's bias is typed Optional; it is there

        layers: list[nn.Module] = []
        for (c_in, c_out), dilation in zip(pairwise(channels), dilations, strict=True):
            pad = 0 if self.margin else dilation
            conv = nn.Conv2d(c_in, c_out, 3, padding=pad, dilation=dilation)
            start(conv)
            layers += [conv, make_norm(norm, c_out), nn.ReLU(inplace=True)] if norm else [conv, nn.ReLU(inplace=True)]
        last = nn.Conv2d(channels[-1], in_channels, 1)
        start(last, zero=residual)
        self.layers = nn.Sequential(*layers, last)

    @property
    def receptive_field(self) -> float:
        """1 + 2 * (sum of dilations) cells: 67 for Basic and Large, 35 for context7, 259 for context10.

        Infinite with group norms.
        """
        return self._receptive_field

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w), any h and w >= 1."""
        y: Tensor = self.layers(F.pad(x, (self.margin,) * 4) if self.margin else x)
        return x + y if self.residual else y


@torch.no_grad()
def identity_(conv: nn.Conv2d, groups: int, noise: float, *, zero: bool = False) -> None:
    """Initialise a convolution as the identity on ``groups`` channels, in place.

    Equation 5 of Yu & Koltun (2016), equation 4 where in = out = groups: the centre tap from input a to output b is
    groups / out if both belong to the same group, everything else N(0, (noise * groups / out)^2); the bias is 0.

    Args:
        conv: odd kernel; ``groups`` divides its input and output channels.
        groups: C of the paper.
        noise: standard deviation relative to the identity's weight.
        zero: noise only, for the last layer of a residual branch.
    """
    out_channels, in_channels = conv.weight.shape[:2]
    weight = groups / out_channels
    group_out = torch.arange(out_channels) * groups // out_channels
    group_in = torch.arange(in_channels) * groups // in_channels
    same = group_out[:, None] == group_in[None, :]  # (out, in)
    nn.init.normal_(conv.weight, std=noise * weight) if noise else nn.init.zeros_(conv.weight)
    if not zero:
        centre = conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2]
        centre[same.to(centre.device)] = weight
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


# The presets of the paper and its code; every option of ContextModule can still be given.
basic = partial(ContextModule, dilations=(1, 1, 2, 4, 8, 16, 1))
large = partial(ContextModule, dilations=(1, 1, 2, 4, 8, 16, 1), widths=(2, 2, 4, 8, 16, 32, 32))
context7 = partial(ContextModule, dilations=(1, 1, 2, 4, 8, 1))
context10 = partial(ContextModule, dilations=(1, 1, 2, 4, 8, 16, 32, 64, 1))
