"""What the gradients of tasks thought of each other, where the run measured it (``balance/...``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from densectx.report.chart import Line, chart
from densectx.report.formats import number
from densectx.report.history import History, Series
from densectx.report.markup import Html, tag
from densectx.report.page import Section, note, scrolled

PREFIX: Final = "balance/"
_HEAD: Final = ("gradients of", "mean cosine", "last", "steps against each other")


def conflict(history: History) -> Section | None:
    """Cosines of every two tasks, lengths of their gradients, effective weights; None where nothing was logged."""
    cosines = _logged(history, "cos")
    lengths, weights = _logged(history, "norm"), _logged(history, "weight")
    if not cosines and not lengths:
        return None
    charts = [
        chart(f"cosine: {_pair(name)}", [Line(name, series, smooth=True)], f"g{index}", zero=True)
        for index, (name, series) in enumerate(cosines.items())
    ]
    for identity, title, series in (("gn", "length of gradients", lengths), ("gw", "effective weights", weights)):
        if series:
            lines = [Line(task, one, smooth=True) for task, one in series.items()]
            charts.append(chart(title, lines, identity, zero=any(min(one.values) < 0 for one in series.values())))
    body: list[Html | str] = [
        note(
            "Gradients of weight * loss with respect to the last weights (or features) that the tasks share. An"
            " effective weight is what the loss, or its gradient in the shared part, was multiplied by."
        ),
        tag("div", charts, class_="plots"),
    ]
    if cosines:
        body.append(scrolled(_table(cosines), "Tasks in conflict"))
    return Section("conflict", "Tasks in conflict", body)


def _logged(history: History, kind: str) -> dict[str, Series]:
    start = f"{PREFIX}{kind}/"
    return {key.removeprefix(start): series for key, series in history.series.items() if key.startswith(start)}


def _pair(name: str) -> str:
    return " and ".join(name.split("/"))


def _table(cosines: Mapping[str, Series]) -> Html:
    rows = []
    for name, series in cosines.items():
        values = series.values
        against = sum(value < 0 for value in values) / len(values)
        cells = [number(sum(values) / len(values)), number(values[-1]), f"{against:.0%}"]
        head = tag("th", tag("code", _pair(name)), scope="row")
        rows.append(tag("tr", head, [tag("td", cell, class_="n") for cell in cells]))
    titles = [tag("th", name, scope="col", class_="n" if index else None) for index, name in enumerate(_HEAD)]
    caption = tag("caption", "1: the tasks want the same, 0: they do not touch, below 0: one undoes the other.")
    return tag("table", caption, tag("thead", tag("tr", titles)), tag("tbody", rows))
