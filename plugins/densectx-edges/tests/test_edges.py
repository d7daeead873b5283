"""The task, its loss and its metric against independent references; training beside segmentation."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from torchmetrics.functional.classification import binary_average_precision

import densectx
from densectx.config import compose
from densectx.errors import ConfigError, DataError
from densectx.model import DenseModel
from densectx.testing import check_loss, check_task
from densectx.types import SourceInfo

pytestmark = pytest.mark.usefixtures("installed")

CONFIG = Path(__file__).parents[1] / "configs" / "boundaries_bsds500.yaml"
NAN = math.nan
BSDS500 = SourceInfo(keys=("image", "target"), target="map")


@pytest.fixture
def edges():
    """The module, imported once it can be found."""
    import densectx_edges

    return densectx_edges


@pytest.fixture
def model():
    config = {
        "backbone": {"name": "plain", "width": 8},
        "projection": None,
        "context": {"name": "basic", "dilations": [1, 2, 1]},
        "tasks": {"edges": {"name": "edges", "source": "photos", "head": {"name": "decoder", "width": 8, "depth": 1}}},
    }
    torch.manual_seed(0)
    return DenseModel.from_config(config, {"photos": BSDS500})


@pytest.fixture
def photos(tmp_path):
    """Two discs in BSDS500's layout; of three annotators two agree on the outline, the third marks a corner."""
    y, x = np.mgrid[:48, :64]
    for subset in ("train", "val", "test"):
        images, truth = (tmp_path / name / subset for name in ("images", "groundTruth"))
        images.mkdir(parents=True)
        truth.mkdir(parents=True)
        for number, (row, column) in enumerate([(20, 24), (26, 40)]):
            distance = np.hypot(y - row, x - column)
            pixels = np.where((distance < 14)[..., None], (220, 160, 60), (40, 60, 90)).astype(np.uint8)
            Image.fromarray(pixels).save(images / f"{number}.png")
            outline, corner = (np.abs(distance - 14) < 0.7).astype(np.uint8), ((y < 4) & (x < 4)).astype(np.uint8)
            cells = np.empty((1, 3), object)
            for k, drawn in enumerate((outline, outline, corner)):
                cells[0, k] = {"Boundaries": drawn, "Segmentation": (distance < 14).astype(np.uint16) + 1}
            savemat(truth / f"{number}.mat", {"groundTruth": cells})
    return tmp_path


# loss -----------------------------------------------------------------------------------------------------------------


def xie_tu(logits, edge, other):
    """Equation 2 of Xie & Tu (2015) for one image, pixel by pixel."""
    beta = other.sum() / (edge.sum() + other.sum())
    p = 1 / (1 + np.exp(-logits))
    return -(beta * np.log(p[edge]).sum() + (1 - beta) * np.log(1 - p[other]).sum())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_loss_is_the_published_one(seed):
    import densectx_edges

    rng = np.random.default_rng(seed)
    target = rng.choice([0, 0, 0.2, 0.4, 1, NAN], (3, 1, 6, 7)).astype(np.float32)
    logits = rng.normal(size=target.shape)
    expected, weight = 0.0, 0.0
    for y, t in zip(logits, target, strict=True):
        edge, other = t >= 0.3, t == 0
        if edge.any() and other.any():
            expected += xie_tu(y, edge, other)
            weight += 2 * edge.sum() * other.sum() / (edge.sum() + other.sum())
    total, counted = densectx_edges.BalancedBCE(0.3)(torch.tensor(logits), torch.tensor(target))
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert counted.item() == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("value", [NAN, 0.0, 0.1, 1.0])
def test_loss_of_nothing_to_balance_is_zero_with_a_graph(edges, value):
    output = torch.randn(2, 1, 4, 4, requires_grad=True)
    total, weight = edges.BalancedBCE(0.3)(output, torch.full((2, 1, 4, 4), value))
    total.backward()
    assert (total.item(), weight.item()) == (0, 0)
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_unlabelled_pixels_pull_nowhere(edges):
    output = torch.randn(1, 1, 4, 4, requires_grad=True)
    target = torch.tensor([[0.0, 1.0, 0.1, NAN]]).expand(1, 1, 4, 4)
    edges.BalancedBCE(0.3)(output, target)[0].backward()
    assert (output.grad[..., 2:] == 0).all()
    assert (output.grad[..., 0] > 0).all()
    assert (output.grad[..., 1] < 0).all()


# metric ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_average_precision_is_torchmetrics_exact_one(seed):
    import densectx_edges

    rng = torch.Generator().manual_seed(seed)
    # probabilities on the grid of the bins, so that binning loses nothing
    prediction = torch.randint(0, 64, (2, 1, 9, 8), generator=rng) / 64
    target = torch.tensor([0.0, 0.0, 0.0, 0.1, 1.0, NAN])[torch.randint(0, 6, prediction.shape, generator=rng)]
    edge, other = densectx_edges.split(target, 0.3)
    metrics = densectx_edges.BoundaryMetrics(bins=64)
    for one in range(2):  # any split into batches
        metrics.update(prediction[one], edge[one], other[one])
    labelled = edge | other
    exact = binary_average_precision(prediction[labelled], edge[labelled].long())
    values = metrics.compute()
    assert values["ap"].item() == pytest.approx(100 * exact.item(), rel=1e-5)
    assert values["ap_constant"].item() == pytest.approx(100 * edge[labelled].float().mean().item(), rel=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.3, 1.0])
