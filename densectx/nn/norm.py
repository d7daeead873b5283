"""Normalisation layers: made, or exchanged in a network that exists."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

Norm: TypeAlias = Literal["batch", "group", "none", "frozen"]
NORMS: tuple[Norm, ...] = ("batch", "group", "none", "frozen")


def make_norm(kind: Literal["batch", "group"], channels: int) -> nn.Module:
    """A fresh normalisation layer for (B, channels, H, W); ``group`` takes at most 32 groups."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(32, channels), channels)


def set_norm(module: nn.Module, kind: Norm) -> None:
    """Exchange every batch norm inside a module, in place.

    Args:
        module: a network whose weights are already loaded.
        kind: ``batch`` keeps them; ``group`` takes fresh group norms (scale and shift are kept); ``frozen`` fixes
            statistics, scale and shift (for small batches and pretrained weights); ``none`` removes them.
    """
    if kind == "batch":
        return
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            new = _convert(child, kind)
            # timm's norm layers apply the activation themselves; it has to stay behind the new layer
            tail = [part for part in (getattr(child, "drop", None), getattr(child, "act", None)) if part is not None]
            setattr(module, name, nn.Sequential(new, *tail) if tail else new)
        else:
            set_norm(child, kind)


def _convert(norm: nn.BatchNorm2d, kind: Norm) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    new = FrozenBatchNorm2d(norm.num_features, norm.eps) if kind == "frozen" else make_norm("group", norm.num_features)
    names = ("weight", "bias", "running_mean", "running_var") if kind == "frozen" else ("weight", "bias")
    for name in names:
        source = getattr(norm, name, None)
        if source is not None:
            getattr(new, name).data.copy_(source.data)
    return new
