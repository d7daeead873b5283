"""The checks for plug-in authors on everything that is registered here, and what they say of faults."""

import os
import random
import warnings
from functools import partial
from pathlib import Path
from typing import final

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from densectx import BACKBONES, CONTEXTS, HEADS, LOSSES, TASKS
from densectx.backbones.base import Backbone
from densectx.backbones.plain import Plain
from densectx.data.base import Dataset
from densectx.errors import ConfigError
from densectx.heads.base import Head
from densectx.losses import L1, Criterion, Loss
from densectx.metrics.regression import RegressionMetrics
from densectx.nn.colour import as_rgb
from densectx.nn.context import Context
from densectx.tasks.base import Task
from densectx.tasks.regression import Regression
from densectx.testing import (
    CheckFailed,
    ChecksFailed,
    backbone_checks,
    check_backbone,
    check_context,
    check_dataset,
    check_head,
    check_loss,
    check_task,
    context_checks,
    dataset_checks,
    head_checks,
    loss_checks,
    make_batch,
    task_checks,
)
from densectx.testing.states import changed, preserved, random_states, reseed, settings
from densectx.testing.task_case import TaskCase
from densectx.testing.values import difference, same
from densectx.types import Feature, Score, SourceInfo

NETS = {
    "timm": {"name": "timm", "model": "resnet10t"},
    # all of its 134 M weights take minutes in bfloat16 where a processor only emulates it
    "frontend_vgg16": {"name": "frontend_vgg16", "width": 16, "fc": 64},
}
LIGHT = [name for name in BACKBONES.names() if not name.startswith(("dilated_resnet", "drn_"))]  # presets


def builtin(registry):
    return [entry.name for entry in registry.entries() if entry.distribution == "densectx"]


# everything that is registered ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", builtin(TASKS))
def test_tasks(name):
    check_task(name)


@pytest.mark.parametrize("name", LIGHT)
def test_backbones(name):
    check_backbone(NETS.get(name, name))


@pytest.mark.parametrize("name", builtin(CONTEXTS))
def test_contexts(name):
    check_context(name)


@pytest.mark.parametrize("name", builtin(HEADS))
def test_heads(name):
    check_head(name)


@pytest.mark.parametrize("name", builtin(LOSSES))
def test_losses(name):
    check_loss(name)


@pytest.mark.parametrize("source", ["masks", "images"])
@pytest.mark.parametrize("channels", [1, 3])
def test_tasks_on_other_sources(source, channels):
    keys = {"masks": ("image", "mask"), "images": ("image",)}[source]
    info = SourceInfo(channels=channels, classes=("a", "b") if source == "masks" else (), keys=keys, size=(18, 14))
    check_task("segmentation" if source == "masks" else {"name": "denoising", "sigma": 15}, info=info)


def test_a_given_batch_and_an_option_of_predict():
    info = SourceInfo()
    batch = {"image": make_batch(info, count=3, size=(16, 16), seed=1)["image"]}
    check_task({"name": "denoising", "sigma": [5, 50]}, info=info, batch=batch, options={"sigma": 20.0})


def test_a_task_of_several_maps():
    check_task({"name": "regression", "outputs": 2})
    info = SourceInfo(keys=("image", "target"), target="map")
    batch = {key: value for key, value in make_batch(info, maps=4, seed=1).items() if key in ("image", "target")}
    for check in task_checks({"name": "regression", "outputs": 4}, info=info, batch=batch):
        if check.name in ("prepare_takes_every_size", "unlabelled_pixels_pull_nowhere"):
            check()
    with pytest.raises(CheckFailed, match=r"refuses what is made up for it: .* -> pass info= and batch= that suit it"):
        task_checks({"name": "regression", "outputs": 4})[4]()


def test_maps_are_found_for_a_task_that_checks_no_channels(monkeypatch):
    prepare = Regression.prepare
    monkeypatch.setattr(
        Regression, "prepare", lambda self, b, rngs: (b["target"][:, self.outputs - 1], prepare(self, b, rngs))[1]
    )
    assert TaskCase({"name": "regression", "outputs": 3}).maps == 3
    with pytest.raises(IndexError, match="index 3 is out of bounds"):
        TaskCase({"name": "regression", "outputs": 4}).batch()