def test_a_constant_answer_scores_the_share_of_boundaries(edges, constant):
    edge = torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    edge[..., :3] = True
    metrics = edges.BoundaryMetrics()
    metrics.update(torch.full(edge.shape, constant), edge, ~edge)
    assert [round(value.item(), 3) for value in metrics.compute().values()] == [30, 30]


def test_perfect_and_empty(edges):
    edge = torch.rand(1, 1, 8, 8) > 0.5
    metrics = edges.BoundaryMetrics()
    assert metrics.compute()["ap"].isnan()
    metrics.update(edge.float(), edge, ~edge)
    assert metrics.compute()["ap"] == 100


# task -----------------------------------------------------------------------------------------------------------------


def test_registered_by_entry_points():
    assert densectx.TASKS.entry("edges").origin == "densectx-edges 0.1.0"
    assert densectx.LOSSES.entry("balanced_bce").target == "densectx_edges:BalancedBCE"


def test_prepare_passes_the_image_on_and_predict_answers_probabilities(model):
    batch = {"image": torch.rand(2, 3, 20, 17), "target": torch.rand(2, 1, 20, 17)}
    x, target = model.task("edges").prepare(batch, [])
    assert x is batch["image"]
    assert torch.equal(target["share"], batch["target"])
    answer = model.predict(torch.rand(3, 20, 17))["edges"]
    assert answer.shape == (1, 20, 17)
    assert 0 < answer.min() < answer.max() < 1


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_draw(model, channels):
    share = torch.rand(1, 1, 12, 16)
    share[..., :4] = NAN
    pictures = model.task("edges").draw(torch.rand(1, 1, 12, 16), torch.rand(1, channels, 12, 16), {"share": share})
    assert [p.shape for p in pictures] == [(3, 12, 16)] * 3
    assert all(p.isfinite().all() for p in pictures)


@pytest.mark.parametrize(
    ("options", "info", "part"),
    [
        ({}, SourceInfo(), "no map of boundaries"),
        ({}, SourceInfo(keys=("image", "target"), target="image"), "no map of boundaries"),
        ({}, SourceInfo(keys=("image", "target"), target="image", scale=2), "no map of boundaries"),
        ({"threshold": 0}, BSDS500, "threshold 0"),
        ({"loss": "l1"}, BSDS500, "'l1' is for numbers, but the target of this task is labels"),
    ],
)
def test_refused(options, info, part):
    spec = {"name": "edges", "source": "photos"} | options
    config = {"backbone": {"name": "plain", "width": 4}, "projection": None, "tasks": {"edges": spec}}
    with pytest.raises(ConfigError, match=part):
        DenseModel.from_config(config, {"photos": info})


def test_maps_of_several_channels_are_refused(model):
    batch = {"image": torch.rand(1, 3, 12, 16), "target": torch.rand(1, 3, 12, 16)}
    with pytest.raises(DataError, match="'photos' has 3 channels, expected one"):
        model.task("edges").prepare(batch, [])


def test_learns_the_outlines_of_discs(model, photos):
    data = densectx.DATASETS.build({"name": "image_mask", "preset": "bsds500", "root": str(photos)}, split="train")
    samples = [data[index] for index in range(2)]
    task = model.task("edges")
    x, target = task.prepare({key: torch.stack([s[key] for s in samples]) for key in ("image", "target")}, [])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        total, weight = task.loss(model({"edges": x})["edges"], target)["balanced_bce"]
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
    task.update(model.predict(x)["edges"], x, target)
    values = task.metrics.compute()
    assert values["ap"] > 90 > 3 * values["ap_constant"]


def test_keeps_the_contracts():
    check_task("edges")
    check_loss("balanced_bce", runtime={"threshold": 0.3}, channels=1)


# training -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("DENSECTX_DATA" not in os.environ, reason="needs DENSECTX_DATA with bsds500 and camvid")
def test_trains_beside_segmentation(tmp_path, monkeypatch):
    from densectx.training import main

    monkeypatch.setenv("DENSECTX_RUN", "")  # main sets it; this brings it back
    beside = tmp_path / "beside.yaml"
    beside.write_text(
        """
model: {tasks: {segmentation: {name: segmentation, source: camvid, weight: 0.5}}}
data:
  sources:
    camvid: {name: image_mask, preset: camvid, root: "${oc.env:DENSECTX_DATA}/camvid", augment: {crop: 64}}
    bsds500: {augment: {crop: 64}}
  num_workers: 0
trainer: {accelerator: cpu, max_steps: 3, limit_val_batches: 0, enable_progress_bar: false, enable_model_summary: false}
"""
    )
    arguments = ["-c", str(CONFIG), "-c", str(beside), "--model.lr_scheduler", "null"]
    assert main("fit", [*arguments, "--trainer.default_root_dir", str(tmp_path / "runs")]) == 0
    run = tmp_path / "runs" / "boundaries_bsds500" / "0"
    answers = densectx.load(run).predict(torch.rand(3, 40, 56))
    assert {key: tuple(answer.shape) for key, answer in answers.items()} == {
        "edges": (1, 40, 56),
        "segmentation": (11, 40, 56),
    }


def test_its_config_builds_without_reading_a_file(monkeypatch):
    monkeypatch.setenv("DENSECTX_DATA", "/nonexistent")
    values = compose([CONFIG]).values
    sources = densectx.DataModule(**values["data"]).info()
    keys = ("backbone", "projection", "context", "tasks")
    assert list(DenseModel.from_config({key: values["model"][key] for key in keys}, sources).tasks) == ["edges"]
