"""Operations that move elements: views, permutations, slices, indices, concatenation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from densectx.inspection.operations.call import Call, Refused
from densectx.inspection.spans import Spans, concatenated


def view(call: Call) -> Spans:
    """The same elements in another shape."""
    x = call.given["self"]
    return call.of("self").reshaped(x.shape, call.outputs[0].shape)


def expand(call: Call) -> Spans:
    """Dimensions of size 1 repeated."""
    spans = call.of("self")
    for _ in range(call.outputs[0].ndim - spans.lo.ndim):
        spans = spans.unsqueezed(0)
    return spans


def repeat(call: Call) -> Spans:
    """Everything repeated."""
    x, out, spans = call.given["self"], call.outputs[0], expand(call)
    for dim in range(out.ndim):
        size = x.shape[dim - out.ndim + x.ndim] if dim >= out.ndim - x.ndim else 1
        spans = spans.moved(dim, np.arange(out.shape[dim]) % size)
    return spans


def permute(call: Call) -> Spans:
    """Dimensions exchanged."""
    ndim = call.given["self"].ndim
    if call.name == "permute":
        dims = [d % ndim for d in call.given["dims"]]
    else:
        first, second = (0, ndim - 1) if call.name == "t" else (call.number("dim0") % ndim, call.number("dim1") % ndim)
        dims = list(range(ndim))
        dims[first], dims[second] = second, first
    return call.of("self").permuted(dims)


def part(call: Call) -> Spans:
    """A part of a dimension."""
    x, dim = call.given["self"], call.number("dim")
    start, stop, step = slice(call.given["start"], call.given["end"], call.given["step"]).indices(x.shape[dim])
    return call.of("self").sliced(dim % x.ndim, start, stop, step)


def select(call: Call) -> Spans:
    """One place of a dimension."""
    x = call.given["self"]
    dim = call.number("dim") % x.ndim
    index = call.number("index") % x.shape[dim]
    return call.of("self").sliced(dim, index, index + 1).dropped([dim])


def split(call: Call) -> list[Spans]:
    """Parts of a dimension."""
    dim, start, parts = call.number("dim") % call.given["self"].ndim, 0, []
    for out in call.outputs:
        size = 1 if call.name == "unbind" else out.shape[dim]
        part = call.of("self").sliced(dim, start, start + size)
        parts.append(part.dropped([dim]) if call.name == "unbind" else part)
        start += size
    return parts


def index(call: Call) -> Spans:
    """Places of a dimension, by numbers that do not depend on the input."""
    x = call.given["self"]
    if call.name == "index_select":
        dim, index = call.number("dim") % x.ndim, call.given["index"]
    else:
        chosen = [(dim, one) for dim, one in enumerate(call.given["indices"]) if one is not None]
        if len(chosen) != 1 or chosen[0][1].ndim != 1:
            raise Refused("only one index of one dimension can be followed")
        dim, index = chosen[0]
    values = call.values(index)
    if not call.of("self").varies(dim):
        return call.of("self")
    if values is None or values.dtype == torch.bool:
        raise Refused("its index is not known beforehand")
    return call.of("self").moved(dim, values.numpy().astype(np.int64) % x.shape[dim])


def flip(call: Call) -> Spans:
    """Dimensions back to front."""
    x, spans = call.given["self"], call.of("self")
    for dim in call.given["dims"]:
        spans = spans.moved(dim % x.ndim, np.arange(x.shape[dim])[::-1])
    return spans


def roll(call: Call) -> Spans:
    """Dimensions rolled around."""
    x, spans = call.given["self"], call.of("self")
    if not call.given["dims"]:
        raise Refused("it rolls the flattened tensor")
    for dim, shift in zip(call.given["dims"], call.given["shifts"], strict=True):
        spans = spans.moved(dim % x.ndim, np.roll(np.arange(x.shape[dim]), shift))
    return spans


def cat(call: Call) -> Spans:
    """Tensors one behind the other, or on a new dimension."""
    tensors = call.given["tensors"]
    parts = [spans if (spans := call.spans(t)) is not None else Spans.nothing(t.ndim) for t in tensors]
    ndim = tensors[0].ndim
    if call.name == "stack":
        dim = call.number("dim") % (ndim + 1)
        return concatenated([part.unsqueezed(dim) for part in parts], [1] * len(parts), dim, spatial=False)
    dim = call.number("dim") % ndim
    spatial = ndim == 4 and dim >= 2 and any(part.varies(dim) for part in parts)
    if spatial:  # a constant beside a picture is a border
        parts = [
            part if call.spans(t) is not None else replace(part, clean=np.zeros_like(part.clean))
            for t, part in zip(tensors, parts, strict=True)
        ]
    return concatenated(parts, [t.shape[dim] for t in tensors], dim, spatial=spatial)


def shuffle(call: Call) -> Spans:
    """(B, C r r, H, W) <-> (B, C, H r, W r): as reshapes and a permutation."""
    x, out, spans = call.given["self"], call.outputs[0], call.of("self")
    if call.name == "channel_shuffle":
        groups = call.number("groups")
        split = (*x.shape[:1], groups, x.shape[1] // groups, *x.shape[2:])
        swapped = spans.reshaped(x.shape, split).permuted([0, 2, 1, *range(3, len(split))])
        return swapped.reshaped([split[0], split[2], split[1], *split[3:]], x.shape)
    if call.name == "pixel_shuffle":
        r = call.number("upscale_factor")
        (b, c, h, w), order = out.shape, [0, 1, 4, 2, 5, 3]
        split = (b, c, r, r, h // r, w // r)
    else:
        r = call.number("downscale_factor")
        (b, c, h, w), order = x.shape, [0, 1, 3, 5, 2, 4]
        split = (b, c, h // r, r, w // r, r)
    moved = spans.reshaped(x.shape, split).permuted(order)
    return moved.reshaped([split[d] for d in order], out.shape)


def unsqueeze(call: Call) -> Spans:
    """A new dimension."""
    return call.of("self").unsqueezed(call.number("dim") % call.outputs[0].ndim)


def squeeze(call: Call) -> Spans:
    """Without dimensions of size 1."""
    return call.of("self").reshaped(call.given["self"].shape, call.outputs[0].shape)
