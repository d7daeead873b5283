"""What every pixel of an answer sees, for the page to draw."""

from __future__ import annotations

from typing import Any

from densectx.errors import ConfigError
from densectx.inspection.extent import Extent
from densectx.inspection.halo import task_geometry
from densectx.model import DenseModel


def field_of(model: DenseModel, key: str) -> dict[str, Any] | None:
    """The receptive field of a task's answer; None where it cannot be derived.

    Args:
        model: the model.
        key: of the task.

    Returns:
        ``{"h": ..., "w": ...}``, each None where an answer sees the whole side of the picture, else ``{period, step,
        first, last}`` as :class:`densectx.inspection.extent.Extent` has them, in pixels of the picture.
    """
    try:
        (output,) = task_geometry(model, key).outputs
    except ConfigError:  # an operation that cannot be followed
        return None
    if output is None:
        return None
    scale = model.task(key).input_scale
    return {"h": _side(output.h, scale), "w": _side(output.w, scale)}


def _side(extent: Extent | None, scale: int) -> dict[str, Any] | None:
    """Of an axis, in pixels of the picture (the network's input is ``scale`` times as large)."""
    if extent is None or extent.causes:
        return None
    return {
        "period": extent.period,
        "step": extent.step / scale,
        "first": [first / scale for first in extent.first],
        "last": [last / scale for last in extent.last],
    }
