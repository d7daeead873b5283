"""Segmentation in its three modes: targets, losses, answers, metrics by class and along boundaries, refusals."""

import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion
from torch.nn import functional as F

from densectx.callbacks import number, score_table
from densectx.checkpointing import Checkpoints
from densectx.cli import main
from densectx.errors import ConfigError
from densectx.metrics import ConfusionMetrics, LabelMetrics
from densectx.metrics.boundary import boundary_counts, boundary_width
from densectx.metrics.classes import class_keys
from densectx.model import DenseModel
from densectx.module import DenseModule
from densectx.types import SourceInfo

MASKS = SourceInfo(classes=("road", "car", "sky"), keys=("image", "mask"))
TWO = SourceInfo(classes=("background", "crack"), keys=("image", "mask"))
MANY = SourceInfo(classes=tuple(map(str, range(300))), keys=("image", "mask"))
LABELS = SourceInfo(classes=("road", "car", "wet"), keys=("image", "target"), target="labels")
INFOS = {"multiclass": MASKS, "binary": TWO, "multilabel": LABELS}


def build(mode="multiclass", info=None, **options):
    torch.manual_seed(0)
    tasks = {"t": {"name": "segmentation", "source": "s", "mode": mode, **options}}
    config = {
        "backbone": {"name": "plain", "width": 6},
        "projection": {"channels": 6},
        "context": "none",
        "tasks": tasks,
    }
    return DenseModel.from_config(config, {"s": info or INFOS[mode]})


def batch_of(mode, size=(17, 14), batch=3):
    """A sample whose first image has unlabelled pixels and whose last one has no label at all."""
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 3, *size, generator=rng)
    found = {"image": image, "key": torch.tensor([[0, i] for i in range(batch)])}
    if mode == "multilabel":
        found["target"] = (image > 0.5).float()
        found["target"][0, :, :4], found["target"][-1] = torch.nan, torch.nan
    else:
        found["mask"] = (image[:, 0] * len(INFOS[mode].classes)).long()
        found["mask"][0, :4], found["mask"][-1] = 255, 255
    return found


# the three modes


@pytest.mark.parametrize("mode", list(INFOS))
def test_modes_answer_with_probabilities_of_every_class(mode):
    model = build(mode)
    answer = model.predict(torch.rand(2, 3, 9, 11))["t"]
    assert answer.shape == (2, len(INFOS[mode].classes), 9, 11)
    assert answer.min() >= 0
    assert answer.max() <= 1
    assert model({"t": torch.rand(1, 3, 8, 8)})["t"].shape[1] == {"multiclass": 3, "binary": 1, "multilabel": 3}[mode]
    if mode != "multilabel":
        assert torch.allclose(answer.sum(1), torch.ones(2, 9, 11))
    assert model.task("t").output == ("labels" if mode == "multilabel" else "classes")


@pytest.mark.parametrize("mode", list(INFOS))
@pytest.mark.parametrize(
    "loss", [None, ["focal", "dice"], [{"name": "tversky", "exponent": 0.75}, "focal"], {"name": "lovasz", "weight": 2}]
)
def test_modes_train_with_every_loss_that_fits(mode, loss):
    """Some steps on one batch lower the loss and raise the score above the trivial answer."""
    model, batch = build(mode, loss=loss).train(), batch_of(mode)
    task = model.task("t")
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    losses = []
    for _ in range(40):
        x, target = task.prepare(batch, [])
        output = model({"t": x})["t"]
        terms = task.loss(output, target)
        total = sum(task.coefficients[name] * s / w for name, (s, w) in terms.items())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0]
    prediction = task.postprocess(output.detach(), x)
    task.update(prediction, x, target)
    values = task.metrics.compute()
    assert values["miou"] > values[f"miou_{task.score.baseline}"]
    pictures = task.draw(prediction[:1], x[:1], {k: v[:1] for k, v in target.items()})
    assert all(p.shape == (3, 17, 14) and p.min() >= 0 and p.max() <= 1 for p in pictures)
    assert pictures[2][:, :4].sum() == 0, "unlabelled is black"


