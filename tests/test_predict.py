"""`densectx predict` and `DenseModel.predict` on small untrained models and generated images."""

import fcntl
import functools
import hashlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import final

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from torch.overrides import TorchFunctionMode
from torchmetrics import MeanSquaredError
from torchvision.io import ImageReadMode, decode_png

import densectx
from densectx.checkpoint import save_safetensors
from densectx.cli import main
from densectx.data.reader import read_image
from densectx.errors import ConfigError
from densectx.inference import files, inputs, predictor
from densectx.inference.command import progress_line
from densectx.inference.overlay import overlay, overlay_labels
from densectx.inference.rasters import png16
from densectx.inference.record import JOURNAL
from densectx.inference.writers import Answer, encoders
from densectx.losses import Criterion
from densectx.model import DenseModel
from densectx.nn import modes
from densectx.nn.colour import grey
from densectx.nn.modes import evaluating
from densectx.registry import HEADS, TASKS
from densectx.tasks.base import Task
from densectx.types import Score, SourceInfo

PALETTE = ((10, 20, 30), (200, 0, 0), (0, 200, 0))
INFO = SourceInfo(classes=("sky", "road", "tree"), palette=PALETTE, keys=("image", "mask"))
HEAD = {"name": "decoder", "width": 8, "depth": 1}
SPECS = {
    "segmentation": {"name": "segmentation", "source": "photos"},
    "denoising": {"name": "denoising", "source": "photos", "head": HEAD},
    "sr": {"name": "super_resolution", "source": "photos", "scale": 2, "head": HEAD},
    "colorization": {"name": "colorization", "source": "photos", "head": HEAD},
}


def build(keys=("segmentation", "denoising"), channels=3, seed=0, **options):
    torch.manual_seed(seed)
    tasks = {key: {**SPECS.get(key, {}), **options.get(key, {})} for key in keys}
    backbone = {"name": "plain", "width": 8, "in_channels": channels}
    context = {"name": "context7"}
    config = {"backbone": backbone, "projection": {"channels": 8}, "context": context, "tasks": tasks}
    info = SourceInfo(channels, INFO.classes, PALETTE, keys=INFO.keys)
    model = DenseModel.from_config(config, {"photos": info})
    for parameter in model.parameters():  # residual heads start at zero: their answer would be the input
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_safetensors(build(), path)
    return path


def saved(tmp_path, *arguments, **options):
    path = tmp_path / "other.safetensors"
    save_safetensors(build(*arguments, **options), path)
    return path


def pixels(seed=0, shape=(13, 17, 3), dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def picture(path, seed=0, shape=(13, 17, 3), dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pixels(seed, shape, dtype)
    if dtype == np.uint16:
        path.write_bytes(png16(data))
    else:
        Image.fromarray(data).save(path)
    return data


def predict(*arguments):
    return main(["predict", *map(str, arguments)])


def summary(out):
    return json.loads((out / "summary.json").read_text())


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(out):
    return sorted(name for name in tree(out) if name != "summary.json")


# ---- DenseModel.predict


def test_predict_leaves_every_part_in_its_mode():
    model = build().train()
    model.backbone.eval()  # as a frozen part is held
    before = {name: part.training for name, part in model.named_modules()}
    model.predict(torch.rand(3, 20, 20))
    assert {name: part.training for name, part in model.named_modules()} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have():
    model, held, done = build(), threading.Event(), threading.Event()

    def hold():
        with evaluating(model), modes._making:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with warnings.catch_warnings(action="ignore"):  # of a fork beside threads
        child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        try:
            with evaluating(model):
                os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    done.set()
    thread.join()
    assert status == 0


@pytest.mark.fault("N08")
@pytest.mark.parametrize("channels", [1, 3])
def test_predict_takes_uint8_and_float_batch_and_single(channels):
    model = build(list(SPECS))
    image = torch.from_numpy(pixels(1, (2, channels, 9, 11)))
    batch = model.predict(image)
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "segmentation": (2, 3, 9, 11),
        "denoising": (2, 3, 9, 11),
        "sr": (2, 3, 18, 22),
        "colorization": (2, 3, 9, 11),
    }
    single = [model.predict(one) for one in image]
    as_float = model.predict(image.float() / 255)
    as_double = model.predict(image.double() / 255)
    for key, value in batch.items():
        assert value.dtype == torch.float32
        assert value.device == image.device
        assert torch.equal(value, as_float[key])
        torch.testing.assert_close(value, as_double[key])
        torch.testing.assert_close(value, torch.stack([one[key] for one in single]))
    torch.testing.assert_close(batch["segmentation"].sum(1), torch.ones(2, 9, 11))


def test_gray_equals_its_three_copies_and_half_precision_comes_back_as_float():
    model = build(list(SPECS))
    gray = torch.rand(1, 8, 9, generator=torch.Generator().manual_seed(0))
    for key, value in model.predict(gray).items():
        assert torch.equal(value, model.predict(gray.expand(3, -1, -1), [key])[key])
    assert model.predict(gray.half(), ["denoising"])["denoising"].dtype == torch.float32


def test_a_gray_model_takes_every_channel_of_colour_by_itself():
    model = build(["denoising"], channels=1)
    image = torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(0))
    whole = model.predict(image)["denoising"]
    assert whole.shape == image.shape
    torch.testing.assert_close(whole, torch.cat([model.predict(c[None])["denoising"] for c in image]))


@pytest.mark.parametrize(
    "options", [{"name": "super_resolution", "scale": s} for s in (2, 3)] + [{"name": "jpeg_deblocking"}]
)
def test_bf16_is_for_the_network_not_for_the_colours_around_it(options):
    model = build(["luma"], channels=1, luma={"source": "photos", "head": HEAD, **options})
    for parameter in model.task("luma").head.parameters():
        torch.nn.init.zeros_(parameter)  # the answer is the input, without its error of bf16
    image = torch.rand(3, 24, 30, generator=torch.Generator().manual_seed(0))
    exact = model.predict(image)["luma"]
    with torch.autocast("cpu", torch.bfloat16):
        half = model.predict(image)["luma"]
    assert torch.equal(half, exact)