@final
class Normals(Task):
    """Components of a vector for every pixel, whose target needs no preparation.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of a source of maps.
        weight: of its loss.
    """

    requires = ("image", "target")
    score = Score("rmse", "constant", higher_is_better=False)
    output, unchanged, turns = "values", True, False

    def __init__(self, features, in_channels, info, source: str, weight: float = 1.0):
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        if info.target != "map" or info.scale != 1:
            raise ConfigError(f"normals: source {source!r} has no map as its target.")
        self.head = HEADS.build("decoder", features=features, in_channels=info.channels, out_channels=3)
        self.criterion, self.metrics = Criterion("l1", form="numbers"), RegressionMetrics(3)

    def prepare(self, batch, rngs):
        return batch["image"], {"normal": batch["target"]}

    def inputs(self, image, options):
        return image

    def loss(self, output, target):
        return self.criterion(output, target["normal"])

    def postprocess(self, output, x):
        return output

    def update(self, prediction, x, target):
        self.metrics.update(prediction, target["normal"])

    def draw(self, prediction, x, target):
        vectors = [(0.5 * y[0] + 0.5).nan_to_num().clamp(0, 1) for y in (prediction, target["normal"])]
        return [as_rgb(x)[0], *vectors]


def test_maps_are_those_that_every_method_takes():
    assert TaskCase(Normals).maps == 3
    check_task(Normals)


def test_a_batch_without_one_of_the_classes_is_a_right_one():
    info = SourceInfo(classes=("a", "b", "c"), keys=("image", "mask"))
    batch = {**make_batch(info, count=3, size=(16, 16), seed=1)}
    batch["mask"] = batch["mask"].clamp_max(1)
    check_task("segmentation", info=info, batch={key: batch[key] for key in ("image", "mask")})


@pytest.fixture
def tree(tmp_path):
    """Images and masks in the layout of a small data set."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (20 + number, 30, 3), np.uint8)
            Image.fromarray(pixels if number else pixels[..., 0]).save(tmp_path / "images" / split / f"{number}.png")
            mask = rng.integers(0, 3, (20 + number, 30), np.uint8)
            mask[:4] = 255
            Image.fromarray(mask).save(tmp_path / "masks" / split / f"{number}.png")
    return tmp_path


def test_datasets(tree):
    check_dataset({"name": "mosaic", "size": 32})
    check_dataset({"name": "folder", "root": str(tree / "images")})
    check_dataset(
        {
            "name": "image_mask",
            "root": str(tree),
            "images": "images/{subset}",
            "masks": "masks/{subset}",
            "classes": ["a", "b", "c"],
        },
        split="val",
    )


def test_two_processes_equal_one():
    two = task_checks(
        {"name": "segmentation", "loss": {"name": "cross_entropy", "class_weights": [1, 2, 3]}}, ranks=True
    )
    assert two[-1].name == "two_processes_equal_one"
    two[-1]()


def test_another_process_must_be_able_to_import_the_task():
    class Here(nn.Module):
        """Defined inside a function."""

    with pytest.raises(CheckFailed, match="cannot be imported by another process -> name it by an entry point"):
        task_checks(Here, ranks=True)[-1]()


# faults ---------------------------------------------------------------------------------------------------------------


def failures(check, subject, **options):
    """{check: what it says}."""
    with pytest.raises(ChecksFailed) as error:
        check(subject, **options)
    return error.value.failures


class Strides(Backbone):
    """Says stride 4 and delivers 2."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.in_channels, self.features = 3, (Feature(width, 4),)
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.idle = nn.Linear(1, 1)

    def forward(self, x):
        return [self.conv(x.mul_(1.0 + 1e-3))]


class Wrong(Head):
    def __init__(self, features, out_channels, width=3):
        super().__init__()
        self.conv = nn.Conv2d(features[-1].channels, out_channels, 1)
        self.scale_of = torch.ones(1)

    def forward(self, features, x):
        return self.conv(features[-1]) + torch.rand(())


class Shrinks(Context):
    """Loses its border."""

    def __init__(self, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3)

    @property
    def receptive_field(self):
        """3."""
        return 3

    def forward(self, x):
        return self.conv(x)


class Mean(Loss):
    """A mean over everything."""

    def forward(self, output, target):
        return (output - target).abs().mean(), torch.tensor(1.0)


class Fills(Loss):
    """Takes unknown numbers for 0."""

    def forward(self, output, target):
        return (output - target.nan_to_num()).abs().sum(), (~target.isnan()).sum().float()


