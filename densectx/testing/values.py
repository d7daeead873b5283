"""Comparing nested values that hold tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal to the bit, NaN being equal to NaN; tensors also in type and shape."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _difference(a, b) == 0
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and bool(np.array_equal(a, b))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or a is b


def difference(a: Any, b: Any) -> float:
    """Largest difference between tensors in equal nests, relative to the largest number if that is above 1.

    Infinite where types, keys, shapes or the places of NaN differ.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return float("inf") if a.shape != b.shape or a.dtype != b.dtype else _difference(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        return max((difference(a[key], b[key]) for key in a), default=0.0)
    return 0.0 if same(a, b) else float("inf")


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().cpu(), b.detach().cpu()
    if not a.is_floating_point():
        return float(not torch.equal(a, b))
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    same_infinity = a == b  # infinities would give NaN
    error = torch.where(same_infinity, 0.0, a.nan_to_num(0.0).double() - b.nan_to_num(0.0).double()).abs()
    scale = a.nan_to_num(0.0, 0.0, 0.0).abs().max().double() if a.numel() else torch.tensor(0.0)
    return float(error.max() / scale.clamp_min(1)) if a.numel() else 0.0


def copied(value: Any) -> Any:
    """The same nest with cloned tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return type(value)(copied(item) for item in value) if type(value) in (list, tuple) else value


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings, lists, tuples and sets."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors(item)


def shape(x: Tensor) -> str:
    """``"2x3x24x20 float32"``."""
    return f"{'x'.join(map(str, x.shape)) or 'scalar'} {str(x.dtype).removeprefix('torch.')}"
