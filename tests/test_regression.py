"""Dense numbers: scales, metrics by hand, pictures, and files that another library reads."""

import math

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densectx import DATASETS
from densectx.checkpoint import save_safetensors
from densectx.cli import main
from densectx.data.base import Dataset
from densectx.errors import ConfigError, DataError
from densectx.inference.writers import Answer, values_tif
from densectx.metrics.regression import RegressionMetrics
from densectx.model import DenseModel
from densectx.nn.colour import rgb_to_lab
from densectx.tasks.regression import Range, false_colour, side_by_side
from densectx.testing import check_task, make_batch
from densectx.types import SourceInfo

NAN = math.nan
HEIGHTS = SourceInfo(keys=("image", "target"), target="map")


def build(info=HEIGHTS, **options):
    torch.manual_seed(0)
    spec = {"name": "regression", "source": "s", "head": {"name": "decoder", "width": 8, "depth": 1}} | options
    config = {"backbone": {"name": "plain", "width": 8, "in_channels": info.channels}, "projection": None}
    context = {"name": "basic", "dilations": [1, 2, 4, 8, 1]}
    return DenseModel.from_config({**config, "context": context, "tasks": {"t": spec}}, {"s": info})


# scale ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 50), st.floats(0.1, 90), st.sampled_from(["linear", "log"]))
def test_a_scale_and_back(low, width, transform):
    limits = Range(low, low + width, transform)
    value = torch.linspace(low, low + width, 9, dtype=torch.float64)
    unit = limits.to_unit(value)
    assert unit[0].item() == pytest.approx(0, abs=1e-9)
    assert unit[-1].item() == pytest.approx(1)
    assert (unit.diff() > 0).all()
    torch.testing.assert_close(limits.to_value(unit), value)
    ratio = value if transform == "linear" else value.log()
    torch.testing.assert_close(unit[4], (ratio[4] - ratio[0]) / (ratio[-1] - ratio[0]))


def test_unknown_stays_unknown_and_answers_stay_in_range():
    for transform in ("linear", "log"):
        limits = Range(1, 10, transform)
        assert limits.to_unit(torch.tensor([NAN, 5.0])).isnan().tolist() == [True, False]
        answers = limits.to_value(torch.tensor([-1e9, -0.1, 0.5, 3.0, 1e9]))
        assert (answers.min().item(), answers.max().item()) == pytest.approx((1, 10))
        assert limits.to_unit(torch.tensor(20.0)) > 1, "a target is not clamped"


@pytest.mark.parametrize("value", [0.0, -2.0])
def test_a_number_without_logarithm_is_refused(value):
    with pytest.raises(DataError, match=f"{value:g} has no logarithm"):
        Range(0.1, 5, "log").to_unit(torch.tensor([1.0, NAN, value]))


# metrics --------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("N07")
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_metrics_are_the_two_rules_by_hand(seed, channels):
    rng = np.random.default_rng(seed)
    prediction = rng.normal(3, 1, (5, channels, 6, 7)).astype(np.float32)
    truth = np.where(rng.random(prediction.shape) < 0.3, NAN, rng.normal(3, 1, prediction.shape)).astype(np.float32)
    truth[3] = NAN  # an image of which nothing is known
    metrics = RegressionMetrics(channels)
    for part in (slice(0, 2), slice(2, 5)):
        metrics.update(torch.tensor(prediction[part]), torch.tensor(truth[part]))
    found = {name: value.item() for name, value in metrics.compute().items()}
    error = (prediction - truth).astype(float)
    of_image = [e[~np.isnan(e)] for e in error if not np.isnan(e).all()]
    means = np.nanmean(truth.astype(float), (0, 2, 3), keepdims=True)
    assert found == pytest.approx(
        {
            "mae": np.nanmean(np.abs(error)),
            "rmse": np.sqrt(np.nanmean(error**2)),
            "mae_per_image": np.mean([np.abs(e).mean() for e in of_image]),
            "rmse_per_image": np.mean([np.sqrt((e**2).mean()) for e in of_image]),
            "rmse_constant": np.sqrt(np.nanmean((truth - means) ** 2)),
        },
        rel=1e-5,
    )


