"""Crops with their real surroundings: geometry of samples, and training that knows nothing of them but by the model."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import densectx
from densectx.data.collate import Collate
from densectx.data.mix import cutmix
from densectx.data.transforms import Augment
from densectx.errors import ConfigError
from densectx.rng import generator
from densectx.surround import surround_of
from densectx.types import SourceInfo

sides = st.integers(1, 12)


def coordinates(height, width):
    """An image that holds row and column, a mask of row * 100 + column, a target twice as large as both."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns, rows * 0]).float()
    fine = torch.stack(torch.meshgrid(torch.arange(2 * height), torch.arange(2 * width), indexing="ij")).float()
    return {"image": image, "mask": rows * 100 + columns, "target": fine, "gray": torch.tensor(False)}


def plain(height, width):
    """The same without a target."""
    return {key: value for key, value in coordinates(height, width).items() if key != "target"}


INFO = SourceInfo(ignore_index=-1, target="map", scale=2)


@settings(max_examples=150, deadline=None)
@given(height=sides, width=sides, crop=st.tuples(sides, sides), border=st.integers(1, 30), seed=st.integers(0, 99))
def test_a_crop_is_cut_from_the_endlessly_mirrored_picture(height, width, crop, border, seed):
    sample = coordinates(height, width)
    augment = Augment(crop=crop, surround=border, pad=True, info=INFO)
    out = augment(sample, generator(seed))
    size = (crop[0] + 2 * border, crop[1] + 2 * border)
    assert augment.size == out["image"].shape[1:] == out["mask"].shape == out["valid"].shape == size
    assert out["target"].shape[1:] == (2 * size[0], 2 * size[1])
    assert out["surround"].shape == ()
    assert out["surround"].item() == border
    # where the crop is: its first labelled pixel
    known = out["valid"].nonzero()
    inside = tuple((known[-1] - known[0] + 1).tolist())
    assert inside == (min(crop[0], height), min(crop[1], width))
    top, left = (known[0] - border).tolist()
    first = out["mask"][tuple(known[0])].item()
    place = first // 100 - top, first % 100 - left
    for axis, (at, length, whole) in enumerate(zip(place, crop, (height, width), strict=True)):
        slack = length - whole
        assert at == -(slack // 2) if slack > 0 else 0 <= at <= -slack, axis
    reach = 40  # enough on each side
    mirrored = np.pad(sample["image"].numpy(), ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    rows, columns = (slice(reach + p - border, reach + p + c + border) for p, c in zip(place, crop, strict=True))
    assert np.array_equal(out["image"].numpy(), mirrored[:, rows, columns])
    # labels: those of the crop inside the picture, nothing else
    labels = np.full((height + 80, width + 80), -1)
    labels[reach:-reach, reach:-reach] = sample["mask"].numpy()
    expected = np.full(size, -1)
    expected[border:-border, border:-border] = labels[rows, columns][border:-border, border:-border]
    assert np.array_equal(out["mask"].numpy(), expected)
    assert torch.equal(out["valid"], out["mask"] >= 0)
    fine = out["valid"].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(~out["target"].isnan(), fine.expand(2, -1, -1))
    assert out["target"][:, fine][0].unique().tolist() == [
        2 * p + h for p in range(max(place[0], 0), max(place[0], 0) + inside[0]) for h in (0, 1)
    ]


def test_a_real_picture_around_the_crop_is_seen_and_not_labelled():
    sample = plain(20, 30)
    out = Augment(crop=[4, 6], surround=3)(sample, generator(7))
    rows, columns = out["image"][0, :, 0], out["image"][1, 0]
    top, left = int(rows[3]), int(columns[3])
    assert 3 <= top <= 13, "the seed places this crop well inside"
    assert 3 <= left <= 21
    assert rows.tolist() == list(range(top - 3, top + 7))
    assert columns.tolist() == list(range(left - 3, left + 9))
    assert (out["mask"] != 255).sum() == 24


def test_crops_are_uniform_over_the_picture():
    sample, augment = plain(5, 6), Augment(crop=[3, 4], surround=9)
    corners = [int(augment(sample, generator(seed))["mask"][9, 9]) for seed in range(900)]
    counts = {corner: corners.count(corner) for corner in set(corners)}
    assert set(counts) == {row * 100 + column for row in range(3) for column in range(3)}
    assert min(counts.values()) > 60  # of 100 expected
    assert max(counts.values()) < 140


@pytest.mark.parametrize("option", [{"flip": True}, {"vertical_flip": True}, {"rotate90": True}, {"scale": [0.5, 2]}])
def test_other_augmentation_moves_surroundings_along(option):
    augment = Augment(crop=4, surround=5, **option)
    for seed in range(8):
        out = augment(plain(12, 15), generator(seed))
        assert out["image"].shape == (3, 14, 14)
        assert torch.equal(out["valid"], out["mask"] != 255)
        assert out["valid"][5:-5, 5:-5].all()
        assert out["valid"].sum() == 16


def test_rare_classes_are_in_the_crop_and_not_only_around_it():
    info = SourceInfo(classes=("a", "b"), keys=("image", "mask"))
    sample = {"image": torch.rand(3, 30, 30), "mask": torch.zeros(30, 30, dtype=torch.int64)}
    sample["mask"][17, 4] = 1
    augment = Augment(crop=5, surround=6, rare={"classes": ["b"], "probability": 1.0}, info=info)
    for seed in range(20):
        assert (augment(sample, generator(seed))["mask"] == 1).any()


def test_batches_and_mixes_keep_it():
    info = SourceInfo(classes=("a",), keys=("image", "mask"))
    augment = Augment(crop=6, surround=4, info=info)
    pair = [augment({**plain(9, 9), "key": torch.tensor([0, i])}, generator(i)) for i in (0, 1)]
    mixed = cutmix(*pair, generator(3), info)
    assert mixed["surround"] == 4
    assert torch.equal(mixed["valid"], mixed["mask"] != 255)
    batch = Collate({"s": info}, "", ["s"])([("s", mixed), ("s", pair[1])])["s"]
    assert batch["surround"].tolist() == [4, 4]
    assert batch["image"].shape == (2, 3, 14, 14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surround": 4}, r"a.surround: a whole picture has no surroundings.*set a.crop"),
        ({"surround": -1, "crop": 3}, r"a.surround: expected a number of pixels of at least 0, got -1"),
        ({"surround": True, "crop": 3}, r"a.surround: expected a number"),
        ({"surroun": 4}, r"did you mean 'surround'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        Augment.from_config(options, "a")


# training -------------------------------------------------------------------------------------------------------------

SEGMENTATION = {"name": "segmentation", "source": "m", "head": {"name": "upsample", "method": "interp_map"}}


def trained(tasks, augment, **model):
    """Data and module of tasks on patches of photographs, in float64, without dropout."""
    source = {"name": "mosaic", "size": 64, "length": 4, "batch_size": 2, "augment": augment}
    data = densectx.DataModule({"m": source}, num_workers=0)
    config = {"backbone": {"name": "plain", "width": 6}, "context": "context7", "tasks": tasks, **model}
    torch.manual_seed(0)
    built = densectx.DenseModel.from_config(config, data.info()).double()
    module = densectx.DenseModule(built, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    module.log = lambda *args, **kwargs: None
    (batch,) = [next(iter(data.train_dataloader()))]
    batch["m"]["image"] = batch["m"]["image"].double()
    return module, batch


FRONT = {"backbone": {"name": "frontend_vgg16", "width": 4, "fc": 8, "dropout": 0.0}}
FRONT |= {"projection": {"channels": 10, "activation": "none"}}


@pytest.mark.parametrize("stride", [1, 8])
def test_the_loss_of_a_crop_is_that_of_its_cells(stride):
    module, batch = trained({"seg": {**SEGMENTATION, "label_stride": stride}}, {"crop": 32, "surround": 186}, **FRONT)
    model, sample = module.model, batch["m"]
    batch["m"]["mask"][:, 186 + 8 : 186 + 17, 186 + 8 : 186 + 17] = 255
    loss = module.training_step(batch, 0)
    scores = model.context["shared"](model.projection(model.backbone.valid(sample["image"])[-1]))  # valid convolutions
    mask = sample["mask"][:, 186:-186, 186:-186]
    assert scores.shape[2:] == (4, 4)
    if stride == 8:
        expected = F.cross_entropy(scores, mask[:, ::8, ::8], ignore_index=255)
    else:
        padded = F.pad(scores.softmax(1), (0, 1, 0, 1), mode="replicate")
        answer = F.interpolate(padded, (33, 33), mode="bilinear", align_corners=True)[..., :32, :32]
        expected = F.nll_loss(answer.log(), mask, ignore_index=255)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


def test_classes_that_are_all_but_excluded_still_teach():
    """Probabilities far below the least number of the type: a loss of p alone would be flat there."""
    features = [densectx.types.Feature(3, 8)]
    head = densectx.HEADS.build(SEGMENTATION["head"], features=features, out_channels=3, exclusive=True)
    scores = torch.tensor([0.0, 500.0, -400.0]).view(1, 3, 1, 1).expand(-1, -1, 2, 2).clone().requires_grad_()
    F.cross_entropy(head([scores], None)[..., ::8, ::8], torch.full((1, 2, 2), 2)).backward()
    torch.testing.assert_close(scores.grad[0, :, 0, 0], torch.tensor([0.0, 0.25, -0.25]))


@pytest.mark.parametrize("crop", [32, 64])
def test_metrics_of_a_crop_are_those_of_its_interior(crop):
    module, batch = trained({"seg": {**SEGMENTATION, "label_stride": 8}}, {"crop": crop, "surround": 186}, **FRONT)
    module.eval()
    with torch.no_grad():
        module.validation_step(batch, 0)
        ((prediction, x, target),) = module.answer(batch).values()
    assert prediction.shape[2:] == x.shape[2:] == target["mask"].shape[1:] == (crop + 372,) * 2
    inner = (..., slice(186, -186), slice(186, -186))
    right = prediction[inner].argmax(1) == target["mask"][inner]
    values = module.model.task("seg").metrics.compute()
    assert values["pixel_accuracy"].item() == pytest.approx(100 * right.double().mean().item())


TASKS = {
    "segmentation": {"source": "m", "loss": ["cross_entropy", "dice"]},
    "denoising": {"source": "m", "sigma": 25, "loss": ["l1", "ssim"]},
    "super_resolution": {"source": "m", "scale": 2},
    "colorization": {"source": "m"},
    "demosaicing": {"source": "m"},
    "jpeg_deblocking": {"source": "m"},
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_learns_from_the_interior_only(name):
    """To a backbone without margin surroundings are part of the input; no label of theirs, no output there counts."""
    task = {"name": name, "head": "decoder" if name != "segmentation" else "linear", **TASKS[name]}
    module, batch = trained({"t": task}, {"crop": 24, "surround": 4})
    model = module.model.float()
    batch["m"]["image"] = batch["m"]["image"].float()
    inputs, targets, surround = module._prepare(batch)
    border = surround["t"]
    assert border == (2 if name == "super_resolution" else 4)
    whole, cut = model(inputs), module._run(inputs, surround)["t"]
    edge = border * model.task("t").scale // model.task("t").input_scale
    inside = F.pad(torch.ones_like(whole["t"][..., edge:-edge, edge:-edge]), (edge,) * 4)
    assert torch.equal(cut, whole["t"] * inside)
    loss = module.training_step(batch, 0)
    other = dict(targets["t"])
    terms = model.task("t").loss(torch.where(inside > 0, whole["t"], 7.0), other)  # whatever is said around it
    coefficients = model.task("t").coefficients
    expected = sum(coefficients[k] * total / weight for k, (total, weight) in terms.items())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_surroundings_that_a_task_cannot_have_are_refused():
    image = torch.rand(2, 3, 40, 40)
    sample = {"image": image, "surround": torch.tensor([5, 5])}
    assert surround_of({"image": image}, image, "t", "s") == 0
    assert surround_of(sample, image[..., :80, :80], "t", "s") == 5
    with pytest.raises(ConfigError, match=r"task 't' takes images of 40x40 as 20x20, in which 5 pixels"):
        surround_of(sample, image[..., ::2, ::2], "t", "s")
    with pytest.raises(ConfigError, match=r"data.sources.s.augment.surround"):
        surround_of({**sample, "surround": torch.tensor([5, 4])}, image, "t", "s")


def test_label_stride_is_checked():
    with pytest.raises(ConfigError, match="label_stride 0 is not positive"):
        trained({"seg": {"name": "segmentation", "source": "m", "label_stride": 0}}, None)


@pytest.mark.parametrize("mode", ["multiclass", "binary", "multilabel"])
def test_label_stride_takes_every_so_manieth_label(mode):
    info = SourceInfo(classes=("a", "b"), keys=("image", "mask"), ignore_index=255)
    if mode == "multilabel":
        info = SourceInfo(classes=("a", "b"), keys=("image", "target"), target="labels")
    options = {"features": [densectx.types.Feature(4, 8)], "in_channels": 3, "info": info}
    one, four = (
        densectx.TASKS.build({"name": "segmentation", "source": "s", "mode": mode, "label_stride": n}, **options)
        for n in (1, 4)
    )
    output = torch.randn(2, one.logits, 21, 18)
    labels = torch.randint(0, 2, (2, 2, 21, 18)).float() if mode == "multilabel" else torch.randint(0, 2, (2, 21, 18))
    key = one.requires[1]
    for surround, first in ((None, 0), (6, 2), (8, 0)):
        target = {key: labels} if surround is None else {key: labels, "surround": torch.tensor([surround] * 2)}
        terms = four.loss(output, target)
        grid = (..., slice(first, None, 4), slice(first, None, 4))
        assert terms == one.loss(output[grid], {key: labels[grid]})