class OfOneForm(Loss):
    """Cross-entropy of labels that are 0 or 1; of numbers nothing."""

    takes = ("labels",)

    def __init__(self, form, ignore_index: int = 3):
        super().__init__()

    def forward(self, output, target):
        known = ~target.isnan()
        labels = target[known]
        assert ((labels == 0) | (labels == 1)).all()
        total = nn.functional.binary_cross_entropy_with_logits(output[known], labels, reduction="sum")
        return total, known.sum().float()


class OfTwoForms(OfOneForm):
    """Says that it is for ids too."""

    takes = ("labels", "ids")

    def forward(self, output, target):
        return super().forward(output, target) if target.is_floating_point() else (output.mean(), target.sum().float())


class Random(Dataset):
    """Random numbers, one tensor for all, read in the constructor."""

    def __init__(self, split, root: str = "."):
        self.files = sorted(Path(root).iterdir())
        self.info = SourceInfo(keys=("image", "mask"), classes=("a",) if split == "train" else ("b",))
        self.cached = torch.zeros(3, 4, 4)
        self.open = lambda: None

    def __len__(self):
        return 5

    def __getitem__(self, index):
        self.cached[0] = torch.rand(())
        return {"image": self.cached, "mask": torch.full((4, 4), 7), "height": torch.tensor(4)}

    def name(self, index):
        return Path("x")


def test_a_bad_backbone():
    found = failures(check_backbone, Strides)
    assert {"gives_what_it_declares", "gradient_reaches_every_parameter", "is_never_random_in_evaluation"} <= set(found)
    assert "idle" in found["gradient_reaches_every_parameter"]
    assert "in place" in found["leaves_image_and_process"]


def test_a_bad_head():
    found = failures(check_head, Wrong)
    assert {"is_documented", "answers_at_scales_and_sizes", "state_round_trip"} <= set(found)
    assert "scale_of" in found["state_round_trip"]
    assert "global generator" in found["answers_samples_one_by_one"]


def test_a_bad_context():
    assert "keeps_every_size" in failures(check_context, Shrinks)


def test_a_bad_loss():
    found = failures(check_loss, Mean)
    assert {"gives_a_sum_and_a_weight", "adds_up_over_samples", "nothing_labelled_is_zero"} <= set(found)


def test_a_loss_is_checked_with_every_form_that_it_takes():
    check_loss(OfOneForm)
    check_loss({"name": "focal", "alpha": 0.25})  # which goes with labels alone
    found = failures(check_loss, OfTwoForms)
    assert all(text.startswith("with a target of ids ") for text in found.values())
    assert "adds_up_over_samples" in found


def test_unlabelled_pixels_of_a_given_batch():
    info = SourceInfo(keys=("image", "target"), target="map")
    batch = {"image": torch.rand(2, 3, 12, 10), "target": torch.rand(2, 1, 12, 10)}
    LOSSES.register("test-fills")(Fills)
    try:
        checks = {c.name: c for c in task_checks({"name": "regression", "loss": "test-fills"}, info=info, batch=batch)}
        with pytest.raises(CheckFailed, match="unlabelled pixels of the output have a gradient"):
            checks["unlabelled_pixels_pull_nowhere"]()
    finally:
        LOSSES.unregister("test-fills")


def test_a_bad_dataset(tmp_path):
    (tmp_path / "file").touch()
    found = failures(check_dataset, partial(Random, root=str(tmp_path)))
    assert set(found) == {"builds_and_has_samples"}  # its names are no text; nothing else was asked
    found = failures(
        check_dataset, partial(Random, root=str(tmp_path)), expected_failed_checks={"builds_and_has_samples": "x"}
    )
    assert found == {"builds_and_has_samples": found["builds_and_has_samples"]}
    for check in dataset_checks(partial(Random, root=str(tmp_path)))[2:]:
        if check.name != "samples_form_a_batch":
            with pytest.raises(CheckFailed):
                check()


class Stripes(Dataset):
    """A generated data set.

    Args:
        split: which samples.
        cache: folder that samples may be kept in.
        root: folder of a file whose size is the level of the images.
    """

    def __init__(self, *, split, cache: str | None = None, root: str | None = None):
        self.root = None if root is None else Path(root)
        self.info = SourceInfo(size=(4, 4))

    def __len__(self):
        return 5

    def __getitem__(self, index):
        level = 0 if self.root is None else (self.root / "level").stat().st_size
        return {"image": torch.full((3, 4, 4), float(level)), "gray": torch.tensor(False)}

    def name(self, index):
        return f"stripes {index}"


