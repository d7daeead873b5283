"""Receptive field, stride and offset of every layer of any network, exactly; infinite where something is global."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from densectx.errors import ConfigError
from densectx.inspection.extent import Extent, Unclear, extent_of
from densectx.inspection.shell import shell_of
from densectx.inspection.spans import NONE, Spans, TooLarge
from densectx.inspection.tracing import Axes, Trace, follow

__all__ = ["Extent", "Geometry", "LayerField", "geometry", "receptive_fields"]

_SMALLEST: Final = 1024  # pixels that the first pass takes
_LARGEST: Final = 1 << 14  # pixels at which a network that is still not regular is given up
_GROWS: Final = 1.2  # an input half as large again; a field that does not depend on it would stay


class LayerField(NamedTuple):
    """What one layer sees.

    Attributes:
        layer: name of the module that the operation ran in; the class of the network itself for its own operations;
            ``""`` for its outputs.
        operation: e.g. ``"conv 3x3, dilation 2"``.
        channels: of its output.
        h: along the height; None where nothing but global layers led here.
        w: along the width.
        causes: layers, among those up to here, that make the field infinite.
    """

    layer: str
    operation: str
    channels: int
    h: Extent | None
    w: Extent | None
    causes: tuple[str, ...]

    @property
    def field(self) -> tuple[float, float]:
        """(height, width) in pixels."""
        h, w = (math.inf if extent is None else extent.field for extent in (self.h, self.w))
        return h, w


@final
@dataclass(frozen=True)
class Geometry:
    """The layers of a network and what it answers with.

    Attributes:
        layers: convolutions, pools, resamplings and global operations, of what depends on the input, in the order in
            which they run.
        outputs: the tensors that the network answers with, flattened; None for a constant.
    """

    layers: list[LayerField]
    outputs: list[LayerField | None]


def receptive_fields(module: nn.Module, x: Tensor) -> list[LayerField]:
    """Field, stride and offset of every layer of a network.

    Args:
        module: any network of convolutions, pools, resampling and branches; it is neither run nor changed.
        x: (B, C, H, W), of which only the shape is used; H and W must suit the network, and so must their multiples.

    Raises:
        ConfigError: as :func:`geometry`.
    """
    return geometry(module, tuple(x.shape)).layers


def geometry(
    module: nn.Module, shape: Sequence[int], run: Callable[[nn.Module, Tensor], Any] | None = None
) -> Geometry:
    """What every layer and the outputs of a network see, from passes at sizes that grow until the middle is clean.

    A layer is finite if what it sees in the middle of an input stays the same when the input grows; one that keeps
    seeing more is infinite, as is everything behind a global operation.

    Args:
        module: as for :func:`receptive_fields`.
        shape: (B, C, H, W), the smallest input to try; the others are multiples of it.
        run: ``run(module, x)`` calls it; ``module(x)`` if left out.

    Raises:
        ConfigError: an operation that cannot be followed, named with its layer, a network that takes other ways at
            other sizes, or one whose pattern does not get regular.
    """
    shell = shell_of(module)

    def at(times: int) -> Trace:
        return follow(shell, (*shape[:2], shape[2] * times, shape[3] * times), run)

    times = max(1, -(-_SMALLEST // min(shape[2:])))
    small: Trace | None = None
    while True:
        final = min(shape[2:]) * times >= _LARGEST
        try:
            last, small = small, at(times)
            if not final:
                _Pair(small, small, final=False).geometry()  # a look before the second pass
            return _Pair(small, at(times + -(-times // 2)), final=final).geometry()
        except TooLarge:
            if small is None:
                raise ConfigError("the receptive field cannot be derived: attention over too many positions.") from None
            return _Pair(last or small, small, final=True).geometry()
        except Unclear:
            times *= 2


@final
class _Pair:
    """Two passes of one network, at two sizes."""

    def __init__(self, small: Trace, large: Trace, *, final: bool) -> None:
        self.small, self.large, self.final = small, large, final
        self.grows: tuple[str, ...] = ()

    def geometry(self) -> Geometry:
        """See :func:`geometry`.

        Raises:
            Unclear: larger inputs are needed.
        """
        outputs = [
            [leaf for leaf in tree_leaves(one.output) if isinstance(leaf, Tensor)] for one in (self.small, self.large)
        ]
        steps = (self.small.steps, self.large.steps)
        if len(steps[0]) != len(steps[1]) or len(outputs[0]) != len(outputs[1]):
            if not self.final:  # where a layer sees all of a small input, another one cannot be global
                raise Unclear
            raise ConfigError("the receptive field cannot be derived: the network takes another way at another size.")
        layers = [
            self._field(large.layer, large.operation, large.channels, small.axes, large.axes)
            for small, large in zip(*steps, strict=True)
            if not _constant(large.axes)
        ]
        answers: list[LayerField | None] = []
        for one, other in zip(*outputs, strict=True):
            axes = self.small.axes(one), self.large.axes(other)
            channels = int(other.shape[1]) if other.ndim > 1 else 1
            if axes[0] is None or axes[1] is None or _constant(axes[1]):
                answers.append(None)
            else:
                answers.append(self._field("", "output", channels, axes[0], axes[1]))
        return Geometry(layers, answers)

    def _field(self, layer: str, operation: str, channels: int, small: Axes, large: Axes) -> LayerField:
        found = []
        causes = tuple(dict.fromkeys(cause for spans in large for cause in spans.causes))
        for axis in (0, 1):
            extent = self._extent(layer, small[axis], large[axis], axis)
            if extent is None and not large[axis].causes:
                self.grows = self.grows or (layer or "the output",)
                causes = (*causes, *(name for name in self.grows if name not in causes))
            found.append(extent)
        return LayerField(layer, operation, channels, found[0], found[1], causes)

    def _extent(self, layer: str, small: Spans, large: Spans, axis: int) -> Extent | None:
        """Along one axis; None where nothing local is left, or where it grows with the input."""
        if bool((large.lo == NONE).all()):
            return None
        try:
            found = [extent_of(spans, axis) for spans in (small, large)]
            if found[0] != found[1]:
                raise Unclear
        except Unclear:
            if not self.final:
                raise
            if large.causes or _widest(large) > _GROWS * _widest(small):
                return None
            raise ConfigError(
                f"the receptive field of {f'layer {layer!r}' if layer else 'the network'} cannot be derived: it gets"
                " not regular at any size."
            ) from None
        return found[1]


def _constant(axes: Axes) -> bool:
    """Whether it was computed from numbers alone that do not depend on the input (any more)."""
    return all(bool((spans.lo == NONE).all()) and not spans.causes for spans in axes)


def _widest(spans: Spans) -> int:
    return int(np.where(spans.lo < NONE, spans.hi - spans.lo + 1, 0).max())