def test_predict_leaves_mode_and_image_alone():
    model, image = build().train(), torch.rand(3, 8, 8)
    before = image.clone()
    model.predict(image)
    assert model.training
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("image", "tasks", "options", "message"),
    [
        (torch.rand(3, 8, 8), ["denoisng"], None, "did you mean 'denoising'"),
        (torch.rand(3, 8, 8), None, {"denoising.sigma": 3}, "unknown option 'denoising.sigma'"),
        (torch.rand(2, 8, 8), None, None, "2 channels"),
        (torch.rand(8, 8), None, None, "shape"),
        (torch.rand(3, 0, 8), None, None, "not empty"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), None, None, "int64"),
    ],
)
def test_predict_refuses(image, tasks, options, message):
    with pytest.raises(ConfigError, match=message):
        build().predict(image, tasks, options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_refused(dtype):
    model, image = build(), torch.rand(3, 8, 8)
    expected = model.predict(image)["denoising"]
    with pytest.raises(ConfigError, match=rf"weights are {dtype}, and predict needs them in float32.*torch\.autocast"):
        model.to(dtype).predict(image)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.float().predict(image)["denoising"], expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("wrong", ["25", True, [25.0]])
def test_an_option_that_is_no_number_is_refused(wrong):
    model, image = build(["denoising"], denoising={"sigma": [0, 50]}), torch.rand(3, 8, 8)
    with pytest.raises(ConfigError, match=rf"option denoising\.sigma: {re.escape(repr(wrong))} is no number"):
        model.predict(image, options={"denoising.sigma": wrong})
    given = model.predict(image, options={"denoising.sigma": np.float32(25)})
    assert torch.equal(given["denoising"], model.predict(image, options={"denoising.sigma": 25})["denoising"])


def test_nothing_float64_is_moved_to_a_device():
    """MPS has no such numbers; metrics count in them."""
    moved = []

    class Moves(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.to:
                moved.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    model = build(SPECS)
    metrics = [model.task(key).metrics for key in SPECS]
    with Moves():
        predictor._moved(model, torch.device("meta"))
    assert {*moved} == {torch.float32}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert [model.task(key).metrics for key in SPECS] == metrics
    assert {state.device.type for metric in metrics for state in metric.metric_state.values()} == {"cpu"}


def test_load_gives_the_same_model(model):
    loaded, image = densectx.load(model), torch.rand(3, 8, 8)
    for key, value in build().predict(image).items():
        assert torch.equal(value, loaded.predict(image)[key])


# ---- files


def test_raw_is_what_predict_returns_and_the_pictures_follow_from_it(tmp_path, model):
    data = picture(tmp_path / "a.png")
    assert predict(model, tmp_path / "a.png", "-o", tmp_path / "out", "--raw") == 0
    answers = densectx.load(model).predict(torch.from_numpy(data).permute(2, 0, 1))
    for key, value in answers.items():
        raw = np.load(tmp_path / "out" / key / "a.npy")
        assert raw.dtype == np.float32
        assert raw.tobytes() == value.numpy().tobytes()
    classes = Image.open(tmp_path / "out/segmentation/a.png")
    assert classes.mode == "P"
    assert np.array_equal(np.asarray(classes), answers["segmentation"].argmax(0).numpy())
    assert tuple(classes.getpalette()[:9]) == sum(PALETTE, ())
    restored = np.asarray(Image.open(tmp_path / "out/denoising/a.png"))
    expected = np.rint(np.clip(answers["denoising"].numpy(), 0, 1) * np.float32(255)).transpose(1, 2, 0)
    assert np.array_equal(restored, expected)
    sheet = Image.open(tmp_path / "out/segmentation/a.overlay.png")
    assert sheet.mode == "RGB"
    assert sheet.width >= 17
    assert sheet.height > 13
    assert names(tmp_path / "out") == [
        "denoising/a.npy",
        "denoising/a.png",
        "segmentation/a.npy",
        "segmentation/a.overlay.png",
        "segmentation/a.png",
    ]


def test_the_summary(tmp_path, model, capsys):
    picture(tmp_path / "a.png")
    assert predict(model, tmp_path / "a.png", "-o", tmp_path / "out", "--tasks", "denoising", "--json") == 0
    printed = capsys.readouterr().out
    found = summary(tmp_path / "out")
    assert json.loads(printed) == found
    assert found["format"] == 1
    assert found["model"] == {"path": str(model), "sha256": hashlib.sha256(model.read_bytes()).hexdigest()}
    assert found["options"] == {"tasks": ["denoising"], "set": {}, "tile": "auto", "raw": False, "precision": "32"}
    status = (tmp_path / "a.png").stat()
    assert found["inputs"] == [
        {
            "path": str(tmp_path / "a.png"),
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest(),
            "outputs": ["denoising/a.png"],
            "status": "done",
            "error": None,
        }
    ]


@pytest.mark.fault("F08")
@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_depth_and_gray_follow_the_input(tmp_path, shape, dtype):
    path = tmp_path / "plain.safetensors"
    residual = build(["denoising", "colorization"])
    residual.task("denoising").head.exit.weight.data.zero_()  # answers with its input
    residual.task("denoising").head.exit.bias.data.zero_()
    save_safetensors(residual, path)
    data = picture(tmp_path / "a.png", 3, shape, dtype)
    assert predict(path, tmp_path / "a.png", "-o", tmp_path / "out") == 0
    encoded = (tmp_path / "out/denoising/a.png").read_bytes()
    decoded = decode_png(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.UNCHANGED).numpy()
    assert decoded.dtype == dtype
    assert np.array_equal(decoded.transpose(1, 2, 0).reshape(shape), data)
    again, gray = read_image(tmp_path / "out/denoising/a.png")
    assert gray == (len(shape) == 2)
    assert torch.equal(again, read_image(tmp_path / "a.png")[0])
    assert not read_image(tmp_path / "out/colorization/a.png")[1]


def test_orientation_profile_and_transparency(tmp_path):
    path = tmp_path / "plain.safetensors"
    model = build(["denoising"])
    model.task("denoising").head.exit.weight.data.zero_()  # answers with its input
    model.task("denoising").head.exit.bias.data.zero_()
    save_safetensors(model, path)
    exif = Image.Exif()
    exif[274] = 6  # turned clockwise to be upright
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    data = pixels(4, (7, 9, 4))
    Image.fromarray(data[..., :3]).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(data[..., :3]).save(tmp_path / "profile.png", icc_profile=profile)
    Image.fromarray(data).save(tmp_path / "clear.png")
    alpha = data[..., 3:] / 255
    expected = {
        "turned": np.rot90(data[..., :3], -1),
        "profile": data[..., :3],
        "clear": np.rint(data[..., :3] * alpha + 255 * (1 - alpha)),
    }
    files = [tmp_path / f"{name}.png" for name in expected]
    assert predict(path, *files, "-o", tmp_path / "out") == 0
    for name, values in expected.items():
        image = Image.open(tmp_path / f"out/denoising/{name}.png")
        assert (image.mode, image.info, dict(image.getexif())) == ("RGB", {}, {})
        assert np.abs(np.asarray(image).astype(float) - values).max() <= (name == "clear"), name


@pytest.mark.fault("F08")
def test_16_bit_tiff_and_jpeg(tmp_path):
    model = saved(tmp_path, ["sr"])
    Image.fromarray(pixels(1, (6, 5), np.uint16)).save(tmp_path / "deep.tif")
    Image.fromarray(pixels(2, (6, 5, 3))).save(tmp_path / "shallow.jpg")
    assert predict(model, tmp_path / "deep.tif", tmp_path / "shallow.jpg", "-o", tmp_path / "out") == 0
    for name, mode in (("deep", "I;16"), ("shallow", "RGB")):
        image = Image.open(tmp_path / f"out/sr/{name}.png")
        assert (image.mode, image.size) == (mode, (10, 12))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 99), st.sampled_from([1, 7, 1 << 30]))
