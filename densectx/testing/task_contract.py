"""Checks of what a task says of itself and of what it makes of a batch."""

from __future__ import annotations

import re
from typing import get_args, get_type_hints

import torch
from torch import Tensor
from torchmetrics import Metric

from densectx.errors import DataError
from densectx.heads.base import Head
from densectx.registry import TASKS
from densectx.tasks.base import Task
from densectx.testing import samples
from densectx.testing.modules import check_answer, check_untouched, modes
from densectx.testing.report import expect
from densectx.testing.states import changed, preserved, random_states, reseed, settings
from densectx.testing.subjects import check_documented
from densectx.testing.task_case import RUNTIME, TaskCase
from densectx.testing.values import copied, difference, same
from densectx.types import Score

SAMPLE_KEYS = ("image", "gray", "mask", "target", "valid", "key")
SIZES = ((1, 1), (1, 13), (9, 1), (17, 31), (30, 8))
CLOSE = 1e-5


def builds_from_a_spec(case: TaskCase) -> None:
    """A model with the task can be built, and is a task with its parts."""
    model = case.model()
    task = case.task(model)
    expect(isinstance(task, Task), f"it is a {type(task).__name__}", "derive it from densectx.tasks.base.Task")
    for attribute, kind, fix in (
        ("head", Head, 'HEADS.build(head, "head", features=features, in_channels=..., out_channels=...)'),
        ("metrics", Metric, "a torchmetrics.Metric with sum states, e.g. of densectx.metrics"),
        ("score", Score, 'Score("metric", "baseline")'),
    ):
        value = getattr(task, attribute, None)
        expect(isinstance(value, kind), f"{attribute} is a {type(value).__name__}", f"set it: {fix}")
    expect(
        hasattr(task, "criterion"),
        "it has no criterion",
        "set self.criterion = Criterion(loss, ...) in the constructor",
    )
    expect(bool(task.coefficients), "coefficients is empty", "name every loss term and its coefficient; see Criterion")
    for term, factor in task.coefficients.items():
        expect(isinstance(factor, int | float), f"the coefficient of {term!r} is {factor!r}", "make it a plain number")


def is_documented(case: TaskCase) -> None:
    """A docstring, and options that a config can be checked against."""
    check_documented(TASKS, case.subject, (*RUNTIME, "self"))


def declares_what_exists(case: TaskCase) -> None:
    """Its class attributes have values that the rest of densectx knows."""
    task = case.task(case.model())
    hints = get_type_hints(Task)
    for attribute in ("output", "on_colour"):
        value, known = getattr(task, attribute), get_args(hints[attribute])
        expect(value in known, f"{attribute} is {value!r}", f"take one of {', '.join(known)}")
    for key in task.requires:
        expect(
            key in SAMPLE_KEYS, f"requires names {key!r}", f"samples have {', '.join(SAMPLE_KEYS)}; see densectx.types"
        )
    expect("image" in task.requires, "requires lacks 'image'", 'set requires = ("image", ...)')
    for attribute in ("scale", "input_scale", "period"):
        value = getattr(task, attribute)
        expect(
            isinstance(value, int) and value >= 1, f"{attribute} is {value!r}", "make it a whole number of at least 1"
        )
    for name in task.options:
        expect(bool(re.fullmatch(r"[a-z]\w*", name)), f"run-time option {name!r}", "call it like a Python variable")


def prepare_gives_what_it_declares(case: TaskCase) -> None:
    """Its x is (B, channels, H, W) float32, finite and without gradient; the target is tensors of B samples."""
    model = case.model()
    task, batch = case.task(model), case.batch()
    for training in (True, False):
        task.train(training)
        found = task.prepare(batch, samples.generators(batch))
        pair = isinstance(found, tuple) and len(found) == 2
        expect(pair, f"prepare returns a {type(found).__name__}", "return (x, target)")
        x, target = found
        count = len(batch["image"])
        advice = f"return x as (B, channels, H, W) float32 with the {task.channels} channels given to Task.__init__"
        check_answer(x, (count, task.channels, None, None), "x of prepare", advice, torch.float32)
        expect(isinstance(target, dict), f"the target is a {type(target).__name__}", "return a dict of tensors")
        for key, value in target.items():
            ok = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
            expect(ok, f"target[{key!r}] has not one entry a sample", "make it a tensor whose first dimension is B")
        grown = [key for key, value in {"x": x, **target}.items() if value.requires_grad]
        expect(
            not grown,
            f"{', '.join(grown)} of prepare require a gradient",
            "compute them without parameters, or detach them",
        )


