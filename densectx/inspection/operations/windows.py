"""Operations whose outputs see windows of their inputs: convolutions, pools, resampling, padding, patches."""

from __future__ import annotations

import numpy as np

from densectx.inspection import taps
from densectx.inspection.operations.call import Call, Refused
from densectx.inspection.spans import PADDING, Ints, Spans, union


def convolution(call: Call) -> Spans:
    """Taps along the places, and all channels of the group."""
    x, weight, out = call.given["input"], call.given["weight"], call.outputs[0]
    spatial = weight.ndim - 2
    spans, groups = call.of("input"), call.number("groups")
    for axis in range(spatial):
        dim, kernel = x.ndim - spatial + axis, weight.shape[2 + axis]
        stride, padding, dilation = (
            value[axis] if len(value) > 1 else value[0]
            for value in (call.given["stride"], call.given["padding"], call.given["dilation"])
        )
        positions = taps.transposed if call.given["transposed"] else taps.sliding
        spans = spans.window(dim, positions(x.shape[dim], out.shape[dim], kernel, stride, padding, dilation))
    channels = x.ndim - spatial - 1
    return spans.grouped(channels, x.shape[channels], groups, out.shape[channels])


def pool(call: Call) -> Spans:
    """Taps along the places."""
    x = call.given["self"]
    spans, out = call.of("self"), call.outputs[0]
    kernel, padding = call.pair("kernel_size"), call.pair("padding")
    stride = call.pair("stride") if call.given["stride"] else kernel
    dilation = call.pair("dilation") if "dilation" in call.given else [1, 1]
    for axis in range(2):
        dim = x.ndim - 2 + axis
        positions = taps.sliding(
            x.shape[dim], out.shape[dim], kernel[axis], stride[axis], padding[axis], dilation[axis]
        )
        spans = spans.window(dim, positions)
    return spans


def unpool(call: Call) -> Spans:
    """An output position gets the value of a pooled cell if the maximum of its window lay there."""
    x, out, pool = call.given["self"], call.outputs[0], call.pools(call.given["indices"])
    if pool is None:
        raise Refused("its indices do not come from a max-pool")
    spans = union([call.of("self"), call.of("indices")])
    for axis, (kernel, stride, padding) in enumerate(zip(*pool, strict=True)):
        dim = x.ndim - 2 + axis
        spans = spans.window(dim, taps.transposed(x.shape[dim], out.shape[dim], kernel, stride, padding))
    return spans


def adaptive(call: Call) -> Spans:
    """Windows whose size depends on that of the input; one window for all is global."""
    x, out, spans = call.given["self"], call.outputs[0], call.of("self")
    for dim in (x.ndim - 2, x.ndim - 1):
        whole = out.shape[dim] == 1 < x.shape[dim]
        spans = (
            spans.reduce([dim], call.layer) if whole else spans.window(dim, taps.adaptive(x.shape[dim], out.shape[dim]))
        )
    return spans


def resample(call: Call) -> Spans:
    """``torch.nn.functional.interpolate`` of maps."""
    name, out = call.name.strip("_"), call.outputs[0]
    x = call.given["self"] if "self" in call.given else call.given["input"]
    spans = call.of("self" if "self" in call.given else "input")
    kind: taps.Filter = "linear" if "linear" in name else "cubic" if "cubic" in name else "nearest"
    kind = "nearest-exact" if "exact" in name else kind
    factors = call.given.get("scale_factors") or [call.given.get("scales_h"), call.given.get("scales_w")]
    for axis in range(2):
        dim = x.ndim - 2 + axis
        positions, dirty = taps.resampled(
            x.shape[dim],
            out.shape[dim],
            kind,
            scale=factors[axis],
            align_corners=bool(call.given.get("align_corners", False)),
            antialias=name.endswith("_aa"),
        )
        spans = spans.window(dim, positions, dirty=dirty)
    return spans


def padded(call: Call) -> Spans:
    """``torch.nn.functional.pad``; negative widths cut off."""
    x, out, spans = call.given["self"], call.outputs[0], call.of("self")
    pad = list(call.given["pad" if "pad" in call.given else "padding"])
    for place in range(len(pad) // 2):
        dim = x.ndim - 1 - place
        size = x.shape[dim]
        index: Ints = np.arange(out.shape[dim]) - pad[2 * place]
        beyond = (index < 0) | (index >= size)
        if call.name.startswith("reflection"):
            index = (size - 1) - np.abs((size - 1) - np.abs(index))
        elif call.name.startswith("replication"):
            index = np.clip(index, 0, size - 1)
        else:
            index = np.where(beyond, PADDING, index)
        spans = spans.window(dim, index[:, None], dirty=beyond)
    return spans


def patches(call: Call) -> Spans:
    """im2col: (B, C, H, W) -> (B, C k k, positions)."""
    x, out, spans = call.given["self"], call.outputs[0], call.of("self")
    kernel, stride, pad, dilation = (call.given[k] for k in ("kernel_size", "stride", "padding", "dilation"))
    places = [(x.shape[2 + a] + 2 * pad[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in range(2)]
    for axis in range(2):
        dim, index = 2 + 2 * axis, np.arange(kernel[axis])[:, None] * dilation[axis] - pad[axis]
        index = (index + np.arange(places[axis]) * stride[axis]).reshape(-1)
        beyond = (index < 0) | (index >= x.shape[2 + axis])
        spans = spans.window(dim, np.where(beyond, PADDING, index)[:, None])
        old = [kernel[axis] * places[axis] if d == dim else s for d, s in enumerate(spans.shape)]
        spans = spans.reshaped(old, [*old[:dim], kernel[axis], places[axis], *old[dim + 1 :]])
    split = (x.shape[0], x.shape[1], kernel[0], kernel[1], places[0], places[1])
    return spans.permuted([0, 1, 2, 4, 3, 5]).reshaped(split, out.shape)


def unfold(call: Call) -> Spans:
    """``Tensor.unfold``: overlapping slices as a new last dimension."""
    x = call.given["self"]
    dim, size, step = call.number("dimension") % x.ndim, call.number("size"), call.number("step")
    places = call.outputs[0].shape[dim]
    spans = call.of("self")
    if not spans.varies(dim):
        return spans.unsqueezed(x.ndim)
    index = (np.arange(places)[:, None] * step + np.arange(size)).reshape(-1)
    spans = spans.window(dim, index[:, None])
    old = [places * size if d == dim else s for d, s in enumerate(spans.shape)]
    spans = spans.reshaped(old, [*old[:dim], places, size, *old[dim + 1 :]])
    return spans.permuted([d for d in range(x.ndim + 1) if d != dim + 1] + [dim + 1])
