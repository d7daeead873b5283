"""Checks of a task's loss and of what it does to the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from densectx.tasks.base import Counting
from densectx.testing import samples
from densectx.testing.modules import check_gradients, check_untouched
from densectx.testing.report import expect
from densectx.testing.task_case import TaskCase
from densectx.testing.values import copied, difference, shape
from densectx.types import Terms

CLOSE = 1e-4


def _pairs(terms: Terms) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (total.detach(), weight.detach()) for name, (total, weight) in terms.items()}


def loss_gives_sums_and_weights(case: TaskCase) -> None:
    """{term: (sum, weight)}, the terms those of ``coefficients``, float32 scalars, a weight >= 0 without gradient."""
    model = case.model()
    terms = case.terms(model, case.batch())
    expect(isinstance(terms, dict), f"loss returns a {type(terms).__name__}", "return {term: (sum, weight)}")
    known = set(case.task(model).coefficients)
    expect(
        set(terms) == known,
        f"loss returns the terms {sorted(terms)}, coefficients are of {sorted(known)}",
        "return every term at every batch, (0 with a graph, 0) where it has nothing to count: all ranks sum one table",
    )
    for name, pair in terms.items():
        expect(
            isinstance(pair, tuple) and len(pair) == 2,
            f"term {name!r} is a {type(pair).__name__}",
            "return (sum, weight)",
        )
        for what, value in zip(("sum", "weight"), pair, strict=True):
            expect(
                isinstance(value, Tensor) and value.ndim == 0 and value.dtype == torch.float32,
                f"the {what} of {name!r} is {shape(value) if isinstance(value, Tensor) else type(value).__name__}",
                "return scalar float32 tensors",
            )
            expect(bool(value.isfinite()), f"the {what} of {name!r} is {value.item()}", "look for log of 0 and 0 / 0")
        total, weight = pair
        expect(
            total.requires_grad,
            f"the sum of {name!r} has no gradient",
            "compute it from output, without detach or no_grad",
        )
        expect(not weight.requires_grad, f"the weight of {name!r} has a gradient", "count it from the target alone")
        expect(
            weight.item() >= 0,
            f"the weight of {name!r} is {weight.item()}",
            "it is a count, or a sum of counts' factors",
        )
        expect(
            weight.item() > 0,
            f"the weight of {name!r} is 0",
            "count what is labelled; or pass a batch= that suits the task",
        )


def loss_adds_up_over_samples(case: TaskCase) -> None:
    """Sums and weights of a batch are those of its samples added: so any number of ranks gives the same loss."""
    model, batch = case.model().eval(), case.batch()
    x, target = case.prepared(model, batch)
    with torch.no_grad():
        output = case.output(model, x)
        whole = _pairs(case.task(model).loss(output, target))
        rows = [
            _pairs(case.task(model).loss(output[[r]], {key: value[[r]] for key, value in target.items()}))
            for r in range(len(output))
        ]
    for name, pair in whole.items():
        for which, what in enumerate(("sum", "weight")):
            added = torch.stack([row[name][which] for row in rows]).sum()
            expect(
                difference(pair[which], added) < CLOSE,
                f"the {what} of {name!r} is {pair[which]:.6g}, of the samples alone {added:.6g} together",
                "return sum and weight, not a mean: the engine divides after adding both over all ranks",
            )


def loss_weights_are_counted(case: TaskCase) -> None:
    """If it is a counting task: the weights it knows ahead are those that its loss returns."""
    model, batch = case.model(), case.batch()
    task = case.task(model)
    if not isinstance(task, Counting):
        return
    x, target = case.prepared(model, batch)
    counted, terms = task.weights(target), task.loss(case.output(model, x), target)
    for name, weight in counted.items():
        found = terms[name][1]
        expect(
            difference(weight.to(found.dtype), found) < CLOSE,
            f"weights() counts {weight.item():.6g} for {name!r}, the loss returns {found.item():.6g}",
            "give criterion.weights the very target that criterion is given",
        )


def loss_leaves_its_arguments(case: TaskCase) -> None:
    """Output and target are not changed in place."""
    model, batch = case.model(), case.batch()
    x, target = case.prepared(model, batch)
    output = case.output(model, x).detach()
    before = copied((output, target))
    case.task(model).loss(output, target)
    check_untouched(before, (output, target), "loss", "output or target")


def loss_of_nothing_labelled_is_zero(case: TaskCase) -> None:
    """Without any label every term is (0 with a graph, 0) and no gradient is NaN."""
    if not case.labelled:
        return
    model = case.model()
    terms = case.terms(model, samples.without_labels(case.batch(), case.info))
    advice = "mask before you compute, sum what is left, count it as the weight; divide by nothing"
    for name, (total, weight) in terms.items():
        expect(total.item() == 0, f"the sum of {name!r} is {total.item()} without labels", advice)
        expect(weight.item() == 0, f"the weight of {name!r} is {weight.item()} without labels", advice)
        expect(
            total.requires_grad,
            f"the sum of {name!r} has no graph without labels",
            f"{advice}; (output * 0).sum() has one",
        )
    torch.autograd.backward(torch.stack([total for total, _ in terms.values()]).sum())
    wrong = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    expect(not wrong, f"without labels the gradient of {', '.join(wrong[:3])} is not zero (or NaN)", advice)


def unlabelled_samples_count_nothing(case: TaskCase) -> None:
    """A sample without labels changes neither sum nor weight."""
    if not case.labelled:
        return
    model, batch = case.model().eval(), case.batch()
    rest = list(range(1, len(batch["image"])))
    with torch.no_grad():
        some = _pairs(case.terms(model, samples.without_labels(batch, case.info, [0])))
        without = _pairs(case.terms(model, samples.take(batch, rest)))
    for name, pair in some.items():
        for value, expected, what in zip(pair, without[name], ("sum", "weight"), strict=True):
            expect(
                difference(value, expected) < CLOSE,
                f"the {what} of {name!r} is {value:.6g} with an unlabelled sample, {expected:.6g} without it",
                "leave pixels of ignore_index, and NaN, out of sum and weight",
            )


def unlabelled_pixels_pull_nowhere(case: TaskCase) -> None:
    """The gradient at unlabelled pixels of the output is zero."""
    if not case.labelled:
        return
    model, batch = case.model(), samples.without_corner(case.batch(), case.info)
    x, target = case.prepared(model, batch)
    output = case.output(model, x).detach().requires_grad_()
    torch.autograd.backward(case.value(model, case.task(model).loss(output, target)))
    gradient = output.grad if output.grad is not None else torch.zeros_like(output)
    expect(
        bool(gradient.isfinite().all()),
        "the gradient of the output is not finite",
        "put where() before a penalty of NaN",
    )
    scale = gradient.shape[-2] // batch["image"].shape[-2] or 1
    top, left = (side * scale for side in samples.corner(batch))
    expect(
        not gradient[0, :, :top, :left].any(),
        "unlabelled pixels of the output have a gradient",
        "leave pixels of ignore_index, and NaN, out of the sum",
    )


def gradient_reaches_every_parameter(case: TaskCase) -> None:
    """The loss trains all of the task's parameters, and the trunk."""
    model = case.model()
    torch.autograd.backward(case.value(model, case.terms(model, case.batch())))
    advice = "use it in the head, without detach, no_grad or argmax before the loss"
    check_gradients(case.task(model), "the task", advice)
    trunk = [p for p in model.backbone.parameters() if p.requires_grad]
    expect(any(p.grad is not None and p.grad.any() for p in trunk), "no gradient reaches the trunk", advice)