class Globbed(Stripes):
    """One that takes a missing folder for an empty one."""

    def __len__(self):
        return len([*self.root.glob("*")])


def test_options_that_the_samples_do_not_depend_on_may_name_anything(tmp_path):
    check_dataset(partial(Stripes, cache=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "level").touch()
    for kind, said in (
        (Stripes, "the first item without files raises FileNotFoundError"),
        (Globbed, "len without files raises nothing"),
    ):
        found = failures(check_dataset, partial(kind, root=str(tmp_path)))
        assert list(found) == ["reads_nothing_when_built"]
        assert said in found["reads_nothing_when_built"]


# messages -------------------------------------------------------------------------------------------------------------


def test_all_failures_are_told_at_once_with_what_to_do():
    with pytest.raises(AssertionError) as error:
        check_loss(Mean)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("loss 'Mean': ")
    assert f"of {len(loss_checks(Mean))} checks failed" in lines[0]
    assert len(lines) >= 4
    assert all(" -> " in line or "raised" in line for line in lines[1:])


def test_what_cannot_be_built_is_told_once():
    with pytest.raises(ChecksFailed) as error:
        check_task({"name": "segmentation", "clases": 3})
    assert "has no option 'clases'; did you mean 'classes'?" in str(error.value)
    assert "more checks need this one" in str(error.value)
    assert len(error.value.failures) == 1


def test_expected_failures():
    found = failures(check_loss, Mean)
    check_loss(Mean, expected_failed_checks=dict.fromkeys(found, "a mean"))
    with pytest.raises(ChecksFailed, match=r"builds: passes, though expected to fail \(why\)"):
        check_loss("l1", expected_failed_checks={"builds": "why"})
    with pytest.raises(ConfigError, match="did you mean 'adds_up_over_samples'"):
        check_loss("l1", expected_failed_checks={"adds_up_over_sample": "why"})


def test_names_of_checks_are_unique_and_nothing_is_built_early():
    for checks in (task_checks, backbone_checks, context_checks, head_checks, loss_checks, dataset_checks):
        names = [check.name for check in checks("there_is_no_such_part")]
        assert len(set(names)) == len(names) >= 7
        with pytest.raises(Exception, match=r"there_is_no_such_part|no usual source"):
            checks("there_is_no_such_part")[0]()
    assert len(task_checks("x")) >= 40


def test_a_class_needs_no_registration():
    before = [registry.names() for registry in (LOSSES, BACKBONES)]
    check_loss(L1)
    check_backbone(partial(Plain, width=5))
    assert [registry.names() for registry in (LOSSES, BACKBONES)] == before


def meddle():
    """Change whatever checks look after."""
    reseed(3)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("error")
    os.environ["DENSECTX_TEST"] = "1"
    os.chdir("/")
    random.random()


def test_what_checks_do_to_the_process_is_undone():
    kept, states = settings(), random_states()
    with preserved():
        meddle()
        assert len(changed(kept, settings())) == 6
        assert len(changed(states, random_states())) == 3
    assert changed(kept, settings()) == changed(states, random_states()) == []


def test_values():
    nan = torch.tensor([1.0, torch.nan, torch.inf])
    assert same({"a": [nan]}, {"a": [nan.clone()]})
    assert not same(nan, nan.double())
    assert not same({"a": 1}, {"b": 1})
    assert difference(nan, torch.tensor([1.5, torch.nan, torch.inf])) == pytest.approx(0.5 / 1)
    assert difference(nan, torch.tensor([1.0, 1.0, torch.inf])) == float("inf")
    assert difference(torch.tensor([100.0]), torch.tensor([101.0])) == pytest.approx(0.01)
    assert difference(torch.zeros(0), torch.zeros(0)) == 0


def test_a_batch_has_what_the_source_says():
    info = SourceInfo(classes=("a", "b"), keys=("image", "mask", "target"), target="labels", scale=2)
    batch = make_batch(info, count=3, size=(10, 12))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "image": (3, 3, 10, 12),
        "gray": (3,),
        "mask": (3, 10, 12),
        "target": (3, 2, 20, 24),
        "key": (3, 2),
    }
    assert set(batch["mask"].unique().tolist()) == {0, 1, 255}
    assert set(batch["target"][1:].unique().tolist()) == {0, 1}
    assert batch["target"][0].isnan().any()
    assert batch["gray"].tolist() == [False, False, True]