def test_binary_mode_is_two_classes_with_one_logit():
    """The sigmoid of one logit is the softmax of (0, logit), and so are loss and metrics."""
    one, two = build("binary").task("t"), build("multiclass", TWO).task("t")
    batch, logit = batch_of("binary"), torch.randn(3, 1, 17, 14)
    both = torch.cat([torch.zeros_like(logit), logit], 1)
    (x, target), (_, same) = one.prepare(batch, []), two.prepare(batch, [])
    (total, weight), (expected, count) = one.loss(logit, target)["bce"], two.loss(both, same)["cross_entropy"]
    assert torch.allclose(total, expected)
    assert weight == count == (batch["mask"] != 255).sum()
    answer = one.postprocess(logit, x)
    assert torch.allclose(answer, two.postprocess(both, x), atol=1e-6)
    for task in (one, two):
        task.update(answer, x, target)
    assert one.metrics.compute() == two.metrics.compute()


@pytest.mark.parametrize("mode", list(INFOS))
def test_batch_without_labels_costs_nothing(mode):
    task, batch = build(mode, loss=["focal", "dice", "tversky", "lovasz"]).task("t"), batch_of(mode)
    x, target = task.prepare({key: value[-1:] for key, value in batch.items()}, [])
    output = torch.randn(1, task.logits, 17, 14, requires_grad=True)
    terms = task.loss(output, target)
    sum(total for total, _ in terms.values()).backward()
    assert all((total.item(), weight.item()) == (0, 0) for total, weight in terms.values())
    assert output.grad.abs().sum() == 0
    task.update(task.postprocess(output.detach(), x), x, target)
    values = task.metrics.compute()
    assert values["miou"].isnan()


@pytest.mark.parametrize(
    ("mode", "info", "options", "message"),
    [
        ("binary", MASKS, {}, "binary needs a source of 2 classes.*has 3 .road, car, sky.; take mode multiclass"),
        ("binary", TWO, {"loss": "cross_entropy"}, r"model.tasks.t.loss: loss 'cross_entropy' .* take bce, dice"),
        ("multilabel", LABELS, {"loss": "cross_entropy"}, "take bce, dice, focal, lovasz, tversky"),
        ("multiclass", MASKS, {"loss": ["bce"]}, "take cross_entropy, dice"),
        ("multilabel", MASKS, {}, "mode multilabel needs labels.*or take mode multiclass"),
        ("multiclass", LABELS, {}, "no masks with classes; take mode multilabel"),
        ("multilabel", LABELS, {"classes": 2}, "classes is 2, but source 's' has 3"),
        ("multiclas", MASKS, {}, "expected 'multiclass' or 'binary' or 'multilabel', got 'multiclas'"),
        ("multiclass", MASKS, {"boundary": 2}, "boundary 2 .*0.02"),
        ("binary", TWO, {"loss": {"name": "bce", "pos_weight": [1, 2]}}, "2 pos_weights for 1"),
        ("multiclass", MANY, {}, "ignore_index 255 is the id of class '255', .* must give another, such as 300"),
    ],
)
def test_unfit_modes_are_refused(mode, info, options, message):
    with pytest.raises(ConfigError, match=message):
        build(mode, info, **options)


# metrics


def jaccard(a, b):
    """Intersection over union in percent of two sets of pixels, as index sets."""
    a, b = set(np.flatnonzero(a)), set(np.flatnonzero(b))
    return 100 * len(a & b) / len(a | b)


@pytest.mark.fault("N07")
@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10_000))
def test_iou_of_each_class_equals_sets_of_pixels(classes, seed):
    rng = np.random.default_rng(seed)
    shown = rng.choice(classes, rng.integers(1, classes + 1), replace=False)  # some classes occur nowhere
    truth, guess = (rng.choice(shown, (3, 4, 5)) for _ in range(2))
    truth[0, 0, :3] = 255
    names = [f"class {i}" for i in range(classes)]
    metrics = ConfusionMetrics(classes, 255, names)
    metrics.update(torch.tensor(guess), torch.tensor(truth))
    values = {key: value.item() for key, value in metrics.compute().items()}
    t, g = truth[truth != 255], guess[truth != 255]
    ious = {int(c): jaccard(t == c, g == c) for c in np.union1d(t, g)}
    for index in range(classes):
        expected = ious.get(index, np.nan)
        assert values[f"iou_class_{index}"] == pytest.approx(expected, nan_ok=True)
    assert values["miou"] == pytest.approx(np.mean(list(ious.values())))
    assert values["frequency_iou"] == pytest.approx(np.mean([ious[c] for c in t]))


