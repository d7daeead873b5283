"""Loss, peaks and matching against independent references; the shapes themselves; a real training."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from skimage.feature import peak_local_max

import densectx
from densectx.config import compose
from densectx.errors import ConfigError
from densectx.model import DenseModel
from densectx.testing import check_dataset, check_loss, check_task
from densectx.types import SourceInfo

pytestmark = pytest.mark.usefixtures("installed")

CONFIG = Path(__file__).parents[1] / "configs" / "keypoints_shapes.yaml"
NAN = math.nan
SMALL = {"name": "shapes", "size": 48, "val_length": 12, "noise": 0.02, "batch_size": 8}
HEAT = SourceInfo(keys=("image", "target"), target="map")


@pytest.fixture
def keypoints():
    """The module, imported once it can be found."""
    import densectx_keypoints

    return densectx_keypoints


def build(info=HEAT, **options):
    torch.manual_seed(0)
    spec = {"name": "keypoints", "source": "s", "head": {"name": "decoder", "width": 16, "depth": 1}} | options
    backbone, context = {"name": "plain", "width": 16}, {"name": "basic", "dilations": [1, 2, 1]}
    config = {"backbone": backbone, "projection": None, "context": context, "tasks": {"keypoints": spec}}
    return DenseModel.from_config(config, {"s": info})


# loss -----------------------------------------------------------------------------------------------------------------


def law_deng(logits, heat):
    """Equation 1 of Law & Deng (2018) for one image with its number of keypoints, pixel by pixel."""
    total, count = 0.0, 0
    for x, y in zip(logits.ravel(), heat.ravel(), strict=True):
        p = 1 / (1 + math.exp(-x))
        if y == 1:
            total, count = total - (1 - p) ** 2 * math.log(p), count + 1
        elif not math.isnan(y):
            total -= (1 - y) ** 4 * p**2 * math.log(1 - p)
    return total, max(count, 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_loss_is_the_published_one(seed):
    import densectx_keypoints

    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(3, 2, 5, 4))
    heat = rng.choice([0, 0.3, 0.9, 1, NAN], logits.shape).astype(np.float32)
    heat[1] = 0  # an image without keypoints still has to be answered with none
    expected = [law_deng(*one) for one in zip(logits, heat, strict=True)]
    total, weight = densectx_keypoints.HeatmapFocal()(torch.tensor(logits), torch.tensor(heat))
    assert total.item() == pytest.approx(sum(value for value, _ in expected), rel=1e-4)
    assert weight.item() == sum(count for _, count in expected)


def test_loss_of_nothing_labelled_is_zero_with_a_graph(keypoints):
    output = torch.randn(2, 1, 4, 4, requires_grad=True)
    total, weight = keypoints.HeatmapFocal()(output, torch.full((2, 1, 4, 4), NAN))
    total.backward()
    assert (total.item(), weight.item()) == (0, 0)
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_large_logits_stay_finite(keypoints):
    output = torch.tensor([[-1e4, 1e4, -1e4, 1e4]]).view(1, 1, 2, 2).requires_grad_()
    total, _ = keypoints.HeatmapFocal()(output, torch.tensor([[1.0, 1.0], [0.0, 0.0]]).view(1, 1, 2, 2))
    total.backward()
    assert total.isfinite()
    assert output.grad.isfinite().all()


# metrics --------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_peaks_are_those_of_scikit_image(seed, radius):
    import densectx_keypoints

    heat = np.random.default_rng(seed).permutation(21 * 17).reshape(21, 17) / 400
    expected = peak_local_max(heat, min_distance=radius, threshold_abs=0.5, exclude_border=False)
    found = densectx_keypoints.peaks(torch.tensor(heat), radius, 0.5 + 1e-9)
    assert found.tolist() == expected.tolist(), "in the same order, best first"


def test_a_plateau_is_one_peak_and_nothing_is_none(keypoints):
    heat = torch.zeros(9, 9)
    heat[3:5, 3:6] = 1
    assert len(keypoints.peaks(heat, 2, 0.5)) == 1
    assert keypoints.peaks(torch.zeros(9, 9), 2, 0.5).shape == (0, 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 8), st.integers(0, 8))
def test_matching_against_the_best_assignment(seed, answers, points):
    import densectx_keypoints

    rng = np.random.default_rng(seed)
    found, truth = (rng.integers(0, 14, (count, 2)) for count in (answers, points))
    hits = densectx_keypoints.matched(torch.tensor(found), torch.tensor(truth), 3.0)
    near = cdist(found, truth) <= 3.0
    rows, columns = linear_sum_assignment(near, maximize=True)
    most = int(near[rows, columns].sum())
    assert math.ceil(most / 2) <= hits <= most  # greedy matching is maximal: at least half of the largest


def test_counts_by_hand(keypoints):
    truth = torch.zeros(1, 1, 40, 40)
    for row, column in ((5, 5), (20, 20), (35, 8)):
        truth[0, 0, row, column] = 1
    answer = torch.zeros_like(truth)
    answer[0, 0, 7, 7] = 0.9  # 2.8 pixels away
    answer[0, 0, 20, 24] = 0.8  # 4 pixels away
    answer[0, 0, 30, 30] = 0.4
    answer[0, 0, 2, 30] = 0.1  # below the threshold
    metrics = keypoints.KeypointMetrics()
    assert all(value.isnan() for value in metrics.compute().values())
    metrics.update(answer, truth)
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert values["precision"] == pytest.approx(100 / 3)
    assert values["recall"] == pytest.approx(100 / 3)
    assert values["f1"] == pytest.approx(100 / 3)
    assert values["f1_grid"] == pytest.approx(100 * 2 * 3 / (3 + 49))  # 7 x 7 answers, all points within 3 of one


def test_a_perfect_answer_and_unlabelled_places(keypoints):
    data = keypoints.Shapes(split="val", size=64, val_length=6)
    truth = torch.stack([data[index]["target"] for index in range(6)])
    metrics = keypoints.KeypointMetrics()
    metrics.update(truth, truth)
    assert metrics.compute()["f1"] > 95  # points nearer than the suppression radius cannot all be answered
    metrics.reset()
    truth[:] = NAN
    metrics.update(torch.rand_like(truth), truth)
    assert metrics.counts.sum() == 0


# data -----------------------------------------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_seed_split_and_index(keypoints):
    data, again = keypoints.Shapes(split="train", length=3), keypoints.Shapes(split="train", length=3)
    val = keypoints.Shapes(split="val", val_length=3)
    for index in (2, 0):
        sample = data[index]
        assert all(torch.equal(sample[key], again[index][key]) for key in sample)
        assert not torch.equal(sample["image"], val[index]["image"])
    assert len(list(data)) == 3


def test_keypoints_are_where_the_picture_turns(keypoints):
    """Without noise the structure tensor has two large eigenvalues near every keypoint, and few places else."""
    from skimage.feature import corner_peaks, corner_shi_tomasi

    data = keypoints.Shapes(split="train", length=40, noise=0.0)
    near, points, kinds = 0, 0, set()
    for index in range(40):
        sample = data[index]
        assert sample["image"].shape == (3, 96, 96)
        assert sample["target"].shape == (1, 96, 96)
        truth = (sample["target"][0] == 1).nonzero().numpy()
        kinds.add(min(len(truth), 8))
        corners = corner_peaks(corner_shi_tomasi(sample["image"].mean(0).numpy(), sigma=1.5), min_distance=3)
        if len(truth) and len(corners):
            near += int((cdist(truth, corners).min(1) <= 4).sum())
        points += len(truth)
    assert near > 0.85 * points
    assert 0 in kinds, "some pictures hold no keypoint"
    assert max(kinds) >= 7, "and some a checkerboard"


# task -----------------------------------------------------------------------------------------------------------------


def test_registered_by_entry_points():
    assert densectx.TASKS.entry("keypoints").origin == "densectx-keypoints 0.1.0"
    assert densectx.LOSSES.entry("heatmap_focal").target == "densectx_keypoints:HeatmapFocal"
    assert densectx.DATASETS.entry("shapes").target == "densectx_keypoints:Shapes"


def test_its_parts_keep_the_contract(keypoints):
    data = keypoints.Shapes(split="train", size=32, length=4)
    batch = {key: torch.stack([sample[key] for sample in data]) for key in ("image", "target", "gray")}
    check_task("keypoints", info=data.info, batch=batch | {"key": torch.tensor([[0, i] for i in range(4)])})
    check_loss("heatmap_focal")
    check_dataset({"name": "shapes", "size": 32, "length": 6})


def test_draw_and_predict():
    model = build(kinds=2)
    heat = torch.zeros(1, 2, 20, 16)
    heat[0, 0, 0, 15] = heat[0, 1, 10, 3] = 1
    pictures = model.task("keypoints").draw(heat, torch.rand(1, 3, 20, 16), {"heat": heat})
    assert [p.shape for p in pictures] == [(3, 20, 16)] * 3
    assert torch.equal(pictures[1], pictures[2])
    assert pictures[1][0, 10, 3] == 1
    answer = model.predict(torch.rand(3, 11, 9))["keypoints"]
    assert answer.shape == (2, 11, 9)
    assert answer.max() < 0.2, "an untrained head finds nothing"


@pytest.mark.parametrize(
    ("options", "info", "part"),
    [
        ({}, SourceInfo(), "no heat maps"),
        ({"threshold": 0}, HEAT, "threshold 0"),
        ({"kinds": 0}, HEAT, "kinds 0"),
        ({"loss": "l1"}, HEAT, "'l1' is for numbers, but the target of this task is labels"),
    ],
)
def test_refused(options, info, part):
    with pytest.raises(ConfigError, match=part):
        build(info, **options)


def test_shapes_refuses():
    with pytest.raises(ConfigError, match="32 or more"):
        densectx.DATASETS.build({"name": "shapes", "size": 8}, split="train")


def test_it_learns_and_beats_the_grid():
    data = densectx.DataModule({"s": SMALL}, num_workers=0)
    model = build(data.info()["s"])
    task = model.task("keypoints")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _, batch in zip(range(80), data.train_dataloader(), strict=False):
        x, target = task.prepare(batch["s"], [])
        total, weight = task.loss(model({"keypoints": x})["keypoints"], target)["heatmap_focal"]
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
    for batch in data.val_dataloader():
        x, target = task.prepare(batch["s"], [])
        task.update(model.predict(x)["keypoints"], x, target)
    values = task.metrics.compute()
    assert values["f1"] > 1.5 * values["f1_grid"]


def test_fit_from_its_config(tmp_path, monkeypatch):
    from densectx.training import main

    monkeypatch.setenv("DENSECTX_RUN", "")  # main sets it; this brings it back
    small = tmp_path / "small.yaml"
    small.write_text(
        """
model: {backbone: {width: 8}, lr_scheduler: null}
data: {sources: {shapes: {size: 32, val_length: 2, batch_size: 2}}, num_workers: 0}
trainer: {accelerator: cpu, max_steps: 2, val_check_interval: 2, enable_progress_bar: false}
"""
    )
    assert main("fit", ["-c", str(CONFIG), "-c", str(small), "--trainer.default_root_dir", str(tmp_path / "runs")]) == 0
    run = tmp_path / "runs" / "keypoints_shapes" / "0"
    with (run / "metrics.csv").open() as file:
        assert {"val/keypoints/f1", "val/keypoints/f1_grid"} <= set(next(csv.reader(file)))
    assert densectx.load(run).predict(torch.rand(3, 33, 40))["keypoints"].shape == (1, 33, 40)


def test_its_config_builds():
    values = compose([CONFIG]).values
    keys = ("backbone", "projection", "context", "tasks")
    sources = densectx.DataModule(**values["data"]).info()
    assert list(DenseModel.from_config({key: values["model"][key] for key in keys}, sources).tasks) == ["keypoints"]
