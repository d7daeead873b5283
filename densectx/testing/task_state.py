"""Checks of what a task keeps: everything in its state, nothing beside it."""

from __future__ import annotations

from copy import deepcopy

import torch

from densectx.testing.modules import check_registered, load_into
from densectx.testing.report import expect
from densectx.testing.task_answers import _images
from densectx.testing.task_case import TaskCase
from densectx.testing.values import same


def tensors_are_registered(case: TaskCase) -> None:
    """Tensors are parameters or buffers, so that they move to a GPU."""
    check_registered(case.task(case.model()))


def state_round_trip(case: TaskCase) -> None:
    """Its state, loaded into a task that was built anew, gives the same answers to the bit."""
    model, other = case.model(seed=0), case.model(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    load_into(other, model)
    image = _images(case)
    expect(
        same(case.predict(model, image), case.predict(other, image)),
        "a task built anew with the saved state answers differently",
        "keep what is learned or drawn in parameters and persistent buffers, not in attributes",
    )


def copies_answer_alike(case: TaskCase) -> None:
    """A deep copy answers the same and shares no weights (averaged weights are kept in one)."""
    model, image = case.model(), _images(case)
    before = case.predict(model, image)
    copy = deepcopy(model)
    expect(
        same(case.predict(copy, image), before),
        "a deep copy answers differently",
        "keep no references outside the task",
    )
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(0.5)
    expect(
        same(case.predict(model, image), before), "a deep copy shares weights", "keep no parameters in plain attributes"
    )


def state_holds_no_metrics(case: TaskCase) -> None:
    """What metrics count is not part of the weights."""
    task = case.task(case.model())
    names = [name for name in task.state_dict() if name.startswith("metrics.")]
    expect(not names, f"the state holds {', '.join(names[:3])}", "leave add_state(persistent=False), its default")
