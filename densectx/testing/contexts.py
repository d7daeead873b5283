"""``check_context``: everything that densectx expects of a context module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, final

import torch
from torch import Tensor

from densectx.nn.context import Context
from densectx.registry import CONTEXTS
from densectx.testing.modules import (
    check_alike_in_bf16,
    check_answer,
    check_gradients,
    check_one_by_one,
    check_registered,
    check_round_trip,
    check_untouched,
)
from densectx.testing.report import Check, expect, run_checks
from densectx.testing.subjects import Subject, called, check_documented, named

CHANNELS: Final = 4
CLOSE: Final = 1e-4


@final
@dataclass(frozen=True)
class ContextCase:
    """A context module under test."""

    subject: Subject

    def build(self, seed: int = 0) -> Context:
        """A fresh one of 4 channels; less tied to the identity where it can be."""
        torch.manual_seed(seed)
        with named(CONTEXTS, self.subject) as spec:
            if "init_noise" in CONTEXTS.options(spec["name"]):
                spec.setdefault("init_noise", 0.3)
            context: Context = CONTEXTS.build(spec, in_channels=CHANNELS)
        return context

    def cells(self, height: int = 40, width: int = 36) -> Tensor:
        """Features of two samples."""
        return torch.rand(2, CHANNELS, height, width, generator=torch.Generator().manual_seed(5))


def builds(case: ContextCase) -> None:
    """It is built from ``in_channels`` and says how far it sees."""
    context = case.build()
    expect(
        isinstance(context, Context), f"it is a {type(context).__name__}", "derive it from densectx.nn.context.Context"
    )
    field = context.receptive_field
    expect(field >= 1, f"receptive_field is {field}", "the side of the square of cells that a cell sees, or math.inf")


def is_documented(case: ContextCase) -> None:
    """A docstring, and options that a config can be checked against."""
    check_documented(CONTEXTS, case.subject, ("in_channels", "self"))


def keeps_every_size(case: ContextCase) -> None:
    """(B, C, h, w) -> (B, C, h, w), from 1 x 1 on."""
    context = case.build().eval()
    for height, width in ((1, 1), (1, 17), (31, 3), (40, 40)):
        with torch.no_grad():
            y = context(case.cells(height, width))
        what = f"the output for {height}x{width} cells"
        check_answer(y, (2, CHANNELS, height, width), what, "pad by the dilation", torch.float32)


def gradient_reaches_every_parameter(case: ContextCase) -> None:
    """All parameters and the input are reached."""
    context, x = case.build(), case.cells().requires_grad_()
    context(x).square().mean().backward()
    check_gradients(context, "the context module", "use it, or leave it out")
    expect(x.grad is not None and bool(x.grad.any()), "no gradient reaches the input", "do not detach it")


def answers_samples_one_by_one(case: ContextCase) -> None:
    """In evaluation mode a sample does not depend on the batch, nothing is random and the input stays."""
    context, x = case.build().eval(), case.cells()
    before = x.clone()
    with torch.no_grad():
        context(x)
    check_untouched(before, x, "forward", "the input")
    check_one_by_one(lambda rows: context(x[rows]), CLOSE)


def is_alike_in_bf16(case: ContextCase) -> None:
    """bf16 autocast changes the output by a few percent at most."""
    context, x = case.build().eval(), case.cells()
    check_alike_in_bf16(lambda: context(x), "the output")


def state_round_trip(case: ContextCase) -> None:
    """Its state, loaded into one built anew, gives the same output to the bit; every tensor is registered."""
    context = case.build(0)
    check_registered(context)
    check_round_trip(context, case.build(1), lambda one: one(case.cells()))


CHECKS: Final = (
    builds,
    is_documented,
    keeps_every_size,
    gradient_reaches_every_parameter,
    answers_samples_one_by_one,
    is_alike_in_bf16,
    state_round_trip,
)


def context_checks(subject: Subject) -> list[Check]:
    """The checks of :func:`check_context` one by one, for ``pytest.mark.parametrize``; builds nothing yet."""
    case = ContextCase(subject)
    return [Check(function.__name__, partial(function, case)) for function in CHECKS]


def check_context(subject: Subject, *, expected_failed_checks: Mapping[str, str] | None = None) -> None:
    """Does a context module keep its contract (:class:`densectx.nn.context.Context`)?

    Args:
        subject: registered name, spec, class, or factory.
        expected_failed_checks: {check: reason} that may fail; one that passes all the same is told.

    Raises:
        ChecksFailed: an AssertionError with every failed check, what it found and what to do.
    """
    run_checks(called(CONTEXTS, subject), context_checks(subject), expected_failed_checks or {})
