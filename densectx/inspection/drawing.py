"""The pictures of an inspection and its numbers, as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from densectx.errors import StorageError
from densectx.inspection.kernels import gallery
from densectx.inspection.pictures import figure1, gallery_picture, growth, heat_map
from densectx.inspection.report import Report

_ROWS: Final = 24  # layers that one picture has room for


def write(report: Report, folder: Path) -> list[Path]:
    """Write ``inspect.json`` and the pictures; returns the files.

    ``figure1.png`` the context's layers (the paper's where there is no dilated context), ``growth.png`` the field by
    layer, ``gallery.png`` equivalent kernels, ``effective_field.png`` a heat map where one was computed
    (``effective_field.TASK.png`` for each of several tasks).

    Raises:
        StorageError: the folder cannot be written.
    """
    pictures = {"figure1.png": _figure(report.content), "growth.png": _growth(report.content)}
    pictures["gallery.png"] = gallery_picture(gallery(seed=0))
    for key, values in report.maps.items():
        name = "effective_field.png" if len(report.maps) == 1 else f"effective_field.{key}.png"
        task = report.content["tasks"][key]
        pictures[name] = heat_map(
            values,
            f"What an answer of {key} weighs its input with",
            field=task["answer"]["field"][0],
            effective=task["effective"]["side"],
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            picture.save(folder / name)
        (folder / "inspect.json").write_text(json.dumps(report.content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    return [folder / name for name in (*pictures, "inspect.json")]


def _figure(content: Mapping[str, Any]) -> Image.Image:
    dilated = [entry["dilations"] for entry in content["contexts"].values() if entry["dilations"]]
    return figure1(dilated[0]) if dilated else figure1()


def _growth(content: Mapping[str, Any]) -> Image.Image:
    """Of the first task's layers, the last one of each field."""
    task = next(iter(content["tasks"].values()))
    fields: dict[float | None, tuple[str, float]] = {}
    answer = [task["answer"]] if "answer" in task else []
    for layer in (*task["layers"], *answer):
        side = layer["field"][0]
        name = "the answer" if layer["operation"] == "output" else f"{_short(layer['layer'])}, {layer['operation']}"
        if layer["field"][0] not in fields or layer in answer:
            fields[side] = (name, float("inf") if side is None else float(side))
    found = _thinned(list(fields.values()))
    return growth(found or [("the answer", 1.0)], "Receptive field by layer", "pixels")


def _thinned(rows: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    if len(rows) <= _ROWS:
        return list(rows)
    return [rows[round(at * (len(rows) - 1) / (_ROWS - 1))] for at in range(_ROWS)]


def _short(layer: str) -> str:
    return ".".join(layer.split(".")[-3:])
