"""Checks of what a task answers and draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from densectx.errors import ConfigError
from densectx.inference.tiler import Setting
from densectx.inference.tiling import Tiling
from densectx.model import DenseModel
from densectx.nn.precision import full
from densectx.testing.modules import check_alike_in_bf16, check_answer, check_untouched
from densectx.testing.report import expect
from densectx.testing.states import changed, random_states, reseed
from densectx.testing.task_case import KEY, STRIDED, TaskCase
from densectx.testing.task_contract import SIZES
from densectx.testing.values import copied, difference, same, shape

CLOSE = 1e-4


def _images(case: TaskCase, count: int = 3, size: tuple[int, int] = (21, 33)) -> Tensor:
    rng = torch.Generator().manual_seed(7)
    return torch.rand(count, case.info.channels, *size, generator=rng)


def inputs_take_an_image_as_it_is(case: TaskCase) -> None:
    """``inputs`` gives x as ``prepare`` does, adds no noise and leaves the image."""
    model, image = case.model(), _images(case)
    task = case.task(model)
    options = case.resolved(model, image)
    missing = [name for name, value in options.items() if value is None]
    expect(
        not missing,
        f"run-time options without value: {', '.join(missing)}",
        "pass options={'sigma': 25.0} to the check",
    )
    before = image.clone()
    states = random_states()
    x, again = task.inputs(image, options), task.inputs(image, options)
    check_untouched(before, image, "inputs", "the image")
    height, width = (size * task.input_scale for size in image.shape[-2:])
    advice = f"return (B, {task.channels}, H, W) float32, H and W input_scale times those of the image"
    check_answer(x, (len(image), task.channels, height, width), "x of inputs", advice, torch.float32)
    used = changed(states, random_states())
    expect(
        same(x, again) and not used, "inputs is random", "the image given to predict is the input; add nothing to it"
    )


def postprocess_answers(case: TaskCase) -> None:
    """One float32 answer of the right size a sample; output and x stay as they are."""
    model, batch = case.model().eval(), case.batch()
    task = case.task(model)
    x, _ = case.prepared(model, batch)
    output = case.output(model, x).detach()
    before = copied((output, x))
    answer = task.postprocess(output, x)
    check_untouched(before, (output, x), "postprocess", "output or x")
    size = tuple(side * task.scale // task.input_scale for side in x.shape[-2:])
    advice = "return (B, K, H * scale, W * scale) float32"
    check_answer(answer, (len(x), None, *size), "the answer", advice, torch.float32)


def answers_are_what_output_says(case: TaskCase) -> None:
    """Probabilities are some, pictures have 1 or 3 channels."""
    model = case.model()
    kind = case.task(model).output
    with torch.no_grad():
        for parameter in case.task(model).head.parameters():
            parameter.mul_(3)  # answers that are far from the middle
    answer = case.predict(model, _images(case))
    low, high, channels = answer.min().item(), answer.max().item(), answer.shape[1]
    if kind in ("classes", "labels"):
        count = len(case.info.classes)
        expect(channels == count, f"{channels} channels for {count} classes", f"output = {kind!r} needs one a class")
        advice = f"output = {kind!r}: return probabilities, softmax(1) or sigmoid() of the logits"
        expect(low >= 0 and high <= 1 + 1e-6, f"answers from {low:.3g} to {high:.3g}", advice)
    if kind == "classes":
        error = (answer.sum(1) - 1).abs().max().item()
        expect(
            error < 1e-4, f"probabilities of a pixel add up to 1 within {error:.3g}", "return softmax(1) of the logits"
        )
    if kind == "restored":
        expect(channels == case.info.channels, f"{channels} channels", f"a restored image has {case.info.channels}")


def answers_at_every_size(case: TaskCase) -> None:
    """H * scale x W * scale for any image, at stride 1."""
    _every_size(case, case.model())


def answers_at_every_size_with_a_strided_trunk(case: TaskCase) -> None:
    """H * scale x W * scale for any image, behind a trunk with strides."""
    _every_size(case, case.model(backbone=STRIDED))


def _every_size(case: TaskCase, model: DenseModel) -> None:
    scale = case.task(model).scale
    for height, width in SIZES:
        answer = case.predict(model, _images(case, 1, (height, width))[0])
        advice = "take factors and strides from the model, no sizes; densectx.nn.resize has exact ones; the model crops"
        what = f"the answer for a {height}x{width} image"
        check_answer(answer, (None, height * scale, width * scale), what, advice, torch.float32)


def answers_one_by_one(case: TaskCase) -> None:
    """An image's answer does not depend on the others of the batch."""
    model, images = case.model(), _images(case)
    together = case.predict(model, images)
    for row in range(len(images)):
        error = difference(case.predict(model, images[row]), together[row])
        advice = "take no statistics, maxima or clamps over the batch dimension; use norms in evaluation mode"
        expect(error < CLOSE, f"alone an image's answer differs by {error:.3g} from that in a batch", advice)


