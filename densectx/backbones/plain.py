"""Features that lose no pixel, for restoration networks."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from densectx.backbones.base import Backbone
from densectx.errors import ConfigError
from densectx.types import Feature


@final
class Plain(Backbone):
    """``depth`` 3x3 convolutions with ReLU: (B, in_channels, H, W) -> [(B, width, H / unshuffle, W / unshuffle)].

    With the context module behind it this is the dilated restoration network of Chen, Xu & Koltun (2017) and close
    to IRCNN (Zhang et al. 2017); with ``unshuffle: 2`` and head ``sub_pixel`` close to FFDNet (Zhang et al. 2018),
    which a quarter of the multiply-adds a pixel lets have more channels and twice the field of view.

    Args:
        width: channels.
        depth: convolutions.
        in_channels: channels of the input; 1 more than the image's lets a task add its noise-level map.
        unshuffle: side of the squares of pixels that become the channels of one cell first, nothing being lost (Shi
            et al. 2016's shuffle backwards); the stride.

    Raises:
        ConfigError: an argument that is not positive.
    """

    def __init__(self, width: int = 64, depth: int = 1, in_channels: int = 3, unshuffle: int = 1) -> None:
        super().__init__()
        if min(width, depth, in_channels, unshuffle) < 1:
            raise ConfigError(
                f"plain: width {width}, depth {depth}, in_channels {in_channels} and unshuffle {unshuffle} must be"
                " positive."
            )
        self.in_channels = in_channels
        self.features = (Feature(width, unshuffle),)
        layers: list[nn.Module] = [nn.PixelUnshuffle(unshuffle)] if unshuffle > 1 else []
        for c_in in (in_channels * unshuffle**2, *(width,) * (depth - 1)):
            conv = nn.Conv2d(c_in, width, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # Conv2d's bias is typed Optional; it is there
            layers += [conv, nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) -> [(B, width, H / unshuffle, W / unshuffle)]."""
        return [self.layers(x)]