def test_png16_reads_back(height, width, colour, seed, most):
    data = pixels(seed, (height, width, 3) if colour else (height, width), np.uint16)
    file = png16(data, most)
    assert (file.count(b"IDAT") > 1) == (most < 1 << 30)
    found = decode_png(torch.frombuffer(bytearray(file), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    assert np.array_equal(found.numpy().transpose(1, 2, 0).reshape(data.shape), data)


def test_classes_without_a_palette_get_the_one_of_voc(tmp_path):
    info = SourceInfo(classes=("a", "b"), keys=("image", "mask"))
    config = {"backbone": {"name": "plain", "width": 4}, "projection": {"channels": 4}, "context": "context7"}
    config["tasks"] = {"segmentation": {"name": "segmentation", "source": "s"}}
    save_safetensors(DenseModel.from_config(config, {"s": info}), tmp_path / "m.safetensors")
    picture(tmp_path / "a.png")
    assert predict(tmp_path / "m.safetensors", tmp_path / "a.png", "-o", tmp_path / "out") == 0
    assert Image.open(tmp_path / "out/segmentation/a.png").getpalette()[:6] == [0, 0, 0, 128, 0, 0]


def test_the_legend_holds_the_classes_that_occur():
    photograph, ids = np.full((60, 200, 3), 128, np.uint8), np.zeros((60, 200), np.uint8)
    ids[:, 120:] = 2
    sheet = np.asarray(overlay(photograph, ids, INFO.classes, PALETTE))
    legend = sheet[60:].reshape(-1, 3)
    found = [bool((legend == colour).all(1).any()) for colour in PALETTE]
    assert found == [True, False, True]
    picture, colours = sheet[:60].astype(float), np.asarray(PALETTE, float)
    assert abs(picture[30, 10] - colours[0]).sum() < abs(picture[30, 150] - colours[0]).sum()
    assert (sheet[30, 119] > sheet[30, 60]).all()  # the outline


def test_the_legend_numbers_classes_that_its_font_cannot_name():
    photograph, ids = np.full((60, 200, 3), 128, np.uint8), np.ones((60, 200), np.uint8)
    numbered = overlay(photograph, ids, ("sky", "1", "tree"), PALETTE)
    assert np.array_equal(overlay(photograph, ids, ("sky", "дорога", "tree"), PALETTE), numbered)


def test_files_of_other_kinds_and_names_that_cannot_be_drawn_are_told(tmp_path, capsys):
    path = labels_model(tmp_path / "m.safetensors", names=("car", "дорога"))
    picture(tmp_path / "in/a.png")
    for name in ("b.gif", "deeper/c.GIF", "d", ".hidden.txt"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).touch()
    for _ in range(2):  # outputs are no inputs
        assert predict(path, tmp_path / "in", "-o", tmp_path / "in/out") == 0
        told = capsys.readouterr().err
        assert "3 files with other extensions are left out (.gif, none)." in told
        assert "letters of classes, whose numbers stand there: 1 дорога." in told


def labels_model(path, names=("car", "wet road")):
    info = SourceInfo(classes=names, keys=("image", "target"), target="labels")
    config = {"backbone": {"name": "plain", "width": 8}, "projection": {"channels": 8}, "context": "context7"}
    config["tasks"] = {"s": {"name": "segmentation", "mode": "multilabel", "source": "s"}}
    torch.manual_seed(0)
    model = DenseModel.from_config(config, {"s": info})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_safetensors(model, path)
    return path


def test_labels_are_a_two_level_file_each(tmp_path):
    path = labels_model(tmp_path / "m.safetensors")
    picture(tmp_path / "a.png")
    assert predict(path, tmp_path / "a.png", "-o", tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["s/a.car.png", "s/a.overlay.png", "s/a.wet_road.png"]
    answer = densectx.load(path).predict(read_image(tmp_path / "a.png")[0])["s"]
    for label, name in enumerate(("car", "wet_road")):
        image = Image.open(tmp_path / f"out/s/a.{name}.png")
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), (answer[label] >= 0.5).numpy() * np.uint8(255))


@pytest.mark.fault("F09")
def test_a_palette_of_other_classes_is_refused(tmp_path, capsys):
    model = build(["segmentation"])
    model.config["sources"]["photos"]["palette"] = [[0, 0, 0], [255, 0, 0]]
    save_safetensors(model, tmp_path / "m.safetensors")
    picture(tmp_path / "a.png")
    assert predict(tmp_path / "m.safetensors", tmp_path / "a.png", "-o", tmp_path / "out") in (2, 4)
    assert "2 colours for 3 classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("clash", [("a b", "a.b"), ("Car", "car"), ("x", "Overlay"), ("\u00e9", "e\u0301")])
def test_labels_with_one_file_name_are_refused(tmp_path, capsys, clash):
    path = labels_model(tmp_path / "m.safetensors", clash)
    picture(tmp_path / "a.png")
    assert predict(path, tmp_path / "a.png", "-o", tmp_path / "out") == 2
    assert "same file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_overlay_of_labels_mixes_where_several_hold():
    photograph = np.full((40, 60, 3), 128, np.uint8)
    labels = np.zeros((3, 40, 60), bool)
    labels[0, :20], labels[1, :, :30] = True, True
    sheet = np.asarray(overlay_labels(photograph, labels, INFO.classes, PALETTE)).astype(int)
    first, second, both, none = sheet[5, 45], sheet[30, 5], sheet[5, 5], sheet[30, 45]
    assert np.abs(both - (first + second) / 2).max() <= 1
    assert len(set(none)) == 1, "the photograph itself where none holds"
    legend = sheet[40:].reshape(-1, 3)
    assert [bool((legend == colour).all(1).any()) for colour in PALETTE] == [True, True, False]
    empty = overlay_labels(photograph, labels & False, INFO.classes, PALETTE)
    assert empty.height > 40


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["denoising", "colorization"])
def test_pictures_of_floats_are_floats(tmp_path, kind, channels):
    task = build([kind]).task(kind)
    (encoder,) = encoders(task, INFO, (3, 8, 8), raw=False, real=True).items()
    value = torch.randn(3, 6, 7)
    (tmp_path / "a.tif").write_bytes(encoder[1](Answer(torch.rand(channels, 6, 7), False, value)))
    assert encoder[0] == ".tif"
    gray = kind == "denoising" and channels == 1
    expected = grey(value[None])[0, 0] if gray else value.permute(1, 2, 0)
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), expected)


