"""Dilated residual networks: published key names, parameter counts, the published files, the contract of backbones."""

import re

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import densectx
from densectx.backbones.drn_network import ARCHS, Network
from densectx.cli import main
from densectx.errors import CheckpointError, ConfigError
from densectx.nn.norm import PerInput, set_norm
from densectx.registry import BACKBONES, MODELS
from densectx.testing import check_backbone

PARAMETERS = {
    "a_50": 25_557_032,
    "c_26": 21_126_584,
    "c_42": 31_234_744,
    "c_58": 41_591_608,
    "d_22": 16_393_752,
    "d_38": 26_501_912,
    "d_54": 35_809_176,
    "d_105": 54_801_304,
}
"""With ``fc``, measured on the published code."""

BLOCKS = {
    "c_26": (1, 1, 2, 2, 2, 2, 1, 1),
    "c_42": (1, 1, 3, 4, 6, 3, 1, 1),
    "c_58": (1, 1, 3, 4, 6, 3, 1, 1),
    "d_22": (1, 1, 2, 2, 2, 2, 1, 1),
    "d_38": (1, 1, 3, 4, 6, 3, 1, 1),
    "d_54": (1, 1, 3, 4, 6, 3, 1, 1),
    "d_105": (1, 1, 3, 4, 23, 3, 1, 1),
}
BOTTLENECK = {"c_58", "d_54", "d_105"}


def published(arch, classes=1000):
    """{key: shape} of a published classifier of family C or D, from the published layout."""
    found = {}

    def conv(name, out, c_in, kernel):
        found[f"{name}.weight"] = (out, c_in, kernel, kernel)

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{part}"] = (channels,)
        found[f"{name}.num_batches_tracked"] = ()

    def block(name, c_in, width, stride, wide):
        out = 4 * width if wide else width
        sizes = [(width, c_in, 1), (width, width, 3), (out, width, 1)] if wide else [(width, c_in, 3), (out, width, 3)]
        for number, (a, b, kernel) in enumerate(sizes, 1):
            conv(f"{name}.conv{number}", a, b, kernel)
            norm(f"{name}.bn{number}", a)
        if stride != 1 or c_in != out:
            conv(f"{name}.downsample.0", out, c_in, 1)
            norm(f"{name}.downsample.1", out)
        return out

    if arch.startswith("c"):
        conv("conv1", 16, 3, 7)
        norm("bn1", 16)
    else:
        conv("layer0.0", 16, 3, 7)
        norm("layer0.1", 16)
    c_in = 16
    for layer, (count, width) in enumerate(zip(BLOCKS[arch], (16, 32, 64, 128, 256, 512, 512, 512), strict=True), 1):
        for number in range(count):
            stride = 2 if layer in (2, 3, 4) and number == 0 else 1
            if layer in (1, 2, 7, 8) and arch.startswith("d"):
                conv(f"layer{layer}.{3 * number}", width, c_in, 3)
                norm(f"layer{layer}.{3 * number + 1}", width)
                c_in = width
            else:
                c_in = block(f"layer{layer}.{number}", c_in, width, stride, arch in BOTTLENECK and 3 <= layer <= 6)
    found["fc.weight"], found["fc.bias"] = (classes, 512, 1, 1), (classes,)
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_parameters_of_the_published_classifiers(arch):
    with torch.device("meta"):
        net = Network(arch, classes=1000)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[arch]


@pytest.mark.parametrize("arch", BLOCKS)
def test_published_keys_and_shapes(arch):
    with torch.device("meta"):
        state = Network(arch, classes=1000).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published(arch)


@torch.no_grad()
def test_a_50_loads_torchvisions_resnet50_strictly():
    reference = torchvision.models.resnet50().eval()
    net = Network("a_50", classes=1000).eval()
    assert len(reference.state_dict()) == 320
    net.load_state_dict(reference.state_dict(), strict=True)
    x = torch.rand(1, 3, 64, 96)
    dilated = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    dilated.load_state_dict(reference.state_dict())
    for block in (dilated.layer3[0], dilated.layer4[0]):  # published: the first block of a layer is not dilated
        block.conv2.dilation, block.conv2.padding = (1, 1), (1, 1)
    assert torch.allclose(net.classify(x), dilated(x), atol=1e-5)
    assert net.classify(x).shape == (1, 1000)


