"""What the answers of a task depend on: the geometry of a whole model, and what a tiler has to know of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast, final

from torch import Tensor, nn

from densectx.errors import ConfigError, unknown
from densectx.inspection.geometry import Extent, Geometry, LayerField, geometry
from densectx.model import DenseModel
from densectx.nn.precision import full


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
        stride: pixels at whose multiples windows start, see :func:`step_of`.
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
    return _geometry(model, task, lambda module, x: answer(module, task, x))


def _geometry(model: DenseModel, task: str, run: Callable[[nn.Module, Tensor], Tensor]) -> Geometry:
    if task not in model.tasks:
        raise ConfigError(unknown("task", task, model.tasks))
    side = step_of(model, task)
    return geometry(model, (1, model.task(task).channels, side, side), run)


def answer(model: nn.Module, task: str, x: Tensor) -> Tensor:
    """A task's input to what ``predict`` returns for it, in the precision of the model.

    Args:
        model: a :class:`densectx.model.DenseModel`, or a copy of one.
        task: its key.
        x: (B, channels, H, W), of sizes that :func:`step_of` divides.
    """
    dense = cast("DenseModel", model)
    return dense.task(task).postprocess(full(dense({task: x})[task]), x)


def step_of(model: DenseModel, task: str) -> int:
    """Pixels of a task's input after which the model's grid and what the task makes of a picture begin anew."""
    return math.lcm(model.stride, model.task(task).period) * model.task(task).input_scale


def with_trunk(model: nn.Module) -> nn.Module:
    """A copy that is being traced, without its ablation: it looks no less far.

    The zeros that pad maps of a zeroed trunk are no part of a field, and yet answers near a border are others.
    """
    cast("DenseModel", model).ablate = None
    return model


def halo(model: DenseModel, task: str) -> Halo:
    """What a window has to have around the part of it that counts, see :class:`Halo`.

    Args:
        model: as for :func:`task_geometry`.
        task: its key.

    Raises:
        ConfigError: as :func:`task_geometry`.
    """
    output = _geometry(model, task, lambda module, x: answer(with_trunk(module), task, x)).outputs[0]
    return Halo(0, 0, 0, 0, (1, 1), step_of(model, task)) if output is None else halo_of(model, task, output)


def halo_of(model: DenseModel, task: str, output: LayerField) -> Halo:
    """The same, of a model without an ablation, from what :func:`task_geometry` said of the answer."""
    scale, smaller = model.task(task).scale, model.task(task).input_scale
    top, bottom = _sides(output.h, scale, smaller)
    left, right = _sides(output.w, scale, smaller)
    periods = [1 if extent is None else extent.period for extent in (output.h, output.w)]
    return Halo(left, right, top, bottom, (periods[0], periods[1]), step_of(model, task), output.causes)


def _sides(extent: Extent | None, scale: int, smaller: int) -> tuple[float, float]:
    if extent is None or extent.causes:
        return math.inf, math.inf
    places: Sequence[int] = [phase * smaller // scale for phase in range(extent.period)]
    before = max(place - first for place, first in zip(places, extent.first, strict=True))
    behind = max(last - place for place, last in zip(places, extent.last, strict=True))
    return max(before, 0), max(behind, 0)
