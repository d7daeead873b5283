"""From a run folder to its page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

import densectx
from densectx.data.base import Split
from densectx.errors import ConfigError, DensectxError, StorageError
from densectx.model import DenseModel
from densectx.report import environment, settings
from densectx.report.classes import classes
from densectx.report.conflicts import conflict
from densectx.report.curves import curves
from densectx.report.field import receptive_field
from densectx.report.formats import grouped, size
from densectx.report.gallery import gallery, spread
from densectx.report.markup import Child, Html, tag
from densectx.report.measure import Measured, measure
from densectx.report.page import Section, note, page, scrolled
from densectx.report.run import Run, checkpoints, open_run
from densectx.report.scores import Scores, cards, measures, table

_SPLITS: Final[Mapping[Split, str]] = {"train": "training", "val": "validation", "test": "test"}


def write_report(
    run: str | Path,
    out: str | Path | None = None,
    *,
    split: Split = "val",
    limit: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Path, list[DensectxError]]:
    """Write the page of a run, with what can be had of it.

    Args:
        run: its folder, or one of its checkpoints; of a folder the best one is looked at.
        out: the file, null for ``report.html`` in the run folder.
        split: the samples that the model is looked at with.
        limit: samples of each source at most, 0 for all.
        device: where the model works.

    Returns:
        The file, and what could not be had (a damaged checkpoint, data that is not there); the page says so too.

    Raises:
        ConfigError: there is no such run, or the device is ``mps``.
        StorageError: the file cannot be written.
    """
    device = torch.device(device)
    if device.type == "mps":
        raise ConfigError("--device mps: Apple's GPU has no float64, in which metrics are summed; take cpu.")
    found = open_run(run)
    target = Path(out) if out is not None else found.folder / "report.html"
    text = render(found, split, limit, device)
    temporary = target.with_name(f"{target.name}.tmp.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror}; choose another -o.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target, found.missing


def render(run: Run, split: Split, limit: int, device: torch.device) -> str:
    """The page of a run; what cannot be had is added to ``run.missing`` and said."""
    model, data = run.model, run.data
    measured: dict[str, Measured] = {}
    if model is not None and data is not None:
        seed = data.seed
        dtype = _dtype(run.config, device)
        looked = run.attempt(lambda: measure(model.to(device), data, split, seed=seed, limit=limit, dtype=dtype))
        measured = looked or {}
    scores = _scores(run, split, measured)
    sections: list[Section | None] = []
    if model is not None and scores.values:
        sections.append(Section("scores", "Scores", table(scores, model)))
    sections.append(curves(run.history, model))
    if model is not None:
        sections += [
            _task(key, index, model, measured[key], scores.values.get(key, {}), split)
            for index, key in enumerate(model.tasks)
            if key in measured
        ]
    sections.append(conflict(run.history))
    if model is not None:
        sections.append(receptive_field(model, measured))
    if run.config:
        sections.append(settings.section(run.config))
    sections += [environment.section(run.folder, run.info), _checkpoints(run)]
    shown = [one for one in sections if one is not None]
    return page(f"{run.name} \N{MIDDLE DOT} densectx", _header(run, scores), shown)


def _dtype(config: Mapping[str, Any], device: torch.device) -> torch.dtype | None:
    """What the fit evaluated in, where this device can."""
    half = torch.float16 if device.type == "cuda" else None
    known = {"bf16": torch.bfloat16, "bf16-mixed": torch.bfloat16, "16": half, "16-mixed": half}
    return known.get(str((config.get("trainer") or {}).get("precision")))


def _scores(run: Run, split: Split, measured: Mapping[str, Measured]) -> Scores:
    """Those of the whole split: as the fit logged them, else as they were measured for this page."""
    step, logged = run.history.validation(run.step)
    of_tasks = {key: value for key, value in logged.items() if key.count("/") > 1}  # a user may log val/loss
    if split == "val" and of_tasks:
        values: dict[str, dict[str, float]] = {}
        for key, value in of_tasks.items():
            _, task, metric = key.split("/", 2)
            values.setdefault(task, {})[metric] = value
        known = run.model.tasks if run.model is not None else values
        return Scores(
            {k: v for k, v in values.items() if k in known},
            f"Of the validation after step {step}, as the fit logged it.",
        )
    model = run.model
    sources = {} if model is None else {model.task(key).source: one for key, one in measured.items()}
    looked, total = sum(one.looked for one in sources.values()), sum(one.total for one in sources.values())
    origin = f"Measured for this page on the {_SPLITS[split]} split"
    origin += "." if looked == total else f", {looked} of {total} samples: not the numbers of the whole split."
    return Scores({key: one.values for key, one in measured.items()}, origin)


def _task(
    key: str, index: int, model: DenseModel, measured: Measured, values: Mapping[str, float], split: Split
) -> Section:
    task = model.task(key)
    info = model.config.get("sources", {}).get(task.source, {})
    count = f"all {measured.total}" if measured.looked == measured.total else f"{measured.looked} of {measured.total}"
    origin = f"Classes and pictures: {count} samples of the {_SPLITS[split]} split, source "
    some = f", of which {measured.labelled} have its labels" if measured.labelled < measured.looked else ""
    body: list[Child] = [
        note(origin, tag("code", task.source), f"{some}."),
        tag(
            "div", measures(values or measured.values, model, key), spread(task, measured, f"s{index}"), class_="beside"
        ),
        classes(measured.metric, info.get("classes", []), info.get("palette", [])),
        gallery(key, task, measured),
    ]
    return Section(f"task-{index}", f"Task: {key}", body, short=key)


def _header(run: Run, scores: Scores) -> list[Child]:
    facts = []
    if run.model is not None:
        facts.append(f"{grouped(sum(p.numel() for p in run.model.parameters()))} parameters")
    if run.history.steps:
        facts.append(f"{grouped(run.history.steps)} steps")
    if run.checkpoint is not None:
        facts.append(f"looked at: {run.checkpoint.name}" + (f", step {run.step}" if run.step is not None else ""))
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts.append(f"written {now} by densectx {densectx.__version__}")
    warnings = [tag("li", str(error)) for error in run.missing]
    return [
        tag("p", "densectx report", class_="kicker"),
        tag("h1", run.name),
        tag("p", " \N{MIDDLE DOT} ".join(facts), class_="facts-line"),
        tag("div", tag("p", "Parts of this page are missing:"), tag("ul", warnings), class_="warning", role="note")
        if warnings
        else None,
        cards(scores, run.model, run.history) if run.model is not None else None,
    ]


def _checkpoints(run: Run) -> Section | None:
    files = checkpoints(run.folder)
    if not files:
        return None
    head = [("file", None), ("also", None), ("size", "n"), ("written", None)]
    rows = [
        tag(
            "tr",
            tag("th", tag("code", file.name), scope="row"),
            tag("td", [tag("span", name, class_="badge") for name in file.links]),
            tag("td", size(file.size), class_="n"),
            tag("td", file.written),
        )
        for file in files
    ]
    cells: list[Html] = [tag("th", name, scope="col", class_=kind) for name, kind in head]
    body = tag("table", tag("thead", tag("tr", cells)), tag("tbody", rows))
    return Section("checkpoints", "Checkpoints", scrolled(body, "Checkpoints"))
