"""Operations on elements at one place, and over whole dimensions: activations, means, norms, products."""

from __future__ import annotations

from torch import Tensor

from densectx.inspection.operations.call import Call
from densectx.inspection.spans import Spans, TooLarge, union


def pointwise(call: Call) -> Spans:
    """The union of all arguments, which broadcast."""
    tensors = [t for value in call.given.values() for t in (value if isinstance(value, list | tuple) else [value])]
    parts = [spans for t in tensors if isinstance(t, Tensor) and (spans := call.spans(t)) is not None]
    return union(parts)


def copy(call: Call) -> Spans:
    """What is written into another tensor."""
    return call.of("src")


def constant(call: Call) -> Spans:
    """Numbers that do not depend on the input, or not any more."""
    return Spans.nothing(call.outputs[0].ndim)


def glu(call: Call) -> Spans:
    """One half of the channels gates the other one."""
    x, dim = call.given["self"], call.number("dim") % call.given["self"].ndim
    half = x.shape[dim] // 2
    return union([call.of("self").sliced(dim, 0, half), call.of("self").sliced(dim, half, 2 * half)])


def reduction(call: Call) -> Spans:
    """Means, sums, extremes: everything along dimensions."""
    x = call.given["self"]
    dims = call.given.get("dim")
    dims = list(range(x.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    spans = call.of("self").reduce(dims, call.layer)
    return spans if call.outputs[0].ndim == x.ndim else spans.dropped(dims)


def along(call: Call) -> Spans:
    """Softmax and the like: everything along a dimension, and the position itself."""
    spans = call.of("self")
    return union([spans, spans.reduce([call.number("dim")], call.layer)])


def layer_norm(call: Call) -> list[Spans]:
    """The element itself and the statistics of the last dimensions."""
    x, spans = call.given["input"], call.of("input")
    over = spans.reduce(range(x.ndim - len(call.given["normalized_shape"]), x.ndim), call.layer)
    return [union([spans, over]), over, over]


def group_norm(call: Call) -> list[Spans]:
    """The element itself and the statistics of its group over all places."""
    x, spans, groups = call.given["input"], call.of("input"), call.number("group")
    over = spans.reduce(range(2, x.ndim), call.layer).grouped(1, x.shape[1], groups, x.shape[1])
    statistics = Spans.nothing(2)
    return [union([spans, over]), statistics, statistics]


def batch_norm(call: Call) -> list[Spans]:
    """The element itself; with statistics of the batch, in training, all places."""
    x, spans = call.given["input"], call.of("input")
    if call.given.get("training", call.given.get("train", "update" in call.name)):
        spans = union([spans, spans.reduce([d for d in range(x.ndim) if d != 1], call.layer)])
    return [spans, *(Spans.nothing(t.ndim) for t in call.outputs[1:])]


def matrices(call: Call) -> Spans:
    """(..., m, k) times (..., k, n), with or without something added."""
    left, right = ("mat1", "mat2") if "mat1" in call.given else ("batch1", "batch2")
    if left not in call.given:
        left, right = "self", "mat2"
    known = any(call.spans(call.given[name]) is None for name in (left, right))
    layer = None if known else call.layer  # weights fix how many numbers are added
    parts = [call.of(left).reduce([-1], layer), call.of(right).reduce([-2], layer)]
    if left != "self" and call.spans(call.given["self"]) is not None:
        parts.append(call.of("self"))
    try:
        return union(parts)
    except TooLarge:  # scores of all pairs of places: a softmax over the second ones comes next, or a sum over them
        return union([parts[0], parts[1].reduce([-1], call.layer), *parts[2:]])


def attention(call: Call) -> list[Spans]:
    """The query itself and all keys and values."""
    keys = union([call.of("key").reduce([-1], call.layer), call.of("value").reduce([-1], call.layer)])
    whole = union([call.of("query").reduce([-1], call.layer), keys.reduce([-2], call.layer)])
    return [whole, *(Spans.nothing(t.ndim) for t in call.outputs[1:])]
