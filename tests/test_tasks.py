"""What each task promises: protocols, partial labels, refusals."""

import math
from typing import final

import pytest
import torch

from densectx.errors import ConfigError, DataError, PluginError
from densectx.model import DenseModel
from densectx.nn.colour import rgb_to_lab
from densectx.registry import TASKS
from densectx.rng import generator
from densectx.tasks.base import Task
from densectx.types import SourceInfo

RGB = SourceInfo(classes=("a", "b"), keys=("image", "mask"))
GRAY = SourceInfo(channels=1)
BOTH = SourceInfo(keys=("image", "mask", "target"), target="map")


def build(task, info=RGB, backbone=None, **model):
    config = {"backbone": backbone or {"name": "plain", "width": 4, "in_channels": info.channels}, "projection": None}
    tasks = {"t": {"source": "s", **task}}
    return DenseModel.from_config({**config, "context": "none", "tasks": tasks, **model}, {"s": info})


def batch(image, gray=False):
    n = len(image)
    return {"image": image, "gray": torch.tensor([gray] * n), "key": torch.tensor([[0, i] for i in range(n)])}


def rngs(n):
    return [generator("test", i) for i in range(n)]


def test_noise_has_the_stated_level_and_the_input_the_theoretical_psnr():
    model = build({"name": "denoising", "sigma": 25})
    task = model.task("t").eval()
    image = torch.full((2, 3, 200, 200), 0.5)
    x, target = task.prepare(batch(image), rngs(2))
    assert (x - image).std().item() * 255 == pytest.approx(25, rel=0.01)
    task.update(model({"t": x})["t"], x, target)
    values = task.metrics.compute()
    assert values["psnr_noisy"].item() == pytest.approx(20 * math.log10(255 / 25), abs=0.05)


def test_noise_of_a_gray_image_is_gray():
    task = build({"name": "denoising"}).task("t")
    x, _ = task.prepare(batch(torch.full((1, 3, 8, 8), 0.5), gray=True), rngs(1))
    assert torch.equal(x[:, 0], x[:, 1])
    assert torch.equal(x[:, 0], x[:, 2])


def test_sigma_range_adds_the_level_map_where_the_trunk_has_room():
    task = {"name": "denoising", "sigma": [0, 50], "test_sigma": 15}
    narrow, wide = build(task), build(task, backbone={"name": "plain", "width": 4, "in_channels": 4})
    for model, seen in ((narrow, 3), (wide, 4)):
        part = model.task("t").train()
        x, _ = part.prepare(batch(torch.zeros(8, 3, 64, 64)), rngs(8))
        assert x.shape[1] == 4
        levels, noise = x[:, 3].mean((1, 2)), x[:, :3].flatten(1).std(1)
        assert torch.allclose(levels, noise, rtol=0.05)
        assert levels.std() > 0.02
        assert part.adapt(x).shape[1] == seen
        part.eval()
        x, _ = part.prepare(batch(torch.zeros(1, 3, 4, 4)), rngs(1))
        assert torch.allclose(x[:, 3], torch.tensor(15 / 255))
    assert narrow.predict(torch.rand(3, 8, 8))["t"].shape == (3, 8, 8)
    assert narrow.predict(torch.rand(3, 8, 8), options={"t.sigma": 25})["t"].shape == (3, 8, 8)


def test_untrained_restoration_answers_with_its_input():
    image = torch.rand(1, 3, 9, 7)
    assert torch.equal(build({"name": "denoising"}).predict(image)["t"], image)


def test_super_resolution_crops_to_a_multiple_and_refuses_too_small():
    task = build({"name": "super_resolution", "scale": 3}).task("t")
    x, target = task.prepare(batch(torch.rand(1, 3, 10, 11)), rngs(1))
    assert x.shape[-2:] == (3, 3)
    assert target["image"].shape[-2:] == (9, 9)
    with pytest.raises(DataError, match="reduced by 3"):
        task.prepare(batch(torch.rand(1, 3, 2, 9)), rngs(1))


def test_colorization_keeps_lightness_and_skips_gray_files():
    model = build({"name": "colorization"})
    task = model.task("t")
    image = torch.rand(1, 3, 16, 16) * 0.2 + 0.4
    lightness = rgb_to_lab(model.predict(image)["t"])[:, 0]
    assert (lightness - rgb_to_lab(image)[:, 0]).abs().max() < 1
    both = batch(torch.rand(2, 3, 4, 4))
    both["gray"][1] = True
    x, target = task.prepare(both, rngs(2))
    terms = task.loss(model({"t": x})["t"], target)
    assert terms["l1"][1].item() == 2 * 4 * 4
    task.update(task.postprocess(model({"t": x})["t"].detach(), x), x, target)
    assert task.metrics.count.item() == 1


def test_gray_model_takes_colour_images():
    denoise = build({"name": "denoising"}, GRAY)
    image = torch.rand(2, 3, 8, 6)
    assert torch.equal(denoise.predict(image)["t"], image)
    sr = build({"name": "super_resolution", "scale": 2}, GRAY)
    assert sr.predict(image)["t"].shape == (2, 3, 16, 12)
    assert sr.predict(image[:, :1])["t"].shape == (2, 1, 16, 12)