def test_float_files_give_float_files(tmp_path):
    path = tmp_path / "m.safetensors"
    model = build(["denoising", "segmentation"])
    model.task("denoising").head.exit.weight.data.zero_()  # answers with its input
    model.task("denoising").head.exit.bias.data.zero_()
    save_safetensors(model, path)
    values = np.random.default_rng(0).random((9, 11, 3), np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    tifffile.imwrite(tmp_path / "b.tif", values[..., 0])
    picture(tmp_path / "c.png")
    assert predict(path, *(tmp_path / name for name in ("a.tif", "b.tif", "c.png")), "-o", tmp_path / "out") == 0
    assert [name for name in names(tmp_path / "out") if "denoising" in name] == [
        f"denoising/{name}" for name in ("a.tif", "b.tif", "c.png")
    ]
    assert tifffile.imread(tmp_path / "out/denoising/a.tif") == pytest.approx(values, abs=1e-6)
    assert tifffile.imread(tmp_path / "out/denoising/b.tif") == pytest.approx(values[..., 0], abs=1e-6)
    assert "segmentation/a.png" in names(tmp_path / "out")


@final
class Counts(Task):
    """A task of a plug-in: any number of channels."""

    score = Score("mse", "mse")

    def __init__(self, features, in_channels, info, source, count=2):
        super().__init__(source, 1.0, channels=3, in_channels=in_channels)
        self.head = HEADS.build("linear", features=features, out_channels=count, scale=1)
        self.metrics, self.criterion = MeanSquaredError(), Criterion("l1")

    def prepare(self, batch, rngs):
        return batch["image"], {}

    def inputs(self, image, options):
        return image

    def loss(self, output, target):
        return {}

    def postprocess(self, output, x):
        return output

    def update(self, prediction, x, target):
        pass

    def draw(self, prediction, x, target):
        return []


def test_tasks_of_plug_ins_are_pictures_or_numbers(tmp_path):
    TASKS.register("counts")(Counts)
    try:
        picture(tmp_path / "a.png", shape=(6, 7))
        for count in (1, 2, 3):
            path = tmp_path / f"{count}.safetensors"
            config = {"backbone": {"name": "plain", "width": 4}, "projection": {"channels": 4}, "context": "context7"}
            config["tasks"] = {"counts": {"name": "counts", "source": "photos", "count": count}}
            save_safetensors(DenseModel.from_config(config, {"photos": INFO}), path)
            assert predict(path, tmp_path / "a.png", "-o", tmp_path / str(count)) == 0
            if count == 2:
                assert names(tmp_path / "2") == ["counts/a.tif"]
                answer = densectx.load(path).predict(read_image(tmp_path / "a.png", 1)[0])["counts"]
                assert np.array_equal(tifffile.imread(tmp_path / "2/counts/a.tif"), answer)
            else:
                assert Image.open(tmp_path / f"{count}/counts/a.png").mode == ("L" if count == 1 else "RGB")
    finally:
        TASKS.unregister("counts")


def test_conditioned_denoising_takes_its_level(tmp_path, capsys):
    model = saved(tmp_path, ["denoising"], denoising={"sigma": [0, 55]})
    picture(tmp_path / "a.png")
    assert predict(model, tmp_path / "a.png", "-o", tmp_path / "out", "--set", "denoising.sigma=300") == 2
    assert "--set denoising.sigma=25" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert predict(model, tmp_path / "a.png", "-o", tmp_path / "out", "--raw", "--set", "denoising.sigma=25") == 0
    answer = densectx.load(model).predict(read_image(tmp_path / "a.png")[0], options={"denoising.sigma": 25.0})
    assert np.array_equal(np.load(tmp_path / "out/denoising/a.npy"), answer["denoising"].numpy())


@pytest.mark.fault("N08")
def test_bf16_is_close_to_32(tmp_path, model):
    picture(tmp_path / "a.png")
    for precision in ("32", "bf16"):
        out = tmp_path / precision
        assert predict(model, tmp_path / "a.png", "-o", out, "--raw", "--precision", precision) == 0
    full, half = (np.load(tmp_path / p / "segmentation/a.npy") for p in ("32", "bf16"))
    assert half.dtype == np.float32
    assert not np.array_equal(full, half)
    assert np.abs(full - half).max() < 2e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_close_to_cpu(tmp_path, model):
    picture(tmp_path / "a.png")
    for device in ("cpu", "auto"):
        assert predict(model, tmp_path / "a.png", "-o", tmp_path / device, "--raw", "--device", device) == 0
    assert summary(tmp_path / "auto")["device"] == "cuda"
    cpu, cuda = (np.load(tmp_path / d / "segmentation/a.npy") for d in ("cpu", "auto"))
    assert np.abs(cpu - cuda).max() < 1e-2  # convolutions may run in TF32


# ---- which inputs, and where


def test_folders_globs_lists_and_files(tmp_path, model, monkeypatch):
    for name in ("in/a.png", "in/b/c.JPG", "in/b/d.webp", "in/.hidden/x.png", "in/.x.png", "single.bmp", "[odd] n.png"):
        picture(tmp_path / name)
    (tmp_path / "in/readme.txt").write_text("no image")
    tasks = ("--tasks", "denoising")
    assert predict(model, tmp_path / "in", tmp_path / "single.bmp", "-o", tmp_path / "1", *tasks) == 0
    assert names(tmp_path / "1") == [f"denoising/{n}.png" for n in ("a", "b/c", "b/d", "single")]
    assert predict(model, f"{tmp_path}/in/**/*", "-o", tmp_path / "2", *tasks) == 0
    assert names(tmp_path / "2") == [f"denoising/{n}.png" for n in ("a", "b/c", "b/d")]
    lines = f"{tmp_path}/in/b\r\n\n{tmp_path}/[odd] n.png\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert predict(model, "-", "-o", tmp_path / "3", *tasks) == 0
    assert names(tmp_path / "3") == [f"denoising/{n}.png" for n in ("[odd] n", "c", "d")]
    assert predict(model, tmp_path / "[odd] n.png", "-o", tmp_path / "4", *tasks) == 0  # a name, no pattern


def test_options_may_stand_between_inputs(tmp_path, model):
    picture(tmp_path / "a.png")
    picture(tmp_path / "-b.png")
    code = predict("--tasks=denoising", model, tmp_path / "a.png", "-o", tmp_path / "out", "--", tmp_path / "-b.png")
    assert code == 0
    assert names(tmp_path / "out") == ["denoising/-b.png", "denoising/a.png"]


def test_clashing_stems_keep_their_extension(tmp_path, model):
    for name in ("a.png", "a.bmp", "b.png", "b.overlay.png", "a.png.png"):
        picture(tmp_path / "in" / name)
    assert predict(model, tmp_path / "in", "-o", tmp_path / "out", "--tasks", "segmentation") == 0
    stems = ["a.bmp", "a.png", "a.png.png", "b.overlay.png", "b.png"]
    assert names(tmp_path / "out") == sorted(f"segmentation/{s}{e}.png" for s in stems for e in ("", ".overlay"))


def test_equal_names_from_two_places_are_refused(tmp_path, model, capsys):
    for name in ("x/a.png", "y/a.png"):
        picture(tmp_path / name)
    assert predict(model, tmp_path / "x/a.png", tmp_path / "y/a.png", "-o", tmp_path / "out") == 2
    assert "name their common folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    picture(tmp_path / "x/a.png")
    assert predict(model, tmp_path / "x/a.png", tmp_path / "x", "-o", tmp_path / "out") == 0  # the same file twice
    assert len(summary(tmp_path / "out")["inputs"]) == 1


NAME = st.text(st.sampled_from("ab.\\ \n'\"%é☃$;[*"), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(NAME, max_size=2), NAME, st.sampled_from([".png", ".jpg", ""])), max_size=8))
def test_outputs_are_apart_and_below_the_folder(places):
    found = []
    for folders, stem, suffix in places:
        parts = [part for part in (*folders, stem + suffix) if part not in (".", "..")]
        if parts:
            found.append(inputs.Input(Path("in", *parts), inputs.PurePosixPath(*parts)))
    found = list({image.path: image for image in found}.values())
    try:
        jobs = inputs.plan(found, lambda path: {"t": [".png", ".overlay.png"], "u": [".npy"]})
    except ConfigError:
        return  # a folder named as an output of a file beside it
    outputs = [name for job in jobs for name in job.outputs.values()]
    assert len(set(outputs)) == len(outputs) == 3 * len(found)
    for name in outputs:
        assert os.path.normpath(name) == name
        assert name.split("/")[0] in ("t", "u")


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_odd_names(tmp_path, model):
    odd = [b"..png", b"...png", b"a\nb.png", b"\xff\xfe.png", "é☃.png".encode(), b"-o.png", b"a;rm -rf $HOME.png"]
    for number, name in enumerate(odd):
        picture(tmp_path / "here" / f"{number}.png", number)
        (tmp_path / "here" / f"{number}.png").rename(tmp_path / "here" / os.fsdecode(name))
    arguments = [tmp_path / "here" / os.fsdecode(name) for name in odd]
    assert predict(model, *arguments, "-o", tmp_path / "out", "--tasks", "denoising") == 0
    assert sorted(os.fsencode(p.name) for p in (tmp_path / "out/denoising").iterdir()) == sorted(odd)
    assert len(summary(tmp_path / "out")["inputs"]) == len(odd)
    assert predict(model, *arguments, "-o", tmp_path / "out", "--tasks", "denoising") == 0
    assert {entry["status"] for entry in summary(tmp_path / "out")["inputs"]} == {"skipped"}


