"""``check_head``: everything that densectx expects of a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor

from densectx.heads.base import Head
from densectx.nn.precision import full
from densectx.nn.resize import bicubic
from densectx.registry import HEADS
from densectx.testing.modules import (
    check_alike_in_bf16,
    check_answer,
    check_gradients,
    check_one_by_one,
    check_registered,
    check_round_trip,
    check_untouched,
    stir,
)
from densectx.testing.report import Check, expect, run_checks
from densectx.testing.states import changed, preserved, settings
from densectx.testing.subjects import Subject, called, check_documented, named
from densectx.testing.values import copied, difference, same
from densectx.types import Feature

CHANNELS: Final = 3
FEATURES: Final = (Feature(6, 2), Feature(8, 4), Feature(CHANNELS, 4))
"""Levels of two strides; the last one has the channels of the answer, as a head without weights needs it."""

PLAIN: Final = (Feature(6, 1), Feature(CHANNELS, 1))
CLOSE: Final = 1e-4
RUNTIME: Final = ("features", "in_channels", "out_channels", "scale", "residual", "exclusive")


@final
@dataclass(frozen=True)
class HeadCase:
    """A head under test.

    Attributes:
        subject: name, spec, class or factory.
        features: levels it is built for.
        out_channels: channels of the answer.
    """

    subject: Subject
    features: Sequence[Feature] = FEATURES
    out_channels: int = CHANNELS

    def takes(self, option: str) -> bool:
        """Whether it has an option."""
        with named(HEADS, self.subject) as spec:
            return option in HEADS.options(spec["name"])

    def build(self, *, seed: int = 0, noise: bool = True, features: Sequence[Feature] = (), **options: Any) -> Head:
        """A fresh one; with noise on parts that start at zero."""
        torch.manual_seed(seed)
        runtime = {"features": tuple(features or self.features), "in_channels": 3, "out_channels": self.out_channels}
        with named(HEADS, self.subject) as spec:
            head: Head = HEADS.build(spec, **{**runtime, "scale": 1, "residual": False, "exclusive": True, **options})
        if noise:
            stir(head)
        return head

    def given(self, size: tuple[int, int] = (16, 24), features: Sequence[Feature] = ()) -> tuple[list[Tensor], Tensor]:
        """Levels and task input of two samples; (H, W) of the input."""
        rng = torch.Generator().manual_seed(5)
        levels = [
            torch.randn(2, f.channels, size[0] // f.stride, size[1] // f.stride, generator=rng)
            for f in features or self.features
        ]
        return levels, torch.rand(2, 3, *size, generator=rng)


def builds(case: HeadCase) -> None:
    """It is built from features, channels, scale and residual."""
    head = case.build()
    expect(isinstance(head, Head), f"it is a {type(head).__name__}", "derive it from densectx.heads.base.Head")


def is_documented(case: HeadCase) -> None:
    """A docstring, and options that a config can be checked against."""
    check_documented(HEADS, case.subject, (*RUNTIME, "self"))


def answers_at_scales_and_sizes(case: HeadCase) -> None:
    """H * scale x W * scale at scale 1, 2 and 3, for one cell and for strange sizes."""
    stride = max(feature.stride for feature in case.features)
    for scale in (1, 2, 3) if case.takes("scale") else (1,):
        head = case.build(scale=scale).eval()
        for rows, columns in ((4, 6), (1, 1), (1, 5), (3, 7)):
            size = (rows * stride, columns * stride)
            expected = (2, case.out_channels, size[0] * scale, size[1] * scale)
            advice = "enlarge by stride * scale with densectx.nn.resize.upsample; the model pads and crops"
            with torch.no_grad():
                y = head(*case.given(size))
            check_answer(y, expected, f"the output for {size[0]}x{size[1]} at scale {scale}", advice)


def takes_a_trunk_at_stride_1(case: HeadCase) -> None:
    """It works behind a trunk that keeps full resolution."""
    head = case.build(features=PLAIN).eval()
    with torch.no_grad():
        y = head(*case.given((5, 7), PLAIN))
    check_answer(y, (2, case.out_channels, 5, 7), "the output behind a trunk at stride 1", "take strides from features")


def gradient_reaches_every_parameter(case: HeadCase) -> None:
    """All parameters are trained, and the context's level is."""
    for residual in (False, True) if case.takes("residual") else (False,):
        head = case.build(residual=residual)
        levels, x = case.given()
        levels = [level.requires_grad_() for level in levels]
        head(levels, x).square().sum().backward()
        check_gradients(head, "the head", "use it, without detach or no_grad, or leave it out")
        gradient = levels[-1].grad
        reached = gradient is not None and bool(gradient.any())
        expect(
            reached, "no gradient reaches the context's level", "answer from features[-1], the context module's output"
        )


