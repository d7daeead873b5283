"""What the answers of a task depend on: the geometry of a whole model, and what a tiler has to know of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from densectx.errors import ConfigError, unknown
from densectx.inspection.geometry import Extent, Geometry, LayerField, geometry
from densectx.model import DenseModel


@final
@dataclass(frozen=True)
class Halo:
    """Pixels of a task's input around the place of an answer that the answer depends on, over all its phases.

    Answer q (along one axis) lies at input pixel ``floor(q * input_scale / scale)`` and depends on no pixel further
    than ``left`` before that place or ``right`` behind it, the borders of the input apart; both bounds are reached by
    at least one phase, q modulo ``period``.

    Hence, for a model in evaluation mode and a window of the input that starts at a multiple of ``stride`` and, unless
    it ends where the input does, has a multiple of ``stride`` as its length: answers that lie at least ``left`` pixels
    from its start and more than ``right`` pixels from its end, where these are not borders of the input itself, are
    those for the whole input, up to the rounding of other orders of summation. A window that touches a border of the
    input must reach ``max(left, right)`` beyond the place on the other side, since a model that mirrors its input
    looks as far to the inside there. The same holds for rows with ``top`` and ``bottom``.

    Attributes:
        left: pixels, infinite where a layer is global.
        right: pixels.
        top: pixels.
        bottom: pixels.
        period: (rows, columns) of answers after which the pattern repeats.
        stride: of the model, at whose multiples windows start.
        causes: layers that are global; empty where the halo is finite.
    """

    left: float
    right: float
    top: float
    bottom: float
    period: tuple[int, int]
    stride: int
    causes: tuple[str, ...] = ()


def task_geometry(model: DenseModel, task: str) -> Geometry:
    """Every layer that runs for a task, with fields in pixels of the task's input, and the answer as the one output.

    Args:
        model: of any device, meta included; unchanged.
        task: its key.

    Raises:
        ConfigError: no such task, or as :func:`densectx.inspection.geometry.geometry`.
    """
    if task not in model.tasks:
        raise ConfigError(unknown("task", task, model.tasks))
    side = model.stride * model.task(task).input_scale

    def run(module: nn.Module, x: Tensor) -> Any:
        return module({task: x})[task]

    return geometry(model, (1, model.task(task).channels, side, side), run)


def halo(model: DenseModel, task: str) -> Halo:
    """What a window has to have around the part of it that counts, see :class:`Halo`.

    Args:
        model: as for :func:`task_geometry`.
        task: its key.

    Raises:
        ConfigError: as :func:`task_geometry`.
    """
    output = task_geometry(model, task).outputs[0]
    return Halo(0, 0, 0, 0, (1, 1), model.stride) if output is None else halo_of(model, task, output)


def halo_of(model: DenseModel, task: str, output: LayerField) -> Halo:
    """The same from what :func:`task_geometry` said of the answer."""
    scale, smaller = model.task(task).scale, model.task(task).input_scale
    top, bottom = _sides(output.h, scale, smaller)
    left, right = _sides(output.w, scale, smaller)
    periods = [1 if extent is None else extent.period for extent in (output.h, output.w)]
    return Halo(left, right, top, bottom, (periods[0], periods[1]), model.stride, output.causes)


def _sides(extent: Extent | None, scale: int, smaller: int) -> tuple[float, float]:
    if extent is None or extent.causes:
        return math.inf, math.inf
    places: Sequence[int] = [phase * smaller // scale for phase in range(extent.period)]
    before = max(place - first for place, first in zip(places, extent.first, strict=True))
    behind = max(last - place for place, last in zip(places, extent.last, strict=True))
    return max(before, 0), max(behind, 0)
