"""`--tile paper`: the published tiled inference, against the same written with numpy."""

import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from densectx.checkpoint import save_safetensors
from densectx.cli import main
from densectx.data import windowed
from densectx.errors import ConfigError
from densectx.inference.paper_tiles import paper_tiles
from densectx.inference.predictor import Predictor
from densectx.inference.tiler import Setting
from densectx.model import DenseModel
from densectx.registry import MODELS
from densectx.types import SourceInfo

MARGIN = 186


def reference(model, picture, tile, *, zoom):
    """predict.py of fyu/dilation: mirrored, cut, each tile filled up by mirroring itself, joined, enlarged."""
    high, wide = (side - 2 * MARGIN for side in tile)
    image = np.pad(picture, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)), mode="reflect")
    rows = []
    for top in range(0, picture.shape[1], high):
        row = []
        for left in range(0, picture.shape[2], wide):
            part = image[:, top : top + tile[0], left : left + tile[1]]
            part = np.pad(part, ((0, 0), (0, tile[0] - part.shape[1]), (0, tile[1] - part.shape[2])), mode="reflect")
            features = model.backbone.valid(torch.from_numpy(part)[None])
            scores = model.context["shared"](model.projection(features[-1]))
            if zoom == 1:
                scores = model.task("segmentation").head([scores], None)
            row.append(scores.softmax(1)[0].detach().numpy())
        rows.append(np.concatenate(row, 2))
    prob = np.concatenate(rows, 1)
    if zoom > 1:
        prob = np.pad(prob, ((0, 0), (0, 1), (0, 1)), mode="edge")
        h, w = np.arange(picture.shape[1]), np.arange(picture.shape[2])
        r, c, rt, ct = h // zoom, w // zoom, (h % zoom / zoom)[:, None], (w % zoom / zoom)[None]
        v0 = rt * prob[:, r + 1][:, :, c] + (1 - rt) * prob[:, r][:, :, c]
        v1 = rt * prob[:, r + 1][:, :, c + 1] + (1 - rt) * prob[:, r][:, :, c + 1]
        prob = (1 - ct) * v0 + ct * v1
    return prob[:, : picture.shape[1], : picture.shape[2]]


@pytest.mark.parametrize(
    "name", ["dilation8_pascal_voc", "dilation8_camvid", "dilation7_kitti", "dilation10_cityscapes"]
)
@pytest.mark.parametrize("size", [(21, 30), (32, 48), (50, 77)])
def test_equals_the_published_procedure(name, size, thin):
    torch.manual_seed(0)
    tile = (MARGIN * 2 + 32, MARGIN * 2 + 48)
    model = thin(name, width=2, fc=4, tile=tile).double()
    picture = torch.rand(3, *size, dtype=torch.float64)
    found = paper_tiles(model, picture.float(), ["segmentation"])["segmentation"]
    expected = reference(model, picture.numpy(), tile, zoom=1 if name == "dilation10_cityscapes" else 8)
    assert found.shape == expected.shape
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_a_tile_of_half_a_cell_more_keeps_cells_8_pixels_apart(thin):
    """KITTI's 1640: its last cell sees a pool of one column."""
    torch.manual_seed(0)
    model = thin("dilation7_kitti", width=2, fc=4, tile=(MARGIN * 2 + 16, MARGIN * 2 + 20)).double()
    picture = torch.rand(3, 16, 20)
    found = paper_tiles(model, picture, ["segmentation"])["segmentation"]
    assert found.shape == (11, 16, 20)
    one = paper_tiles(model, picture[..., :16], ["segmentation"])["segmentation"]
    expected = reference(model, picture[..., :16].double().numpy(), (MARGIN * 2 + 16, MARGIN * 2 + 20), zoom=8)
    assert np.abs(one.numpy() - expected).max() < 1e-5