def test_tasks_with_the_same_input_share_a_pass():
    tasks = {
        "segmentation": {"name": "segmentation", "source": "s"},
        "again": {"name": "segmentation", "source": "s"},
        "denoising": {"name": "denoising", "source": "s"},
    }
    model = DenseModel.from_config({"backbone": "plain", "tasks": tasks}, {"s": RGB})
    passes = []
    model.backbone.register_forward_hook(lambda *_: passes.append(1))
    data = batch(torch.rand(1, 3, 8, 8)) | {"mask": torch.zeros(1, 8, 8, dtype=torch.long)}
    inputs = {key: model.task(key).prepare(data, rngs(1))[0] for key in tasks}
    model(inputs)
    assert len(passes) == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda levels: levels[-1], "a Tensor"),
        (lambda levels: levels[:-1], "0 levels"),
        (lambda levels: [*levels, levels[-1]], "2 levels"),
        (dict.fromkeys, "a dict"),
    ],
)
def test_a_backbone_that_gives_no_list_of_its_levels_is_refused(monkeypatch, answer, said):
    model = build({"name": "segmentation"}).eval()
    forward = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda x: answer(forward(x)))
    with pytest.raises(PluginError, match=f"Plain gives {said}; expected a list of 1, a tensor for each of its feat"):
        model({"t": torch.rand(3, 3, 8, 8)})
    monkeypatch.setattr(model.backbone, "forward", lambda x: tuple(forward(x)))
    assert model({"t": torch.rand(3, 3, 8, 8)})["t"].shape == (3, 2, 8, 8)


def test_shared_and_own_contexts():
    tasks = {"a": {"name": "denoising", "source": "s"}, "b": {"name": "segmentation", "source": "s"}}
    shared = DenseModel.from_config({"backbone": "plain", "tasks": tasks}, {"s": RGB})
    own = DenseModel.from_config(
        {"backbone": "plain", "context": {"name": "basic", "share": False}, "tasks": tasks}, {"s": RGB}
    )
    assert list(shared.context) == ["shared"]
    assert list(own.context) == ["a", "b"]
    assert own.predict(torch.rand(3, 8, 8))["b"].shape == (2, 8, 8)


def test_zeroed_trunk_leaves_only_the_heads_own_path():
    options = {"ablate": "trunk_zero", "tasks": {"t": {"name": "segmentation", "source": "s"}}}
    model = DenseModel.from_config({"backbone": "plain", **options}, {"s": RGB})
    a, b = (model.predict(torch.rand(3, 8, 8))["t"] for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "segmentation", "classes": 3}, "classes is 3, but source 's' has 2"),
        ({"name": "super_resolution", "scale": 5}, "scale 5"),
        ({"name": "denoising", "sigma": [30, 10]}, "sigma"),
        ({"name": "denoising", "sigma": -1}, "sigma"),
        ({"name": "denoising", "sigma": [0, 50], "head": "linear"}, "or set blind"),
        ({"name": "denoising", "weight": -1}, "weight -1 is not a number from 0 up"),
        ({"name": "denoising", "sigm": 1}, "did you mean 'sigma'"),
        ({"name": "denosing"}, "did you mean 'denoising'"),
        ({"name": "denoising", "source": "x"}, "unknown source 'x'"),
        ({"name": "denoising", "features": []}, "set by densectx"),
        ({"name": "denoising", "head": {"name": "decoder", "widht": 3}}, "did you mean 'width'"),
        ({"name": "segmentation", "head": "upsample"}, "projection.channels to 2"),
    ],
)
def test_impossible_tasks_are_refused(task, message):
    with pytest.raises(ConfigError, match=message):
        build(task)


@final
class Unchecked(Task):
    """Learns from masks and a target, and looks at no source."""

    requires = ("image", "mask", "target")
    prepare = inputs = loss = postprocess = update = draw = None

    def __init__(self, features, in_channels, source: str):
        super().__init__(source, 1.0, channels=3, in_channels=in_channels)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"s": RGB}, r"^model.tasks.t.source: samples of source 's' have no target, .*; name a .* samples do\.$"),
        ({"s": GRAY, "m": RGB, "both": BOTH}, r"source 's' have no mask and no target, .*whose samples do \(both\)\.$"),
    ],
)
def test_a_source_that_never_has_a_tasks_labels_is_refused(sources, message):
    TASKS.register("unchecked")(Unchecked)
    tasks = {"t": {"name": "unchecked", "source": "s"}}
    config = {"backbone": {"name": "plain", "width": 4}, "context": "none", "tasks": tasks}
    try:
        with pytest.raises(ConfigError, match=message):
            DenseModel.from_config(config, sources)
    finally:
        TASKS.unregister("unchecked")


def test_super_resolution_measures_luma():
    with pytest.raises(ConfigError, match="source 's' has 4 channels"):
        build({"name": "super_resolution"}, SourceInfo(channels=4))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"projection": {"chanels": 3}}, "did you mean 'channels'"),
        ({"projection": {"channels": 0}}, "positive"),
        ({"norm": "bach"}, "norm"),
        ({"contxt": "basic"}, "did you mean 'context'"),
    ],
)
def test_impossible_models_are_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        build({"name": "denoising"}, **model)


def test_channel_mismatch_is_refused():
    with pytest.raises(ConfigError, match="backbone takes 5"):
        build({"name": "segmentation"}, backbone={"name": "plain", "in_channels": 5})
    model = build({"name": "segmentation"})
    with pytest.raises(ConfigError, match="5 channels"):
        model.predict(torch.rand(5, 8, 8))
    with pytest.raises(ConfigError, match="not empty"):
        model.predict(torch.rand(3, 0, 8))
