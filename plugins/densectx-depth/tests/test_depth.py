"""Loss, metrics and data against closed forms and the calibration; training through densectx."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

import densectx
from densectx.config import compose
from densectx.errors import ConfigError, DataError
from densectx.model import DenseModel
from densectx.testing import check_dataset, check_loss, check_task, make_batch
from densectx.types import SourceInfo

pytestmark = pytest.mark.usefixtures("installed")

CONFIG = Path(__file__).parents[1] / "configs" / "depth_motorcycle.yaml"
NYUD = Path(__file__).parents[1] / "configs" / "test_nyud.yaml"
NAN = math.nan
METRES = SourceInfo(keys=("image", "target"), target="map")


@pytest.fixture
def depth():
    """The module, imported once it can be found."""
    import densectx_depth

    return densectx_depth


def build(info=METRES, **options):
    torch.manual_seed(0)
    spec = {"name": "depth", "source": "s", "head": {"name": "decoder", "width": 8, "depth": 1}} | options
    backbone, context = {"name": "plain", "width": 8}, {"name": "basic", "dilations": [1, 2, 1]}
    config = {"backbone": backbone, "projection": None, "context": context, "tasks": {"depth": spec}}
    return DenseModel.from_config(config, {"s": info})


# loss -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0.3, 3))
def test_loss_is_the_published_one_in_its_pairwise_form(seed, balance, span):
    """Equation 3 of Eigen et al. (2014): for balance 1 half the mean over pairs of pixels of (d_i - d_j)^2."""
    import densectx_depth

    rng = np.random.default_rng(seed)
    output, target = rng.normal(size=(2, 3, 1, 4, 5))
    target[rng.random(target.shape) < 0.3] = NAN
    target[1] = NAN
    expected, images = 0.0, 0
    for y, t in zip(output, target, strict=True):
        d = span * (y - t)[~np.isnan(t)]
        if d.size:
            pairs = np.mean((d[:, None] - d[None]) ** 2) / 2
            expected, images = expected + balance * pairs + (1 - balance) * np.mean(d**2), images + 1
    total, weight = densectx_depth.SILog(span, balance)(torch.tensor(output), torch.tensor(target))
    assert total.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert weight.item() == images


def test_balance_1_does_not_see_the_scale_of_an_image_and_0_is_the_mean_squared_error(depth):
    output, target = torch.randn(2, 1, 6, 7), torch.randn(2, 1, 6, 7)
    far = output + torch.tensor([0.3, -2.0]).view(2, 1, 1, 1)
    one = depth.SILog(2.0, 1.0)
    torch.testing.assert_close(one(output, target)[0], one(far, target)[0])
    total, weight = depth.SILog(2.0, 0.0)(output, target)
    torch.testing.assert_close(total / weight, F.mse_loss(2 * output, 2 * target))


def test_loss_of_nothing_known_is_zero_with_a_graph(depth):
    output = torch.randn(2, 1, 4, 4, requires_grad=True)
    total, weight = depth.SILog()(output, torch.full((2, 1, 4, 4), NAN))
    total.backward()
    assert (total.item(), weight.item()) == (0, 0)
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_the_task_gives_the_loss_natural_logarithms(depth):
    task = build(low=1, high=20).task("depth")
    metres = torch.rand(2, 1, 6, 6) * 8 + 1
    _, target = task.prepare({"image": torch.rand(2, 3, 6, 6), "target": metres}, [])
    answer = torch.rand(2, 1, 6, 6)
    total, _ = task.loss(answer, target)["silog"]
    d = task.postprocess(answer, answer).log() - metres.log()
    expected = (d.square().flatten(1).mean(1) - 0.5 * d.flatten(1).mean(1).square()).sum()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


# metrics --------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_metrics_by_hand(seed, scaled):
    import densectx_depth

    rng = np.random.default_rng(seed)
    answer, truth = np.exp(rng.normal(0, 0.4, (2, 4, 1, 7, 9))).astype(np.float32)
    truth[rng.random(truth.shape) < 0.3] = NAN
    truth[2] = NAN
    metrics = densectx_depth.DepthMetrics(scaled)
    metrics.update(torch.tensor(answer[:1]), torch.tensor(truth[:1]))
    metrics.update(torch.tensor(answer[1:]), torch.tensor(truth[1:]))
    rows, medians = [], []
    for y, t in zip(answer.astype(float), truth.astype(float), strict=True):
        y, t = y[~np.isnan(t)], t[~np.isnan(t)]
        if t.size:
            median, own = np.median(t), np.median(y)  # of 2 values in the middle their mean
            rows.append(by_hand(y * (median / own if scaled else 1), t))
            medians.append(by_hand(np.full_like(t, median), t))
    values = metrics.compute()
    names = densectx_depth.MEASURES
    assert [values[name].item() for name in names] == pytest.approx(np.mean(rows, 0).tolist(), rel=1e-4)
    assert [values[f"{n}_median"].item() for n in names] == pytest.approx(np.mean(medians, 0).tolist(), rel=1e-4)


def by_hand(y, t):
    """Section 4 of Eigen et al. (2014)."""
    errors = [np.mean(np.abs(y - t) / t), np.mean((y - t) ** 2 / t), np.sqrt(np.mean((y - t) ** 2))]
    within = [np.mean(np.maximum(y / t, t / y) < 1.25**k) for k in (1, 2, 3)]
    return [*errors, np.sqrt(np.mean((np.log(y) - np.log(t)) ** 2)), *within]


def test_a_wrong_scale_is_forgiven_only_by_median_scaling(depth):
    truth = torch.rand(1, 1, 9, 9) + 1
    for scaled, expected in ((False, 1.0), (True, 0.0)):
        metrics = depth.DepthMetrics(scaled)
        metrics.update(2 * truth, truth)
        assert metrics.compute()["abs_rel"].item() == pytest.approx(expected, abs=1e-6)
    assert all(value.isnan() for value in depth.DepthMetrics().compute().values())


# data -----------------------------------------------------------------------------------------------------------------


def test_motorcycle_is_skimage_s_pair_by_its_calibration(depth):
    from skimage.data import stereo_motorcycle

    left, _, disparity = stereo_motorcycle()
    train, val = (depth.StereoMotorcycle(split=split) for split in ("train", "val"))
    for data, columns in ((train, slice(0, 480)), (val, slice(496, 741))):
        (sample,) = [data[index] for index in range(len(data))]
        image = torch.from_numpy(left[:, columns].copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(sample["image"], image)
        metres = 193.001 * 994.978 / (disparity[:, columns].astype(float) + 31.086) / 1000
        known = np.isfinite(disparity[:, columns])
        assert np.array_equal(~sample["target"][0].isnan().numpy(), known)
        assert sample["target"][0].numpy()[known] == pytest.approx(metres[known], rel=1e-6)
    assert train[0]["image"].shape[1:] == train.info.size
    assert 2 < val[0]["target"].nan_to_num(9).min() < 2.3


def nyud(folder, name, depth):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*depth.shape, 3), 99, np.uint8)).save(folder / f"{name}.png")
    Image.fromarray(depth).save(folder / f"depth_gt_{name}.png")


def test_nyud_is_the_test_split_where_it_is_named(depth, tmp_path):
    nyud(tmp_path / "b", "7", np.array([[0, 5000], [12500, 65535]], np.uint16))
    nyud(tmp_path / "a", "8", np.full((3, 2), 10000, np.uint16))
    data = depth.StereoMotorcycle(split="test", nyud=str(tmp_path))
    assert [data.name(index) for index in range(len(data))] == [str(tmp_path / p) for p in ("a/8.png", "b/7.png")]
    target = data[1]["target"]
    assert target[0, 0].isnan().tolist() == [True, False]
    assert target.flatten()[1:].tolist() == pytest.approx([1, 2.5, 13.107])
    assert len(depth.StereoMotorcycle(split="val", nyud=str(tmp_path))) == 1
    assert torch.equal(
        depth.StereoMotorcycle(split="test")[0]["image"], depth.StereoMotorcycle(split="val")[0]["image"]
    )


def test_broken_nyud_is_refused(depth, tmp_path):
    with pytest.raises(DataError, match="no file depth_gt"):
        len(depth.StereoMotorcycle(split="test", nyud=str(tmp_path)))
    nyud(tmp_path, "1", np.zeros((3, 4), np.uint16))
    Image.fromarray(np.zeros((3, 5), np.uint16)).save(tmp_path / "depth_gt_1.png")
    with pytest.raises(DataError, match=r"depth_gt_1\.png"):
        depth.StereoMotorcycle(split="test", nyud=str(tmp_path))[0]


# task -----------------------------------------------------------------------------------------------------------------


def test_registered_by_entry_points():
    assert densectx.TASKS.entry("depth").origin == "densectx-depth 0.1.0"
    assert densectx.LOSSES.entry("silog").target == "densectx_depth:SILog"
    assert densectx.DATASETS.entry("stereo_motorcycle").target == "densectx_depth:StereoMotorcycle"


def test_its_parts_keep_the_contract(depth, tmp_path):
    batch = make_batch(METRES)
    batch["target"] = batch["target"] * 8 + 1  # metres; a corner stays unknown
    check_task("depth", info=METRES, batch=batch)
    check_loss("silog", target="numbers")
    check_dataset("stereo_motorcycle")
    check_dataset({"name": "stereo_motorcycle", "nyud": str(tmp_path)})


def test_answers_lie_in_the_range_and_pictures_are_pictures():
    model = build(low=2, high=5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    answer = model.predict(torch.rand(3, 11, 9))["depth"]
    assert answer.shape == (1, 11, 9)
    assert answer.min() >= 2 * (1 - 1e-6)
    assert answer.max() <= 5 * (1 + 1e-6)
    truth = torch.full((1, 1, 11, 9), 3.0)
    truth[..., :4] = NAN
    pictures = model.task("depth").draw(answer[None], torch.rand(1, 3, 11, 9), {"depth": truth})
    assert [p.shape for p in pictures] == [(3, 11, 9)] * 3
    assert all(p.isfinite().all() for p in pictures)


@pytest.mark.parametrize(
    ("options", "info", "part"),
    [
        ({}, SourceInfo(), "no map of depths"),
        ({"low": 0}, METRES, "must be positive"),
        ({"loss": {"name": "silog", "balance": 2}}, METRES, "balance 2"),
        ({"loss": {"name": "silog", "span": 2}}, METRES, "span"),
    ],
)
def test_refused(options, info, part):
    with pytest.raises(ConfigError, match=part):
        build(info, **options)


# training -------------------------------------------------------------------------------------------------------------


def test_fit_and_test_from_its_configs(tmp_path, monkeypatch, capsys):
    from densectx.training import main

    monkeypatch.setenv("DENSECTX_RUN", "")  # main sets it; this brings it back
    monkeypatch.setenv("DENSECTX_DATA", str(tmp_path))
    nyud(tmp_path / "multitask_samples" / "one", "1", np.full((40, 48), 9000, np.uint16))
    small = tmp_path / "small.yaml"
    small.write_text(
        """