@pytest.mark.fault("N07")
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_metrics_of_labels_equal_sets_of_pixels(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, (4, 3, 5, 6)).astype(np.float32)
    truth[:, 2] = 0  # never there, and never said below
    probability = rng.random(truth.shape).astype(np.float32)
    probability[:, 2] /= 2.1
    truth[1, 0], truth[0, :, 2:] = np.nan, np.nan
    metrics = LabelMetrics(["a", "b", "c"])
    for p, t in zip(probability, truth, strict=True):
        metrics.update(torch.tensor(p)[None], torch.tensor(t)[None])
    values = {key: value.item() for key, value in metrics.compute().items()}
    ious, constant, right = [], [], []
    for k in range(2):
        known = ~np.isnan(truth[:, k])
        t, p = truth[:, k][known], probability[:, k][known] >= 0.5
        ious.append(jaccard(t == 1, p))
        constant.append(jaccard(t == 1, np.ones_like(p)))
        assert values[f"iou_{'ab'[k]}"] == pytest.approx(ious[-1])
        right += (t == p).tolist()
    right += [True] * int((~np.isnan(truth[:, 2])).sum())
    assert np.isnan(values["iou_c"])
    assert values["miou"] == pytest.approx(np.mean(ious))
    assert values["miou_constant"] == pytest.approx(np.mean(constant))
    assert values["pixel_accuracy"] == pytest.approx(100 * np.mean(right))


def brute_force_boundary(prediction, truth, known, classes, width):
    """The paper's definition by erosion, class by class and image by image; unknown pixels on neither side."""
    square, counts = np.ones((3, 3), bool), np.zeros((2, classes), int)
    for p, t, k in zip(prediction, truth, known, strict=True):
        for c in range(classes):
            bands = []
            for ids in (p, t):
                inside = binary_erosion((ids == c) | ~k, square, iterations=width, border_value=0)
                bands.append((ids == c) & k & ~inside)
            counts[:, c] += (bands[0] & bands[1]).sum(), (bands[0] | bands[1]).sum()
    return counts


