"""Best and worst samples side by side: input, answer, truth, and where the answer is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from densectx.inspection.colours import sequential
from densectx.report.chart import Line, chart
from densectx.report.errors import MEANING, ErrorMap
from densectx.report.formats import number
from densectx.report.history import Series
from densectx.report.images import embedded
from densectx.report.markup import Html, tag
from densectx.report.measure import Measured
from densectx.report.page import note
from densectx.report.ranking import Scored
from densectx.tasks.base import Task

_WRONG = (0.86, 0.08, 0.24)
_NAMES = ("Input", "Answer", "Truth")


def gallery(key: str, task: Task, measured: Measured) -> list[Html]:
    """The worst and the best samples."""
    worst, best = measured.ranking.ends()
    shown = [*worst, *best]
    if not shown:
        return [note("No sample of the split has a label for this task.", kind="warning")]
    limit = _limit(shown)
    parts = []
    for title, ends in (("Worst", worst), ("Best", best)):
        if ends:
            parts.append(tag("h3", f"{title} of {len(measured.scored)}"))
            parts += [_row(key, task, one, limit) for one in ends]
    return [*parts, *_scale(shown, limit)]


def spread(task: Task, measured: Measured, identity: str) -> Html | None:
    """Every sample's score, sorted, with what the trivial answer has there; nothing of a single one."""
    if len(measured.scored) < 2:
        return None
    score = task.score
    ordered = sorted(measured.scored, key=lambda one: one.score)
    ranks = range(1, len(ordered) + 1)
    lines = [Line(score.metric, Series(tuple(ranks), tuple(one.score for one in ordered)))]
    trivial = [(rank, one.trivial) for rank, one in zip(ranks, ordered, strict=True) if np.isfinite(one.trivial)]
    if trivial:
        series = Series(tuple(rank for rank, _ in trivial), tuple(value for _, value in trivial))
        lines.append(Line(f"trivial answer: {score.baseline}", series, baseline=True))
    title = f"{score.metric} of each of {len(ordered)} images, sorted"
    return chart(title, lines, identity, over="image")


def _row(key: str, task: Task, one: Scored, limit: float) -> Html:
    assert one.error is not None
    known = bool(one.error.values.isfinite().any())
    pictures = dict(zip(_NAMES, one.pictures, strict=False))
    if known:
        pictures["Error"] = _coloured(one.error, one.pictures[0], limit)
    figures = [
        tag(
            "figure",
            embedded(picture, f"{name} of {key} for {one.name}"),
            tag("figcaption", name),
        )
        for name, picture in pictures.items()
    ]
    score = task.score
    trivial = f", {score.baseline} {number(one.trivial)}" if np.isfinite(one.trivial) else ""
    mean = ""
    if known:
        value = float(one.error.values.nanmean())
        mean = f", {value:.1%} of the pixels wrong" if one.error.kind == "classes" else f", mean error {number(value)}"
    caption = [tag("strong", f"{score.metric} {number(one.score)}"), trivial, mean, tag("br"), tag("code", one.name)]
    return tag("figure", tag("figcaption", caption), tag("div", figures, class_="quad"), class_="sample")


def _limit(shown: Sequence[Scored]) -> float:
    """What the brightest colour stands for: few pixels of the samples shown lie above."""
    values = [one.error.values.flatten() for one in shown if one.error is not None]
    known = torch.cat([value[value.isfinite()] for value in values])
    return max(float(known.quantile(0.995)) if 0 < known.numel() < 2**24 else 1.0, 1e-6)


def _coloured(error: ErrorMap, image: Tensor, limit: float) -> Tensor:
    """(3, H, W): wrong pixels on the dimmed input, or a map of heat; what is unknown is gray."""
    values = error.values
    unknown = values.isnan()
    if error.kind == "classes":
        base = image.mean(0, keepdim=True).expand(3, -1, -1) * 0.55 + 0.25
        if base.shape[1:] != values.shape:
            base = torch.nn.functional.interpolate(base[None], values.shape, mode="bilinear")[0]
        wrong = torch.tensor(_WRONG).view(3, 1, 1)
        picture = torch.where(values > 0, wrong, base)
        return torch.where(unknown, base * 0.35, picture)
    heat = (
        torch.from_numpy(sequential((values.nan_to_num() / limit).clamp(0, 1).numpy())).permute(2, 0, 1).float() / 255
    )
    return torch.where(unknown, 0.5, heat)


def _scale(shown: Sequence[Scored], limit: float) -> list[Html]:
    """What the colours of the error maps mean, where there are any."""
    error = next((one.error for one in shown if one.error is not None and one.error.values.isfinite().any()), None)
    if error is None:
        return []
    if error.kind == "classes":
        chip = tag("span", class_="chip wrong-chip", aria_hidden="true")
        return [note("Error: ", chip, "wrong class; dark: not labelled.")]
    bar = np.repeat(sequential(np.linspace(0, 1, 256))[None], 10, 0)
    picture = torch.from_numpy(bar).permute(2, 0, 1).float() / 255
    words = f"Error: {MEANING[error.kind]}. Gray: not known."
    ends = [
        tag("span", "0"),
        embedded(picture, "scale of colours, dark to light"),
        tag("span", f"{number(limit)} and more"),
    ]
    return [tag("div", tag("p", words, class_="note"), tag("div", ends, class_="ramp"))]
