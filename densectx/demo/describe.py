"""What the page is told of the model and the limits before any picture is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from densectx.demo.examples import examples
from densectx.demo.field import field_of
from densectx.demo.uploads import Uploads
from densectx.model import DenseModel


def describe(name: str, model: DenseModel, tasks: Sequence[str], device: str, uploads: Uploads) -> dict[str, Any]:
    """In JSON types.

    Args:
        name: of the model, as it was given: the last part of a path only.
        model: the model.
        tasks: keys that are offered.
        device: where it runs.
        uploads: for the limits.
    """
    return {
        "name": name,
        "device": device,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tasks": [_task(model, key) for key in tasks],
        "limits": {"bytes": uploads.max_bytes, "pixels": uploads.max_pixels},
        "examples": [{"name": key, "title": example.title} for key, example in examples().items()],
    }


def _task(model: DenseModel, key: str) -> dict[str, Any]:
    task = model.task(key)
    return {
        "key": key,
        "output": task.output,
        "scale": task.scale,
        "options": [
            {"name": name, "default": default, "estimated": name in task.estimators}
            for name, default in task.options.items()
        ],
        "field": field_of(model, key),
    }
