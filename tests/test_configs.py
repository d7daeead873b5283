"""Every config of the repository composes, builds and trains; impossible ones are refused before work starts."""

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import densectx
from densectx import cli
from densectx.config import compose, load_yaml
from densectx.model import MODEL_KEYS, DenseModel
from densectx.precision import native_precision

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMOKE = ROOT / "configs" / "overlays" / "smoke.yaml"


class Done(NamedTuple):
    status: int
    out: str
    err: str


def command(*arguments):
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSECTX_RUN", "")  # a start leaves its run folder there for other ranks; this brings it back
        status = cli.main(list(map(str, arguments)))
    return Done(status, out.getvalue(), err.getvalue())


def name_of(path):
    return path.stem


# trees in the layouts that the configs expect ------------------------------------------------------------------------


def photo(path, size=(96, 128), seed=0):
    """A smooth random picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


def mask(path, classes, void, size=(96, 128)):
    """Vertical stripes of the first classes, the last one unlabelled; palette indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.repeat(np.array([*range(classes), void], np.uint8), -(-size[1] // (classes + 1)))[: size[1]]
    picture = Image.fromarray(np.broadcast_to(stripes, size).copy(), "P")
    picture.putpalette([0, 0, 0, 128, 0, 0])
    picture.save(path)


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    """A few files of CamVid, BSDS500 and VOC, as the downloads lay them out."""
    root = tmp_path_factory.mktemp("trees")
    camvid, size = root / "camvid", (360, 480)
    for stem in ("0006R0_f00930", "0016E5_00390", "0001TP_006690"):
        photo(camvid / "train" / f"{stem}.png", size)
        mask(camvid / "trainannot" / f"{stem}.png", 11, 11, size)
    lines = [f"/SegNet/CamVid/train/{p.name} /SegNet/CamVid/trainannot/{p.name}" for p in (camvid / "train").iterdir()]
    (camvid / "train.txt").write_text("\n".join(lines) + "\n")
    for subset, stem in (("train", "100075"), ("train", "60079"), ("test", "101084"), ("test", "69007"), ("val", "1")):
        photo(root / "bsds500" / "images" / subset / f"{stem}.jpg", seed=int(stem))
    for subset, stem in (("train", "a"), ("train", "b"), ("val", "c")):
        for folder in ("input", "target"):
            photo(root / "pairs" / subset / folder / f"{stem}.png", seed=len(folder))
        photo(root / "maps" / subset / "images" / f"{stem}.png", size=(200, 240))
        photo(root / "mine" / "images" / subset / f"{stem}.png")
        photo(root / "photos" / subset / "holiday" / f"{stem}.png")
        mask(root / "mine" / "masks" / subset / f"{stem}.png", 2, 255)
        depth = root / "maps" / subset / "depth" / f"{stem}.png"
        depth.parent.mkdir(parents=True, exist_ok=True)
        ramp = np.linspace(500, 9000, 240).astype(np.uint16)
        Image.fromarray(np.broadcast_to(ramp, (200, 240)).copy()).save(depth)
    voc = root / "VOCdevkit" / "VOC2012"
    for subset, stems in {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}.items():
        lists = voc / "ImageSets" / "Segmentation" / f"{subset}.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        lists.write_text("\n".join(stems) + "\n")
        for stem in stems:
            photo(voc / "JPEGImages" / f"{stem}.jpg")
            mask(voc / "SegmentationClass" / f"{stem}.png", 21, 255)
    return root


# every config --------------------------------------------------------------------------------------------------------


def test_there_is_one_for_each_task():
    tasks = {task["name"] for path in CONFIGS for task in load_yaml(path)["model"]["tasks"].values()}
    assert tasks == {entry.name for entry in densectx.TASKS.entries() if entry.distribution == "densectx"}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_says_what_it_is_for_and_where_its_data_lie(path):
    text = path.read_text()
    assert text.startswith("# ")
    for source in load_yaml(path)["data"]["sources"].values():
        if "root" in source:
            assert source["root"].startswith("${oc.env:DENSECTX_DATA,data}/")
            assert "# Data: $DENSECTX_DATA/" in text


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_composes_and_builds_without_reading_a_file(path, monkeypatch):
    monkeypatch.setenv("DENSECTX_DATA", "/nonexistent")
    values = compose([path]).values
    data = densectx.DataModule(**values["data"])
    model = DenseModel.from_config({k: v for k, v in values["model"].items() if k in MODEL_KEYS}, data.info())
    assert set(model.tasks) == set(values["model"]["tasks"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "overlays").glob("*.yaml")), ids=name_of)
def test_overlays_add_to_any_config(path):
    before, after = (compose([CONFIGS[0], *overlay]).values for overlay in ([], [path]))
    assert after["model"]["tasks"] == before["model"]["tasks"]
    assert after["trainer"] | load_yaml(path)["trainer"] == after["trainer"]


def cheap(path):
    """Flags for small batches of small crops."""
    options = (("augment.crop", "64"), ("batch_size", "2"))
    return [(f"data.sources.{source}.{k}", v) for source in load_yaml(path)["data"]["sources"] for k, v in options]


class Fit(NamedTuple):
    folder: Path
    values: dict
    done: Done


@pytest.fixture(scope="module", params=CONFIGS, ids=name_of)
def fitted(request, trees, tmp_path_factory):
    """Two steps of a config on the little trees, with its own network."""
    path, root = request.param, tmp_path_factory.mktemp("fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSECTX_DATA", str(trees))
        flags = [*cheap(path), ("trainer.default_root_dir", str(root))]
        values = compose([path, SMOKE], flags).values
        if values["trainer"].get("precision") == "auto":  # what ran is kept, not that it was chosen
            values["trainer"]["precision"] = native_precision("cpu")
        done = command("fit", "-c", path, "-c", SMOKE, *(part for key, value in flags for part in (f"--{key}", value)))
    yield Fit(root / path.stem / "0", values, done)
    shutil.rmtree(root)  # checkpoints of full networks


def test_two_steps_leave_a_whole_run(fitted):
    assert fitted.done.status == 0, fitted.done.err
    run, config = fitted.folder, fitted.values
    columns = set((run / "metrics.csv").read_text().partition("\n")[0].split(","))
    for key, task in config["model"]["tasks"].items():
        score = densectx.TASKS.get(task["name"]).score
        assert {
            f"train/{key}/loss",
            f"val/{key}/{score.metric}",
            f"val/{key}/{score.metric}_{score.baseline}",
        } <= columns
        assert (run / "pictures" / key / "step-2.png").exists()
        assert f"\n{key} " in fitted.done.out
    assert "nan" not in fitted.done.out
    for name in ("last.ckpt", "best.ckpt"):
        assert os.readlink(run / "checkpoints" / name) == "step-2.ckpt"


def test_the_saved_config_is_the_one_that_ran(fitted):
    assert compose([fitted.folder / "config.yaml"]).values == fitted.values


def test_the_run_loads_and_predicts(fitted):
    model = densectx.load(fitted.folder)
    image = torch.rand(3, 30, 41)
    for key, answer in model.predict(image).items():
        scale = model.task(key).scale
        assert answer.shape[1:] == (30 * scale, 41 * scale)
        assert answer.isfinite().all()
        assert model.predict(image, key).keys() == {key}, "one key may stand for a list of it"


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem not in ("quickstart", "segmentation_voc")], ids=name_of)
def test_fits_the_real_data(path, tmp_path):
    folders = [source["root"].rpartition("}/")[2] for source in load_yaml(path)["data"]["sources"].values()]
    data = os.environ.get("DENSECTX_DATA")
    if data is None or not all((Path(data) / folder).is_dir() for folder in folders):
        pytest.skip(f"needs DENSECTX_DATA with {' and '.join(folders)}")
    flags = [*cheap(path), ("trainer.enable_checkpointing", "false")]
    flags.append(("trainer.default_root_dir", str(tmp_path)))
    done = command("fit", "-c", path, "-c", SMOKE, *(part for key, value in flags for part in (f"--{key}", value)))
    assert done.status == 0, done.err


