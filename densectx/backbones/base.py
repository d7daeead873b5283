"""The contract of a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densectx.errors import CheckpointError
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


def read_weights(path: str | Path) -> Mapping[str, Any]:
    """The tensors of a local weights file: safetensors, or a torch file read with ``weights_only=True``.

    Raises:
        CheckpointError: missing or unreadable file.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for a bad file
        raise CheckpointError(f"weights {str(path)!r} cannot be read: {error}.") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"weights {str(path)!r} hold a {type(state).__name__}, expected a mapping of tensors.")
    return state


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
