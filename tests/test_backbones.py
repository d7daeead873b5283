"""Backbones: what timm can be dilated and what not, VGG's two forms, dilation against strides."""

import pytest
import timm
import torch
from torch import nn

from densectx.errors import CheckpointError, ConfigError
from densectx.nn.norm import set_norm
from densectx.registry import BACKBONES


def randomise_statistics(net):
    """Batch norms that do something, so that a wrong dilation shows."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_dilated_resnet_equals_the_strided_one_on_its_grid(model):
    strided = timm.create_model(model, features_only=True).double().eval()
    randomise_statistics(strided)
    dilated = BACKBONES.build({"name": "timm", "model": model}).double().eval()
    dilated.net.load_state_dict(strided.state_dict())
    x = torch.rand(1, 3, 97 - 1, 128, dtype=torch.float64)
    with torch.no_grad():
        coarse, fine = strided(dilated.standardize(x))[-1], dilated(x)[-1]
    assert fine.shape[-2:] == (12, 16)
    assert (fine[..., ::4, ::4] - coarse).abs().max() < 1e-10 * coarse.abs().max()


def test_dilated_vgg_keeps_the_strided_function_with_dilated_pools_only():
    torch.manual_seed(0)
    dilated = BACKBONES.build({"name": "dilated_vgg16", "pools": "dilated"}).double()
    removed = BACKBONES.build({"name": "dilated_vgg16"}).double()
    removed.load_state_dict(dilated.state_dict())
    strided = timm.create_model("vgg16", num_classes=0).double()
    strided.features.load_state_dict(
        {k.removeprefix("layers.features."): v for k, v in dilated.state_dict().items() if "features." in k}
    )
    x = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        coarse = strided.features[:30](dilated.standardize(x))  # up to the last ReLU: stride 16
        fine, other = dilated(x)[-1], removed(x)[-1]
    assert (fine[..., ::2, ::2] - coarse).abs().max() < 1e-10 * coarse.abs().max()
    assert (other[..., ::2, ::2] - coarse).abs().max() > 0.1 * coarse.abs().max()


def test_vgg_takes_torchvision_style_weights_and_refuses_others(tmp_path):
    reference = timm.create_model("vgg16", num_classes=0)
    weights = {f"features.{k}": v for k, v in reference.features.state_dict().items()}
    torch.save(weights, tmp_path / "vgg.pth")
    net = BACKBONES.build({"name": "dilated_vgg16", "weights": str(tmp_path / "vgg.pth")})
    assert torch.equal(net.layers["features"][28].weight, weights["features.28.weight"])
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"bad\.pth.*26 of 26"):
        BACKBONES.build({"name": "dilated_vgg16", "weights": str(tmp_path / "bad.pth")})
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        BACKBONES.build({"name": "dilated_vgg16", "weights": str(tmp_path / "nowhere.pth")})


@pytest.mark.parametrize(
    "model",
    ["resnet10t", "regnetx_002", "efficientnet_lite0", "mobilenetv3_small_100", "convnext_atto", "res2net50_14w_8s"],
)
def test_timm_networks_that_dilate(model):
    net = BACKBONES.build({"name": "timm", "model": model}).eval()
    with torch.no_grad():
        maps = net(torch.rand(1, 3, 64, 40))
    assert [(m.shape[1], 64 // m.shape[2], 40 // m.shape[3]) for m in maps] == [(c, s, s) for c, s in net.features]
    assert net.features[-1].stride == 8


@pytest.mark.parametrize(
    "model", ["vgg16", "densenet121", "hrnet_w18_small", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"]
)
def test_timm_networks_that_do_not_are_refused_in_one_sentence(model):
    with pytest.raises(ConfigError, match=f"{model}.*cannot be dilated to stride 8") as caught:
        BACKBONES.build({"name": "timm", "model": model})
    assert "\n" not in str(caught.value)


def test_unknown_timm_network_is_suggested():
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        BACKBONES.build({"name": "timm", "model": "resnet181"})


def test_timm_weights_by_local_path(tmp_path):
    reference = timm.create_model("resnet10t")
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    net = BACKBONES.build({"name": "timm", "model": "resnet10t", "weights": str(tmp_path / "w.pth")})
    assert torch.equal(net.net.state_dict()["layer1.0.conv1.weight"], reference.state_dict()["layer1.0.conv1.weight"])
    with pytest.raises(CheckpointError, match="resnet10t"):
        BACKBONES.build({"name": "timm", "model": "resnet10t", "weights": str(tmp_path / "none.pth")})


@pytest.mark.parametrize("kind", ["group", "none", "frozen"])
@pytest.mark.parametrize("model", ["resnet10t", "efficientnet_lite0"])
def test_norms_are_exchanged_with_their_activation(kind, model):
    net = BACKBONES.build({"name": "timm", "model": model})
    acts = sum(isinstance(m, nn.ReLU | nn.ReLU6) for m in net.modules())
    frozen_reference = [
        m.detach() for m in net.eval()(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    ]
    set_norm(net, kind)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert sum(isinstance(m, nn.ReLU | nn.ReLU6) for m in net.modules()) == acts
    if kind == "frozen":  # also in training mode the statistics are the ones it had
        again = net.train()(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        assert torch.allclose(again[-1], frozen_reference[-1], atol=1e-4 * float(frozen_reference[-1].abs().max()))
