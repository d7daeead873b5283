"""The front end of Yu & Koltun (2016), section 4: VGG-16 for dense prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densectx.backbones.base import MarginBackbone
from densectx.errors import ConfigError
from densectx.nn.norm import make_norm
from densectx.nn.resize import reflect101
from densectx.types import Feature

_STAGES: Final = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # (width / width of the first stage, convolutions)
MARGIN: Final = 186
"""Pixels that the valid convolutions take off each side: out = (in - 2 * 186) / 8."""


@final
class FrontEndVGG16(MarginBackbone):
    """VGG-16 without pool4 and pool5, fc6 and fc7 as convolutions: (B, 3, H, W) -> one level at stride 8.

    Behind the removed pools convolutions are dilated: conv5 by 2, fc6 (7x7) by 4. Pools round up as Caffe's do. With
    ``padding: margin`` convolutions are valid, and the picture is mirrored (reflect-101) by 186 pixels on each side:
    output cell i sees the 380 pixels from 8 i - 186 on. Pixels are turned into what the published weights expect: BGR,
    0..255, minus the mean. The paper's next layer, ``final``, is the model's projection.

    Args:
        mean: of B, G and R in 0..255, subtracted; the default is the published PASCAL VOC networks'.
        padding: ``margin``, see above, or ``each`` layer by zeros to keep its size (same weights, far fewer operations
            on small pictures, other values within 186 pixels of a border).
        width: channels of the first stage; 64 in VGG-16, smaller to try things out.
        fc: channels of fc6 and fc7.
        dropout: probability in [0, 1), behind fc6 and fc7, in training.
        norm: ``batch``, ``group`` or null behind each convolution; the paper's has none.
        tile: [height, width] in which the published network takes padded pictures, for ``--tile paper``.

    Raises:
        ConfigError: a width or channels below 1, a tile smaller than the field, another mean or padding.
    """

    mean: Tensor

    def __init__(
        self,
        mean: Sequence[float] = (102.93, 111.36, 116.52),
        padding: Literal["margin", "each"] = "margin",
        width: int = 64,
        fc: int = 4096,
        dropout: float = 0.5,
        norm: Literal["batch", "group"] | None = None,
        tile: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if padding not in ("margin", "each"):
            raise ConfigError(f"frontend_vgg16: padding {padding!r} is not 'margin' or 'each'.")
        if min(width, fc) < 1 or len(mean) != 3:
            raise ConfigError(
                f"frontend_vgg16: width {width} and fc {fc} must be positive and mean {list(mean)} 3 numbers."
            )
        if not 0 <= dropout < 1:
            raise ConfigError(f"frontend_vgg16: dropout {dropout} is not in [0, 1).")
        if tile is not None and (len(tile) != 2 or min(tile) < 2 * MARGIN + 8):
            raise ConfigError(f"frontend_vgg16: tile {list(tile)}: expected two sides of at least 380 pixels.")
        if tile is not None and padding != "margin":
            raise ConfigError("frontend_vgg16: a tile is for padding 'margin'.")
        self.in_channels, self.features = 3, (Feature(fc, 8),)
        self.margin = MARGIN if padding == "margin" else 0
        self.tile = None if tile is None else (tile[0], tile[1])
        self.dropout = nn.Dropout(dropout)
        # as the published nets say it, so that it travels in the config and not among the weights
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, 3, 1, 1), persistent=False)
        self.layers, self.norms = nn.ModuleDict(), nn.ModuleDict()
        channels = 3
        for stage, (factor, count) in enumerate(_STAGES, 1):
            for number in range(1, count + 1):
                self._add(f"conv{stage}_{number}", channels, width * factor, 3, 2 if stage == 5 else 1, norm)
                channels = width * factor
        self._add("fc6", channels, fc, 7, 4, norm)
        self._add("fc7", fc, fc, 1, 1, norm)

    def _add(
        self, name: str, channels: int, out: int, kernel: int, dilation: int, norm: Literal["batch", "group"] | None
    ) -> None:
        pad = 0 if self.margin else dilation * (kernel // 2)
        conv = nn.Conv2d(channels, out, kernel, padding=pad, dilation=dilation)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # Conv2d's bias is typed Optional; it is there
        self.layers[name] = conv
        if norm:
            self.norms[name] = make_norm(norm, out)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) sRGB 0..1, multiples of 8 -> [(B, fc, H / 8, W / 8)]."""
        return self.valid(reflect101(x, *(self.margin,) * 4))

    def valid(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H + 2 margin, W + 2 margin), the picture with its surroundings -> [(B, fc, H / 8, W / 8)]."""
        x = x.flip(1) * 255 - self.mean
        for name, layer in self.layers.items():
            if name in ("conv2_1", "conv3_1", "conv4_1"):  # pool1 to pool3
                x = F.max_pool2d(x, 2, 2, ceil_mode=True)
            x = layer(x)
            x = F.relu(self.norms[name](x) if name in self.norms else x, inplace=True)
            if name in ("fc6", "fc7"):
                x = self.dropout(x)
        return [x]
