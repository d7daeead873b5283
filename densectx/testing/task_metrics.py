"""Checks of a task's metrics: exact over any number of batches and ranks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum

from densectx.metrics.states import add_states, metrics_of
from densectx.model import DenseModel
from densectx.tasks.base import Target
from densectx.testing import samples
from densectx.testing.modules import check_untouched
from densectx.testing.report import expect
from densectx.testing.task_case import TaskCase
from densectx.testing.values import copied, difference, same, shape
from densectx.types import Sample

CLOSE = 1e-6

Answered: TypeAlias = tuple[Tensor, Tensor, Target]


def _states(metrics: Metric) -> dict[str, Any]:
    return {
        f"{number}.{name}": value
        for number, part in enumerate(metrics_of(metrics))
        for name, value in part.metric_state.items()
    }


def compute(metrics: Metric) -> dict[str, Tensor]:
    """What the metrics compute now, not what they remember of an earlier call."""
    for part in metrics_of(metrics):
        part._computed = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method of metric")
        values: dict[str, Tensor] = metrics.compute()
    return values


def _counted(case: TaskCase, model: DenseModel, batches: Sequence[Sample | Answered]) -> Metric:
    """A copy of the fresh metrics that has counted batches; the task's own stay fresh."""
    fresh, task = deepcopy(case.task(model).metrics), case.task(model)
    for batch in batches:
        task.update(*(case.answered(model, batch) if isinstance(batch, dict) else batch))
    counted, task.metrics = task.metrics, fresh
    return counted


def _rows(answered: Answered, rows: range) -> Answered:
    """Some samples, the same numbers as in the batch to the bit."""
    prediction, x, target = answered
    part = slice(rows.start, rows.stop)
    return prediction[part], x[part], {key: value[part] for key, value in target.items()}


def _merged(metrics: list[Metric]) -> Metric:
    """As after a reduction over ranks."""
    total = deepcopy(metrics[0])
    for other in metrics[1:]:
        add_states(total, other)
    return total


def metrics_have_sum_states(case: TaskCase) -> None:
    """All that is counted is in tensor states that ranks add."""
    parts = metrics_of(case.task(case.model()).metrics)
    names = [name for part in parts for name in part.metric_state]
    advice = 'add_state(name, torch.zeros(...), dist_reduce_fx="sum"): sums and counts, divided in compute'
    expect(bool(names), "the metrics have no states", advice)
    for part in parts:
        for name, value in part._defaults.items():
            expect(
                isinstance(value, Tensor),
                f"state {name!r} is a {type(value).__name__}, which grows and cannot be added",
                advice,
            )
            fx = part._reductions[name]
            expect(fx is dim_zero_sum, f"state {name!r} is reduced by {getattr(fx, '__name__', fx)}", advice)
            expect(
                isinstance(value, Tensor) and not value.any(),
                f"state {name!r} does not start at zero, so ranks would add the start",
                advice,
            )


def metrics_have_the_score(case: TaskCase) -> None:
    """Scalars by name, among them the score and what the trivial answer scores."""
    model = case.model()
    values = compute(_counted(case, model, [case.batch()]))
    expect(isinstance(values, dict), f"compute returns a {type(values).__name__}", "return {name: scalar tensor}")
    score = case.task(model).score
    for name in (score.metric, f"{score.metric}_{score.baseline}"):
        known = ", ".join(map(str, values))
        expect(
            name in values, f"compute gives no {name!r} (it gives {known})", "Score names the metric and the baseline"
        )
    for name, value in values.items():
        ok = isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()
        expect(
            ok, f"{name!r} is {shape(value) if isinstance(value, Tensor) else value!r}", "make it a scalar float tensor"
        )
        # others may be NaN: the IoU of a class that occurs nowhere
        finite = name not in (score.metric, f"{score.metric}_{score.baseline}") or bool(value.isfinite())
        expect(finite, f"{name!r} is {value.item()} on a labelled batch", "check what it divides by")