@pytest.mark.fault("F04")
def test_the_output_folder_inside_an_input_folder(tmp_path, model, capsys):
    picture(tmp_path / "in/a.png")
    for status in ("done", "skipped"):
        assert predict(model, tmp_path / "in", "-o", tmp_path / "in/out") == 0
        assert [e["status"] for e in summary(tmp_path / "in/out")["inputs"]] == [status]
    assert "3 images of the output folder" in capsys.readouterr().err
    assert predict(model, tmp_path / "in", "-o", tmp_path / "in") == 2
    before = (tmp_path / "in/a.png").read_bytes()
    for _ in range(2):
        assert predict(model, tmp_path / "in/a.png", "-o", tmp_path / "in", "--overwrite") == 0
    assert (tmp_path / "in/a.png").read_bytes() == before


# ---- existing outputs


@pytest.mark.fault("F04")
def test_done_is_skipped_and_anything_else_refused(tmp_path, model, capsys):
    for number in range(3):
        picture(tmp_path / f"in/{number}.png", number)
    run = functools.partial(predict, model, tmp_path / "in", "-o", tmp_path / "out")
    assert run() == 0
    first = tree(tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}
    assert run() == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")} == times
    assert [e["status"] for e in summary(tmp_path / "out")["inputs"]] == ["skipped"] * 3

    (tmp_path / "out/denoising/1.png").unlink()  # one lacks: made again
    assert run() == 0
    assert [e["status"] for e in summary(tmp_path / "out")["inputs"]] == ["skipped", "done", "skipped"]
    assert names(tmp_path / "out") == [name for name in first if name != "summary.json"]

    before = tree(tmp_path / "out")
    for changed in (("--raw",), ("--precision", "bf16"), ("--tasks", "denoising")):
        capsys.readouterr()
        assert run(*changed) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert tree(tmp_path / "out") == before
    status = (tmp_path / "in/2.png").stat()
    os.utime(tmp_path / "in/2.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert run() == 0  # as after a copy: the same content
    entries = summary(tmp_path / "out")["inputs"]
    assert [e["status"] for e in entries] == ["skipped"] * 3
    assert entries[2]["mtime_ns"] == status.st_mtime_ns + 1
    assert run("--overwrite") == 0
    assert [e["status"] for e in summary(tmp_path / "out")["inputs"]] == ["done"] * 3
    other = saved(tmp_path, seed=7)
    assert predict(other, tmp_path / "in", "-o", tmp_path / "out") == 2
    assert "another model" in capsys.readouterr().err
    data = bytearray((tmp_path / "in/0.png").read_bytes())
    (tmp_path / "in/0.png").write_bytes(data + b"\0")
    capsys.readouterr()
    assert run() == 2
    assert "0.png" in capsys.readouterr().err
    for output in list((tmp_path / "out").rglob("0.*")):
        output.unlink()
    assert run() == 0  # the way that the message names
    assert [e["status"] for e in summary(tmp_path / "out")["inputs"]] == ["done", "skipped", "skipped"]


@pytest.mark.fault("F04")
def test_a_folder_of_unknown_outputs(tmp_path, model):
    picture(tmp_path / "a.png")
    picture(tmp_path / "out/denoising/a.png", 9)
    before = tree(tmp_path / "out")
    assert predict(model, tmp_path / "a.png", "-o", tmp_path / "out") == 2
    assert tree(tmp_path / "out") == before
    (tmp_path / "out/summary.json").write_text("[1]")
    assert predict(model, tmp_path / "a.png", "-o", tmp_path / "out") == 2
    assert predict(model, tmp_path / "a.png", "-o", tmp_path / "out", "--overwrite") == 0
    assert tree(tmp_path / "out")["denoising/a.png"] != before["denoising/a.png"]


def test_runs_on_other_inputs_are_remembered(tmp_path, model):
    for name in "abc":
        picture(tmp_path / f"{name}.png", ord(name))
        assert predict(model, tmp_path / f"{name}.png", "-o", tmp_path / "out") == 0
    assert [e["outputs"][0] for e in summary(tmp_path / "out")["inputs"]] == ["segmentation/c.png"]
    assert predict(model, *(tmp_path / f"{n}.png" for n in "abc"), "-o", tmp_path / "out") == 0
    assert [e["status"] for e in summary(tmp_path / "out")["inputs"]] == ["skipped"] * 3


# ---- what goes wrong


@pytest.mark.fault("F01")
def test_bad_files_are_reported_and_the_rest_is_done(tmp_path, model, capsys, monkeypatch):
    for number in range(3):
        picture(tmp_path / f"in/{number}.png", number)
    whole = (tmp_path / "in/1.png").read_bytes()
    (tmp_path / "in/1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\0b.png\n")))
    bad = [tmp_path / "in/1.png", tmp_path / "gone.png", tmp_path / "empty", tmp_path / "pipe.png", tmp_path / "*.gif"]
    assert predict(model, tmp_path / "in", *bad, "-", "-o", tmp_path / "out", "--json") == 3
    printed = capsys.readouterr()
    entries = json.loads(printed.out)["inputs"]
    assert sorted(e["path"] for e in entries if e["status"] == "failed") == sorted(["a\0b.png", *map(str, bad)])
    for entry in entries:
        assert bool(entry["error"]) == (entry["status"] == "failed")
        assert entry["error"] is None or entry["error"] in printed.err
        assert entry["error"] is None or entry["path"] in entry["error"] or "\0" in entry["path"]
    assert names(tmp_path / "out") == sorted(
        f"{task}/{n}{suffix}"
        for task, suffixes in (("denoising", [".png"]), ("segmentation", [".png", ".overlay.png"]))
        for n in (0, 2)
        for suffix in suffixes
    )
    (tmp_path / "in/1.png").write_bytes(whole)
    assert predict(model, tmp_path / "in", "-o", tmp_path / "out") == 0
    assert [e["status"] for e in summary(tmp_path / "out")["inputs"]] == ["skipped", "done", "skipped"]


