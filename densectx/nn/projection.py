"""The 1x1 convolution between a backbone's channels and the context module's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from densectx.errors import ConfigError, unknown

PROJECTION: Final = {"channels": 128, "activation": "relu", "std": None}
"""What a config that says nothing gets; the keys that it may have."""


def make_projection(spec: Any, channels: int) -> tuple[nn.Module, int]:
    """The projection of ``model.projection``: (B, channels, h, w) -> (B, its channels, h, w).

    Args:
        spec: ``{channels: 128, activation: relu | none, std: null}``, or None for none; std is the deviation of the
            initial weights, null for He et al. (2015).
        channels: of the backbone's last level.

    Returns:
        The module and the channels of its output.

    Raises:
        ConfigError: another key or value.
    """
    if spec is None:
        return nn.Identity(), channels
    if not isinstance(spec, Mapping):
        raise ConfigError(f"model.projection: expected {{channels, activation, std}} or null, got {spec!r}.")
    for key in spec:
        if key not in PROJECTION:
            raise ConfigError(f"model.projection: {unknown('key', str(key), PROJECTION)}")
    options = {**PROJECTION, **spec}
    out, activation, std = options["channels"], options["activation"] or "none", options["std"]
    if not isinstance(out, int) or out < 1 or activation not in ("relu", "none"):
        raise ConfigError(
            f"model.projection: channels {out!r} is no positive integer, or activation {activation!r} not relu or none."
        )
    if std is not None and (not isinstance(std, int | float) or not 0 < std < float("inf")):
        raise ConfigError(f"model.projection: std {std!r} is no positive number.")
    conv = nn.Conv2d(channels, out, 1)
    if std is None:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    else:
        nn.init.normal_(conv.weight, std=std)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # Conv2d's bias is typed Optional; it is there
    return (nn.Sequential(conv, nn.ReLU(inplace=True)) if activation == "relu" else conv), out