def test_predict_takes_published_networks_in_their_tiles(tmp_path, capsys, thin):
    torch.manual_seed(0)
    model = thin("dilation8_camvid", width=2, fc=4, tile=(MARGIN * 2 + 32, MARGIN * 2 + 32))
    save_safetensors(model, tmp_path / "net.safetensors")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "a.png")
    arguments = ["predict", str(tmp_path / "net.safetensors"), str(tmp_path / "a.png"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--raw"]) == 0
    assert "paper" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["options"]["tile"] == "paper"
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)
    expected = paper_tiles(model, picture, ["segmentation"])["segmentation"]
    raw = np.load(tmp_path / "out" / "segmentation" / "a.npy")
    assert np.abs(raw - expected.numpy()).max() < 1e-6
    classes = Image.open(tmp_path / "out" / "segmentation" / "a.png")
    assert np.array_equal(np.asarray(classes), raw.argmax(0))
    assert classes.getpalette()[:6] == [128, 0, 0, 128, 128, 0]  # Building, Tree
    assert main([*arguments, "--tile", "whole", "--overwrite"]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["options"]["tile"] == "whole"


def test_what_is_read_in_parts_has_no_published_tiles(tmp_path, capsys, monkeypatch, thin):
    """They are cut from the whole picture; a plain pass of it is no substitute."""
    monkeypatch.setattr(windowed, "WINDOWED_FROM", 1500)
    model = thin("dilation8_camvid", width=2, fc=4, tile=(MARGIN * 2 + 32, MARGIN * 2 + 32))
    save_safetensors(model, tmp_path / "net.safetensors")
    values = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    tifffile.imwrite(tmp_path / "large.tif", values, photometric="rgb")
    tifffile.imwrite(tmp_path / "small.tif", values[:20], photometric="rgb")
    arguments = ["predict", str(tmp_path / "net.safetensors"), str(tmp_path / "large.tif"), str(tmp_path / "small.tif")]
    for number, tile in enumerate(([], ["--tile", "paper"], ["--tile", "whole"])):
        out = tmp_path / str(number)
        assert main([*arguments, "-o", str(out), *tile]) == 3
        assert f"{tmp_path / 'large.tif'}: is too large" in capsys.readouterr().err
        entries = json.loads((out / "summary.json").read_text())["inputs"]
        assert [entry["status"] for entry in entries] == ["failed", "done"]
        assert "--tile exact" in entries[0]["error"]
        assert not list(out.rglob("large*"))
    assert main([*arguments, "-o", str(tmp_path / "half"), "--tile", "paper", "--precision", "bf16"]) == 2
    assert "published tiles are taken in float32" in capsys.readouterr().err
    out = tmp_path / "exact"
    assert main([*arguments, "-o", str(out), "--tile", "exact", "--raw"]) == 0
    expected = model.predict(torch.from_numpy(values).permute(2, 0, 1))["segmentation"]
    assert np.abs(np.load(out / "segmentation" / "large.npy") - expected.numpy()).max() < 1e-5


def test_other_networks_are_refused(tmp_path, capsys):
    config = {"backbone": {"name": "plain", "width": 4}, "tasks": {"d": {"name": "denoising", "source": "x"}}}
    save_safetensors(DenseModel.from_config(config, {"x": SourceInfo()}), tmp_path / "net.safetensors")
    arguments = ["predict", str(tmp_path / "net.safetensors"), str(tmp_path), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--tile", "paper"]) == 2
    assert "--tile paper" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "task", "channels"),
    [
        ("clean", {"name": "denoising", "head": "linear"}, 11),
        ("depth", {"name": "regression", "low": 1, "high": 80, "head": "upsample"}, 1),
    ],
)
def test_published_tiles_are_the_default_only_where_they_can_be(key, task, channels):
    """Nobody asked for them: other tasks, and half precision, are answered without."""
    config = MODELS.get("dilation8_camvid")()
    config["backbone"] |= {"width": 2, "fc": 4, "tile": [MARGIN * 2 + 32, MARGIN * 2 + 32]}
    (source, info), *_ = config.pop("sources").items()
    info = SourceInfo(classes=info["classes"], keys=("image", "mask", "target"), target="map")
    config["projection"] |= {"channels": channels}
    config["tasks"][key] = {**task, "source": source}
    if channels == 1:
        config["tasks"]["segmentation"] |= {"head": "linear"}
    torch.manual_seed(0)
    model, cpu = DenseModel.from_config(config, {source: info}).eval(), torch.device("cpu")
    picture = torch.rand(3, 40, 50)
    predictor = Predictor(model, None, {}, cpu, "32")
    assert predictor.tiling.setting.mode is None
    expected = model.predict(picture)
    for name, answer in predictor(picture).items():
        assert (answer - expected[name]).abs().max() < 1e-6
    if channels > 1:
        assert Predictor(model, ["segmentation"], {}, cpu, "32").tiling.setting.mode == "paper"
        assert Predictor(model, ["segmentation"], {}, cpu, "bf16").tiling.setting.mode is None
    with pytest.raises(ConfigError, match=f"--tile paper: is for classes of .*, not '{key}'"):
        Predictor(model, [key], {}, cpu, "32", Setting("paper"))


def test_a_network_without_weights_names_convert(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert main(["predict", "dilation8_camvid", str(tmp_path / "a.png"), "-o", str(tmp_path / "out")]) == 4
    assert "densectx convert" in capsys.readouterr().err