# refusals ------------------------------------------------------------------------------------------------------------

BASE = """
model:
  backbone: {name: plain, width: 8}
  projection: null
  context: {name: basic, dilations: [1, 1]}
  tasks:
    segmentation: {name: segmentation, source: camvid, head: {name: linear}, loss: {name: cross_entropy}}
    denoising: {name: denoising, source: camvid, head: {name: linear}, sigma: 25}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}
data:
  sources:
    camvid: {name: image_mask, preset: camvid, root: /nonexistent, augment: {flip: true}}
    mosaic: {name: mosaic, size: 48, val_length: 2, augment: {flip: true}}
"""
# 3 would be the missing folder: what ends with 2 was refused before data was looked for


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """A fit of BASE and a second file, wrong.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)

    def fit(wrong="{}", *arguments):
        (tmp_path / "wrong.yaml").write_text(wrong)
        return command("fit", "-c", "base.yaml", "-c", "wrong.yaml", "-c", SMOKE, *arguments)

    return fit


def refused(done, status, *parts):
    assert done.status == status, done.err
    assert done.err.startswith("densectx: error: "), done.err
    assert "Traceback" not in done.err
    for part in parts:
        assert part in done.err


COLOUR = "model: {tasks: {colour: {name: colorization, source: x}}}"
UNKNOWN = [
    ("modle: {}", "modle", "model"),
    ("model: {contxt: basic}", "model.contxt", "context"),
    ("data: {num_worker: 1}", "data.num_worker", "num_workers"),
    ("trainer: {max_epoch: 3}", "trainer.max_epoch", "max_epochs"),
    ("model: {backbone: {widht: 3}}", "model.backbone", "width"),
    ("model: {backbone: plian}", "model.backbone", "plain"),
    ("model: {projection: {chanels: 3}}", "model.projection", "channels"),
    ("model: {context: {dilation: [1]}}", "model.context", "dilations"),
    ("model: {tasks: {denoising: {sigm: 3}}}", "model.tasks.denoising", "sigma"),
    ("model: {tasks: {denoising: {source: camvit}}}", "model.tasks.denoising.source", "camvid"),
    ("model: {tasks: {denoising: {head: {dropuot: 1}}}}", "model.tasks.denoising.head", "dropout"),
    ("model: {tasks: {denoising: {head: {name: linaer}}}}", "model.tasks.denoising.head", "linear"),
    ("model: {tasks: {segmentation: {loss: {clas_weights: 1}}}}", "model.tasks.segmentation.loss", "class_weights"),
    ("model: {tasks: {sr: {name: super_resolutoin, source: mosaic}}}", "model.tasks.sr", "super_resolution"),
    ("data: {sources: {mosaic: {siz: 32}}}", "data.sources.mosaic", "size"),
    ("data: {sources: {mosaic: {augment: {flp: true}}}}", "data.sources.mosaic.augment", "flip"),
    ("data: {sources: {other: {name: mosiac}}}", "data.sources.other", "mosaic"),
    ("data: {sources: {camvid: {preset: camvit}}}", "preset", "camvid"),
    ("data: {sources: {camvid: {splits: {vla: null}}}}", "splits", "val"),
    ("model: {tasks: {denoisng: null}}", "model.tasks.denoisng", "denoising"),
]


@pytest.mark.fault("C01")
@pytest.mark.fault("C03")
@pytest.mark.parametrize(("wrong", "path", "near"), UNKNOWN, ids=[path + "/" + near for _, path, near in UNKNOWN])
def test_unknown_key_or_name(fit, wrong, path, near):
    refused(fit(wrong), 2, path, f"'{near}'")


@pytest.mark.parametrize(("wrong", "path", "near"), UNKNOWN[:4], ids=[path for _, path, _ in UNKNOWN[:4]])
def test_unknown_key_names_its_file(fit, wrong, path, near):
    refused(fit(wrong), 2, f"unknown key '{path}' (file wrong.yaml); did you mean '{near}'?")


@pytest.mark.parametrize("wrong", [wrong for wrong, _, _ in UNKNOWN[4:-1]])
def test_unknown_key_further_down_names_its_file(fit, wrong):
    refused(fit(wrong), 2, "wrong.yaml")


@pytest.mark.fault("C04")
def test_flags_are_not_abbreviated_and_name_themselves(fit):
    refused(fit("{}", "--trainer.max_epoch", "3"), 2, "unknown key 'trainer.max_epoch' (flag); did you mean 'max_epo")
    refused(fit("{}", "--resum", "auto"), 2, "--resume")


@pytest.mark.fault("C02")
@pytest.mark.parametrize(
    ("wrong", "path", "value"),
    [
        ("model: 3", "model", "3"),
        ("seed_everything: soon", "seed_everything", "soon"),
        ("model: {backbone: 3}", "model.backbone", "3"),
        ("model: {backbone: {width: wide}}", "model.backbone", "wide"),
        ("model: {projection: {channels: wide}}", "model.projection", "wide"),
        ("model: {tasks: {denoising: 5}}", "model.tasks.denoising", "5"),
        ("model: {tasks: {denoising: {weight: heavy}}}", "denoising", "heavy"),
        ("model: {tasks: {denoising: {sigma: big}}}", "denoising", "big"),
        ("model: {norm: btach}", "model", "btach"),
        ("model: {balancing: fixd}", "model.balancing", "fixd"),
        ("data: {sources: {mosaic: {batch_size: 0}}}", "data.sources.mosaic.batch_size", "0"),
        ("data: {sources: {mosaic: {batch_size: two}}}", "data.sources.mosaic.batch_size", "two"),
        ("data: {sources: {mosaic: {augment: {crop: 0}}}}", "data.sources.mosaic.augment.crop", "0"),
        ("data: {sources: {mosaic: {augment: {flip: 1}}}}", "data.sources.mosaic.augment.flip", "1"),
        ("data: {sources: {mosaic: 3}}", "data.sources.mosaic", "3"),
        ("data: {num_workers: two}", "data.num_workers", "two"),
        ("data: {sampling: joined}", "data.sampling", "joined"),
        ("model: {channels_last: maybe}", "model.channels_last", "maybe"),
        ("model: {freeze: backbone}", "model.freeze", "backbone"),
        ("model: {optimizer: adamw}", "model.optimizer", "adamw"),
        ("model: {optimizer: {init_args: {learning: 1}}}", "model.optimizer", "learning"),
        ("model: {optimizer: {class_path: os.system}}", "model.optimizer", "os.system"),
        ("model: {optimizer: {init_args: {lr: fast}}}", "model.optimizer.init_args.lr: expected a number", "'fast'"),
        (
            "model: {lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR}}",
            "model.lr_scheduler.init_args: torch.optim.lr_scheduler.StepLR needs step_size",
            "one.yaml",
        ),
        ("trainer: {accumulate_grad_batches: -1}", "trainer.accumulate_grad_batches: expected 1 or more", "-1"),
        ("trainer: {accumulate_grad_batches: 0}", "trainer.accumulate_grad_batches: expected 1 or more", "got 0"),
        ("trainer: {check_val_every_n_epoch: 0}", "trainer.check_val_every_n_epoch: expected 1 or more", "got 0"),
        ("trainer: {gradient_clip_val: -1.0}", "trainer.gradient_clip_val: expected 0 or more", "-1.0"),
        ("trainer: {log_every_n_steps: -1}", "trainer.log_every_n_steps: expected 0 or more", "-1"),
        ("trainer: {val_check_interval: 0}", "trainer.val_check_interval: expected a number of batches", "got 0"),
        ("trainer: {val_check_interval: 0.0}", "trainer.val_check_interval: expected a number of batches", "got 0.0"),
        ("trainer: {max_steps: many}", "trainer.max_steps", "many"),
        ("trainer: {precision: bf17}", "trainer.precision", "bf17"),
        ("trainer: {accelerator: gpuu}", "accelerator", "gpuu"),
    ],
)
def test_wrong_type_or_value(fit, tmp_path, wrong, path, value):
    (tmp_path / "one.yaml").write_text(wrong)  # after the overlay, which sets some of these
    refused(fit("{}", "-c", "one.yaml"), 2, path, value)


@pytest.mark.fault("C02")
@pytest.mark.parametrize(
    ("flag", "origin"),
    [
        ("--model.tasks.denoising.sigma=-5", "(flag)"),
        ("--model.tasks.denoising.weight=-1", "(flag)"),
        ("--model.backbone.width=0", "(flag)"),
        ("--model.optimizer.init_args.lr=-1.0", ", flag)"),  # torch does not say which argument it means
    ],
)
def test_a_value_that_a_part_refuses_names_where_it_comes_from(fit, flag, origin):
    refused(fit("{}", flag), 2, origin)


@pytest.mark.fault("C11")
@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ("model: {tasks: {segmentation: {classes: 5}}}", ["segmentation", "5", "11", "Bicyclist"]),
        ("model: {tasks: {segmentation: {loss: {class_weights: [1, 2, 3]}}}}", ["class_weights", "3", "11"]),
        ("data: {sources: {x: {name: folder, root: x}}}\nmodel: {tasks: {segmentation: {source: x}}}", ["no masks"]),
        ("data: {sources: {x: {name: folder, root: x, channels: 1}}}\n" + COLOUR, ["model.tasks.colour", "1 channel"]),
        ("data: {sources: {mosaic: {augment: {crop: 64}}}}", ["crop", "48", "64"]),
        ("model: {backbone: {name: timm, model: vgg16}}", ["vgg16", "dilated_vgg16"]),
        ("model: {backbone: {name: timm, model: swin_tiny_patch4_window7_224}}", ["swin_tiny", "ResNet"]),
        ("model: {backbone: {name: timm, model: resnet81}}", ["'resnet81'", "did you mean"]),
        ("model: {tasks: {segmentation: {head: upsample}}}", ["'upsample'", "8", "11"]),
        ("model: {backbone: {in_channels: 1}}", ["model.backbone.in_channels", "3"]),
    ],
)
def test_what_does_not_fit_together(fit, wrong, parts):
    refused(fit(wrong), 2, *parts)


def test_the_base_of_these_fails_at_its_missing_folder_only(fit):
    refused(fit(), 3, "/nonexistent")


@pytest.mark.fault("C10")
def test_files(fit, tmp_path):
    refused(command("fit"), 2, "-c FILE")
    refused(command("fit", "-c", tmp_path / "none.yaml"), 2, "none.yaml")
    refused(fit("seed_everything: 0\nseed_everything: 1"), 2, "wrong.yaml", "seed_everything")
    refused(fit("model: {norm: batch, norm: group}"), 2, "wrong.yaml", "norm")
    refused(fit("- a list"), 2, "wrong.yaml")


def test_a_refused_config_leaves_no_run_folder(fit, tmp_path):
    refused(fit("model: {balancing: fixd}"), 2)
    assert list((tmp_path / "runs").iterdir()) == []


# validate ------------------------------------------------------------------------------------------------------------


def test_fit_and_validate_want_different_options(fit):
    refused(fit("{}", "--ckpt_path", "x"), 2, "--resume", "init_from")
    refused(command("validate", "-c", "base.yaml"), 2, "--ckpt_path", "init_from")
    refused(command("test", "-c", "base.yaml"), 2, "--ckpt_path", "init_from")
    refused(command("validate", "-c", "base.yaml", "--resume", "auto"), 2, "--ckpt_path")
    refused(command("validate", "-c", "base.yaml", "--ckpt_path", "nowhere"), 4, "nowhere")


def test_validate_gives_the_numbers_of_the_last_validation(tmp_path):
    arguments = ["-c", ROOT / "configs" / "quickstart.yaml", "-c", SMOKE, "--trainer.default_root_dir", tmp_path]
    fitted = command("fit", *arguments)
    assert fitted.status == 0, fitted.err
    run = tmp_path / "quickstart" / "0"
    tasks = ["segmentation", "denoising", "super_resolution", "colorization"]
    rows = [line.split() for line in fitted.out.splitlines() if line]
    assert [row[0] for row in rows] == [*(f"{task}:" for task in tasks), "task", *tasks]  # conventions, then numbers
    for weights in (run, run / "checkpoints" / "last.ckpt"):
        validated = command("validate", *arguments, "--ckpt_path", weights)
        assert validated.status == 0, validated.err
        assert [line.split() for line in validated.out.splitlines() if line] == rows
    started = command("validate", *arguments, "--init_from", run)
    assert started.out == validated.out
