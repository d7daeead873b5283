"""The peers of benchmarks/peers.py are the networks of segmentation-models-pytorch but for the last enlargement."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from densectx.model import DenseModel
from densectx.registry import BACKBONES
from densectx.testing import check_backbone
from densectx.types import SourceInfo

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def peers(monkeypatch):
    """The script, with its backbone registered."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("peers")
    BACKBONES.register("smp")(script.Peer)
    yield script, smp
    BACKBONES.unregister("smp")
    for name in ("peers", "results", "result_table", "record"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("arch", ["DeepLabV3", "DeepLabV3Plus", "Unet", "FPN", "PSPNet"])
def test_a_peer_answers_as_its_library_does(peers, arch):
    script, smp = peers
    assert arch in script.PEERS
    torch.manual_seed(0)
    model = DenseModel.from_config(
        {
            "backbone": {"name": "smp", "arch": arch, "classes": 3},
            "projection": None,
            "context": "none",
            "tasks": {"segmentation": {"name": "segmentation", "source": "scenes", "head": "upsample"}},
        },
        {"scenes": SourceInfo(classes=("a", "b", "c"), keys=("image", "mask"))},
    ).eval()
    peer = model.backbone
    net = smp.create_model(arch, encoder_name="resnet18", encoder_weights=None, classes=3).eval()
    net.encoder.load_state_dict(peer.encoder.state_dict())
    net.decoder.load_state_dict(peer.decoder.state_dict())
    net.segmentation_head[0].load_state_dict(peer.scores.state_dict())
    stride = peer.features[-1].stride
    if stride > 1:  # theirs aligns the corners, which shifts the scores against the labels by up to half a cell
        last = net.segmentation_head[1]
        assert (last.scale_factor, last.mode, last.align_corners) == (stride, "bilinear", True)
        last.align_corners = False
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in net.parameters())
    x = torch.rand(2, 3, 96, 160)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(model({"segmentation": x})["segmentation"], net((x - mean) / std))


def test_a_peer_keeps_the_contract_of_backbones(peers):
    check_backbone({"name": "smp", "arch": "Unet", "encoder": "resnet18"})


def test_the_recipe_takes_a_peer(peers):
    script, _ = peers
    own = [flag.removeprefix("--") for flag in script.flags("FPN", "resnet18")]
    network = script.networks.ours(script.CONFIG, dict(zip(own[::2], own[1::2], strict=True)))
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert network.run(network.module.eval(), x).shape == (1, script.CLASSES, 64, 96)
