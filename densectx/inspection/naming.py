"""What the steps of a network are called in tables: ``conv 3x3, dilation 2``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_KINDS: Final = {
    "max_pool2d_with_indices": "max pool",
    "avg_pool2d": "mean pool",
    "_adaptive_avg_pool2d": "adaptive mean pool",
    "adaptive_max_pool2d": "adaptive max pool",
    "max_unpool2d": "max unpool",
    "pixel_shuffle": "pixel shuffle",
    "pixel_unshuffle": "pixel unshuffle",
}


def named(operation: str, bound: Mapping[str, Any]) -> str:
    """Of one of ATen's operations; ``""`` for one that no table needs.

    Args:
        operation: its name without the underscore of in-place variants.
        bound: arguments by name.
    """
    if operation == "convolution":
        return _conv(bound)
    if operation in ("max_pool2d_with_indices", "avg_pool2d"):
        (high, wide), (down, across), _ = pool_of(bound)
        return f"{_KINDS[operation]} {high}x{wide}" + (
            f", stride {_pair(down, across)}" if max(down, across) > 1 else ""
        )
    if "upsample" in operation:
        return "resize, " + operation.strip("_").removeprefix("upsample_").replace("2d", "").replace("_", " ")
    return _KINDS.get(operation, "")


def pool_of(bound: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Kernel, stride and padding of a pool, each (vertical, horizontal)."""
    kernel, stride, padding = (list(bound[key]) for key in ("kernel_size", "stride", "padding"))
    kernel, padding = (value * 2 if len(value) == 1 else value for value in (kernel, padding))
    return kernel, (stride * 2 if len(stride) == 1 else stride) or kernel, padding


def _conv(bound: Mapping[str, Any]) -> str:
    size = "x".join(str(side) for side in bound["weight"].shape[2:])
    name = f"{'transposed conv' if bound['transposed'] else 'conv'} {size}"
    for key in ("stride", "dilation"):
        if max(bound[key]) > 1:
            name += f", {key} {_pair(*bound[key])}"
    return name + (f", {bound['groups']} groups" if bound["groups"] > 1 else "")


def _pair(*values: int) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))
