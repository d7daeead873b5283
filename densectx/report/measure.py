"""The model of a run on its data once more, sample by sample: what the fit summed up, taken apart."""

from __future__ import annotations

import math
import warnings
from copy import deepcopy
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from torchmetrics import Metric

from densectx.data.base import Split
from densectx.data.collate import Collate
from densectx.data.items import Items
from densectx.data.module import DataModule
from densectx.metrics.states import add_states, metrics_of
from densectx.model import DenseModel
from densectx.nn.precision import full
from densectx.report.errors import ErrorMap, error_map
from densectx.report.images import thumbnail
from densectx.report.ranking import Ranking, Scored
from densectx.rng import generator
from densectx.tasks.base import Target, Task
from densectx.types import Sample


@final
@dataclass
class Measured:
    """What was found for a task.

    Attributes:
        looked: samples of the source that were looked at.
        total: samples that the split has.
        metric: the task's metric, with its sums over all that were looked at.
        ranking: the best and the worst samples.
        scored: every sample that has a score, in the order of the data, without pictures.
        values: {metric: value} over all that were looked at.
        labelled: samples looked at that have what the task needs.
    """

    looked: int
    total: int
    metric: Metric
    ranking: Ranking
    scored: list[Scored] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    labelled: int = 0


def measure(
    model: DenseModel, data: DataModule, split: Split, *, seed: int, limit: int = 0, dtype: torch.dtype | None = None
) -> dict[str, Measured]:
    """Evaluate as the module does, one sample at a time.

    Noise and other randomness is counted as in validation, so a whole split gives the fit's own numbers.

    Args:
        model: in evaluation mode; the work is done on its device.
        data: the run's.
        split: which samples.
        seed: of the run.
        limit: samples a source at most, evenly spread over the split; 0 for all.
        dtype: of autocast, null for none.

    Returns:
        {task: what was found}; tasks that no sample of the split has a label for are left out.

    Raises:
        DataError: a sample cannot be read.
    """
    found: dict[str, Measured] = {}
    infos = data.info()
    collate = Collate(infos, "single samples are read here, so this cannot be")
    for source, dataset in data.datasets[split].items():
        keys = [key for key in model.tasks if model.task(key).source == source]
        total = len(dataset) if keys else 0
        if not total:
            continue
        count = min(total, limit) if limit else total
        for key in keys:
            task = model.task(key)
            found[key] = Measured(count, total, _metric(task), Ranking(task.score.higher_is_better))
        items = Items({source: dataset}, {source: None}, seed)
        for index in (place * total // count for place in range(count)):
            sample = collate([items[source, 0, index]])[source]
            for key, answer in _answers(model, keys, sample, seed, dtype).items():
                _count(model.task(key), answer, found[key], dataset.name(index), infos[source].ignore_index)
    with warnings.catch_warnings():  # sums that were merged, or of nothing
        warnings.filterwarnings("ignore", "The ``compute`` method of metric")
        for one in found.values():
            one.values = {name: float(value) for name, value in one.metric.compute().items()}
    return {key: one for key, one in found.items() if one.labelled}


Answer = tuple[Tensor, Tensor, Target]  # postprocessed, x, target: of one sample


@torch.no_grad()
def _answers(
    model: DenseModel, keys: list[str], sample: Sample, seed: int, dtype: torch.dtype | None
) -> dict[str, Answer]:
    """Of the tasks that the sample has data for, with what is compared."""
    device = next(model.parameters()).device
    sample = {name: value.to(device) for name, value in sample.items()}
    asked: dict[str, tuple[Tensor, Target]] = {}
    for key in keys:
        task = model.task(key)
        if all(name in sample for name in task.requires):
            rngs = [generator(seed, task.source, *k, key, device=device) for k in sample["key"].tolist()]
            asked[key] = task.prepare(sample, rngs)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        outputs = model({key: x for key, (x, _) in asked.items()})
    return {key: (model.task(key).postprocess(full(y), asked[key][0]), *asked[key]) for key, y in outputs.items()}


@torch.no_grad()
def _count(task: Task, answer: Answer, measured: Measured, name: str, ignore_index: int) -> None:
    """Add a sample to the sums and, if it has a label, to the list of scores."""
    measured.labelled += 1
    alone = _metric(task)
    _update(task, answer, alone)
    add_states(measured.metric, alone)
    values: dict[str, Tensor] = alone.compute()
    score = float(values.get(task.score.metric, math.nan))
    trivial = float(values.get(f"{task.score.metric}_{task.score.baseline}", math.nan))
    if math.isnan(score):
        return
    measured.scored.append(Scored(name, score, trivial))
    if measured.ranking.takes(score):
        prediction, x, target = answer
        drawn = task.draw(prediction, x, target)[:3]
        error = error_map(task, prediction, target, drawn, ignore_index)
        flat = task.output in ("classes", "labels")
        small = tuple(thumbnail(picture, exact=flat and place > 0) for place, picture in enumerate(drawn))
        kept = ErrorMap(error.kind, thumbnail(error.values[None], exact=error.kind == "classes")[0])
        height, width = x.shape[-2:]
        measured.ranking.add(Scored(name, score, trivial, small, kept, (height, width)))


def _metric(task: Task) -> Metric:
    """The task's metric from the beginning, and one that waits for no other process: a report is written by one."""
    metric = deepcopy(task.metrics)
    for part in metrics_of(metric):
        part.distributed_available_fn = _nobody
        part.reset()
    return metric


def _nobody() -> bool:
    """Whether there are others to sum with."""
    return False


def _update(task: Task, answer: Answer, metric: Metric) -> None:
    """Let a task count a sample in a metric that is not its own."""
    own, task.metrics = task.metrics, metric
    try:
        task.update(*answer)
    finally:
        task.metrics = own