def loss_falls(case: TaskCase) -> None:
    """Some steps on one batch bring its loss down."""
    tried = []
    for rate in (1e-2, 1e-3, 1e-4):
        model, batch = case.model().eval(), case.batch()  # eval: no dropout, no statistics
        x, target = case.prepared(model, batch)
        optimizer = torch.optim.Adam(model.parameters(), rate)
        values = []
        for _ in range(8):
            optimizer.zero_grad()
            value = case.value(model, case.task(model).loss(case.output(model, x), target))
            torch.autograd.backward(value)
            optimizer.step()
            values.append(value.item())
        if min(values) < values[0] - 1e-3 * abs(values[0]):
            return
        tried.append(f"{values[0]:.4g} to {values[-1]:.4g} at rate {rate:g}")
    expect(False, f"the loss does not fall: {'; '.join(tried)}", "check its sign and that it depends on the output")


def ranks_add_up_to_one_process(case: TaskCase) -> None:
    """Gradients of two halves of a batch, normalised as on two ranks, are those of the whole batch."""
    model, batch = case.model().eval(), case.batch()
    torch.autograd.backward(case.value(model, case.terms(model, batch)))
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    middle = len(batch["image"]) // 2
    halves = [samples.take(batch, range(middle)), samples.take(batch, range(middle, len(batch["image"])))]
    terms = [case.terms(model, half) for half in halves]
    together = {
        name: (torch.stack([t[name][0] for t in terms]).sum(), torch.stack([t[name][1] for t in terms]).sum())
        for name in terms[0]
    }
    torch.autograd.backward(case.value(model, together))
    for name, p in model.named_parameters():
        if name in whole and p.grad is not None:
            error = (p.grad - whole[name]).norm() / whole[name].norm().clamp_min(1e-6)
            expect(
                bool(error < 10 * CLOSE),
                f"on two ranks the gradient of {name} would differ by {error:.3g} (relative) from one process's",
                "let no sample's sum depend on the others of the batch; region losses are taken image by image",
            )


def padding_weighs_nothing(case: TaskCase) -> None:
    """Where ``valid`` says that augmentation padded the image, nothing is learned and nothing is counted."""
    model, batch = case.model().eval(), case.batch()
    bare = samples.padded(batch, case.info)
    _, target = case.prepared(model, bare)
    output = case.raw(model, bare).requires_grad_()
    terms = case.task(model).loss(output, target)
    with torch.no_grad():
        before = _pairs(case.terms(model, batch))
    advice = 'leave out of the target (NaN, ignore_index) where batch.get("valid") is false'
    for name, (total, weight) in _pairs(terms).items():
        expect(bool(total.isfinite()), f"with padded images the sum of {name!r} is {total.item()}", advice)
        more = weight.item() > before[name][1].item() * (1 + CLOSE)
        expect(not more, f"padded images raise the weight of {name!r}", advice)
    torch.autograd.backward(case.value(model, terms))
    gradient = output.grad if output.grad is not None else torch.zeros_like(output)
    real = round(gradient.shape[-2] / batch["image"].shape[-2]) * samples.real_rows(batch)
    expect(not gradient[..., real:, :].any(), "padded pixels of the output have a gradient", advice)