def arch_c_or_d(state, arch, x):
    """A network of family C or D written out: {layer: map}."""

    def norm(x, name):
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    def conv(x, name, stride=1, dilation=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation)

    def block(x, name, stride, dilation, wide, residual):
        y = F.relu(norm(conv(x, f"{name}.conv1", 1 if wide else stride, 1 if wide else dilation), f"{name}.bn1"))
        y = norm(conv(y, f"{name}.conv2", stride if wide else 1, dilation), f"{name}.bn2")
        if wide:
            y = norm(conv(F.relu(y), f"{name}.conv3"), f"{name}.bn3")
        if residual and f"{name}.downsample.0.weight" in state:
            x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        return F.relu(y + x if residual else y)

    first = ("conv1", "bn1") if arch.startswith("c") else ("layer0.0", "layer0.1")
    x = F.relu(norm(conv(x, first[0]), first[1]))
    found = {}
    for layer, (count, dilation) in enumerate(zip(BLOCKS[arch], (1, 1, 1, 1, 2, 4, 2, 1), strict=True), 1):
        for number in range(count):
            stride = 2 if layer in (2, 3, 4) and number == 0 else 1
            if layer in (1, 2, 7, 8) and arch.startswith("d"):
                x = conv(x, f"layer{layer}.{3 * number}", stride, dilation)
                x = F.relu(norm(x, f"layer{layer}.{3 * number + 1}"))
            else:
                wide = arch in BOTTLENECK and 3 <= layer <= 6
                x = block(x, f"layer{layer}.{number}", stride, dilation, wide, layer < 7)
        found[layer] = x
    return found


def randomised(net):
    """Batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            nn.init.uniform_(module.weight, 0.5, 1, generator=generator)
    return net


@torch.no_grad()
@pytest.mark.parametrize("arch", ["c_26", "c_58", "d_22", "d_54"])
def test_levels_are_those_of_the_network_written_out(arch):
    net = randomised(BACKBONES.build(f"drn_{arch}")).double().eval()
    x = torch.rand(1, 3, 48, 40, dtype=torch.float64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = arch_c_or_d(net.net.state_dict(), arch, (x - mean) / std)
    levels = net(x)
    for layer, level in zip((1, 2, 3, 4, 8), levels, strict=True):
        assert torch.allclose(level, expected[layer], rtol=1e-5, atol=1e-6 * float(expected[layer].abs().max()))
    assert [tuple(level.shape[1:]) for level in levels] == [(c, 48 // s, 40 // s) for c, s in net.features]


SLOW = [pytest.param(f"drn_{arch}", marks=pytest.mark.slow) for arch in ARCHS if arch != "c_26"]


@pytest.mark.parametrize("name", ["drn_c_26", *SLOW])
def test_contract(name):
    check_backbone(name)


def test_the_unused_shortcut_of_c_58_is_loaded_and_never_trained():
    with torch.device("meta"):
        net = Network("c_58")
    frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    assert frozen == ["layer7.0.downsample.0.weight", "layer7.0.downsample.1.weight", "layer7.0.downsample.1.bias"]
    norms = [name for name, part in net.named_modules() if isinstance(part, nn.BatchNorm2d)]
    set_norm(net, "per_input", ["a", "b"])
    assert sum(isinstance(part, PerInput) for part in net.modules()) == len(norms)
    assert not any(name.startswith("layer7.0.downsample") for name in norms)


def test_options():
    net = BACKBONES.build({"name": "drn", "in_channels": 4, "maps": 1})
    assert not net.net.stem().weight[:, 3].any()
    assert net.standardize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406, 0])
    for options, said in (
        ({"arch": "d_23"}, "arch: expected 'a_50' or 'c_26'"),
        ({"mean": [0.5]}, "expected three numbers"),
        ({"std": [1, 1, 0]}, "std positive"),
    ):
        with pytest.raises(ConfigError, match=said):
            BACKBONES.build({"name": "drn", **options})


# published files ------------------------------------------------------------------------------------------------------


def classifier(arch, seed=0):
    torch.manual_seed(seed)
    return {key: value.detach() for key, value in randomised_network(arch).state_dict().items()}


@torch.no_grad()
def randomised_network(arch):
    return randomised(Network(arch, classes=10))


def segmentation(arch, state, classes=19):
    """The state dict of a published segmentation network: the classifier's children but the last two, numbered."""
    children = ["conv1", "bn1", "relu", "maxpool"] if arch == "a_50" else ["conv1", "bn1", "relu"]
    children = ["layer0"] if arch.startswith("d") else children
    children += [f"layer{i}" for i in range(1, 5 if arch == "a_50" else 9)]
    found = {}
    for key, value in state.items():
        name, _, rest = key.partition(".")
        if name != "fc":
            found[f"base.{children.index(name)}.{rest}"] = value
    channels = 2048 if arch == "a_50" else 512
    found["seg.weight"], found["seg.bias"] = torch.randn(classes, channels, 1, 1) * 0.05, torch.randn(classes)
    line = 1 - (torch.arange(16) / 8 - 15 / 16).abs()
    found["up.weight"] = (line[:, None] * line).expand(classes, 1, 16, 16).clone()
    return found


