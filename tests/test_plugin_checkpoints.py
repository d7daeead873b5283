"""Checkpoints of models with parts of other packages: named when one is absent, and their weights can still be had."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import densectx
from densectx.checkpoint import header, read, save_safetensors, to_safetensors
from densectx.cli import main
from densectx.errors import PluginError
from densectx.model import DenseModel
from densectx.registry import allow_import
from densectx.types import SourceInfo

HEAD = '''
from torch import nn
from densectx.heads.base import Head


class Pointwise(Head):
    """One 1x1 convolution."""

    def __init__(self, features, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(features[-1].channels, out_channels, 1)

    def forward(self, features, x):
        return self.conv(features[-1])
'''


def model_with(head):
    config = {
        "backbone": {"name": "plain", "width": 4},
        "projection": None,
        "context": {"name": "basic", "dilations": [1, 2, 1]},
        "tasks": {"denoising": {"name": "denoising", "source": "photos", "head": head}},
    }
    torch.manual_seed(0)
    return DenseModel.from_config(config, {"photos": SourceInfo()})


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.fault("P09")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_weights_without_the_package_that_they_need(distribute, tmp_path, suffix, image, capsys):
    site = distribute("plug-head", {"heads": {"pointwise": "Pointwise"}}, HEAD, version="2.5")
    model = model_with("pointwise")
    file, out = tmp_path / f"model{suffix}", tmp_path / "weights.safetensors"
    if suffix == ".ckpt":
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        torch.save({"state_dict": state, "densectx": header(model)}, file)
    else:
        save_safetensors(model, file)
    sys.path.remove(str(site))
    with pytest.raises(PluginError) as error:
        densectx.load(file)
    for part in (str(file), "needs plug-head 2.5", "pip install plug-head", "densectx.checkpoint.to_safetensors"):
        assert part in str(error.value)
    assert main(["predict", str(file), str(image), "-o", str(tmp_path / "out")]) == 5
    assert "plug-head 2.5" in capsys.readouterr().err
    to_safetensors(file, out)
    weights = load_file(out)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert json.dumps(read(out)[1]) == json.dumps(read(file)[1])
    sys.path.insert(0, str(site))
    x = torch.rand(3, 9, 7)
    assert torch.equal(densectx.load(out).predict(x)["denoising"], model.predict(x)["denoising"])


def test_a_package_that_has_become_too_old(distribute, tmp_path):
    site = distribute("plug-head", {"heads": {"pointwise": "Pointwise"}}, HEAD)
    save_safetensors(model_with("pointwise"), tmp_path / "model.safetensors")
    info = next(site.glob("*.dist-info"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-head\nVersion: 1.0\nRequires-Dist: densectx<0\n")
    with pytest.raises(PluginError, match=r"plug-head 1\.0.*needs densectx<0, this is"):
        densectx.load(tmp_path / "model.safetensors")


def test_predict_with_a_part_that_has_no_entry_point(distribute, tmp_path, image, monkeypatch, capsys):
    monkeypatch.setattr("densectx.imports._allowed", set())
    distribute("plug-loose", {}, HEAD)
    allow_import("plug_loose")
    file, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_safetensors(model_with("plug_loose:Pointwise"), file)
    monkeypatch.setattr("densectx.imports._allowed", set())
    line = ["predict", str(file), str(image), "-o", str(out)]
    assert main(line) == 4
    assert "pass --allow-import plug_loose if you trust it" in capsys.readouterr().err
    assert not out.exists()
    assert main([*line, "--allow-import", "plug_loose"]) == 0
    assert (out / "denoising" / "image.png").exists()
