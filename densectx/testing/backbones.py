"""``check_backbone``: everything that densectx expects of a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, final

import torch
from torch import Tensor

from densectx.backbones.base import Backbone
from densectx.nn.norm import set_norm
from densectx.registry import BACKBONES
from densectx.testing.modules import (
    check_alike_in_bf16,
    check_answer,
    check_gradients,
    check_registered,
    check_round_trip,
    check_untouched,
    modes,
    stir,
)
from densectx.testing.report import Check, expect, run_checks
from densectx.testing.states import changed, preserved, random_states, settings
from densectx.testing.subjects import Subject, called, check_documented, named
from densectx.testing.values import difference, same
from densectx.types import Feature

CLOSE: Final = 1e-3


@final
@dataclass(frozen=True)
class BackboneCase:
    """A backbone under test."""

    subject: Subject

    def build(self, seed: int = 0) -> Backbone:
        """A fresh one; parts that start at zero get some noise."""
        torch.manual_seed(seed)
        with named(BACKBONES, self.subject) as spec:
            net: Backbone = BACKBONES.build(spec)
        stir(net)
        return net

    def image(self, net: Backbone, rows: int = 2, columns: int = 3, count: int = 2) -> Tensor:
        """Pictures of so many total strides, at least 48 pixels a side unless it is one stride."""
        stride = max(feature.stride for feature in net.features)
        least = -(-48 // stride) if min(rows, columns) > 1 else 1
        rng = torch.Generator().manual_seed(3)
        return torch.rand(
            count, net.in_channels, max(rows, least) * stride, max(columns, least) * stride, generator=rng
        )


def builds_and_declares(case: BackboneCase) -> None:
    """``features`` and ``in_channels`` say what it takes and gives, fine to coarse."""
    net = case.build()
    features = getattr(net, "features", None)
    advice = "set self.features = (Feature(channels, stride), ...), fine to coarse, in the constructor"
    expect(isinstance(features, tuple) and bool(features), f"features is {features!r}", advice)
    for feature in net.features:
        expect(isinstance(feature, Feature), f"features holds {feature!r}", advice)
        expect(min(feature) >= 1, f"features holds {feature}", f"{advice}; both are at least 1")
    strides = [feature.stride for feature in net.features]
    expect(strides == sorted(strides), f"strides are {strides}", "order the levels fine to coarse")
    total = max(strides)
    expect(all(total % stride == 0 for stride in strides), f"strides are {strides}", "let each divide the largest")
    channels = getattr(net, "in_channels", None)
    expect(isinstance(channels, int) and channels >= 1, f"in_channels is {channels!r}", "set self.in_channels")


def is_documented(case: BackboneCase) -> None:
    """A docstring, and options that a config can be checked against."""
    check_documented(BACKBONES, case.subject, ("self",))


def gives_what_it_declares(case: BackboneCase) -> None:
    """Each level has its declared channels and stride, at odd multiples of the total stride and for one image."""
    net = case.build().eval()
    stride = max(feature.stride for feature in net.features)
    for count, rows, columns in ((2, 3, 5), (1, 1, 1), (1, 1, 3)):
        x = torch.rand(count, net.in_channels, rows * stride, columns * stride)
        with torch.no_grad():
            levels = net(x)
        ok = isinstance(levels, list) and len(levels) == len(net.features)
        expect(
            ok,
            f"forward returns {type(levels).__name__} of {len(levels)}",
            f"return a list of {len(net.features)} maps",
        )
        for number, (level, feature) in enumerate(zip(levels, net.features, strict=True)):
            size = (count, feature.channels, x.shape[-2] // feature.stride, x.shape[-1] // feature.stride)
            what = f"level {number} for an image of {x.shape[-2]}x{x.shape[-1]}"
            check_answer(level, size, what, f"deliver what features[{number}] = {feature} says", torch.float32)


def gradient_reaches_every_parameter(case: BackboneCase) -> None:
    """The levels together train every parameter that is trained."""
    net = case.build()
    torch.autograd.backward(torch.stack([level.square().mean() for level in net(case.image(net))]).sum())
    check_gradients(
        net, "the backbone", "use it in a level, or leave it out; freeze on purpose with requires_grad_(False)"
    )


def answers_images_one_by_one(case: BackboneCase) -> None:
    """In evaluation mode an image's levels do not depend on the batch."""
    net = case.build().eval()
    x = case.image(net)
    with torch.no_grad():
        together, alone = net(x), net(x[1:])
    for number, (a, b) in enumerate(zip(together, alone, strict=True)):
        error = difference(b[0], a[1])
        expect(
            error < CLOSE, f"level {number} differs by {error:.3g} alone", "take no statistics over the batch in eval()"
        )