def convert(path, out, *arguments):
    return main(["convert", "drn", str(path), "-o", str(out), *arguments])


@torch.no_grad()
@pytest.mark.parametrize(("arch", "parallel"), [("a_50", False), ("c_26", False), ("d_22", True)])
def test_segmentation_files(arch, parallel, tmp_path, capsys):
    state = segmentation(arch, classifier(arch))
    path, out = tmp_path / "drn.pth", tmp_path / "drn.safetensors"
    saved = {f"module.{key}": value for key, value in state.items()} if parallel else state
    torch.save({"epoch": 3, "arch": arch, "state_dict": saved, "best_prec1": 0.5} if parallel else saved, path)
    assert convert(path, out) == 0
    said = capsys.readouterr().out
    assert f"net: drn_{arch}\n" in said
    assert "layer4, " in said
    assert "up is the fixed bilinear deconvolution" in said
    assert "fresh" not in said
    assert "left over" not in said
    model = densectx.load(out)
    image = torch.rand(3, 40, 56)
    mean = torch.tensor([0.290101, 0.328081, 0.286964]).view(3, 1, 1)
    std = torch.tensor([0.182954, 0.186566, 0.184475]).view(3, 1, 1)
    x = ((image - mean) / std)[None]
    if arch == "a_50":
        trunk = Network(arch).eval()
        children = dict(trunk.named_children())
        for number, name in enumerate(children):
            part = {k.removeprefix(f"base.{number}."): v for k, v in state.items() if k.startswith(f"base.{number}.")}
            children[name].load_state_dict(part)
        y = nn.Sequential(*children.values())(x)
    else:
        names = ["conv1", "bn1", "relu"] if arch == "c_26" else ["layer0"]
        names += [f"layer{i}" for i in range(1, 9)]
        own = {re.sub(r"^base\.(\d+)", lambda m: names[int(m[1])], key): value for key, value in state.items()}
        y = arch_c_or_d(own, arch, x)[8]
    y = F.conv2d(y, state["seg.weight"], state["seg.bias"])
    y = F.conv_transpose2d(y, state["up.weight"], stride=8, padding=4, groups=19).softmax(1)[0]
    answer = model.predict(image)["segmentation"]
    assert y.std((1, 2)).max() > 1e-3, "it says something"
    assert torch.allclose(answer, y, atol=1e-4)


