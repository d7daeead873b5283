"""``check_loss``: everything that densectx expects of a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.losses import Countable, Form, Loss
from densectx.registry import LOSSES
from densectx.testing.modules import check_registered, check_untouched
from densectx.testing.report import Check, CheckFailed, expect, run_checks
from densectx.testing.states import changed, random_states
from densectx.testing.subjects import Subject, called, check_documented, named
from densectx.testing.values import copied, difference, same, shape

CLOSE: Final = 1e-5
IGNORE: Final = 255
CORNER: Final = 4


@final
@dataclass(frozen=True)
class LossCase:
    """A loss under test.

    Attributes:
        subject: name, spec, class or factory.
        kind: of its target, None to tell from the class and its options.
        runtime: what a task supplies.
        channels: of the output.
    """

    subject: Subject
    kind: Form | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)
    channels: int = 3

    def build(self) -> Loss:
        """A fresh one."""
        runtime = {"ignore_index": IGNORE, "classes": self.channels, "form": self.kind, **self.runtime}
        with named(LOSSES, self.subject) as spec:
            loss: Loss = LOSSES.build(spec, **runtime)
        return loss

    @property
    def kinds(self) -> tuple[Form, ...]:
        """The kinds of target: those of the class that go with its options, else ids where it has an ignore index."""
        if self.kind is not None:
            return (self.kind,)
        with named(LOSSES, self.subject) as spec:
            takes: tuple[Form, ...] = getattr(LOSSES.get(spec["name"]), "takes", ())
            guess: Form = "ids" if "ignore_index" in LOSSES.options(spec["name"]) else "numbers"
        return tuple(kind for kind in takes if replace(self, kind=kind).fits()) or takes[:1] or (guess,)

    def fits(self) -> bool:
        """Whether the kind of target goes with the options."""
        try:
            self.build()
        except ConfigError:
            return False
        return True

    def given(self, labelled: bool = True) -> tuple[Tensor, Tensor]:
        """Output and target of three samples of 20 x 24 pixels; a corner of the first is unlabelled, or everything."""
        rng = torch.Generator().manual_seed(11)
        size = (3, self.channels, 20, 24)
        output = torch.rand(size, generator=rng) if self.kind == "numbers" else torch.randn(size, generator=rng)
        if self.kind == "ids":
            target = torch.randint(0, self.channels, (3, 20, 24), generator=rng)
        else:
            target = (1.6 * torch.rand(size, generator=rng) - 0.3).clamp(0, 1)
            target = target.round() if self.kind == "labels" else target
        void = IGNORE if self.kind == "ids" else torch.nan
        target[0, ..., :CORNER, :CORNER] = void
        return output, target if labelled else torch.full_like(target, void)


def builds(case: LossCase) -> None:
    """It is built from its options and what a task supplies."""
    loss = case.build()
    expect(isinstance(loss, Loss), f"it is a {type(loss).__name__}", "derive it from densectx.losses.Loss")
    check_registered(loss)


def is_documented(case: LossCase) -> None:
    """A docstring, and options that a config can be checked against."""
    check_documented(LOSSES, case.subject, ("self", *LOSSES.runtime, *case.runtime))


def gives_a_sum_and_a_weight(case: LossCase) -> None:
    """Two float32 scalars: a sum with a graph, a weight above 0 without one."""
    output, target = case.given()
    output.requires_grad_()
    found = case.build()(output, target)
    expect(isinstance(found, tuple) and len(found) == 2, f"it returns a {type(found).__name__}", "return (sum, weight)")
    for what, value in zip(("sum", "weight"), found, strict=True):
        ok = isinstance(value, Tensor) and value.ndim == 0 and value.dtype == torch.float32
        said = shape(value) if isinstance(value, Tensor) else type(value).__name__
        expect(ok, f"the {what} is {said}", "return scalar float32 tensors")
        expect(bool(value.isfinite()), f"the {what} is {value.item()}", "look for log of 0 and 0 / 0")
    total, weight = found
    expect(total.requires_grad, "the sum has no gradient", "compute it from output without detach")
    expect(not weight.requires_grad, "the weight has a gradient", "count it from the target alone")
    expect(weight.item() > 0, f"the weight is {weight.item()}", "count what is labelled")
    total.backward()
    gradient = output.grad
    expect(gradient is not None and bool(gradient.any()), "the gradient is zero", "use every labelled pixel of output")
    finite = gradient is not None and bool(gradient.isfinite().all())
    expect(finite, "the gradient is not finite", "put where() before a penalty: NaN behind it poisons the gradient")


def adds_up_over_samples(case: LossCase) -> None:
    """Sum and weight of a batch are those of its samples added."""
    loss, (output, target) = case.build(), case.given()
    whole = loss(output, target)
    rows = [loss(output[[row]], target[[row]]) for row in range(len(output))]
    for which, what in enumerate(("sum", "weight")):
        added = torch.stack([row[which] for row in rows]).sum()
        expect(
            difference(whole[which], added) < CLOSE,
            f"the {what} is {whole[which]:.6g}, of the samples alone {added:.6g} together",
            "return sum and weight, not a mean; region losses take image by image, weight = images with labels",
        )


def counts_its_weight(case: LossCase) -> None:
    """If it is countable: the weight it knows ahead is the one that it returns."""
    loss = case.build()
    if not isinstance(loss, Countable):
        return
    for labelled in (True, False):
        output, target = case.given(labelled)
        counted, weight = loss.weight(target), loss(output, target)[1]
        expect(
            counted.ndim == 0 and difference(counted.to(weight.dtype), weight) < CLOSE,
            f"weight() counts {counted.tolist()}, the loss returns {weight.item():.6g} for the same target",
            "count the same pixels in both, or do not derive it from Countable",
        )


def nothing_labelled_is_zero(case: LossCase) -> None:
    """Without labels it is (0 with a graph, 0), and so is the gradient."""
    output, target = case.given(labelled=False)
    output.requires_grad_()
    total, weight = case.build()(output, target)
    advice = "mask before you compute, and divide by nothing"
    expect(total.item() == 0, f"the sum is {total.item()} without labels", advice)
    expect(weight.item() == 0, f"the weight is {weight.item()} without labels", advice)
    expect(total.requires_grad, "without labels the sum has no graph", f"{advice}; (output * 0).sum() has one")
    total.backward()
    clean = output.grad is not None and not output.grad.any()
    expect(clean, "without labels the gradient is not zero (or NaN)", advice)


def unlabelled_samples_count_nothing(case: LossCase) -> None:
    """A sample without labels changes neither sum nor weight."""
    loss, (output, target), (_, void) = case.build(), case.given(), case.given(labelled=False)
    some = loss(output, torch.cat([target[:2], void[2:]]))
    without = loss(output[:2], target[:2])
    for which, what in enumerate(("sum", "weight")):
        expect(
            difference(some[which], without[which]) < CLOSE,
            f"the {what} is {some[which]:.6g} with an unlabelled sample, {without[which]:.6g} without it",
            "leave pixels of ignore_index, and NaN, out of sum and weight",
        )


def unlabelled_pixels_do_not_matter(case: LossCase) -> None:
    """What the output says at unlabelled pixels changes nothing."""
    loss, (output, target) = case.build(), case.given()
    other = output.clone()
    other[0, :, :CORNER, :CORNER] = 0.77
    first, second = loss(output, target), loss(other, target)
    for which, what in enumerate(("sum", "weight")):
        error = difference(first[which], second[which])
        expect(error < CLOSE, f"unlabelled pixels change the {what} by {error:.3g}", "leave them out of both")


def leaves_its_arguments_and_is_not_random(case: LossCase) -> None:
    """Output and target stay as they are, and the same comes out twice."""
    loss, given = case.build(), case.given()
    before, states = copied(given), random_states()
    first, second = loss(*given), loss(*given)
    check_untouched(before, given, "forward", "output or target")
    used = changed(states, random_states())
    expect(same(first, second) and not used, "it is random", "a loss draws nothing")


CHECKS: Final = (
    builds,
    is_documented,
    gives_a_sum_and_a_weight,
    adds_up_over_samples,
    counts_its_weight,
    nothing_labelled_is_zero,
    unlabelled_samples_count_nothing,
    unlabelled_pixels_do_not_matter,
    leaves_its_arguments_and_is_not_random,
)


def _of_each_kind(function: Callable[[LossCase], None], case: LossCase) -> None:
    kinds = case.kinds
    for kind in kinds:
        try:
            function(replace(case, kind=kind))
        except CheckFailed as error:
            if len(kinds) == 1:
                raise
            raise CheckFailed(f"with a target of {kind} {error.found}", error.advice) from error


def loss_checks(
    subject: Subject, *, target: Form | None = None, runtime: Mapping[str, Any] | None = None, channels: int = 3
) -> list[Check]:
    """The checks of :func:`check_loss` one by one, for ``pytest.mark.parametrize``; builds nothing yet."""
    case = LossCase(subject, target, dict(runtime or {}), channels)
    return [Check(function.__name__, partial(_of_each_kind, function, case)) for function in CHECKS]


def check_loss(
    subject: Subject,
    *,
    target: Form | None = None,
    runtime: Mapping[str, Any] | None = None,
    channels: int = 3,
    expected_failed_checks: Mapping[str, str] | None = None,
) -> None:
    """Does a loss keep its contract (:class:`densectx.losses.Loss`)?

    Args:
        subject: registered name, spec, class, or factory.
        target: ``numbers``: (B, K, H, W) in 0..1 for an output of the same; ``labels``: 0 or 1 for logits; ``ids``:
            (B, H, W) int64 for logits. Default each of the class attribute ``takes``; where that is empty ``ids`` for
            losses with an option ``ignore_index``, else ``numbers``.
        runtime: arguments that its task supplies.
        channels: K.
        expected_failed_checks: {check: reason} that may fail; one that passes all the same is told.

    Raises:
        ChecksFailed: an AssertionError with every failed check, what it found and what to do.
    """
    checks = loss_checks(subject, target=target, runtime=runtime, channels=channels)
    run_checks(called(LOSSES, subject), checks, expected_failed_checks or {})
