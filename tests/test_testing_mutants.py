"""A good task passes ``check_task``; one with a single fault of the kinds that people make does not."""

import random
import warnings

import pytest
import torch
from torch import nn
from torchmetrics import Metric

from densectx.errors import ConfigError
from densectx.losses import Criterion
from densectx.nn.colour import as_rgb
from densectx.registry import HEADS
from densectx.tasks.base import Counting, Task
from densectx.testing import check_task, task_checks
from densectx.testing.report import CheckFailed
from densectx.types import Score, Spec


class MeanError(Metric):
    """Mean absolute error of the answer and of one half."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("sums", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction, target):
        known = ~target.isnan()
        for row, answer in enumerate((prediction, torch.full_like(target, 0.5))):
            self.sums[row] += (answer - target)[known].abs().double().sum()
        self.count += known.sum()

    def compute(self):
        error, half = self.sums / self.count
        return {"error": error, "error_half": half}


class Good(Task):
    """The target's map from a noisy image: (B, C, H, W) -> (B, 1, H, W) in 0..1."""

    requires = ("image", "target")
    score = Score("error", "half", higher_is_better=False)
    output = "values"

    def __init__(
        self, features, in_channels, info, source: str, weight: float = 1.0, noise: float = 0.1, head: Spec = "decoder"
    ):
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        if info.target != "map":
            raise ConfigError(f"source {source!r} has no map.")
        self.noise = noise
        self.head = HEADS.build(head, "head", features=features, in_channels=info.channels, out_channels=1)
        self.criterion = Criterion("l1")
        self.metrics = MeanError()

    def prepare(self, batch, rngs):
        image, target = batch["image"], batch["target"]
        noise = [torch.randn(image.shape[1:], generator=rng, device=rng.device) for rng in rngs]
        return image + self.noise * torch.stack(noise), {"value": target}

    def inputs(self, image, options):
        return image

    def loss(self, output, target):
        return self.criterion(output.sigmoid(), target["value"])

    def postprocess(self, output, x):
        return output.sigmoid()

    def update(self, prediction, x, target):
        self.metrics.update(prediction, target["value"])

    def draw(self, prediction, x, target):
        pictures = (x, prediction, target["value"].nan_to_num())
        return [as_rgb(picture)[0].clamp(0, 1) for picture in pictures]


def mutant(check, **methods):
    """A fault and the check that must find it."""
    return check, type("Mutant", (Good,), {"__doc__": "A mutant.", **methods})


def noisy(draw):
    def prepare(self, batch, rngs):
        return batch["image"] + self.noise * draw(batch["image"]), {"value": batch["target"]}

    return prepare


def adds_in_place(self, batch, rngs):
    batch["image"].add_(0.01)
    return batch["image"].clone(), {"value": batch["target"]}


def terms_of(make):
    def loss(self, output, target):
        known = ~target["value"].isnan()
        error = torch.where(known, output.sigmoid() - target["value"], 0.0).abs()
        return make(error, known)

    return loss


def counted(metric):
    def init(self, *args, **options):
        Good.__init__(self, *args, **options)
        self.metrics = metric()

    def init_with_options(self, features, in_channels, info, source: str):
        init(self, features, in_channels, info, source)

    return init_with_options


class Forgets(MeanError):
    """Counts in an attribute that reset does not know."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def update(self, prediction, target):
        super().update(prediction, target)
        self.seen += len(target)

    def compute(self):
        return {**super().compute(), "seen": torch.tensor(float(self.seen))}


class Lists(Metric):
    """Keeps every value."""

    def __init__(self):
        super().__init__()
        self.add_state("errors", [], dist_reduce_fx="cat")

    def update(self, prediction, target):
        self.errors.append((prediction - target).abs().nanmean())

    def compute(self):
        mean = torch.stack(self.errors).mean() if self.errors else torch.tensor(torch.nan)
        return {"error": mean, "error_half": mean}


class Averages(MeanError):
    """Means of batches."""

    def update(self, prediction, target):
        self.sums += (prediction - target).abs().nanmean().double()
        self.count += 1


class NoBaseline(MeanError):
    """Without the trivial answer's score."""

    def compute(self):
        return {"error": (self.sums / self.count)[0]}


def with_part(make):
    def init(self, features, in_channels, info, source: str):
        Good.__init__(self, features, in_channels, info, source)
        make(self)

    return init


def add_buffer(self):
    self.register_buffer("shift", torch.rand(()), persistent=False)


def add_attribute(self):
    self.shift = torch.rand(())


def shifted(self, output, x):
    return (output + self.shift).sigmoid()


def filters(self, output, x):
    warnings.filterwarnings("ignore", "a message of this test")
    return output.sigmoid()


def trains(self, output, x):
    self.train()
    return output.sigmoid()


def evens(self, output, x):
    height, width = (size - size % 2 for size in output.shape[-2:])
    return output.sigmoid()[..., :height, :width]