def prepare_leaves_the_batch(case: TaskCase) -> None:
    """The batch is not changed: other tasks of the source read it too."""
    task = case.task(case.model())
    batch = case.batch()
    before = copied(batch)
    x, target = task.prepare(batch, samples.generators(batch))
    check_untouched(before, batch, "prepare", "the batch")
    kept = copied({"x": x, **target})
    task.prepare(batch, samples.generators(batch))
    check_untouched(kept, {"x": x, **target}, "a second prepare", "what the first one returned")


def prepare_is_repeatable(case: TaskCase) -> None:
    """Equal generators, equal x and target, whatever the state of global generators."""
    task, batch = case.task(case.model()), case.batch()
    for training in (True, False):
        task.train(training)
        reseed(1)
        first = task.prepare(batch, samples.generators(batch))
        reseed(2)
        states = random_states()
        second = task.prepare(batch, samples.generators(batch))
        used = changed(states, random_states())
        advice = "draw with generator=rng from the generator of each sample; nothing else may be random"
        expect(not used, f"prepare uses {', '.join(used)}", advice)
        expect(same(first, second), "prepare gives something else the second time", advice)


def prepare_takes_samples_one_by_one(case: TaskCase) -> None:
    """A sample gives the same alone as in any batch, so that results do not depend on batch size and ranks."""
    task, batch = case.task(case.model()), case.batch()
    for training in (True, False):
        task.train(training)
        x, target = task.prepare(batch, samples.generators(batch))
        for row in range(len(x)):
            one = samples.take(batch, [row])
            alone, its = task.prepare(one, samples.generators(one))
            advice = "draw each sample's numbers from its own generator, and mix nothing over the batch"
            expect(its.keys() == target.keys(), f"sample {row} alone has other target keys", advice)
            pairs = [(alone[0], x[row]), *((its[key][0], target[key][row]) for key in target)]
            error = max(difference(a, b) for a, b in pairs)
            expect(error < CLOSE, f"sample {row} alone differs from the batch's by {error:.3g}", advice)


def prepare_takes_every_size(case: TaskCase) -> None:
    """Sizes down to 1 x 1 work, or are refused with a DataError."""
    for height, width in (*SIZES, (2, 3), (12, 12)):
        task = case.task(case.model())
        batch = case.batch((height, width))
        try:
            x, _ = task.prepare(batch, samples.generators(batch))
        except DataError:
            continue
        advice = "images of every size come without a crop; refuse what cannot work with densectx.errors.DataError"
        check_answer(x, (len(batch["image"]), task.channels, None, None), f"x of {height}x{width} images", advice)


def says_whether_it_changes_the_image(case: TaskCase) -> None:
    """An unchanged image is the very tensor, so that tasks share a pass through the trunk, and is declared."""
    task, batch = case.task(case.model()), case.batch()
    x, _ = task.prepare(batch, samples.generators(batch))
    very = x is batch["image"]
    expect(
        very or not same(x, batch["image"]),
        "x equals the image but is another tensor",
        'return batch["image"] itself: tasks with the same input share a pass through the trunk',
    )
    expect(
        task.unchanged == very,
        f"unchanged is {task.unchanged}, but x is {'the image' if very else 'another tensor'}",
        f"set the class attribute unchanged = {very}",
    )


def keeps_its_mode(case: TaskCase) -> None:
    """No method switches training mode or gradients of parameters."""
    for training in (True, False):
        model = case.model()
        batch = case.batch()
        output = case.raw(model, batch)
        before = modes(model.train(training))
        for method in case.methods(model, batch, output):
            now = changed(before, modes(model))
            where = ", ".join(now[:3])
            expect(
                not now,
                f"{method} changes the mode of {where}",
                "leave train(), eval() and requires_grad to the trainer",
            )


def leaves_the_process_as_it_was(case: TaskCase) -> None:
    """No method changes global settings or uses global random numbers."""
    model, batch = case.model(), case.batch()
    output = case.raw(model, batch)
    with preserved():  # what is imported at the first use may do more
        list(case.methods(model, batch, output))
    before, states = settings(), random_states()
    for method in case.methods(model, batch, output):
        touched = changed(before, settings())
        expect(not touched, f"{method} changes {', '.join(touched)}", "leave settings of the process as they are")
        used = changed(states, random_states())
        advice = "randomness comes from the generators that prepare is given, and from nowhere else"
        expect(not used, f"{method} uses {', '.join(used)}", advice)