@pytest.mark.fault("F01")
def test_one_bad_file_among_a_hundred(tmp_path, model, capsys):
    for number in range(100):
        picture(tmp_path / f"in/{number:02}.png", number, (8, 8, 3))
    whole = (tmp_path / "in/41.png").read_bytes()
    (tmp_path / "in/41.png").write_bytes(whole[: len(whole) // 2])
    assert predict(model, tmp_path / "in", "-o", tmp_path / "out", "--tasks", "denoising", "--batch", 7) == 3
    found = summary(tmp_path / "out")["inputs"]
    assert [Path(entry["path"]).name for entry in found] == [f"{number:02}.png" for number in range(100)]
    assert [number for number, entry in enumerate(found) if entry["status"] != "done"] == [41]
    assert names(tmp_path / "out") == [f"denoising/{number:02}.png" for number in range(100) if number != 41]
    assert capsys.readouterr().err.count("41.png") == 1


def test_a_picture_of_one_cell_passes_narrow_group_norms(tmp_path):
    torch.manual_seed(0)
    parts = {"context": {"name": "context7", "norm": "group"}, "projection": {"channels": 8}}
    backbone = {"name": "plain", "width": 8, "unshuffle": 8}
    config = {"backbone": backbone, "tasks": {"segmentation": SPECS["segmentation"]}, **parts}
    save_safetensors(DenseModel.from_config(config, {"photos": INFO}), tmp_path / "m.safetensors")
    for name, side in {"a": 17, "b": 8, "c": 17}.items():
        picture(tmp_path / f"in/{name}.png", shape=(side, side, 3))
    assert predict(tmp_path / "m.safetensors", tmp_path / "in", "-o", tmp_path / "out") == 0
    assert [entry["status"] for entry in summary(tmp_path / "out")["inputs"]] == ["done"] * 3


def test_a_gray_model_of_classes_sees_the_gray_version_of_colour(tmp_path):
    model = saved(tmp_path, ["segmentation"], channels=1)
    picture(tmp_path / "colour.png")
    picture(tmp_path / "gray.png", shape=(9, 8))
    assert predict(model, tmp_path / "colour.png", tmp_path / "gray.png", "-o", tmp_path / "out") == 0
    pictures = [f"segmentation/{stem}{end}" for stem in ("colour", "gray") for end in (".overlay.png", ".png")]
    assert names(tmp_path / "out") == pictures
    image = torch.rand(3, 9, 8)
    answer = densectx.load(model).predict(image)["segmentation"]
    assert torch.equal(answer, densectx.load(model).predict(grey(image[None])[0])["segmentation"])


def test_answers_that_are_not_finite_are_bad(tmp_path, capsys):
    broken = build(["denoising"])
    broken.task("denoising").head.exit.bias.data.fill_(float("nan"))
    save_safetensors(broken, tmp_path / "m.safetensors")
    picture(tmp_path / "a.png")
    assert predict(tmp_path / "m.safetensors", tmp_path / "a.png", "-o", tmp_path / "out") == 3
    assert "a.png" in capsys.readouterr().err
    assert names(tmp_path / "out") == []


@pytest.mark.fault("F09")
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--taks", "denoising"], 2, "did you mean '--tasks'"),
        (["--task", "denoising"], 2, "unknown option '--task'"),
        (["--over"], 2, "unknown option '--over'"),
        (["--tda"], 2, "did you mean '--tta'"),
        (["--batch", "0"], 2, "at least 1"),
        (["--tile", "exakt"], 2, "--tile"),
        (["--precision", "16"], 2, "--precision"),
        (["--tasks", "denoisng"], 2, "did you mean 'denoising'"),
        (["--tasks", "denoising,"], 2, "commas"),
        (["--set", "denoising.sigm=25"], 2, "unknown option 'denoising.sigm'"),
        (["--set", "denoising.sigma"], 2, "TASK.OPTION=NUMBER"),
        (["--set", "denoising.sigma=nan"], 2, "TASK.OPTION=NUMBER"),
        (["--tasks", "segmentation", "--set", "denoising.sigma=2"], 2, "not one of --tasks segmentation"),
        (["--device", "gpu"], 2, "unknown device 'gpu'"),
        (["--device", "cuda:77"], 2, "not available here"),
    ],
)
def test_wrong_options_are_told_in_one_line(tmp_path, model, capsys, arguments, status, message):
    picture(tmp_path / "a.png")
    assert predict(model, tmp_path / "a.png", "-o", tmp_path / "out", *arguments) == status
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("F09")
def test_missing_arguments_and_models(tmp_path, model, capsys):
    picture(tmp_path / "a.png")
    assert predict(model, tmp_path / "a.png") == 2
    assert predict(model, "-o", tmp_path / "out") == 2
    assert predict() == 2
    assert predict(tmp_path / "none.ckpt", tmp_path / "a.png", "-o", tmp_path / "out") == 4
    assert predict(tmp_path / "a.png", tmp_path / "a.png", "-o", tmp_path / "out") == 4
    assert capsys.readouterr().err.count("\n") == 5
    assert predict(model, tmp_path / "a.png", "-o", tmp_path / "a.png") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("F04")