@torch.no_grad()
def test_classifiers(tmp_path, capsys, distribute):
    distribute("plug-a", {"models": {"drn_a_50": "Task", "drn_c_26": "Task"}})  # not asked for by anybody
    state = classifier("c_26")
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}  # as published
    torch.save(old, tmp_path / "drn_c_26.pth")
    assert convert(tmp_path / "drn_c_26.pth", tmp_path / "out.safetensors") == 0
    said = capsys.readouterr().out
    assert "net: drn_c_26\n" in said
    assert "fresh: projection (initialised as the net starts)\nleft over: fc.weight, fc.bias\n" in said
    assert "no --net given: its names and shapes are those of drn_c_26" in said
    model = densectx.load(tmp_path / "out.safetensors")
    assert model.config["backbone"]["mean"] == [0.485, 0.456, 0.406]
    assert model.projection.weight.std().item() == pytest.approx(np.sqrt(2 / 19), rel=0.1)
    built = BACKBONES.build({"name": "drn_c_26", "weights": str(tmp_path / "drn_c_26.pth")}).eval()
    x = torch.rand(1, 3, 32, 32)
    for a, b in zip(built(x), model.backbone(x), strict=True):
        assert torch.equal(a, b)


def thin(tensor):
    """One number in the shape of a tensor: a small file."""
    return tensor.flatten()[:1].clone().reshape((1,) * tensor.ndim).expand(tensor.shape)


def test_files_that_do_not_fit(tmp_path, capsys):
    state = classifier("d_22")
    deep = {key.replace("layer5.1", "layer5.2"): value for key, value in state.items() if "layer5.1" in key}
    up = segmentation("d_22", state)
    nets = ("--net", "drn_d_22")
    cases = {
        "missing": (
            {k: v for k, v in state.items() if k != "layer3.0.bn1.weight"},
            nets,
            "1 missing (layer3.0.bn1.weight)",
        ),
        "shape": (
            state | {"layer0.0.weight": torch.zeros(16, 1, 7, 7)},
            nets,
            "layer0.0.weight is 16x1x7x7, not 16x3x7x7",
        ),
        "number": (
            {k: v for k, v in up.items() if k != "base.3.0.bn1.weight"},
            nets,
            "1 missing (base.3.0.bn1.weight)",
        ),
        "deep": (state | deep, nets, "is of another network than drn_d_22: it also has"),
        "other": (state, ("--net", "drn_d_38"), "missing (layer3.2.conv1.weight"),
        "up": (up | {"up.weight": up["up.weight"] * 2}, nets, "up.weight is not the fixed bilinear"),
        "classes": (segmentation("d_22", state, classes=11), nets, "seg.weight is 11x512x1x1, not 19x512x1x1"),
        "none": ({"fc.weight": torch.zeros(3, 3)}, (), "fits none of drn_a_50, drn_c_26"),
        "nan": (
            state | {"layer0.1.bias": torch.full((16,), torch.nan)},
            nets,
            "backbone.net.layer0.1.bias has numbers that",
        ),
    }
    for name, (content, arguments, said) in cases.items():
        path, out = tmp_path / f"{name}.pth", tmp_path / f"{name}.safetensors"
        torch.save({key: value if "up." in key else thin(value) for key, value in content.items()}, path)
        assert convert(path, out, *arguments) == 4, name
        error = capsys.readouterr().err
        assert f"{path}: " in error
        assert said in error
        assert not out.exists()
    assert convert(path, out, "--net", "dilation7_kitti") == 2
    assert "--net dilation7_kitti: its backbone is no DRN" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"deep\.pth' do not fit drn_d_22: .*layer5\.2"):
        BACKBONES.build({"name": "drn_d_22", "weights": str(tmp_path / "deep.pth")})


@pytest.mark.parametrize("arch", ARCHS)
def test_presets_are_the_segmentation_networks(arch):
    config = MODELS.get(f"drn_{arch}")()
    assert config["backbone"] == {
        "name": f"drn_{arch}",
        "mean": [0.290101, 0.328081, 0.286964],
        "std": [0.182954, 0.186566, 0.184475],
    }
    info = config["sources"]["scenes"]
    assert (len(info["classes"]), info["classes"][0], info["palette"][0]) == (19, "road", [128, 64, 128])
