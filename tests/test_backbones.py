"""Backbones: what timm can be dilated and what not, VGG's two forms, dilation against strides."""

import pytest
import timm
import torch
import torchvision
from timm.layers import DropPath
from torch import nn

from densectx.backbones.base import add_maps
from densectx.errors import CheckpointError, ConfigError
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


@torch.no_grad()
def test_torchvisions_weights_keep_their_function_when_dilated(tmp_path):
    strided = torchvision.models.resnet50()
    randomise_statistics(strided)
    torch.save(strided.state_dict(), tmp_path / "resnet50.pth")
    dilated = BACKBONES.build({"name": "dilated_resnet50", "weights": str(tmp_path / "resnet50.pth")}).double().eval()
    strided = strided.double().eval()
    x = torch.rand(1, 3, 97, 135, dtype=torch.float64)  # not multiples of 32 either
    fine, y = dilated(x)[-1], dilated.standardize(x)
    for name, layer in strided.named_children():
        if name not in ("avgpool", "fc"):
            y = layer(y)
    assert fine.shape[-2:] == (13, 17)
    assert (fine[..., ::4, ::4] - y).abs().max() < 1e-10 * y.abs().max()


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


@pytest.mark.fault("N10")
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


@pytest.mark.fault("N10")
def test_timm_weights_by_local_path(tmp_path):
    reference = timm.create_model("resnet10t")
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    net = BACKBONES.build({"name": "timm", "model": "resnet10t", "weights": str(tmp_path / "w.pth")})
    assert torch.equal(net.net.state_dict()["layer1.0.conv1.weight"], reference.state_dict()["layer1.0.conv1.weight"])
    with pytest.raises(CheckpointError, match="resnet10t"):
        BACKBONES.build({"name": "timm", "model": "resnet10t", "weights": str(tmp_path / "none.pth")})


def test_timm_weights_that_leave_a_part_at_random_are_refused(tmp_path):
    whole = timm.create_model("resnet10t").state_dict()
    files = {
        "prefix": {f"encoder.{key}": value for key, value in whole.items()},
        "part": {key: value for key, value in whole.items() if not key.startswith("layer4")},
        "half": {key: value.half().float() for key, value in whole.items()},
    }
    for name, state in files.items():
        torch.save(state, tmp_path / f"{name}.pth")

    def build(name, **options):
        path = str(tmp_path / f"{name}.pth")
        return BACKBONES.build({"name": "timm", "model": "resnet10t", "weights": path, **options})

    for name in ("prefix", "part"):
        with pytest.raises(CheckpointError, match=rf"{name}.pth' have nothing for \d+ of its \d+ tensors"):
            build(name)
    build("part", levels=4)  # what is cut off is not missed
    build("half")
    build("half", in_channels=1)
    build("half", in_channels=4, maps=1)


def stems(name, tmp_path):
    """``build(**options)`` of a network with the same RGB weights each time, and its first convolution."""
    if name == "timm":
        reference, spec = timm.create_model("resnet10t"), {"name": "timm", "model": "resnet10t", "levels": 2}
        torch.save(reference.state_dict(), tmp_path / "w.pth")
    else:
        reference, spec = timm.create_model("vgg16", num_classes=0), {"name": name}
        torch.save({f"features.{k}": v for k, v in reference.features.state_dict().items()}, tmp_path / "w.pth")

    def build(**options):
        net = BACKBONES.build({**spec, "weights": str(tmp_path / "w.pth"), **options}).double().eval()
        return net, next(m for m in net.modules() if isinstance(m, nn.Conv2d)).weight.detach()

    return build


@pytest.mark.parametrize("name", ["timm", "dilated_vgg16"])
@torch.no_grad()
def test_pretrained_stems_for_other_channels(name, tmp_path):
    build = stems(name, tmp_path)
    rgb, weight = build()
    red, green, blue = weight.split(1, 1)
    gray = torch.rand(1, 1, 32, 24, dtype=torch.float64)
    expected = rgb(gray.expand(-1, 3, -1, -1))
    many, wide = build(in_channels=6)
    assert torch.allclose(wide, torch.cat([weight, weight], 1) / 2)
    for a, b in zip(many(gray.expand(-1, 6, -1, -1)), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max())), "equal channels respond like gray"
    single, sums = build(in_channels=1)
    assert torch.allclose(sums, red + green + blue, atol=1e-6)
    assert single.standardize.mean.flatten().tolist() == pytest.approx([sum((0.485, 0.456, 0.406)) / 3])
    four, odd = build(in_channels=4)
    assert torch.allclose(odd, 0.75 * torch.cat([weight, red], 1), atol=1e-6)
    assert four.standardize.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225, 0.229])


@pytest.mark.parametrize("name", ["timm", "dilated_vgg16"])
def test_maps_start_without_effect_and_are_trained(name, tmp_path):
    build = stems(name, tmp_path)
    rgb, _ = build()
    net, weight = build(in_channels=4, maps=1)
    assert not weight[:, 3].any()
    image, level = torch.rand(1, 3, 32, 24, dtype=torch.float64), torch.full((1, 1, 32, 24), 0.1, dtype=torch.float64)
    answer = net(torch.cat([image, level], 1))
    for a, b in zip(answer, rgb(image), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    answer[-1].square().sum().backward()
    stem = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    assert stem.weight.grad[:, 3].abs().sum() > 0
    with pytest.raises(ConfigError, match="in_channels 1 and maps 1"):
        build(in_channels=1, maps=1)


@torch.no_grad()
def test_a_stem_that_normalises_its_weights_takes_no_maps():
    """Over all input channels: zeros more would change what it makes of the image. Padding alone does no harm."""
    spec = {"name": "timm", "levels": 1, "in_channels": 4, "maps": 1}
    with pytest.raises(ConfigError, match=r"nf_resnet26.*ScaledStdConv2d.*leave out maps"):
        BACKBONES.build({**spec, "model": "nf_resnet26"})
    net = BACKBONES.build({**spec, "model": "tf_efficientnet_lite0"}).eval()
    image = torch.rand(1, 3, 32, 24)
    one, two = (net(torch.cat([image, torch.full((1, 1, 32, 24), level)], 1))[0] for level in (0.1, 0.9))
    assert torch.equal(one, two)


def test_a_stem_that_does_not_read_the_image_itself_takes_no_maps():
    with pytest.raises(ConfigError, match=r"net: its first convolution.*leave out maps"):
        add_maps("net", nn.Conv2d(12, 8, 3), 3, 1)


def test_drop_path_leaves_out_branches_in_training_only():
    net = BACKBONES.build({"name": "dilated_resnet18", "drop_path": 0.5})
    plain = BACKBONES.build({"name": "dilated_resnet18"})
    plain.load_state_dict(net.state_dict())
    rates = [m.drop_prob for m in net.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.5 * i / 7 for i in range(1, 8)])
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net.eval()(x)[-1], plain.eval()(x)[-1])
        net.train()
        for module in net.modules():  # so that only the dropped branches differ
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                nn.init.ones_(module.weight)
        answers = []
        for seed in (0, 0, 1, 2):
            torch.manual_seed(seed)
            answers.append(net(x)[-1])
    assert torch.equal(answers[0], answers[1]), "the same random state drops the same branches"
    assert not torch.equal(answers[0], answers[2]) or not torch.equal(answers[0], answers[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_path": 1.0}, r"drop_path 1.0 is not in \[0, 1\)"),
        ({"drop_path": 0.1, "levels": 1}, "no residual branches"),
        ({"in_channels": 0}, "in_channels 0"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        BACKBONES.build({"name": "timm", "model": "resnet10t", **options})