def test_inputs_are_never_written_over(tmp_path, model):
    picture(tmp_path / "out/denoising/a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "out/denoising/a.png")
    before = tree(tmp_path / "out")
    for arguments in (
        [tmp_path / "out/denoising/a.png"],
        [tmp_path / "out/denoising"],
        [tmp_path / "link.png", tmp_path / "out/denoising"],
    ):
        assert predict(model, *arguments, "-o", tmp_path / "out", "--overwrite") == 2
        assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("link", ["denoising", "denoising/sub", "denoising/sub/a.png", "summary.json", JOURNAL])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_links_in_the_output_folder_are_refused(tmp_path, model, link, overwrite):
    picture(tmp_path / "in/sub/a.png")
    (tmp_path / "outside").mkdir()
    (tmp_path / "out" / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / link).symlink_to(tmp_path / "outside" / ("x" if "." in link else ""))
    assert predict(model, tmp_path / "in", "-o", tmp_path / "out", *overwrite) == 2
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_link_that_appears_while_working_is_refused(tmp_path, model, monkeypatch):
    picture(tmp_path / "in/a.png")
    (tmp_path / "outside").mkdir()
    real = Image.open

    def attack(path, *arguments, **options):
        if not (tmp_path / "out/denoising").exists():
            (tmp_path / "out/denoising").symlink_to(tmp_path / "outside")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Image, "open", attack)
    assert predict(model, tmp_path / "in", "-o", tmp_path / "out", "--tasks", "denoising") == 3
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_link_as_the_output_folder_itself_is_fine(tmp_path, model):
    picture(tmp_path / "a.png")
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert predict(model, tmp_path / "a.png", "-o", tmp_path / "out") == 0
    assert names(tmp_path / "real")