MUTANTS = {
    "wrong shape": mutant("postprocess_answers", postprocess=lambda self, y, x: y.sigmoid()[..., 1:]),
    "wrong size where the size is odd": mutant("answers_at_every_size", postprocess=evens),
    "float16 answer": mutant("postprocess_answers", postprocess=lambda self, y, x: y.sigmoid().half()),
    "NaN in the answer": mutant("postprocess_answers", postprocess=lambda self, y, x: (y.sigmoid() - 0.5).sqrt()),
    "answer normalised over the batch": mutant(
        "answers_one_by_one", postprocess=lambda self, y, x: (y - y.mean()).sigmoid()
    ),
    "grid that begins anew in each tile": mutant(
        "answers_alike_in_tiles",
        inputs=lambda self, image, options: image * (torch.arange(image.shape[-1], device=image.device) % 2),
    ),
    "output changed in place": mutant("postprocess_answers", postprocess=lambda self, y, x: y.sigmoid_()),
    "mode left changed": mutant("keeps_its_mode", postprocess=trains),
    "warnings filtered": mutant("leaves_the_process_as_it_was", postprocess=filters),
    "noise added in predict": mutant(
        "inputs_take_an_image_as_it_is", inputs=lambda self, image, options: image + 0.1 * torch.randn_like(image)
    ),
    "no loss": mutant("loss_gives_sums_and_weights", loss=lambda self, y, target: None),
    "loss term missing": mutant("loss_gives_sums_and_weights", loss=lambda self, y, target: {}),
    "float64 loss": mutant(
        "loss_gives_sums_and_weights", loss=terms_of(lambda e, known: {"l1": (e.double().sum(), known.sum().double())})
    ),
    "mean instead of sum": mutant(
        "loss_adds_up_over_samples",
        loss=terms_of(lambda e, known: {"l1": (e.sum() / known.sum().clamp_min(1), torch.ones(()))}),
    ),
    "weight counts unlabelled pixels": mutant(
        "unlabelled_samples_count_nothing",
        loss=terms_of(lambda e, known: {"l1": (e.sum(), torch.tensor(float(known.numel())))}),
    ),
    "NaN without labels": mutant(
        "loss_of_nothing_labelled_is_zero",
        loss=terms_of(lambda e, known: {"l1": (e.sum() / known.sum() * known.sum(), known.sum().float())}),
    ),
    "NaN taken for labels": mutant(
        "loss_of_nothing_labelled_is_zero",
        loss=lambda self, y, target: {
            "l1": ((y.sigmoid() - target["value"]).nan_to_num().abs().sum(), torch.tensor(float(y.numel())))
        },
    ),
    "gradient cut": mutant(
        "gradient_reaches_every_parameter",
        loss=lambda self, y, target: Good.loss(self, y.detach() + 0 * y, target),
    ),
    "weight counted otherwise": (
        "loss_weights_are_counted",
        type("Mutant", (Good, Counting), {"__doc__": "A mutant.", "weights": lambda *_: {"l1": torch.tensor(7.0)}}),
    ),
    "sign of the loss": mutant(
        "loss_falls",
        loss=terms_of(lambda e, known: {"l1": ((e.detach() ** 2 / e.clamp_min(1e-6)).sum(), known.sum().float())}),
    ),
    "batch changed in place": mutant("prepare_leaves_the_batch", prepare=adds_in_place),
    "own seed in prepare": mutant(
        "prepare_takes_samples_one_by_one",
        prepare=noisy(lambda image: torch.randn(image.shape, generator=torch.Generator().manual_seed(0))),
    ),
    "global random numbers": mutant("prepare_is_repeatable", prepare=noisy(torch.randn_like)),
    "Python's random numbers": mutant("prepare_is_repeatable", prepare=noisy(lambda image: random.random())),
    "input of another type": mutant(
        "prepare_gives_what_it_declares",
        prepare=lambda self, batch, rngs: (batch["image"].double(), {"value": batch["target"]}),
    ),
    "image copied": mutant(
        "says_whether_it_changes_the_image",
        prepare=lambda self, batch, rngs: (batch["image"].clone(), {"value": batch["target"]}),
    ),
    "picture out of range": mutant("draws_pictures", draw=lambda self, y, x, t: [255 * as_rgb(x)[0]]),
    "picture with NaN": mutant("draws_pictures", draw=lambda self, y, x, t: [as_rgb(t["value"])[0]]),
    "count that reset forgets": mutant("metrics_reset", __init__=counted(Forgets)),
    "list state": mutant("metrics_have_sum_states", __init__=counted(Lists)),
    "mean of means": mutant("metrics_add_up", __init__=counted(Averages)),
    "no score of the trivial answer": mutant("metrics_have_the_score", __init__=counted(NoBaseline)),
    "tensor in an attribute": mutant("tensors_are_registered", __init__=with_part(add_attribute), postprocess=shifted),
    "state not saved": mutant("state_round_trip", __init__=with_part(add_buffer), postprocess=shifted),
    "parameter without use": mutant(
        "gradient_reaches_every_parameter",
        __init__=with_part(lambda self: setattr(self, "extra", nn.Linear(2, 2))),
    ),
    "unlabelled counted in metrics": mutant(
        "unlabelled_samples_are_not_measured",
        update=lambda self, y, x, target: self.metrics.update(y, target["value"].nan_to_num()),
    ),
}


def test_the_good_one_passes():
    check_task(Good)


@pytest.mark.fault("P08")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_found_by_the_check_for_it(name):
    check, task = MUTANTS[name]
    with pytest.raises(CheckFailed, match=" -> "):
        next(one for one in task_checks(task) if one.name == check)()
