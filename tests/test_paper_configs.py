"""The recipes of Yu & Koltun (2016): the numbers of their tables, and that they train."""

import contextlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import densectx
from densectx import cli
from densectx.building import instantiate
from densectx.config import compose, load_yaml
from densectx.data.class_names import CITYSCAPES, CITYSCAPES_IDS, ROAD, VOC
from densectx.model_names import check_classes

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
SMOKE = ROOT / "configs" / "overlays" / "smoke.yaml"
THIN = [("model.backbone.width", "8"), ("model.backbone.fc", "16")]


def name_of(path):
    return path.stem


RECIPES = {
    # learning rate, momentum, images a step, steps, side of the crop with its margins (none: whole images)
    "voc_frontend": (1e-3, 0.9, 14, 60_000, 500),
    "voc_context": (1e-3, 0.9, 60, None, None),
    "voc_joint": (1e-5, 0.9, 14, None, 900),
    "camvid_frontend": (1e-4, 0.99, 8, 20_000, 628),
    "camvid_joint": (1e-5, 0.9, 1, None, 852),
    "kitti_frontend": (1e-4, 0.99, 8, 10_000, 628),
    "kitti_joint": (1e-5, 0.99, 1, 20_000, 900),
    "cityscapes_frontend": (1e-4, 0.99, 8, 40_000, 628),
    "cityscapes_context": (1e-4, 0.99, 100, 24_000, None),
    "cityscapes_joint": (1e-5, 0.99, 1, 60_000, 1396),
}
CLASSES = {"voc": VOC, "camvid": ROAD, "kitti": ROAD, "cityscapes": CITYSCAPES}


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Composed values, trainer, module and data of a config, with a thin network, no file read."""

    def built(path):
        monkeypatch.setenv("DENSECTX_DATA", "/nonexistent")
        composed = compose([path], [*THIN, ("trainer.accelerator", "cpu")])
        return composed, *instantiate(composed.values, tmp_path, "validate", composed.base)

    return built


def test_all_are_here():
    assert sorted(RECIPES) == [path.stem for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_numbers_are_the_papers(path, built):
    rate, momentum, images, steps, side = RECIPES[path.stem]
    _, trainer, module, data = built(path)
    ((name, augment),) = data.augments.items()
    assert trainer.accumulate_grad_batches * data.batch_sizes[name] == images
    if steps is not None:
        assert trainer.max_steps == steps
    if side is not None:
        assert augment.surround == 186
        assert augment.size[1] == side
        assert augment.size[0] == (732 if path.stem == "camvid_joint" else side)  # this CamVid is 360 pixels high
        assert all((edge - 372) % 8 == 0 for edge in augment.size)
    assert augment.flip
    assert (augment.scale, augment.rotate90, augment.vertical_flip, augment.color) == ((1, 1), False, False, 0)
    optimizer = module.configure_optimizers()["optimizer"]
    scheduler = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert (scheduler.step_size, scheduler.gamma) == (100_000, 0.1)
    sizes = {}
    for group in optimizer.param_groups:
        biases = {parameter.ndim == 1 for parameter in group["params"]}
        assert len(biases) == 1
        assert group["lr"] == pytest.approx(rate * (2 if biases == {True} else 1))
        assert group["weight_decay"] == (0 if biases == {True} else 5e-4)
        assert group["momentum"] == momentum
        sizes[biases.pop()] = len(group["params"])
    trained = [n for n, p in module.model.named_parameters() if p.requires_grad]
    assert sizes == {True: len(trained) // 2, False: len(trained) // 2}
    stage = path.stem.partition("_")[2]
    parts = {"frontend": {"backbone", "projection"}, "context": {"context"}}
    assert {n.partition(".")[0] for n in trained} == parts.get(stage, parts["frontend"] | parts["context"])


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_networks_losses_and_classes_are_the_papers(path, built):
    data_set, _, stage = path.stem.partition("_")
    composed, _, module, data = built(path)
    task = module.model.task("segmentation")
    whole = data_set == "cityscapes"
    assert (task.label_stride, task.head.method) == ((1, "deconvolution") if whole else (8, "interp_map"))
    assert task.coefficients == {"cross_entropy": 1.0}
    assert task.criterion.terms["cross_entropy"].class_weights is None
    assert task.info.ignore_index == 255
    assert task.info.classes == CLASSES[data_set]
    check_classes(composed.base, composed.values["model"], data.info())
    field = {"voc": 67, "camvid": 67, "kitti": 35, "cityscapes": 259}[data_set]
    assert module.model.context["shared"].receptive_field == (1 if stage == "frontend" else field)
    assert module.model.margin == 186
    assert (module.features is not None) == (stage == "context")


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_says_what_it_is_for_and_where_its_data_lie(path):
    text = path.read_text()
    assert text.startswith("# Yu & Koltun (2016) on ")
    assert "# Data: $DENSECTX_DATA/" in text
    (source,) = load_yaml(path)["data"]["sources"].values()
    assert source["root"].startswith("${oc.env:DENSECTX_DATA,data}/")
    assert "--init_from" in text  # of the stage before, or ImageNet's weights


# training -------------------------------------------------------------------------------------------------------------

SIZE = (44, 60)


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)).save(path)


def labels(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.repeat(np.array(ids, np.uint8), -(-SIZE[1] // len(ids)))[: SIZE[1]]
    Image.fromarray(np.broadcast_to(stripes, SIZE).copy()).save(path)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A few small files in each of the layouts."""
    root = tmp_path_factory.mktemp("trees")
    voc, lists = root / "VOCdevkit/VOC2012", root / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for subset, stem, folder in (("trainaug", "a", "SegmentationClassAug"), ("val", "b", "SegmentationClassAug")):
        picture(voc / f"JPEGImages/{stem}.jpg", len(subset))
        labels(voc / folder / f"{stem}.png", [0, 7, 20, 255])
        (lists / f"{subset}.txt").write_text(f"{stem}\n")
    for subset in ("train", "val"):
        picture(root / f"camvid/{subset}/0001.png", len(subset))
        labels(root / f"camvid/{subset}annot/0001.png", [*range(12)])
        (root / f"camvid/{subset}.txt").write_text(f"/SegNet/CamVid/{subset}/0001.png /x/{subset}annot/0001.png\n")
        picture(root / f"cityscapes/leftImg8bit/{subset}/ulm/ulm_1_leftImg8bit.png", len(subset))
        labels(root / f"cityscapes/gtFine/{subset}/ulm/ulm_1_gtFine_labelIds.png", [0, *CITYSCAPES_IDS])
    for number in (0, 149, 150):
        picture(root / f"kitti/training/image_2/{number:06d}_10.png", number)
        labels(root / f"kitti/training/semantic/{number:06d}_10.png", [0, *CITYSCAPES_IDS])
    return root


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_two_steps(path, trees, tmp_path, monkeypatch):
    monkeypatch.setenv("DENSECTX_DATA", str(trees))
    monkeypatch.setenv("DENSECTX_RUN", "")
    monkeypatch.chdir(tmp_path)
    (name,) = load_yaml(path)["data"]["sources"]
    augment = f"data.sources.{name}.augment"
    thin = [("model.backbone.width", "2"), ("model.backbone.fc", "8")]  # with 372 pixels of margins all the same
    flags = [*thin, (f"data.sources.{name}.batch_size", "1"), ("trainer.limit_val_batches", "1")]
    if "crop" in load_yaml(path)["data"]["sources"][name]["augment"]:
        flags.append((f"{augment}.crop", "16"))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        arguments = [part for key, value in flags for part in (f"--{key}", value)]
        assert cli.main(["fit", "-c", str(path), "-c", str(SMOKE), *arguments]) == 0, err.getvalue()
    run = tmp_path / "runs" / path.stem / "0"
    assert "\nsegmentation " in out.getvalue()
    assert "train/segmentation/loss" in (run / "metrics.csv").read_text()
    model = densectx.load(run)
    assert model.predict(torch.rand(3, 20, 30))["segmentation"].shape == (
        len(CLASSES[path.stem.partition("_")[0]]),
        20,
        30,
    )
    kept = len([*tmp_path.glob("features/*/*/*.features")])  # one image, mirrored too or not, and one for validation
    assert kept in ((2, 3) if path.stem.endswith("context") else (0,))
    shutil.rmtree(run)
