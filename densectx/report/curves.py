"""The course of training as charts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from densectx.metrics.classes import class_keys
from densectx.model import DenseModel
from densectx.report.chart import Line, chart
from densectx.report.conflicts import PREFIX
from densectx.report.formats import number
from densectx.report.history import History, Series
from densectx.report.markup import Html, tag
from densectx.report.page import Section, scrolled

_CHARTS: Final = 4  # of measures a task; the task's own comes first


def curves(history: History, model: DenseModel | None) -> Section | None:
    """Loss and measures of every task, the rate of learning, and whatever else was logged."""
    left = {key: series for key, series in history.series.items() if key != "epoch" and not key.startswith(PREFIX)}
    blocks = []
    for number_, task in enumerate(_tasks(left, model)):
        charts = _charts_of(task, left, model, f"c{number_}")
        if charts:
            blocks.append(tag("h3", task, id=f"curves-{number_}"))
            blocks.append(tag("div", charts, class_="plots"))
    other = [key for key in left if not re.match(r"(train|val)/[^/]+/", key)]
    if other:
        rates = [chart(_title(key), [Line(key, left[key])], f"o{i}") for i, key in enumerate(other)]
        blocks += [
            tag("h3", "Learning rate" if all(k.startswith("lr-") for k in other) else "Learning rate and others")
        ]
        blocks.append(tag("div", rates, class_="plots"))
    if not blocks:
        return None
    return Section("curves", "Curves", [*blocks, _table(history)])


def _tasks(series: Mapping[str, Series], model: DenseModel | None) -> list[str]:
    """In the order of the model."""
    found = dict.fromkeys(key.split("/")[1] for key in series if re.match(r"(train|val)/[^/]+/", key))
    order = list(model.tasks) if model is not None else []
    return [*(key for key in order if key in found), *(key for key in found if key not in order)]


def _charts_of(task: str, series: Mapping[str, Series], model: DenseModel | None, identity: str) -> list[Html]:
    score, baseline, classes = "", "", set[str]()
    if model is not None and task in model.tasks:
        part = model.task(task)
        score, baseline = part.score.metric, part.score.baseline
        names = model.config.get("sources", {}).get(part.source, {}).get("classes", [])
        classes = {*class_keys("iou", names), *class_keys("boundary_iou", names)}
    start = f"val/{task}/"
    measured = {key.removeprefix(start): found for key, found in series.items() if key.startswith(start)}
    metrics = {key: found for key, found in measured.items() if key not in classes}
    trivial = {f"{key}_{baseline}" for key in metrics} & metrics.keys()
    others = [key for key in metrics if key not in trivial and key != score and not _variant(key, metrics)]
    shown = [key for key in (score, *others) if key in metrics][:_CHARTS]
    charts = []
    losses = {key: found for key, found in series.items() if key.startswith(f"train/{task}/")}
    for place, (key, found) in enumerate(losses.items()):
        name = key.rpartition("/")[2]
        charts.append(chart(f"{name} (training)", [Line(name, found, smooth=True)], f"{identity}l{place}"))
    for place, key in enumerate(shown):
        lines = [Line(key, metrics[key])]
        if (other := f"{key}_{baseline}") in trivial:
            lines.append(Line(f"trivial answer: {baseline}", metrics[other], baseline=True))
        charts.append(chart(f"{key} (validation)", lines, f"{identity}v{place}"))
    return charts


def _variant(key: str, metrics: Mapping[str, Series]) -> bool:
    """Whether a key is another one with something behind it (``psnr_gray``): said in the table, not drawn."""
    return any(key != other and key.startswith(f"{other}_") for other in metrics)


def _title(key: str) -> str:
    return f"learning rate ({key.removeprefix('lr-')})" if key.startswith("lr-") else key


def _table(history: History) -> Html | None:
    """Every validation's numbers, for those who want to read them off."""
    rows = {step + 1: row for step, row in history.rows.items() if any(key.startswith("val/") for key in row)}
    if not rows:
        return None
    columns = list(dict.fromkeys(key for row in rows.values() for key in row if key.startswith("val/")))
    steps = list(rows)
    head = tag(
        "tr", tag("th", "metric", scope="col"), [tag("th", f"step {step}", scope="col", class_="n") for step in steps]
    )
    body = [
        tag(
            "tr",
            tag("th", tag("code", key.removeprefix("val/")), scope="row"),
            [tag("td", number(rows[step].get(key, float("nan"))), class_="n") for step in steps],
        )
        for key in columns
    ]
    table = tag("table", tag("thead", head), tag("tbody", body))
    summary = tag("summary", f"All numbers of {len(steps)} validation{'s' * (len(steps) != 1)}")
    return tag("details", summary, scrolled(table, "Numbers of all validations"))