def test_no_constant_is_better_than_the_trivial_answer():
    truth = torch.rand(2, 1, 8, 9) * 5
    best = RegressionMetrics()
    best.update(torch.full_like(truth, truth.mean()), truth)
    values = best.compute()
    assert values["rmse"].item() == pytest.approx(values["rmse_constant"].item(), rel=1e-5)
    for constant in (truth.mean() - 0.1, truth.mean() + 0.1, truth.median()):
        other = RegressionMetrics()
        other.update(torch.full_like(truth, constant), truth)
        assert other.compute()["rmse"] > values["rmse_constant"]


def test_nothing_known_is_nan():
    metrics = RegressionMetrics(2)
    assert all(value.isnan() for value in metrics.compute().values())
    metrics.update(torch.rand(1, 2, 3, 3), torch.full((1, 2, 3, 3), NAN))
    assert all(value.isnan() for value in metrics.compute().values())


# pictures -------------------------------------------------------------------------------------------------------------


def test_colours_are_even_in_lightness_inside_srgb_and_black_where_unknown():
    ramp = torch.linspace(0, 1, 201)[None]
    colours = false_colour(ramp)
    lightness = rgb_to_lab(colours[None])[0, 0, 0]
    torch.testing.assert_close(lightness, torch.linspace(18, 92, 201), atol=0.05, rtol=0)  # clipping would bend it
    assert (colours[:, 0, 0] * 255).round().tolist() != [0, 0, 0]
    assert false_colour(torch.tensor([[NAN]])).flatten().tolist() == [0, 0, 0]
    assert torch.equal(false_colour(torch.tensor([[-1.0, 2.0]])), false_colour(torch.tensor([[0.0, 1.0]])))


def test_answer_and_truth_share_a_scale():
    truth = torch.tensor([[[2.0, 6.0, NAN]]])
    answer, drawn = side_by_side(torch.tensor([[[6.0, 4.0, 2.0]]]), truth, Range(0, 100))
    assert torch.equal(drawn[:, 0, 0], answer[:, 0, 2])
    assert torch.equal(drawn[:, 0, 1], answer[:, 0, 0])
    assert drawn[:, 0, 2].tolist() == [0, 0, 0]
    nothing = side_by_side(torch.rand(2, 4, 4), torch.full((2, 4, 4), NAN), Range(0, 1))
    assert len(nothing) == 4
    assert all(picture.isfinite().all() for picture in nothing)


# task -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("transform", "scale", "outputs"), [("linear", 1, 1), ("log", 1, 3), ("linear", 2, 2)])
def test_a_batch_with_holes_trains_and_measures(transform, scale, outputs):
    info = SourceInfo(keys=("image", "target"), target="map", scale=scale)
    model = build(info, low=1, high=9, transform=transform, outputs=outputs)
    task = model.task("t")
    batch = {"image": torch.rand(2, 3, 12, 10), "target": torch.rand(2, outputs, 12 * scale, 10 * scale) * 8 + 1}
    batch["target"][0, :, :4] = NAN
    x, target = task.prepare(batch, [])
    assert x is batch["image"], "tasks with the same input share a pass"
    output = model({"t": x})["t"]
    total, weight = task.loss(output, target)["l1"]
    total.backward()
    assert weight == (~batch["target"].isnan()).sum()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    answer = task.postprocess(output.detach(), x)
    assert answer.shape == batch["target"].shape
    task.update(answer, x, target)
    assert all(value.isfinite() for value in task.metrics.compute().values())
    pictures = task.draw(answer[:1], x[:1], {key: value[:1] for key, value in target.items()})
    assert len(pictures) == 1 + 2 * outputs
    assert all(p.shape[0] == 3 and p.min() >= 0 and p.max() <= 1 for p in pictures)
    assert model.predict(torch.rand(3, 7, 5))["t"].shape == (outputs, 7 * scale, 5 * scale)


class Vectors(Dataset):
    """Nothing; a run is refused before it is read."""

    info = HEIGHTS

    def __init__(self, *, split):
        pass

    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError

    def name(self, index):
        return "none"