model: {backbone: {name: plain, width: 4}, projection: null, lr_scheduler: null}
data: {sources: {motorcycle: {batch_size: 2, augment: {crop: 32}}}, num_workers: 0, steps_per_epoch: 2}
trainer: {accelerator: cpu, max_steps: 2, val_check_interval: 2, enable_progress_bar: false}
"""
    )
    files = ["-c", str(CONFIG), "-c", str(small), "--trainer.default_root_dir", str(tmp_path / "runs")]
    assert main("fit", files) == 0
    run = tmp_path / "runs" / "depth_motorcycle" / "0"
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/depth/abs_rel", "val/depth/abs_rel_median", "val/depth/delta1"} <= set(header)
    capsys.readouterr()
    assert main("test", [*files, "-c", str(NYUD), "--ckpt_path", str(run)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("depth "))
    assert "median" in row
    assert row.split()[-1] == "0", "a flat scene is answered by its median"


def test_nyud_samples(depth, data_root):
    data = depth.StereoMotorcycle(split="test", nyud=str(data_root / "multitask_samples"))
    assert len(data) == 2
    for index in range(2):
        metres = data[index]["target"]
        known = metres[~metres.isnan()]
        assert metres.shape == (1, 480, 640)
        assert 1.4 < known.min() < 2
        assert 5 < known.max() < 6


def test_its_configs_build_without_reading_a_file(monkeypatch):
    monkeypatch.setenv("DENSECTX_DATA", "/nonexistent")
    for files in ([CONFIG], [CONFIG, NYUD]):
        values = compose(files).values
        sources = densectx.DataModule(**values["data"]).info()
        keys = ("backbone", "projection", "context", "tasks")
        assert list(DenseModel.from_config({k: values["model"][k] for k in keys}, sources).tasks) == ["depth"]
