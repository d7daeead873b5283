"""`--tta` and `--batch` of `densectx predict`: against averages written out and against one image at a time."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from densectx.checkpoint import load
from densectx.cli import main
from densectx.data import windowed
from densectx.errors import ConfigError
from densectx.inference.predictor import Predictor
from densectx.inference.tiler import Setting
from densectx.model import DenseModel
from densectx.types import SourceInfo

CPU = torch.device("cpu")


def predict(*arguments):
    return main(["predict", *map(str, arguments)])


def entries(out):
    return json.loads((out / "summary.json").read_text())["inputs"]


def picture(path, seed, shape=(13, 17, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


def turned_average(model, image, key, options):
    """The eight turned and mirrored views, written out."""
    total = 0
    for transpose in (False, True):
        for axes in ((), (-1,), (-2,), (-2, -1)):
            view = image.mT if transpose else image
            answer = model.predict(view.flip(axes), [key], options)[key].flip(axes)
            total = total + (answer.mT if transpose else answer)
    return total / 8


def mirrored_average(model, image, key, options):
    """The picture and its mirror image, written out."""
    answers = (model.predict(view, [key], options)[key] for view in (image, image.flip(-1)))
    return (next(answers) + next(answers).flip(-1)) / 2


def resized_average(model, image, key):
    """The picture and its mirror image at three sizes, written out."""
    height, width = image.shape[-2:]
    total = 0
    for scale in (0.75, 1, 1.25):
        size = (round(height * scale), round(width * scale))
        view = F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        for mirror in (lambda x: x, lambda x: x.flip(-1)):
            answer = mirror(model.predict(mirror(view), [key])[key])
            total = total + F.interpolate(answer[None], (height, width), mode="bilinear", antialias=True)[0]
    return total / 6


@pytest.mark.parametrize("channels", [1, 3])
def test_answers_are_the_averages_of_the_views(every_output, channels):
    model = load(every_output)
    image = torch.rand(channels, 13, 18, generator=torch.Generator().manual_seed(1))
    options = model.resolve(image)
    found = Predictor(model, None, {}, CPU, "32", tta=True)(image)
    assert list(found) == list(model.tasks)
    for key, value in found.items():
        output = model.task(key).output
        if output in ("classes", "labels"):
            expected = resized_average(model, image, key)
        else:  # photographs are upright, and networks that restore them may see them turned nevertheless
            average = turned_average if output == "restored" else mirrored_average
            expected = average(model, image, key, options)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["segmentation"].sum(0), torch.ones(13, 18))


def test_a_network_that_turns_with_its_picture_answers_the_same():
    head = {"name": "decoder", "width": 8, "depth": 1}
    config = {"backbone": {"name": "plain", "width": 8}, "projection": {"channels": 8}, "context": "context7"}
    config["tasks"] = {"denoising": {"name": "denoising", "source": "s", "head": head}}
    model = DenseModel.from_config(config, {"s": SourceInfo(keys=("image",))}).eval()
    for parameter in model.parameters():  # kernels without a direction
        torch.nn.init.normal_(parameter, std=0.1)
        if parameter.ndim == 4:
            parameter.data[:] = parameter.data.mean((2, 3), keepdim=True)
    image = torch.rand(3, 12, 17, generator=torch.Generator().manual_seed(2))
    once, ensemble = (Predictor(model, None, {}, CPU, "32", tta=tta)(image)["denoising"] for tta in (False, True))
    assert not torch.equal(once, image)
    torch.testing.assert_close(ensemble, once, rtol=1e-5, atol=1e-5)


def test_every_view_is_tiled_exactly(every_output):
    model, keys = load(every_output), ["denoising", "super_resolution"]
    image = torch.rand(3, 50, 67, generator=torch.Generator().manual_seed(3))
    options = {"denoising.sigma": 20.0}
    whole, tiled = (
        Predictor(model, keys, options, CPU, "32", setting, tta=True)(image)
        for setting in (Setting("whole"), Setting("exact", 24))
    )
    for key in keys:
        torch.testing.assert_close(tiled[key], whole[key], rtol=1e-5, atol=1e-5)


def test_the_command_averages_and_says_so(tmp_path, every_output):
    picture(tmp_path / "a.png", 0)
    tasks = ("--tasks", "segmentation,super_resolution", "--raw")
    assert predict(every_output, tmp_path / "a.png", "-o", tmp_path / "1", *tasks, "--tta") == 0
    assert json.loads((tmp_path / "1/summary.json").read_text())["options"]["tta"] is True
    model = load(every_output)
    image = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1) / 255
    expected = turned_average(model, image, "super_resolution", {})
    assert np.load(tmp_path / "1/super_resolution/a.npy") == pytest.approx(expected.numpy(), abs=1e-5)
    expected = resized_average(model, image, "segmentation")
    assert np.load(tmp_path / "1/segmentation/a.npy") == pytest.approx(expected.numpy(), abs=1e-5)
    assert predict(every_output, tmp_path / "a.png", "-o", tmp_path / "1", *tasks) == 2, "other options"


def test_a_mosaic_does_not_turn():
    config = {"backbone": {"name": "plain", "width": 8}, "projection": {"channels": 8}, "context": "context7"}
    config["tasks"] = {"demosaicing": {"name": "demosaicing", "source": "s"}}
    model = DenseModel.from_config(config, {"s": SourceInfo(keys=("image",))}).eval()
    with pytest.raises(ConfigError, match=r"--tta: .*'demosaicing' \(a mosaic"):
        Predictor(model, None, {}, CPU, "32", tta=True)


def test_vectors_do_not_turn():
    """Positions would be turned back, components not: those of a picture and its mirror image would cancel."""
    config = {"backbone": {"name": "plain", "width": 8}, "projection": {"channels": 8}, "context": "context7"}
    flow = {"name": "regression", "source": "s", "low": -10.0, "high": 10.0, "outputs": 2}
    info = SourceInfo(keys=("image", "target"), target="map")
    model = DenseModel.from_config({**config, "tasks": {"flow": flow, "depth": {**flow, "outputs": 1}}}, {"s": info})
    with pytest.raises(ConfigError, match=r"--tta: .*'flow' \(.*components of vectors"):
        Predictor(model.eval(), None, {}, CPU, "32", tta=True)
    Predictor(model, ["depth"], {}, CPU, "32", tta=True)


def test_what_is_read_in_parts_is_refused(tmp_path, every_output, capsys, monkeypatch):
    monkeypatch.setattr(windowed, "WINDOWED_FROM", 200)
    for seed, (name, shape) in enumerate({"a.tif": (20, 30, 3), "b.tif": (10, 11, 3)}.items()):
        picture(tmp_path / name, seed, shape)
    arguments = [every_output, tmp_path / "a.tif", tmp_path / "b.tif", "--tasks", "denoising"]
    assert predict(*arguments, "-o", tmp_path / "1", "--tta") == 3
    assert f"{tmp_path / 'a.tif'}: is too large" in capsys.readouterr().err
    assert [entry["status"] for entry in entries(tmp_path / "1")] == ["failed", "done"]
    assert predict(*arguments, "-o", tmp_path / "2") == 0


@pytest.mark.parametrize("options", [[], ["--tta"], ["--tile", "8"]], ids=["whole", "tta", "tiles"])
def test_batches_answer_as_one_image_at_a_time(tmp_path, every_output, options, monkeypatch):
    shapes = [(13, 17, 3)] * 5 + [(13, 17)] * 2 + [(9, 17, 3), (13, 17, 3)]
    for number, shape in enumerate(shapes):
        picture(tmp_path / f"in/{number}.png", number, shape)
    (tmp_path / "in/1.png").write_bytes(b"no picture")
    seen, real = [], DenseModel.predict

    def counted(self, image, *arguments):
        seen.append(len(image) if image.ndim == 4 else 1)
        return real(self, image, *arguments)

    monkeypatch.setattr(DenseModel, "predict", counted)
    for batch in (1, 3):
        seen.clear()
        out = tmp_path / str(batch)
        assert predict(every_output, tmp_path / "in", "-o", out, "--raw", "--batch", batch, *options) == 3
        # 0 | 1 is bad | 2 3 4 | gray 5 6 | 7 | 8
        assert set(seen) == ({1} if batch == 1 or "--tile" in options else {1, 2, 3})
    one, three = (entries(tmp_path / str(batch)) for batch in (1, 3))
    for first, second in zip(one, three, strict=True):
        assert first.pop("estimated", {}) == pytest.approx(second.pop("estimated", {}), rel=1e-5)
        assert first == second
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.npy"))
    assert len(files) == 8 * len(load(every_output).tasks)
    for file in files:
        assert np.load(tmp_path / "3" / file) == pytest.approx(np.load(tmp_path / "1" / file), abs=1e-5)


def test_a_batch_that_does_not_fit_is_taken_one_by_one(tmp_path, every_output, monkeypatch):
    for number in range(4):
        picture(tmp_path / f"in/{number}.png", number)
    real = DenseModel.predict

    def small(self, image, *arguments):
        if image.ndim == 4 and len(image) > 1:
            raise MemoryError
        return real(self, image, *arguments)

    monkeypatch.setattr(DenseModel, "predict", small)
    assert predict(every_output, tmp_path / "in", "-o", tmp_path / "out", "--batch", 4) == 0
    assert [entry["status"] for entry in entries(tmp_path / "out")] == ["done"] * 4