@pytest.mark.parametrize(
    ("options", "refused"), [("outputs: 1", False), ("outputs: 2", True), ("outputs: 2, turns: true", False)]
)
def test_labels_with_a_direction_are_not_mirrored(tmp_path, monkeypatch, capsys, options, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "flow.yaml").write_text(
        f"""
model:
  backbone: {{name: plain, width: 4}}
  tasks: {{flow: {{name: regression, source: pairs, {options}}}}}
  optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
data: {{sources: {{pairs: {{name: test-vectors, augment: {{flip: true, rotate90: true}}}}}}, num_workers: 0}}
trainer: {{accelerator: cpu, max_steps: 1, enable_progress_bar: false}}
"""
    )
    DATASETS.register("test-vectors")(Vectors)
    try:
        status = main(["fit", "-c", "flow.yaml"])
    finally:
        DATASETS.unregister("test-vectors")
    said = capsys.readouterr().err
    if not refused:
        assert (status, "no training samples" in said) == (3, True)
    else:
        assert status == 2
        assert "data.sources.pairs.augment: task 'flow' learns from the target of this source" in said
        assert "leave out flip and rotate90." in said


@pytest.mark.parametrize(("options", "scale"), [({"low": 0.5, "high": 10, "transform": "log"}, 1), ({"high": 9}, 2)])
def test_it_keeps_the_contract(options, scale):
    info = SourceInfo(keys=("image", "target"), target="map", scale=scale)
    batch = make_batch(info)
    batch["target"] = batch["target"] * 8 + 1  # a corner stays unknown
    check_task({"name": "regression", **options}, info=info, batch=batch)


@pytest.mark.fault("N09")
def test_it_learns_a_field():
    """Height is the distance from a bright disc: rmse falls far below that of the best constant."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    distances = torch.stack([(y - row).hypot(x - column) for row, column in ((8, 8), (20, 12), (14, 26), (25, 24))])
    batch = {"image": (distances < 4).float()[:, None].expand(-1, 3, -1, -1), "target": distances[:, None]}
    model = build(high=40, loss=["l1", {"name": "mse", "weight": 0.5}])
    task = model.task("t")
    inputs, target = task.prepare(batch, [])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        terms = task.loss(model({"t": inputs})["t"], target)
        optimizer.zero_grad()
        sum(task.coefficients[name] * total / weight for name, (total, weight) in terms.items()).backward()
        optimizer.step()
    task.update(model.predict(inputs)["t"], inputs, target)
    values = task.metrics.compute()
    assert values["rmse"] < 0.6 * values["rmse_constant"]


@pytest.mark.parametrize(
    ("options", "info", "part"),
    [
        ({}, SourceInfo(), "no map of numbers"),
        ({}, SourceInfo(keys=("image", "target"), target="labels", classes=("a",)), "no map of numbers"),
        ({"low": 3, "high": 3}, HEIGHTS, "low below high"),
        ({"high": math.inf}, HEIGHTS, "finite"),
        ({"transform": "log"}, HEIGHTS, "must be positive"),
        ({"transform": "sqrt"}, HEIGHTS, "linear"),
        ({"outputs": 0}, HEIGHTS, "outputs 0"),
    ],
)
def test_refused(options, info, part):
    with pytest.raises(ConfigError, match=part):
        build(info, **options)


def test_a_target_of_other_channels_is_refused():
    task = build(outputs=2).task("t")
    with pytest.raises(DataError, match="set outputs to 1"):
        task.prepare({"image": torch.rand(1, 3, 4, 4), "target": torch.rand(1, 1, 4, 4)}, [])


# files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_tiff_holds_the_numbers(tmp_path, channels):
    value = torch.randn(channels, 6, 7) * 1000
    (tmp_path / "a.tif").write_bytes(values_tif(Answer(torch.rand(3, 6, 7), False, value)))
    found = tifffile.imread(tmp_path / "a.tif")
    assert found.dtype == np.float32
    assert np.array_equal(found, value[0] if channels == 1 else value)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(file.pages) == 1


def test_predict_writes_tiff(tmp_path):
    from PIL import Image

    save_safetensors(build(low=10, high=20, outputs=2), tmp_path / "m.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    arguments = ["predict", tmp_path / "m.safetensors", tmp_path / "a.png", "-o", tmp_path / "out", "--raw"]
    assert main([str(argument) for argument in arguments]) == 0
    written = tifffile.imread(tmp_path / "out/t/a.tif")
    assert np.array_equal(written, np.load(tmp_path / "out/t/a.npy"))
    assert written.shape == (2, 9, 11)
    assert 10 <= written.min() < written.max() <= 20