def is_never_random_in_evaluation(case: BackboneCase) -> None:
    """In evaluation mode nothing is drawn and nothing changes."""
    net = case.build().eval()
    x = case.image(net)
    before, state = x.clone(), {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        first = net(x)
        states = random_states()
        second = net(x)
    used = changed(states, random_states())
    expect(not used and same(first, second), "it is random in evaluation mode", "drop and draw only if self.training")
    check_untouched(before, x, "forward", "the image")
    expect(
        same(state, dict(net.state_dict())),
        "its state changes in evaluation mode",
        "update statistics only if self.training",
    )


def leaves_image_and_process(case: BackboneCase) -> None:
    """In training mode the image, modes and settings of the process stay as they are."""
    net = case.build().train()
    x = case.image(net)
    with preserved():
        net(x)  # what is imported at the first use may do more
    before, flags, kept = x.clone(), modes(net), settings()
    net(x)
    check_untouched(before, x, "forward", "the image")
    touched = [*changed(flags, modes(net)), *changed(kept, settings())]
    expect(not touched, f"forward changes {', '.join(touched[:3])}", "leave modes and settings as they are")


def is_alike_in_bf16(case: BackboneCase) -> None:
    """bf16 autocast changes the coarsest level by a few percent at most."""
    net = case.build().eval()
    x = case.image(net)
    check_alike_in_bf16(lambda: net(x)[-1], "the last level")


def state_round_trip(case: BackboneCase) -> None:
    """Its state, loaded into one built anew, gives the same levels to the bit; every tensor is registered."""
    net = case.build(0)
    check_registered(net)
    x = case.image(net)
    net.train()(x)  # statistics that are not the first ones
    check_round_trip(net, case.build(1), lambda one: one(x))


def norms_can_be_exchanged(case: BackboneCase) -> None:
    """``norm: group``, ``frozen`` and ``none`` work: its batch norms are modules of their own."""
    for kind in ("group", "frozen", "none"):
        net = case.build()
        set_norm(net, kind)
        levels = net(case.image(net))
        finite = all(bool(level.isfinite().all()) for level in levels)
        expect(finite, f"with norm: {kind} a level is not finite", "use nn.BatchNorm2d as sub-modules")
        left = [name for name, part in net.named_modules() if isinstance(part, torch.nn.BatchNorm2d)]
        expect(not left, f"norm: {kind} leaves {', '.join(left[:3])}", "use nn.BatchNorm2d as sub-modules")


CHECKS: Final = (
    builds_and_declares,
    is_documented,
    gives_what_it_declares,
    gradient_reaches_every_parameter,
    answers_images_one_by_one,
    is_never_random_in_evaluation,
    leaves_image_and_process,
    is_alike_in_bf16,
    state_round_trip,
    norms_can_be_exchanged,
)


def backbone_checks(subject: Subject) -> list[Check]:
    """The checks of :func:`check_backbone` one by one, for ``pytest.mark.parametrize``; builds nothing yet."""
    case = BackboneCase(subject)
    return [Check(function.__name__, partial(function, case)) for function in CHECKS]


def check_backbone(subject: Subject, *, expected_failed_checks: Mapping[str, str] | None = None) -> None:
    """Does a backbone keep its contract (:class:`densectx.backbones.base.Backbone`)?

    Args:
        subject: registered name, spec, class, or factory.
        expected_failed_checks: {check: reason} that may fail; one that passes all the same is told.

    Raises:
        ChecksFailed: an AssertionError with every failed check, what it found and what to do.
    """
    run_checks(called(BACKBONES, subject), backbone_checks(subject), expected_failed_checks or {})
