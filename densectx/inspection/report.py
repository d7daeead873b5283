"""All that ``densectx inspect`` says of a model, in plain JSON types."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from densectx.inspection.cost import cost
from densectx.inspection.coverage import coverage, suggest_dilations
from densectx.inspection.equivariance import ShiftError
from densectx.inspection.geometry import Extent, LayerField
from densectx.inspection.halo import answer, halo, halo_of, step_of, task_geometry
from densectx.inspection.kernels import is_kronecker
from densectx.inspection.measured import Measured, measured
from densectx.inspection.probes import effective_of_task, shifts_of_context, shifts_of_references, shifts_of_task
from densectx.inspection.subject import Subject
from densectx.model import DenseModel
from densectx.nn.context import Context, ContextModule

FORMAT: Final = 1


@final
@dataclass(frozen=True)
class Wishes:
    """What is asked for.

    Attributes:
        tasks: keys, None for all.
        size: (H, W) of the picture whose multiply-adds are counted.
        shifts: the largest shift, 0 for none.
        effective: side of the inputs for the effective field; None for what takes seconds, 0 for no field.
        field: a wished field of the context in cells, for which dilations are suggested.
        thorough: shifts of tasks whatever it costs.
    """

    tasks: Sequence[str] | None = None
    size: tuple[int, int] = (512, 512)
    shifts: int = 16
    effective: int | None = None
    field: int | None = None
    thorough: bool = False


@final
@dataclass
class Report:
    """What was found.

    Attributes:
        content: of ``--json``.
        maps: effective field of each task that has one, (H, W) with the largest value 1.
    """

    content: dict[str, Any]
    maps: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def inspect(subject: Subject, wishes: Wishes, say: Callable[[str], None] = lambda line: None) -> Report:
    """Look a model over.

    Args:
        subject: the model.
        wishes: what is asked for.
        say: takes a line on what is being done.

    Raises:
        ConfigError: an unknown task, an operation that cannot be followed, a field below 3.
    """
    model = subject.shell
    keys = list(model.tasks) if wishes.tasks is None else list(wishes.tasks)
    suggestion = None if wishes.field is None else _suggestion(wishes.field)
    geometries = {key: task_geometry(model, key) for key in keys}  # before anything that takes long
    found = cost(model, wishes.size, keys)
    content: dict[str, Any] = {
        "format": FORMAT,
        "name": subject.name,
        "kind": subject.kind,
        "stride": model.stride,
        "margin": model.margin,
        "size": list(wishes.size),
        "cost": {
            "parts": {name: part._asdict() for name, part in found.parts.items()},
            **found.total._asdict(),
            "macs_per_megapixel": round(found.macs_per_pixel * 1e6),
        },
        "tasks": {},
        "contexts": {},
        "references": {},
        "suggestion": suggestion,
        "skipped": [],
    }
    report = Report(content)
    say("weights ...")
    real = subject.real() if wishes.shifts or wishes.effective != 0 else None
    shifts = list(range(1, wishes.shifts + 1))
    for key in keys:
        say(f"task {key} ...")
        layers, output = geometries[key].layers, geometries[key].outputs[0]
        entry: dict[str, Any] = {"layers": [_layer(layer) for layer in layers]}
        content["tasks"][key] = entry
        if output is None:  # trunk_zero: the answer does not depend on the picture
            continue
        reach = halo_of(model, key, output) if model.ablate is None else halo(model, key)
        entry["answer"] = _layer(output)
        entry["halo"] = {side: _finite(getattr(reach, side)) for side in ("left", "right", "top", "bottom")}
        entry["measured"] = _measured(model, key, output)
        if real is not None and wishes.effective != 0:
            effective = effective_of_task(real, key, reach, wishes.effective)
            if effective is None:
                content["skipped"].append(
                    f"effective field of {key}: more than seconds; --effective PIXELS computes it"
                )
            else:
                report.maps[key] = effective.map
                entry["effective"] = {
                    "size": list(effective.map.shape),
                    "area": effective.area,
                    "side": effective.side,
                    "sigma": [_finite(sigma) for sigma in effective.sigma],
                }
        if real is not None and shifts:
            errors = shifts_of_task(real, key, reach, shifts, always=wishes.thorough)
            if errors is None:
                content["skipped"].append(f"shifts of {key}: more than seconds; --thorough computes them")
            entry["shifts"] = _shifts(errors)
    say("context ...")
    for name, module in (real or model).context.items():
        assert isinstance(module, Context)
        content["contexts"][name] = _context(model, module, shifts if real is not None else [])
    if shifts:
        content["references"] = {name: _shifts(errors) for name, errors in shifts_of_references(shifts).items()}
    return report


def _layer(layer: LayerField) -> dict[str, Any]:
    extents = (layer.h, layer.w)
    return {
        "layer": layer.layer,
        "operation": layer.operation,
        "channels": layer.channels,
        "field": [_finite(side) for side in layer.field],
        "local": [None if extent is None else extent.local for extent in extents],
        "stride": [None if extent is None else float(extent.stride) for extent in extents],
        "offset": [None if extent is None else extent.offset for extent in extents],
        "global": list(layer.causes),
    }


def _measured(model: DenseModel, key: str, output: LayerField) -> dict[str, Any] | None:
    """Along rows and columns; None for an infinite field, for which every size of input gives another one."""

    def run(module: nn.Module, x: Tensor) -> Tensor:
        return answer(module, key, x)

    found = {}
    for axis, (name, extent) in enumerate((("rows", output.h), ("columns", output.w))):
        if extent is None or extent.causes:
            return None
        found[name] = _measurement(
            measured(model, model.task(key).channels, step_of(model, key), extent, axis, run), extent
        )
    return found


def _measurement(one: Measured, extent: Extent) -> dict[str, Any]:
    return {
        "position": one.position,
        "first": one.first,
        "last": one.last,
        "field": one.field,
        "connected": one.connected,
        "expected": extent.local,
        "agrees": one.agrees,
    }


def _context(model: DenseModel, module: Context, shifts: Sequence[int]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": type(module).__name__,
        "channels": model.context_channels,
        "field": _finite(module.receptive_field),
        "dilations": None,
    }
    if isinstance(module, ContextModule):
        layers = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
        dilations, kernels = [m.dilation[0] for m in layers], [m.kernel_size[0] for m in layers]
        seen = coverage(dilations, kernels)
        entry |= {
            "dilations": dilations,
            "connected": seen.connected,
            "gridding": seen.gridding,
            "fields": [coverage(dilations[: n + 1], kernels[: n + 1]).field for n in range(len(layers))],
            "equivalent_kernel": seen.field,
            "kronecker": is_kronecker([m.weight for m in layers], dilations),
            "kernel_numbers": sum(k * k for k in kernels),
        }
    if shifts:
        entry["shifts"] = _shifts(shifts_of_context(module, model.context_channels, shifts))
    return entry


def _suggestion(wished: int) -> dict[str, Any]:
    dilations = suggest_dilations(wished)
    found = coverage(dilations)
    return {"wished": wished, "dilations": list(dilations), "field": found.field, "gridding": found.gridding}


def _shifts(errors: Sequence[ShiftError] | None) -> list[dict[str, Any]] | None:
    return None if errors is None else [error._asdict() for error in errors]


def _finite(value: float) -> float | int | None:
    """JSON has no infinity."""
    if not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() else float(value)