def answers_alike_in_tiles(case: TaskCase) -> None:
    """Exact tiles give the answer of the whole image; a task whose field is infinite or unknown has none."""
    model = case.model().eval()
    tiles = Tiling(model, [KEY], Setting(), lambda image, options: model.predict(image, [KEY], options))
    try:
        halo = tiles.halo
    except ConfigError:  # what it does to an image cannot be followed: it is refused in tiles
        return
    if halo is None:
        return
    core = 15 * tiles.step  # an odd number of steps: windows start at odd and at even ones
    image = _images(case, 1, (9, halo.left + 3 * core))[0]
    options = model.resolve(image, [KEY], {f"{KEY}.{name}": value for name, value in case.options.items()})
    tiles.setting = Setting("exact", core)
    error = difference(tiles(image, options)[KEY], tiles.model.predict(image, [KEY], options)[KEY])
    expect(
        error < CLOSE,
        f"in exact tiles an image's answer differs by {error:.3g} from that of the whole",
        "set the class attribute period to the pixels after which inputs() repeats (2 for a Bayer mosaic)",
    )


def answers_gray_images(case: TaskCase) -> None:
    """An image of one channel is answered, too."""
    model = case.model()
    answer = case.predict(model, _images(case)[:1, :1])
    scale = case.task(model).scale
    check_answer(
        answer, (1, None, 21 * scale, 33 * scale), "the answer for a gray image", "expect the source's channels"
    )


def answers_are_never_random(case: TaskCase) -> None:
    """``predict`` gives the same twice, uses no global generator and leaves the image."""
    model, image = case.model().train(), _images(case)
    before = image.clone()
    reseed(1)
    first = case.predict(model, image)
    reseed(2)
    states = random_states()
    second = case.predict(model, image)
    check_untouched(before, image, "predict", "the image")
    used = changed(states, random_states())
    advice = "inputs and postprocess draw nothing; dropout is off in evaluation mode"
    expect(not used, f"predict uses {', '.join(used)}", advice)
    expect(same(first, second), "predict answers differently the second time", advice)


def answers_alike_in_bf16(case: TaskCase) -> None:
    """bf16 autocast changes the answer by a few percent at most."""
    model, images = case.model(), _images(case)
    check_alike_in_bf16(lambda: case.predict(model, images), "the answer")


def draws_pictures(case: TaskCase) -> None:
    """A list of (3, H, W) pictures in 0..1 of every sample, without labels as well.

    ``densectx report`` shows the first three as input, answer and truth. Its map of errors compares answer and truth of
    one size, or, of classes, the answer with a target (B, H, W), of labels and values with one of the answer's shape;
    a task that has neither goes without.
    """
    from densectx.testing import samples

    model, batch = case.model(), case.batch()
    variants = [batch, samples.without_labels(batch, case.info)] if case.labelled else [batch]
    for one in variants:
        prediction, x, target = case.answered(model, one)
        for row in (0, len(x) - 1):
            pick = slice(row, row + 1)
            drawn: Any = case.task(model).draw(prediction[pick], x[pick], {k: v[pick] for k, v in target.items()})
            advice = "return [(3, H, W)] in 0..1: input, answer, truth; as_rgb, clamp(0, 1) and nan_to_num help"
            expect(
                isinstance(drawn, list) and bool(drawn), f"draw returns {type(drawn).__name__} {drawn!r:.40}", advice
            )
            for number, picture in enumerate(drawn):
                check_answer(picture, (3, None, None), f"picture {number} of draw", advice)
                low, high = picture.min().item(), picture.max().item()
                inside = picture.is_floating_point() and low >= 0 and high <= 1
                expect(inside, f"picture {number} of draw is {shape(picture)} from {low:.3g} to {high:.3g}", advice)


class _Answer(nn.Module):
    """An image to the answer of one task, as an exporter sees it."""

    def __init__(self, case: TaskCase, model: DenseModel, options: dict[str, Any]) -> None:
        super().__init__()
        self.case, self.model, self.options = case, model, options

    def forward(self, image: Tensor) -> Tensor:
        task = self.case.task(self.model)
        x = task.inputs(image, self.options)
        return task.postprocess(full(self.model({KEY: x})[KEY]), x)


def exports(case: TaskCase) -> None:
    """``torch.export`` takes the model with the task, and what it makes answers the same."""
    model, image = case.model().eval(), _images(case, 1, (16, 24))
    options = case.resolved(model, image)
    with torch.no_grad():
        program = torch.export.export(_Answer(case, model, options).eval(), (image,), strict=False)
        error = difference(program.module()(image), case.predict(model, image))
    expect(
        error < CLOSE,
        f"the exported model answers {error:.3g} differently",
        "branch on shapes and options, not on values",
    )
