"""Segmentation taken apart: each class, and which ones are taken for which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torchmetrics import Metric

from densectx.inspection.colours import sequential
from densectx.metrics import ConfusionMetrics, LabelMetrics
from densectx.report.formats import grouped, percent
from densectx.report.images import embedded
from densectx.report.markup import Html, tag
from densectx.report.page import scrolled

_TABLE: Final = 24  # classes up to which the confusion matrix is a table; of more it is a picture
_PAIRS: Final = 8  # confusions that are named
_PALE: Final = 0.55  # share from which on a cell is so dark that its number is light

Palette = Sequence[Sequence[int]]


def classes(metric: Metric, names: Sequence[str], palette: Palette) -> list[Html]:
    """The table of classes and the confusion matrix; nothing for other metrics, or where nothing was labelled."""
    if isinstance(metric, ConfusionMetrics):
        matrix = metric.confusion.double().cpu()
        if not matrix.sum():
            return []
        hits, truth, answer = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        table = _table(names, palette, hits, truth, answer, float(matrix.sum()))
        return [
            tag(
                "div",
                tag("div", tag("h3", "Classes"), table),
                tag("div", tag("h3", "Confusion matrix"), _confusion(matrix, names, palette)),
                class_="beside",
            ),
            _pairs(matrix, names),
        ]
    if isinstance(metric, LabelMetrics):
        tables = metric.tables.double().cpu()
        if not tables.sum():
            return []
        hits, truth, answer = tables[:, 1, 1], tables[:, 1].sum(1), tables[:, :, 1].sum(1)
        return [tag("h3", "Classes"), _table(names, palette, hits, truth, answer, float(tables.sum() / len(names)))]
    return []


def _table(names: Sequence[str], palette: Palette, hits: Tensor, truth: Tensor, answer: Tensor, total: float) -> Html:
    """Intersection over union, precision, recall and shares from counts (K,), best first."""
    union = truth + answer - hits
    iou, precision, recall = (100 * hits / part for part in (union, answer, truth))
    rows = []
    for index in sorted(range(len(names)), key=lambda i: (math.isnan(iou[i]), -iou[i].nan_to_num().item())):
        value = float(iou[index])
        bar = tag("span", class_="bar", style=f"width:{0 if math.isnan(value) else value:.1f}%")
        rows.append(
            tag(
                "tr",
                tag("th", _swatch(palette, index), names[index], scope="row"),
                tag("td", percent(value), tag("span", bar, class_="track", aria_hidden="true"), class_="n barred"),
                [tag("td", percent(float(part[index])), class_="n") for part in (precision, recall)],
                [tag("td", percent(float(100 * part[index] / total)), class_="n") for part in (truth, answer)],
                tag("td", grouped(int(truth[index])), class_="n"),
            )
        )
    head = ["class", "IoU", "precision", "recall", "truth", "answers", "pixels"]
    cells = [tag("th", name, scope="col", class_="n" if i else None) for i, name in enumerate(head)]
    caption = tag(
        "caption", "In percent; truth and answers: shares of all pixels. A class without a number is in neither."
    )
    table = tag("table", caption, tag("thead", tag("tr", cells)), tag("tbody", rows), class_="classes")
    return scrolled(table, "Classes")


def _confusion(matrix: Tensor, names: Sequence[str], palette: Palette) -> Html:
    """(K, K) pixels by [truth, answer] -> shares of each row."""
    shares = matrix / matrix.sum(1, keepdim=True).clamp_min(1)
    if len(names) > _TABLE:
        side = max(1, 480 // len(names))
        pixels = torch.from_numpy(sequential(shares.numpy())).permute(2, 0, 1).float() / 255
        large = pixels.repeat_interleave(side, 1).repeat_interleave(side, 2)
        words = (
            f"Confusion matrix of {len(names)} classes: rows are the truth, columns the answer; dark 0, light 100 %."
        )
        return tag("figure", embedded(large, words), tag("figcaption", words), class_="single")
    rows = []
    for index, row in enumerate(shares.tolist()):
        cells = [_cell(share, index == column) for column, share in enumerate(row)]
        head = tag("th", _swatch(palette, index), names[index], scope="row")
        rows.append(
            tag("tr", head, cells if matrix[index].sum() else tag("td", "not in the truth", colspan=len(names)))
        )
    columns = [tag("th", tag("span", name), _swatch(palette, i), scope="col") for i, name in enumerate(names)]
    corner = tag(
        "th", "truth \N{DOWNWARDS ARROW}", tag("br"), "answer \N{RIGHTWARDS ARROW}", scope="col", class_="corner"
    )
    table = tag(
        "table",
        tag("caption", "Of every 100 pixels of a class, how many were taken for which; the diagonal is right."),
        tag("thead", tag("tr", corner, columns)),
        tag("tbody", rows),
        class_="confusion",
    )
    return scrolled(table, "Confusion matrix")


def _cell(share: float, right: bool) -> Html:
    shown = f"{100 * share:.0f}" if share >= 0.005 else "\N{MIDDLE DOT}"
    kinds = ["right" if right else "wrong", *(["strong"] if share >= _PALE else [])]
    return tag("td", shown, class_=" ".join(kinds), style=f"--share:{share:.3f}")


def _pairs(matrix: Tensor, names: Sequence[str]) -> Html:
    """The confusions that cost most pixels."""
    wrong = matrix - matrix.diagonal().diag()
    values, places = wrong.flatten().topk(min(_PAIRS, wrong.numel()))
    total = float(matrix.sum())
    items = [
        tag(
            "li",
            tag("b", names[at // len(names)]),
            " taken for ",
            tag("b", names[at % len(names)]),
            f": {value / total:.2%}",
        )
        for value, at in zip(values.tolist(), places.tolist(), strict=True)
        if value
    ]
    if not items:
        return Html("")
    return tag("div", tag("p", "What costs most, of all pixels:"), tag("ol", items, class_="pairs"))


def _swatch(palette: Palette, index: int) -> Html | None:
    if index >= len(palette):
        return None
    red, green, blue = (min(255, max(0, int(value))) for value in palette[index])
    return tag("span", class_="chip", style=f"background:rgb({red},{green},{blue})", aria_hidden="true")
