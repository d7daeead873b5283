"""The recipes behind the recorded results: what they may cost, what they may see, and that they train."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import densectx
from densectx import cli
from densectx.config import compose, load_yaml
from densectx.model import MODEL_KEYS, DenseModel

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
SMOKE = ROOT / "configs" / "overlays" / "smoke.yaml"
ZOO = ("denoise_gray", "denoise_color", "sr_x2", "sr_x3", "sr_x4", "colorize", "camvid_small", "multitask")
SIX = ("60079", "69007")


def name_of(path):
    return path.stem


def photo(path, size=(160, 192), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A few files of BSDS500, T91 and CamVid, as they lie on disk; what must not be trained on cannot be read."""
    root = tmp_path_factory.mktemp("data")
    for subset, stem in (("train", "100075"), ("train", SIX[0]), ("test", "101084"), ("test", SIX[1])):
        photo(root / "bsds500" / "images" / subset / f"{stem}.jpg", seed=int(stem))
    (root / "bsds500" / "images" / "val").mkdir()
    (root / "bsds500" / "images" / "val" / "101085.jpg").write_bytes(b"not to be opened")
    photo(root / "t91" / "t1.webp")
    photo(root / "t91" / "t20.webp", (78, 90))  # as small as the smallest of T91
    for stem in ("0006R0_f00930", "0016E5_00390", "0001TP_006690"):
        photo(root / "camvid" / "train" / f"{stem}.webp", (360, 480))
        mask = root / "camvid" / "trainannot" / f"{stem}.png"
        mask.parent.mkdir(exist_ok=True)
        Image.fromarray(np.broadcast_to(np.repeat(np.arange(12, dtype=np.uint8), 40), (360, 480)).copy()).save(mask)
    stems = sorted(file.stem for file in (root / "camvid" / "train").iterdir())
    lines = [f"/SegNet/CamVid/train/{s}.png /SegNet/CamVid/trainannot/{s}.png\n" for s in stems]
    (root / "camvid" / "train.txt").write_text("".join(lines))
    return root


@pytest.fixture
def built(monkeypatch):
    """The data and the model of a recipe; no file is read."""

    def built(path):
        monkeypatch.setenv("DENSECTX_DATA", "/nonexistent")
        values = compose([path]).values
        data = densectx.DataModule(**values["data"])
        part = {key: value for key, value in values["model"].items() if key in MODEL_KEYS}
        return DenseModel.from_config(part, data.info())

    return built


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_says_what_it_is_for_and_where_its_data_lie(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert "\n# Data: $DENSECTX_DATA/" in text
    config = load_yaml(path)
    assert config["model"]["lr_scheduler"]["init_args"]["warmup_steps"] > 0
    assert config["model"]["channels_last"]
    assert config["trainer"]["precision"] == "auto"
    trainer = config["trainer"]
    if config["model"]["lr_scheduler"]["init_args"].get("timed"):
        assert trainer["max_time"]
    else:
        assert trainer["max_steps"] % trainer["val_check_interval"] == 0  # the last step is validated
    assert config["trainer"]["callbacks"][0]["class_path"].endswith("EMAWeightAveraging")


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_trains_on_no_image_of_a_test_set(path, data, monkeypatch):
    monkeypatch.setenv("DENSECTX_DATA", str(data))
    module = densectx.DataModule(**compose([path]).values["data"])
    for source in module.datasets["train"]:
        train, val = (
            {Path(dataset.name(i)).stem for i in range(len(dataset))}
            for dataset in (module.datasets[split][source] for split in ("train", "val"))
        )
        assert train
        assert val
        assert not train & val
        assert "101085" not in train | val
        assert not {stem for stem in train if stem.startswith(("6", "0001TP"))} - {"0001TP_006690"}
        if "segmentation" in compose([path]).values["model"]["tasks"] or path.stem == "pretrain_trunk":
            assert "0001TP_006690" not in train  # validates the segmentation
        assert val <= {*SIX, "0001TP_006690"}


@pytest.mark.parametrize("path", [ROOT / "configs" / "segmentation_camvid.yaml", *RECIPES], ids=name_of)
def test_the_flag_that_a_comment_gives_takes_all_frames(path, data, monkeypatch):
    monkeypatch.setenv("DENSECTX_DATA", str(data))
    for flag, value in re.findall(r"^#.*--(data\.sources\.camvid\.\S+) (\w+)", path.read_text(), re.MULTILINE):
        module = densectx.DataModule(**compose([path], [(flag, value)]).values["data"])
        assert len(module.datasets["train"]["camvid"]) == 3


def test_gray_denoiser_costs_less_than_dncnn(built):
    model = built(ROOT / "configs" / "recipes" / "denoise_gray.yaml")
    x = model.task("denoising").inputs(torch.rand(1, 1, 64, 64), {"sigma": 25.0})
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        answer = model({"denoising": x})["denoising"]
    assert counter.get_total_flops() / 2 / 64**2 < 555_000
    assert torch.equal(answer, x[:, :1])  # the residual starts at zero


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_super_resolution_is_no_larger_than_imdn(built, scale):
    model = built(ROOT / "configs" / "recipes" / f"sr_x{scale}.yaml")
    assert model.task("super_resolution").scale == scale
    assert sum(parameter.numel() for parameter in model.parameters()) <= 720_000


def test_models_of_the_zoo_fit_into_it(built):
    sizes = {}
    for name in ZOO:
        state = built(ROOT / "configs" / "recipes" / f"{name}.yaml").state_dict()
        sizes[name] = sum(tensor.numel() * (2 if tensor.squeeze().ndim > 1 else 4) for tensor in state.values())
    assert max(sizes.values()) < 3_950_000, sizes  # a header is added
    assert sum(sizes.values()) < 19_900_000, sizes


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_trains_two_steps(path, data, tmp_path):
    flags = [("trainer.default_root_dir", str(tmp_path)), ("model.compile", "false")]
    flags.append(("trainer.enable_checkpointing", "false"))
    for source in load_yaml(path)["data"]["sources"]:
        flags += [(f"data.sources.{source}.batch_size", "2")]
        flags += [(f"data.sources.{source}.augment.crop", "96" if source == "camvid" else "48")]
    out, err = io.StringIO(), io.StringIO()
    arguments = [part for key, value in flags for part in (f"--{key}", value)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSECTX_RUN", "")  # a start leaves its run folder there for other ranks; this brings it back
        patch.setenv("DENSECTX_DATA", str(data))
        status = cli.main(["fit", "-c", str(path), "-c", str(SMOKE), "--no-report", *arguments])
    assert status == 0, err.getvalue()
    columns = (tmp_path / path.stem / "0" / "metrics.csv").read_text().partition("\n")[0].split(",")
    for key, task in load_yaml(path)["model"]["tasks"].items():
        assert {f"train/{key}/loss", f"val/{key}/{densectx.TASKS.get(task['name']).score.metric}"} <= set(columns)