def metrics_add_up(case: TaskCase) -> None:
    """Batches counted apart and added, as over ranks, give what one process gives for all of them."""
    model, batch = case.model(), case.batch()
    count, answered = len(batch["image"]), case.answered(model, batch)
    rows = [_rows(answered, range(row, row + 1)) for row in range(count)]
    expected = compute(_counted(case, model, [answered]))
    idle = deepcopy(case.task(model).metrics)  # a rank that saw nothing
    halves = [_counted(case, model, [_rows(answered, half)]) for half in (range(1), range(1, count))]
    for what, found in (
        ("sample by sample", compute(_counted(case, model, rows))),
        ("on two ranks and an idle one", compute(_merged([*halves, idle]))),
    ):
        expect(found.keys() == expected.keys(), f"{what} other metrics are computed", "give the same keys always")
        for name, value in expected.items():
            error = difference(found[name].double(), value.double())
            expect(
                error < CLOSE,
                f"{name!r} is {found[name]:.8g} {what}, {value:.8g} in one batch",
                "count sums in states (float64 or integers) and divide in compute; nothing of the batch may matter",
            )


def metrics_reset(case: TaskCase) -> None:
    """After ``reset`` nothing is left of what was counted."""
    model = case.model()
    first, second = samples.take(case.batch(), [0]), samples.take(case.batch(), [1])
    fresh = deepcopy(case.task(model).metrics)
    used = _counted(case, model, [first])
    used.reset()
    advice = "keep everything that is counted in states (add_state), or override reset"
    expect(same(_states(used), _states(fresh)), "states are not what they were before after reset", advice)
    expected = compute(_counted(case, model, [second]))
    case.task(model).metrics = used
    found = compute(_counted(case, model, [second]))
    for name, value in expected.items():
        error = difference(found[name], value)
        expect(error < CLOSE, f"{name!r} is {found[name]:.6g} after a reset, {value:.6g} afresh", advice)


def metrics_compute_twice(case: TaskCase) -> None:
    """``compute`` changes nothing."""
    metrics = _counted(case, case.model(), [case.batch()])
    states = copied(_states(metrics))
    first, second = compute(metrics), compute(metrics)
    check_untouched(states, _states(metrics), "compute", "the states")
    expect(same(first, second), "compute gives something else the second time", "change nothing in compute")


def metrics_of_nothing(case: TaskCase) -> None:
    """Without samples ``compute`` gives the same names, NaN if it must, and raises nothing."""
    model = case.model()
    empty = compute(deepcopy(case.task(model).metrics))
    full = compute(_counted(case, model, [case.batch()]))
    expect(
        list(empty) == list(full),
        f"without samples compute gives {sorted(empty)}, with samples {sorted(full)}",
        "give the same keys in the same order always: a rank may have seen nothing",
    )


def unlabelled_samples_are_not_measured(case: TaskCase) -> None:
    """A sample without labels changes no metric."""
    if not case.labelled:
        return
    model, batch = case.model(), case.batch()
    expected = compute(_counted(case, model, [batch]))
    found = compute(_counted(case, model, [batch, samples.without_labels(batch, case.info)]))
    for name, value in expected.items():
        expect(
            difference(found[name], value) < CLOSE,
            f"an unlabelled batch moves {name!r} from {value:.6g} to {found[name]:.6g}",
            "leave ignore_index, and NaN, out in update",
        )


def update_leaves_its_arguments(case: TaskCase) -> None:
    """``update`` changes neither prediction nor x nor target, and makes no graph."""
    model, batch = case.model(), case.batch()
    given = case.answered(model, batch)
    before = copied(given)
    case.task(model).update(*given)
    check_untouched(before, given, "update", "prediction, x or target")
    grown = [name for name, value in _states(case.task(model).metrics).items() if value.requires_grad]
    expect(not grown, f"states {', '.join(grown)} require a gradient", "detach what you count")
    assert torch.is_grad_enabled()
