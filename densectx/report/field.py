"""What one pixel of an answer looks at: to scale, around a sample, and how it grows from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, cast, final

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from densectx.errors import ConfigError
from densectx.inspection.geometry import Geometry, LayerField, geometry
from densectx.inspection.halo import step_of
from densectx.model import DenseModel
from densectx.nn.precision import full
from densectx.report.chart import Line, chart
from densectx.report.history import Series
from densectx.report.images import embedded
from densectx.report.markup import Html, tag
from densectx.report.measure import Measured
from densectx.report.page import Section, note, scrolled

_MARGIN: Final = 1.04  # of the drawing around what is drawn
_NAMED: Final = 3  # global layers that are named


@final
class _Field(NamedTuple):
    """Of a task: sides in pixels of its input without global layers, None where nothing else leads there; and those."""

    height: int | None
    width: int | None
    causes: tuple[str, ...]


def receptive_field(model: DenseModel, measured: Mapping[str, Measured]) -> Section:
    """The fields of all tasks, drawn around a sample."""
    try:
        fields, layers = _fields(model)
    except ConfigError as error:  # an operation that cannot be followed
        return Section("field", "Receptive field", note(str(error), kind="warning"))
    figures = [figure for figure in (_around(fields, measured), _growth(layers)) if figure is not None]
    rows = [
        tag(
            "tr",
            tag("th", key, scope="row"),
            tag("td", _said(field), class_="n"),
            tag("td", _some(field.causes), class_="words"),
        )
        for key, field in fields.items()
    ]
    head = [
        ("task", None),
        ("height x width in pixels of its input", "n"),
        ("layers that see the whole picture beside that", None),
    ]
    cells = [tag("th", name, scope="col", class_=kind) for name, kind in head]
    table = tag("table", tag("thead", tag("tr", cells)), tag("tbody", rows))
    return Section(
        "field", "Receptive field", [tag("div", figures, class_="field"), scrolled(table, "Receptive fields")]
    )


def _fields(model: DenseModel) -> tuple[dict[str, _Field], list[LayerField]]:
    """By task; and the layers on the way to the first one. Tasks with inputs of equal shape share a pass."""
    fields: dict[str, _Field] = {}
    groups: dict[tuple[int, int], list[str]] = {}
    for key in model.tasks:
        groups.setdefault((model.task(key).channels, step_of(model, key)), []).append(key)
    layers: list[LayerField] = []
    for (channels, side), keys in groups.items():
        found = _geometry(model, channels, side, keys)
        for key, output in zip(keys, found.outputs, strict=True):
            if output is not None:
                fields[key] = _Field(*_local(output), output.causes)
        first = f"tasks.{keys[0]}."
        layers = layers or [
            one for one in found.layers if not one.layer.startswith("tasks.") or one.layer.startswith(first)
        ]
    return {key: fields[key] for key in model.tasks if key in fields}, layers


def _geometry(model: DenseModel, channels: int, side: int, keys: Sequence[str]) -> Geometry:
    def run(module: nn.Module, x: Tensor) -> Any:
        copied = cast("DenseModel", module)
        outputs = copied(dict.fromkeys(keys, x))
        return tree_leaves([copied.task(key).postprocess(full(outputs[key]), x) for key in keys])

    return geometry(model, (1, channels, side, side), run)


def _around(fields: Mapping[str, _Field], measured: Mapping[str, Measured]) -> Html | None:
    """The squares that the middle of a sample sees, to scale."""
    key = next((key for key in fields if key in measured and measured[key].ranking.ends()[0]), None)
    if key is None:
        return None
    sample = measured[key].ranking.ends()[0][0]
    height, width = sample.size
    sides = [side for field in fields.values() for side in (field.height, field.width) if side is not None]
    space = max([height, width, *sides]) * _MARGIN
    x, y, unit = (space - width) / 2, (space - height) / 2, space / 400
    picture = embedded(sample.pictures[0], "", element="image", x=x, y=y, width=width, height=height)
    squares, entries = [], []
    different = {(field.height, field.width) for field in fields.values() if field.height and field.width}
    for index, (high, wide) in enumerate(sorted(different, reverse=True)):
        names = ", ".join(name for name, field in fields.items() if (field.height, field.width) == (high, wide))
        said = f"{high} x {wide}"
        entries.append(
            tag("li", tag("span", class_=f"swatch s{_COLOURS[index % 4]}", aria_hidden="true"), f"{names}: {said}")
        )
        squares.append(
            tag(
                "rect",
                x=f"{(space - wide) / 2:.1f}",
                y=f"{(space - high) / 2:.1f}",
                width=wide,
                height=high,
                class_=f"square s{_COLOURS[index % 4]}",
                stroke_width=f"{2.5 * unit:.2f}",
            )
        )
    words = f"The middle pixel of an answer sees what lies in its square; the picture is {height} x {width}, to scale."
    drawing = tag(
        "svg",
        tag("title", "Receptive fields around a sample", id="field-t"),
        tag("desc", words, id="field-d"),
        picture,
        squares,
        tag(
            "circle", cx=space / 2, cy=space / 2, r=f"{4 * unit:.2f}", class_="middle", stroke_width=f"{1.5 * unit:.2f}"
        ),
        viewBox=f"0 0 {space:.1f} {space:.1f}",
        role="img",
        aria_labelledby="field-t",
        aria_describedby="field-d",
        class_="around",
    )
    legend = tag("ul", entries, class_="legend")
    return tag("figure", drawing, legend, tag("figcaption", words))


_COLOURS = (0, 2, 3, 4)


def _growth(layers: Sequence[LayerField]) -> Html | None:
    """The field after each layer on the way to the first task."""
    sides: list[int] = []
    for one in layers:
        height, width = _local(one)
        if height is not None and width is not None:
            sides.append(max([height, width, *sides[-1:]]))  # branches such as the shortcuts of a ResNet see less
    if len(sides) < 2:
        return None
    series = Series(tuple(range(1, len(sides) + 1)), tuple(sides))
    return chart("Side of the field in pixels, layer by layer", [Line("field", series)], "fg", over="layer")


def _said(field: _Field) -> str:
    return " x ".join("all" if side is None else str(side) for side in (field.height, field.width))


def _some(causes: Sequence[str]) -> str:
    more = f" and {len(causes) - _NAMED} more" if len(causes) > _NAMED else ""
    return (", ".join(causes[:_NAMED]) + more) or "none"


def _local(layer: LayerField) -> tuple[int | None, int | None]:
    height, width = (None if extent is None else extent.local for extent in (layer.h, layer.w))
    return height, width
