"""The contract of a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densectx.archive import check_bomb, why
from densectx.errors import CheckpointError, ConfigError
from densectx.types import Feature


class Backbone(nn.Module, ABC):
    """An image to a pyramid: (B, in_channels, H, W), H and W multiples of the total stride.

    Attributes:
        in_channels: channels of its input.
        features: what each level of the pyramid is, fine to coarse; the last one feeds the context module.
    """

    in_channels: int
    features: tuple[Feature, ...]

    @abstractmethod
    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W), sRGB in [0, 1] -> [(B, C_i, H / s_i, W / s_i)] as ``features`` says."""


class MarginBackbone(Backbone, ABC):
    """A backbone of valid convolutions, which can take a picture with its real surroundings.

    Attributes:
        margin: pixels of surroundings on each side that its convolutions use up; ``forward`` makes them up. 0 for a
            variant that needs none.
        tile: (height, width), margins included, of the inputs that its published form takes; None for any.
    """

    margin: int
    tile: tuple[int, int] | None

    @abstractmethod
    def valid(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H + 2 margin, W + 2 margin) -> what ``forward`` answers for the (H, W) in the middle."""


def read_weights(path: str | Path) -> Mapping[str, Any]:
    """The tensors of a local weights file: safetensors, or a torch file read with ``weights_only=True``.

    Raises:
        CheckpointError: missing or unreadable file.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        with Path(path).open("rb") as file:
            check_bomb(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for a bad file
        raise CheckpointError(f"weights {str(path)!r} cannot be read: {why(error)}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"weights {str(path)!r} hold a {type(state).__name__}, expected a mapping of tensors.")
    return state


def stem_statistics(rgb: Sequence[float], channels: int, other: Sequence[float] = ()) -> tuple[float, ...]:
    """Mean or deviation of each input channel for a stem that was trained on RGB.

    They follow the rule by which timm adapts the stem's weights (``timm.models.adapt_input_conv``): one channel has the
    sum of the three weights and so the average colour, N channels have weights R, G, B, R ... scaled by 3 / N. With
    equal values in all channels a stem of 1 or of a multiple of 3 channels responds like the RGB stem to gray (for 1 as
    far as the three deviations agree), unless it normalises its weights over the channels (nfnets of timm).

    Args:
        rgb: three values.
        channels: N.
        other: values of channels behind them that are no image.
    """
    own = (sum(rgb) / len(rgb),) if channels == 1 else tuple(rgb[i % len(rgb)] for i in range(channels))
    return (*own, *other)


def check_channels(name: str, in_channels: int, maps: int) -> int:
    """How many of the input channels are image: all but the last ``maps``.

    Raises:
        ConfigError: no image channel is left.
    """
    if not 0 <= maps < in_channels:
        raise ConfigError(f"{name}: in_channels {in_channels} and maps {maps}: expected at least one channel of image.")
    return in_channels - maps


@torch.no_grad()
def add_maps(name: str, stem: nn.Conv2d, channels: int, maps: int) -> None:
    """Give a stem more input channels whose weights are zero, in place: at first it answers as without them.

    For noise-level maps behind pretrained weights; zero is no dead end, the weights' gradient is not zero.

    Args:
        name: of the network, for the message.
        stem: first convolution of the network, of ``channels`` channels, which takes its weights as they are.
        channels: those it should have now.
        maps: how many to add.

    Raises:
        ConfigError: the stem does not read the image itself (it is folded or grouped first).
    """
    if not maps:
        return
    if stem.in_channels != channels or stem.groups != 1:
        raise ConfigError(f"{name}: its first convolution does not read the image as it is; leave out maps.")
    zeros = stem.weight.new_zeros(stem.out_channels, maps, *stem.kernel_size)
    stem.weight = nn.Parameter(torch.cat([stem.weight, zeros], 1))
    stem.in_channels += maps


class Standardize(nn.Module):
    """(x - mean) / std a channel, (B, C, H, W); the statistics travel with the model.

    Args:
        mean: one value a channel, in units of x (sRGB 0..1).
        std: one value a channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return (x - self.mean) / self.std
