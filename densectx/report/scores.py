"""Numbers of tasks beside those of their trivial answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, final

from densectx.metrics.classes import class_keys
from densectx.model import DenseModel
from densectx.report.chart import sparkline
from densectx.report.formats import difference, number
from densectx.report.history import History
from densectx.report.markup import Html, tag
from densectx.report.page import scrolled


@final
class Scores(NamedTuple):
    """Measures of tasks, and where they come from.

    Attributes:
        values: {task: {metric: value}}.
        origin: a sentence.
    """

    values: Mapping[str, Mapping[str, float]]
    origin: str


def cards(scores: Scores, model: DenseModel, history: History) -> Html | None:
    """A tile a task: its number, the trivial answer's, how it went."""
    tiles = []
    for key, values in scores.values.items():
        score = model.task(key).score
        value, other = (values.get(name, math.nan) for name in (score.metric, f"{score.metric}_{score.baseline}"))
        better = (value - other) * (1 if score.higher_is_better else -1)
        series = history.series.get(f"val/{key}/{score.metric}")
        against = [
            tag("span", difference(value, other), class_=f"delta {'good' if better > 0 else 'bad'}"),
            f" against {number(other)} ({score.baseline})",
        ]
        tiles.append(
            tag(
                "li",
                tag("span", key, class_="card-task"),
                tag("span", tag("strong", number(value)), f" {score.metric}", class_="card-value"),
                tag("span", against if math.isfinite(better) else "no trivial answer", class_="card-against"),
                sparkline(series) if series is not None and len(series.values) > 1 else None,
            )
        )
    return tag("ul", tiles, class_="cards") if tiles else None


def table(scores: Scores, model: DenseModel) -> Html:
    """One row a task: by which metric and convention it is judged, beside the trivial answer."""
    head = ["task", "metric", "value", "trivial answer", "its value", "difference", "measured by"]
    rows = []
    for key, values in scores.values.items():
        task = model.task(key)
        score = task.score
        value, other = (values.get(name, math.nan) for name in (score.metric, f"{score.metric}_{score.baseline}"))
        arrow = "\N{UPWARDS ARROW}" if score.higher_is_better else "\N{DOWNWARDS ARROW}"
        better = "higher is better" if score.higher_is_better else "lower is better"
        rows.append(
            tag(
                "tr",
                tag("th", key, scope="row"),
                tag("td", score.metric, " ", tag("span", arrow, title=better, role="img", aria_label=better)),
                tag("td", tag("strong", number(value)), class_="n"),
                tag("td", score.baseline),
                tag("td", number(other), class_="n"),
                tag("td", difference(value, other), class_="n"),
                tag("td", task.convention or f"see densectx show tasks {_name(model, key)}", class_="words"),
            )
        )
    numbers = {2, 4, 5}
    cells = [tag("th", name, scope="col", class_="n" if i in numbers else None) for i, name in enumerate(head)]
    body = tag("table", tag("caption", scores.origin), tag("thead", tag("tr", cells)), tag("tbody", rows))
    return scrolled(body, "Scores")


def _name(model: DenseModel, key: str) -> str:
    spec = model.config.get("tasks", {}).get(key, key)
    return str(spec.get("name", key)) if isinstance(spec, Mapping) else str(spec)


def measures(values: Mapping[str, float], model: DenseModel, key: str) -> Html:
    """All measures of a task but those of single classes, the trivial answer's beside them."""
    task = model.task(key)
    names = model.config.get("sources", {}).get(task.source, {}).get("classes", [])
    classes = {*class_keys("iou", names), *class_keys("boundary_iou", names)}
    baseline = task.score.baseline
    trivial = {name: f"{name}_{baseline}" for name in values if f"{name}_{baseline}" in values}
    rows = [
        tag(
            "tr",
            tag("th", tag("code", name), scope="row"),
            tag("td", number(value), class_="n"),
            tag("td", number(values[trivial[name]]) if name in trivial else "", class_="n"),
        )
        for name, value in values.items()
        if name not in classes and name not in trivial.values()
    ]
    head = [("measure", None), ("value", "n"), (f"trivial answer: {baseline}", "n")]
    cells = [tag("th", name, scope="col", class_=kind) for name, kind in head]
    return scrolled(tag("table", tag("thead", tag("tr", cells)), tag("tbody", rows)), f"Measures of {key}")
