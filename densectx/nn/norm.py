"""Normalisation layers: made, or exchanged in a network that exists."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

Norm: TypeAlias = Literal["batch", "group", "none", "frozen", "per_input"]
NORMS: tuple[Norm, ...] = ("batch", "group", "none", "frozen", "per_input")
_STATE: Final = ("weight", "bias", "running_mean", "running_var")


def make_norm(kind: Literal["batch", "group"], channels: int) -> nn.Module:
    """A fresh normalisation layer for (B, channels, H, W); ``group`` takes at most 32 groups."""
    return nn.BatchNorm2d(channels) if kind == "batch" else GroupNorm(math.gcd(32, channels), channels)


@final
class GroupNorm(nn.GroupNorm):
    """torch's, also for a group of one number: (B, C, h, w) -> (B, C, h, w), any B, h and w >= 1.

    At most 32 channels have a group each, which on a 1x1 map is one number: normalised it is 0, up to rounding,
    and the shift is left. torch computes that for any batch, but refuses a batch of one, in evaluation too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


@final
class PerInput(nn.Module):
    """Copies of a normalisation layer, one a kind of input: (B, C, h, w) -> (B, C, h, w).

    Clean, noisy, small and gray pictures have other statistics in every layer; one batch norm for all of them
    trains on each batch's own and evaluates on their mixture. Which copy runs is said by :func:`select` before the
    pass; until then it is the first. State-dict keys: ``<layer>.norms.<kind>.weight`` and so on.

    Args:
        norm: layer to copy, weights and statistics included.
        kinds: names without dots.
    """

    def __init__(self, norm: nn.Module, kinds: Sequence[str]) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({kind: copy.deepcopy(norm) for kind in kinds})
        self.kind = kinds[0]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) of the selected kind -> normalised."""
        y: Tensor = self.norms[self.kind](x)
        return y

    def extra_repr(self) -> str:
        """The kind that runs."""
        return f"kind={self.kind!r}"


def select(modules: Iterable[nn.Module], kind: str) -> None:
    """Let the next pass through modules be one of a kind of input.

    Raises:
        KeyError: a layer has no copy for it.
    """
    for part in modules:
        for module in part.modules():
            if isinstance(module, PerInput):
                if kind not in module.norms:
                    raise KeyError(f"no normalisation for inputs of kind {kind!r}, only {', '.join(module.norms)}")
                module.kind = kind


def spread(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with a copy for every kind of input of a module: from the shared layer, or from another kind.

    Args:
        module: with :class:`PerInput` layers; without, the weights come back as they are.
        weights: a state dict of the same network; a kind that is not in it takes the shared layer of a ``batch``
            model, or the copy for unchanged images (else the first by name) of a ``per_input`` model.
    """
    found = dict(weights)
    for name, part in module.named_modules():
        if not isinstance(part, PerInput):
            continue
        inside = f"{name}.norms."
        known = {key.removeprefix(inside).partition(".")[0] for key in weights if key.startswith(inside)}
        origin = f"{inside}{min(known, key=lambda kind: (':' not in kind, kind))}." if known else f"{name}."
        given = {key.removeprefix(origin): value for key, value in weights.items() if key.startswith(origin)}
        for kind in part.norms:
            if kind not in known:
                found |= {f"{inside}{kind}.{key}": value for key, value in given.items()}
        if not known:
            found = {key: value for key, value in found.items() if key.startswith(inside) or not key.startswith(origin)}
    return found


def renamed(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose norm layers have the names of a module's, which depend on the kind: see :func:`set_norm`.

    Args:
        module: where they are to go.
        weights: a state dict of the same network with norm layers of any kind.
    """
    found = dict(weights)
    for name, part in module.named_modules():
        plain, before_activation = f"{name}.", f"{name}.0."
        if isinstance(part, nn.Sequential) and len(part) and isinstance(part[0], Frozen | nn.GroupNorm):
            origin, target = plain, before_activation
        elif isinstance(part, nn.BatchNorm2d | PerInput):
            origin, target = before_activation, plain
        else:
            continue
        for key in _STATE:
            if origin + key in found:
                found[target + key] = found.pop(origin + key)
    return found


@final
class Frozen(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision has no types
    """A batch norm that nothing changes: statistics, scale and shift are buffers; (B, C, H, W) of x's own dtype.

    torchvision's forward answers in float32 whatever x is, and so would every layer behind it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def set_norm(module: nn.Module, kind: Norm, inputs: Sequence[str] = ()) -> int:
    """Exchange every batch norm inside a module, in place; other kinds of normalisation stay as they are.

    Where a layer of timm applies the activation too, a group or frozen norm in its place is called ``<layer>.0``, and
    the activation follows it.

    Channel attention with batch norms of its own on 1x1 maps (sknet, resnest and rexnet of timm) loses what narrow
    group norms take away there; ``frozen`` or ``per_input`` suit those networks better than ``group``.

    Args:
        module: a network whose weights are already loaded.
        kind: ``batch`` keeps them; ``group`` takes fresh group norms (scale and shift are kept); ``frozen`` fixes
            statistics, scale and shift (for small batches and pretrained weights); ``none`` removes them;
            ``per_input`` copies them, see :class:`PerInput`.
        inputs: the kinds of input, for ``per_input``.

    Returns:
        How many layers were exchanged.
    """
    exchanged = 0
    if kind == "batch":
        return exchanged
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, PerInput(child, inputs) if kind == "per_input" else _exchanged(child, kind))
            exchanged += 1
        else:
            exchanged += set_norm(child, kind, inputs)
    return exchanged


def _exchanged(norm: nn.BatchNorm2d, kind: Norm) -> nn.Module:
    new = _convert(norm, kind)
    # timm's norm layers apply the activation themselves; it has to stay behind the new layer
    tail = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    for part in tail:
        if kind == "none" and hasattr(part, "inplace"):
            part.inplace = False  # nothing was computed in between: it would overwrite the block's own input
    return nn.Sequential(new, *tail) if tail else new


def _convert(norm: nn.BatchNorm2d, kind: Norm) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    new = Frozen(norm.num_features, norm.eps) if kind == "frozen" else make_norm("group", norm.num_features)
    for name in _STATE if kind == "frozen" else ("weight", "bias"):
        source = getattr(norm, name, None)
        if source is not None:
            getattr(new, name).data.copy_(source.data)
    return new