@pytest.mark.fault("N07")
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.02, 0.05, 0.2]), st.booleans(), st.integers(0, 999))
def test_boundary_counts_equal_erosion(height, width, share, ignore, seed):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 4, (2, 2, height // 5 + 1, width // 5 + 1))  # blocks, so that there is an inside
    truth, guess = np.kron(small, np.ones((5, 5), int))[..., :height, :width]
    guess = np.roll(guess, 1, axis=1)
    known = rng.random(truth.shape) > (0.1 if ignore else -1)
    counts = boundary_counts(torch.tensor(guess), torch.tensor(truth), torch.tensor(known), 4, share)
    expected = brute_force_boundary(guess, truth, known, 4, boundary_width(height, width, share))
    assert counts.tolist() == expected.tolist()


def test_boundary_width_is_that_of_the_papers_code():
    assert boundary_width(3, 4, 0.02) == 1
    assert boundary_width(300, 400, 0.02) == 10


def test_boundary_iou_sees_contours_that_iou_hardly_does():
    truth = torch.zeros(1, 100, 100, dtype=torch.long)
    truth[0, 20:80, 20:80] = 1
    guess = torch.zeros_like(truth)
    guess[0, 22:82, 20:80] = 1  # two rows too low
    metrics = ConfusionMetrics(2, 255, ("ground", "thing"), boundary=0.02)
    metrics.update(guess, truth)
    values = metrics.compute()
    assert values["iou_thing"] > 93
    assert values["boundary_iou_thing"] < 75
    assert values["boundary_iou"] == pytest.approx((values["boundary_iou_ground"] + values["boundary_iou_thing"]) / 2)
    metrics.reset()
    metrics.update(truth, truth)
    assert metrics.compute()["boundary_iou"] == 100
    labels = LabelMetrics(("thing",), boundary=0.02)
    labels.update(guess[:, None].float(), truth[:, None].float())
    assert labels.compute()["boundary_iou_thing"] == pytest.approx(values["boundary_iou_thing"])


@pytest.mark.parametrize("mode", list(INFOS))
def test_metrics_of_ranks_add_up_exactly(mode):
    """States are integer sums: what the ranks counted, added, is what one process counts."""
    whole, parts = (build(mode, boundary=0.05).task("t") for _ in range(2))
    batch = batch_of(mode, batch=5)
    x, target = whole.prepare(batch, [])
    prediction = torch.rand(5, len(INFOS[mode].classes), 17, 14)
    whole.update(prediction, x, target)
    states = []
    for mine in ([0, 3], [1, 2], [4], []):  # image 4 has no label, the last rank no image
        parts.metrics.reset()
        parts.update(prediction[mine], x[mine], {key: value[mine] for key, value in target.items()})
        states.append({name: getattr(parts.metrics, name).clone() for name in parts.metrics.metric_state})
    for name, value in whole.metrics.metric_state.items():
        assert value.dtype == torch.long
        assert torch.equal(value, sum(state[name] for state in states))


def test_keys_of_classes_are_fit_for_files_and_flags():
    names = ["traffic light", "pole", "sign/post", "Straße", "a b", "a_b", "道", "a-b"]
    keys = class_keys("iou", names)
    assert keys[:4] == ["iou_traffic_light", "iou_pole", "iou_sign_post", "iou_Stra_e"]
    assert keys[6] == "iou_6"
    assert len(set(keys)) == len(names)
    assert all(key.isidentifier() for key in keys)


# in a run

CONFIG = """
model:
  backbone: {name: plain, width: 6}
  projection: {channels: 6}
  context: none
  tasks:
    segmentation: {name: segmentation, source: mosaic, boundary: 0.02, loss: [cross_entropy, {name: lovasz, weight: 2}]}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  sources:
    mosaic: {name: mosaic, size: 24, length: 8, val_length: 2, batch_size: 4}
  num_workers: 0
trainer:
  accelerator: cpu
  max_steps: 2
  val_check_interval: 2
  check_val_every_n_epoch: null
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {class_path: densectx.checkpointing.Checkpoints, init_args: {monitor: val/segmentation/boundary_iou}}
"""


def test_run_logs_each_class_and_prints_one_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "small.yaml").write_text(CONFIG)
    assert main(["fit", "-c", "small.yaml", "--name", "run"]) == 0
    folder = tmp_path / "runs" / "run" / "0"
    with (folder / "metrics.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    classes = [key for key in row if key.startswith("val/segmentation/iou_")]
    assert len(classes) == len([key for key in row if key.startswith("val/segmentation/boundary_iou_")]) == 10
    found = [float(row[key]) for key in classes]
    assert np.nanmean(found) == pytest.approx(float(row["val/segmentation/miou"]), rel=1e-5)
    assert (folder / "checkpoints" / "best.ckpt").exists()
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1].split()[:3] == ["segmentation", "miou", number(float(row["val/segmentation/miou"]))]
    assert printed[-2].split()[:2] == ["task", "metric"]
    assert "iou_" not in "".join(printed[-2:])
    absent = [key.rpartition("iou_")[2] for key in classes if np.isnan(float(row[key]))]
    said = [line for line in printed if line.startswith("segmentation: neither in truth nor in prediction")]
    assert bool(said) == bool(absent)
    assert all(line.endswith(": " + ", ".join(absent)) for line in said)


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_monitored_class_that_was_not_there_is_never_the_best(mode, sign):
    callback, module = Checkpoints(monitor="val/t/iou_car", mode=mode), DenseModule(build(), torch.optim.Adam)
    assert callback.value({"val/t/iou_car": float("nan")}, module) == -np.inf
    assert callback.value({"val/t/iou_car": 3.0}, module) == 3.0 * sign


def test_absent_classes_are_named_above_the_table():
    model = build()
    task = model.task("t")
    mask = torch.zeros(1, 4, 4, dtype=torch.long)
    task.update(F.one_hot(mask, 3).permute(0, 3, 1, 2).float(), mask, {"mask": mask})
    values = {f"val/t/{key}": float(value) for key, value in task.metrics.compute().items()}
    text = score_table(DenseModule(model, torch.optim.Adam), values)
    assert "t: neither in truth nor in prediction, so left out of the mean: car, sky\n" in text
    assert text.splitlines()[-1].split() == ["t", "miou", "100.00", "majority", "100.00"]
    task.metrics.reset()
    values = {f"val/t/{key}": float(value) for key, value in task.metrics.compute().items()}
    assert "neither" not in score_table(DenseModule(model, torch.optim.Adam), values), "nothing was labelled at all"