@pytest.mark.fault("F06")
def test_storage_errors_leave_whole_files(tmp_path, model, monkeypatch, capsys):
    for number in range(3):
        picture(tmp_path / f"in/{number}.png", number)
    real = files.Place.put

    def full(place):
        if "denoising/1" in str(place.target):
            raise files.storage_error(place.target, OSError(28, "No space left on device"))
        real(place)

    run = functools.partial(predict, model, tmp_path / "in", "-o", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(files.Place, "put", full)
        assert run() == 8
    assert "No space left" in capsys.readouterr().err
    assert not [name for name in names(tmp_path / "out") if name.endswith(".part")]
    assert [e["status"] for e in summary(tmp_path / "out")["inputs"]] == ["done", "started"]
    assert run() == 0
    assert [e["status"] for e in summary(tmp_path / "out")["inputs"]] == ["skipped", "done", "done"]
    assert predict(model, tmp_path / "in", "-o", tmp_path / "whole") == 0
    assert {n: c for n, c in tree(tmp_path / "out").items() if n != "summary.json"} == {
        n: c for n, c in tree(tmp_path / "whole").items() if n != "summary.json"
    }


@pytest.mark.fault("F06")
def test_no_truncated_file_where_the_system_takes_no_more(tmp_path, model, capsys):
    picture(tmp_path / "in/0.png", 0, (8, 8, 3))
    picture(tmp_path / "in/1.png", 1, (90, 90, 3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # bytes of a file
    try:
        assert predict(model, tmp_path / "in", "-o", tmp_path / "out", "--tasks", "denoising") == 8
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out/denoising").iterdir()] == ["0.png"]
    Image.open(tmp_path / "out/denoising/0.png").load()


def test_two_runs_do_not_write_into_one_folder(tmp_path, model, capsys):
    picture(tmp_path / "in/0.png", 0)
    out = tmp_path / "out"
    assert predict(model, tmp_path / "in", "-o", out) == 0
    before = tree(out)
    holder = os.open(out, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    picture(tmp_path / "in/1.png", 1)
    assert predict(model, tmp_path / "in", "-o", out) == 2
    assert "another `densectx predict` writes there" in capsys.readouterr().err
    assert tree(out) == before
    os.close(holder)
    assert predict(model, tmp_path / "in", "-o", out) == 0


def test_lines_of_a_list_that_are_no_names_are_told_and_the_rest_is_done(tmp_path, model, capsys, monkeypatch):
    picture(tmp_path / "a.png", 0)
    lines = f"{tmp_path / 'a.png'}\n{'x ' * 200}y.png\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert predict(model, "-", "-o", tmp_path / "out") == 3
    assert "too long" in capsys.readouterr().err
    assert [e["status"] for e in summary(tmp_path / "out")["inputs"]].count("done") == 1


def test_interruption_leaves_whole_files_and_a_summary(tmp_path, model, monkeypatch):
    for number in range(3):
        picture(tmp_path / f"in/{number}.png", number)
    real = files.Place.put

    def interrupt(place):
        if "segmentation/1.overlay" in str(place.target):
            raise KeyboardInterrupt
        real(place)

    with monkeypatch.context() as patched:
        patched.setattr(files.Place, "put", interrupt)
        assert predict(model, tmp_path / "in", "-o", tmp_path / "out") == 130
    assert names(tmp_path / "out") == [
        "denoising/0.png",
        "segmentation/0.overlay.png",
        "segmentation/0.png",
        "segmentation/1.png",
    ]
    assert predict(model, tmp_path / "in", "-o", tmp_path / "out") == 0
    assert [e["status"] for e in summary(tmp_path / "out")["inputs"]] == ["skipped", "done", "done"]


@pytest.mark.fault("F02")
def test_kill_and_go_on(tmp_path, model):
    for number in range(60):
        picture(tmp_path / f"in/{number:02}.png", number, (64, 64, 3))
    arguments = ["predict", str(model), str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(densectx.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-m", "densectx", *arguments], env=environment)
    deadline = time.monotonic() + 60
    # its first picture is then in the journal too
    while not (tmp_path / "out/denoising/01.png").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (tmp_path / "out" / JOURNAL).open("a").write('["torn')
    for path in (tmp_path / "out").rglob("*.png"):
        Image.open(path).load()
    assert main(arguments) == 0
    statuses = [entry["status"] for entry in summary(tmp_path / "out")["inputs"]]
    assert len(statuses) == 60
    assert "skipped" in statuses
    assert main([*arguments[:-1], str(tmp_path / "whole")]) == 0
    assert names(tmp_path / "out") == names(tmp_path / "whole")
    assert all(tree(tmp_path / "out")[n] == tree(tmp_path / "whole")[n] for n in names(tmp_path / "whole"))


# ---- what is seen


def test_progress_is_for_terminals_only(tmp_path, model, capsys, monkeypatch):
    picture(tmp_path / "a.png")
    assert predict(model, tmp_path / "a.png", "-o", tmp_path / "1") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out == f"{tmp_path / '1' / 'summary.json'}: 1 done\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert predict(model, tmp_path / "a.png", "-o", tmp_path / "2") == 0
    assert "1/1 images" in capsys.readouterr().err
    assert progress_line(12, 100, 4.0) == "12/100 images, 3.0 images/s, 29 s left"


def test_help_needs_no_torch(model):
    code = "import sys; from densectx.cli import main\ntry: main(['predict', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(densectx.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert "--tasks" in done.stdout


def test_a_picture_whose_answer_has_no_name_is_told_and_the_others_are_done(tmp_path, model, capsys):
    picture(tmp_path / "in" / f"{'x' * 248}.png")
    picture(tmp_path / "in" / "b.png")
    out = tmp_path / "out"
    for _ in range(2):  # the second time it is still not there, and no reason to refuse the rest
        assert predict(model, tmp_path / "in", "-o", out, "--tasks", "segmentation") == 3
        error = capsys.readouterr().err
        assert "too long for the file system" in error
        assert "Traceback" not in error
        assert [name for name in names(out) if name.startswith("segmentation/")] == [
            "segmentation/b.overlay.png",
            "segmentation/b.png",
        ]