def a_correction_starts_at_zero(case: HeadCase) -> None:
    """With ``residual`` the untrained head answers with its (bicubically enlarged) input, in float32."""
    if not case.takes("residual"):
        return
    for scale in (1, 2) if case.takes("scale") else (1,):
        head = case.build(residual=True, scale=scale, noise=False)
        levels, x = case.given()
        with torch.no_grad():
            y = full(head(levels, x))
            error = difference(y, bicubic(x[:, : case.out_channels], up=scale))
        advice = "start the last layer at zero and add densectx.nn.resize.bicubic(x, up=scale)"
        expect(error < 1e-6, f"untrained at scale {scale} it is {error:.3g} away from its input", advice)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = head(levels, x)
        expect(
            y.dtype == torch.float32, f"under bf16 the corrected image is {y.dtype}", "add in float32: full(y) + ..."
        )


def reads_what_it_says(case: HeadCase) -> None:
    """With ``reads_pyramid = False`` the context's level is enough, and the answer is the same to the bit."""
    head = case.build().eval()
    levels, x = case.given()
    expect(isinstance(head.reads_pyramid, bool), f"reads_pyramid is {head.reads_pyramid!r}", "make it true or false")
    if head.reads_pyramid:
        return
    with torch.no_grad():
        equal = same(head(levels, x), head(levels[-1:], x))
    expect(equal, "without the pyramid it answers differently", "set reads_pyramid = True, or read features[-1] only")


def answers_samples_one_by_one(case: HeadCase) -> None:
    """In evaluation mode a sample's output does not depend on the batch, and nothing is random."""
    head = case.build().eval()
    levels, x = case.given()
    check_one_by_one(lambda rows: head([level[rows] for level in levels], x[rows]), CLOSE)


def leaves_its_arguments_and_the_process(case: HeadCase) -> None:
    """Features and input are not changed in place: other tasks read them, too."""
    head = case.build().train()
    given = case.given()
    with preserved():
        head(*given)  # what is imported at the first use may do more
    before, kept = copied(given), settings()
    head(*given)
    check_untouched(before, given, "forward", "the features or the input")
    touched = changed(kept, settings())
    expect(not touched, f"forward changes {', '.join(touched)}", "leave settings of the process as they are")


def is_alike_in_bf16(case: HeadCase) -> None:
    """bf16 autocast changes the output by a few percent at most."""
    head = case.build().eval()
    given = case.given()
    check_alike_in_bf16(lambda: head(*given), "the output")


def state_round_trip(case: HeadCase) -> None:
    """Its state, loaded into one built anew, gives the same output to the bit; every tensor is registered."""
    head = case.build(seed=0)
    check_registered(head)
    check_round_trip(head, case.build(seed=1), lambda one: one(*case.given()))


CHECKS: Final = (
    builds,
    is_documented,
    answers_at_scales_and_sizes,
    takes_a_trunk_at_stride_1,
    gradient_reaches_every_parameter,
    a_correction_starts_at_zero,
    reads_what_it_says,
    answers_samples_one_by_one,
    leaves_its_arguments_and_the_process,
    is_alike_in_bf16,
    state_round_trip,
)


def head_checks(
    subject: Subject, *, features: Sequence[Feature] = FEATURES, out_channels: int = CHANNELS
) -> list[Check]:
    """The checks of :func:`check_head` one by one, for ``pytest.mark.parametrize``; builds nothing yet."""
    case = HeadCase(subject, tuple(features), out_channels)
    return [Check(function.__name__, partial(function, case)) for function in CHECKS]


def check_head(
    subject: Subject,
    *,
    features: Sequence[Feature] = FEATURES,
    out_channels: int = CHANNELS,
    expected_failed_checks: Mapping[str, str] | None = None,
) -> None:
    """Does a head keep its contract (:class:`densectx.heads.base.Head`)?

    Args:
        subject: registered name, spec, class, or factory.
        features: levels it is built for, fine to coarse, the context's last.
        out_channels: channels of the answer.
        expected_failed_checks: {check: reason} that may fail; one that passes all the same is told.

    Raises:
        ChecksFailed: an AssertionError with every failed check, what it found and what to do.
    """
    checks = head_checks(subject, features=features, out_channels=out_channels)
    run_checks(called(HEADS, subject), checks, expected_failed_checks or {})
