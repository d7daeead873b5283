"""``densectx convert``: synthetic files of every published network against its layers written out in torch."""

import errno
import json
import os
import re
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F
from torchvision.models import vgg as torchvision_vgg

import densectx
from densectx.cli import main
from densectx.published.from_vgg import FEATURES, IMAGENET
from densectx.registry import MODELS

WIDTH, FC, CLASSES = 2, 8, 3

# What github fyu/dilation publishes, written down from its prototxt and json files: context layers as (name, channels
# in multiples of the classes, kernel, dilation); mean of B, G, R; the picture that a tile is; how it is enlarged.
MEANS = {
    "voc": (102.93, 111.36, 116.52),
    "camvid": (110.70313206, 108.77808759, 105.41212523),
    "kitti": (96.19429688, 95.55136972, 91.34692262),
    "cityscapes": (72.39, 82.91, 73.16),
}
CONTEXTS = {
    "front": [],
    "voc": [
        ("ct_conv1_1", 2, 3, 1),
        ("ct_conv1_2", 2, 3, 1),
        ("ct_conv2_1", 4, 3, 2),
        ("ct_conv3_1", 8, 3, 4),
        ("ct_conv4_1", 16, 3, 8),
        ("ct_conv5_1", 32, 3, 16),
        ("ct_fc1", 32, 3, 1),
        ("ct_final", 1, 1, 1),
    ],
    "camvid": [
        ("ctx_conv1_1", 1, 3, 1),
        ("ctx_conv1_2", 1, 3, 1),
        ("ctx_conv2_1", 1, 3, 2),
        ("ctx_conv3_1", 1, 3, 4),
        ("ctx_conv4_1", 1, 3, 8),
        ("ctx_conv5_1", 1, 3, 16),
        ("ctx_fc1", 1, 3, 1),
        ("ctx_final", 1, 1, 1),
    ],
    "kitti": [
        ("ctx_conv1_1", 1, 3, 1),
        ("ctx_conv1_2", 1, 3, 1),
        ("ctx_conv2_1", 1, 3, 2),
        ("ctx_conv3_1", 1, 3, 4),
        ("ctx_conv4_1", 1, 3, 8),
        ("ctx_fc1", 1, 3, 1),
        ("ctx_final", 1, 1, 1),
    ],
    "cityscapes": [
        ("ctx_conv1_1", 1, 3, 1),
        ("ctx_conv1_2", 1, 3, 1),
        ("ctx_conv2_1", 1, 3, 2),
        ("ctx_conv3_1", 1, 3, 4),
        ("ctx_conv4_1", 1, 3, 8),
        ("ctx_conv5_1", 1, 3, 16),
        ("ctx_conv6_1", 1, 3, 32),
        ("ctx_conv7_1", 1, 3, 64),
        ("ctx_fc1", 1, 3, 1),
        ("ctx_final", 1, 1, 1),
    ],
}
TILES = {
    "front": (900, 900),
    "voc": (900, 900),
    "camvid": (900, 1100),
    "kitti": (852, 1640),
    "cityscapes": (1396, 1396),
}
NETS = {
    "front": "frontend_vgg16",
    "voc": "dilation8_pascal_voc",
    "camvid": "dilation8_camvid",
    "kitti": "dilation7_kitti",
    "cityscapes": "dilation10_cityscapes",
}
FRONT = [("conv1_1", 1), ("conv1_2", 1), ("conv2_1", 2), ("conv2_2", 2)]
FRONT += [(f"conv3_{i}", 4) for i in (1, 2, 3)] + [(f"conv{s}_{i}", 8) for s in (4, 5) for i in (1, 2, 3)]


def layers_of(published, width=WIDTH, fc=FC, classes=CLASSES, seed=0):
    """{name: (weight, bias)} as a published file has them, random."""
    rng = np.random.default_rng(seed)

    def conv(c_in, out, kernel, gain=1.0):
        std = gain * np.sqrt(2 / (c_in * kernel**2))
        weight = rng.normal(0, std, (out, c_in, kernel, kernel)).astype(np.float32)
        return weight, rng.normal(0, 0.1, out).astype(np.float32)

    found, c_in = {}, 3
    for name, factor in FRONT:
        found[name] = conv(c_in, width * factor, 3, 0.02 if name == "conv1_1" else 1.0)
        c_in = width * factor
    found["fc6"], found["fc7"] = conv(c_in, fc, 7), conv(fc, fc, 1)
    found["fc-final" if published in ("voc", "front") else "final"] = conv(fc, classes, 1, 20)
    c_in = classes
    for name, factor, kernel, _ in CONTEXTS[published]:
        found[name] = conv(c_in, classes * factor, kernel)
        c_in = classes * factor
    if published == "cityscapes":
        found["ctx_upsample"] = (filler(classes),)
    return found


def filler(classes):
    """Caffe's bilinear filler of size 16, entry by entry."""
    weight = np.zeros((classes, 1, 16, 16), np.float32)
    f = np.ceil(16 / 2)
    c = (2 * f - 1 - f % 2) / (2 * f)
    for y in range(16):
        for x in range(16):
            weight[:, 0, y, x] = (1 - abs(y / f - c)) * (1 - abs(x / f - c))
    return weight


def evaluate(layers, published, picture):
    """The published ``predict.py`` for a picture smaller than a tile: (classes, H, W) probabilities."""
    weights = {name: [torch.from_numpy(a).double() for a in arrays] for name, arrays in layers.items()}
    height, width = picture.shape[:2]
    bgr = picture[..., ::-1].astype(np.float64) - MEANS["voc" if published == "front" else published]
    whole = np.pad(bgr, ((186, 186), (186, 186), (0, 0)), mode="reflect")
    rows, columns = TILES[published]
    tile = np.pad(whole, ((0, rows - whole.shape[0]), (0, columns - whole.shape[1]), (0, 0)), mode="reflect")
    x = torch.from_numpy(tile.transpose(2, 0, 1).copy())[None]
    for name, _ in FRONT:
        x = F.relu(F.conv2d(x, *weights[name], dilation=2 if name.startswith("conv5") else 1))
        if name in ("conv1_2", "conv2_2", "conv3_3"):
            x = F.max_pool2d(x, 2, 2, ceil_mode=True)
    x = F.relu(F.conv2d(x, *weights["fc6"], dilation=4))
    x = F.relu(F.conv2d(x, *weights["fc7"]))
    x = F.conv2d(x, *weights["fc-final" if published in ("voc", "front") else "final"])
    if published == "voc":
        x = F.pad(x, (33, 33, 33, 33))
    for name, _, kernel, dilation in CONTEXTS[published]:
        padding = dilation if kernel == 3 and published != "voc" else 0
        x = F.conv2d(x, *weights[name], padding=padding, dilation=dilation)
        x = x if name.endswith("final") else F.relu(x)
    if published == "cityscapes":
        x = F.conv_transpose2d(x, *weights["ctx_upsample"], stride=8, padding=4, groups=x.shape[1])
        return x.softmax(1)[0, :, :height, :width].numpy()
    return interp_map(x.softmax(1)[0].numpy(), 8, height, width)


def interp_map(probabilities, zoom, height, width):
    found = np.zeros((len(probabilities), height, width))
    for h in range(height):
        for w in range(width):
            r, c = h // zoom, w // zoom
            rt, ct = h / zoom - r, w / zoom - c
            above = (1 - ct) * probabilities[:, r, c] + ct * probabilities[:, r, c + 1]
            below = (1 - ct) * probabilities[:, r + 1, c] + ct * probabilities[:, r + 1, c + 1]
            found[:, h, w] = (1 - rt) * above + rt * below
    return found


def small(published):
    """The preset with few channels and classes."""
    config = deepcopy(MODELS.get(f"densectx/{NETS[published]}")())
    config["backbone"] |= {"width": WIDTH, "fc": FC}
    config["projection"]["channels"] = CLASSES
    for part in ("classes", "palette"):
        config["sources"]["scenes"][part] = config["sources"]["scenes"][part][:CLASSES]
    return config


@pytest.fixture
def registered():
    """The small presets as ``small_voc`` and so on."""
    for published in NETS:
        MODELS.register(f"small_{published}")(lambda published=published: small(published))
    yield
    for published in NETS:
        MODELS.unregister(f"small_{published}")


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (50, 37, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return pixels


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


@pytest.mark.parametrize(
    ("published", "form"),
    [
        ("front", {}),
        ("voc", {"old": True, "legacy": True}),
        ("voc", {"packed": False}),
        ("camvid", {"double": True}),
        ("kitti", {"old": True, "legacy": True, "packed": False}),
        ("cityscapes", {}),
    ],
)
def test_a_converted_net_answers_as_the_published_one(
    published, form, caffemodel, registered, picture, tmp_path, capsys
):
    layers = layers_of(published)
    path, out = tmp_path / "net.caffemodel", tmp_path / "net.safetensors"
    path.write_bytes(caffemodel(layers, **form))
    assert convert("caffe", path, "--net", f"small_{published}", "-o", out) == 0
    said = capsys.readouterr().out
    assert f"net: small_{published}\ntaken: conv1_1, conv1_2, conv2_1" in said
    assert "left over" not in said
    assert "fresh" not in said
    assert ("ctx_upsample is the fixed bilinear deconvolution" in said) == (published == "cityscapes")
    assert main(["predict", str(out), str(tmp_path / "picture.png"), "-o", str(tmp_path / "out"), "--raw"]) == 0
    answer = np.load(tmp_path / "out" / "segmentation" / "picture.npy")
    expected = evaluate(layers, published, picture)
    assert expected.std(axis=(1, 2)).max() > 0.01, "it says something"
    assert np.abs(answer - expected).max() < 2e-5
    best, second = np.sort(expected, axis=0)[[-1, -2]]
    classes = np.asarray(Image.open(tmp_path / "out" / "segmentation" / "picture.png"))
    clear = best - second > 1e-4
    assert clear.mean() > 0.9
    assert (classes == expected.argmax(0))[clear].all()
    colours = Image.open(tmp_path / "out" / "segmentation" / "picture.png").getpalette()[: 3 * CLASSES]
    assert colours == [v for colour in small(published)["sources"]["scenes"]["palette"] for v in colour]


@pytest.mark.parametrize("published", NETS)
def test_the_net_is_guessed_from_layers_and_classes(published, caffemodel, registered, tmp_path, capsys):
    path, out = tmp_path / "net.caffemodel", tmp_path / "net.safetensors"
    path.write_bytes(caffemodel(layers_of(published)))
    assert convert("caffe", path, "-o", out) == 0
    assert f"no --net given: its layers and classes are those of small_{published}" in capsys.readouterr().out
    assert densectx.load(out).config["context"] == small(published)["context"]


def test_other_packages_may_provide_a_built_in_name(distribute, vgg16, caffemodel, registered, tmp_path, capsys):
    """What densectx tries by itself is its own, and is not in the way of a net that the user names."""
    distribute("plug-a", {"models": {"dilation8_camvid": "Task", "frontend_vgg16": "Task", "small_kitti": "Task"}})
    path, out = tmp_path / "net.caffemodel", tmp_path / "net.safetensors"
    path.write_bytes(caffemodel(layers_of("kitti")))
    assert convert("caffe", path, "-o", out) == 0
    assert "net: small_kitti\n" in capsys.readouterr().out
    torch.save(vgg16.state_dict(), tmp_path / "vgg16.pth")
    assert convert("vgg", tmp_path / "vgg16.pth", "-o", out, "--overwrite") == 4, "it is too thin for the built-in net"
    assert "does not fit net frontend_vgg16" in capsys.readouterr().err


def change(layers, published):
    return {name: list(arrays) for name, arrays in layers_of(published).items()} | layers


def without(published, *names):
    return {name: arrays for name, arrays in layers_of(published).items() if name not in names}


CITY = layers_of("cityscapes")
BROKEN = {
    "a layer is missing": (
        "camvid",
        without("camvid", "conv3_2"),
        r"of its 48 tensors 2 missing \(conv3_2.weight, conv3_2.bias\)",
    ),
    "a bias is missing": (
        "camvid",
        change({"fc7": layers_of("camvid")["fc7"][:1]}, "camvid"),
        r"1 missing \(fc7.bias\)",
    ),
    "a wrong name": (
        "camvid",
        without("camvid", "ctx_fc1") | {"ctx_fc2": layers_of("camvid")["ctx_fc1"]},
        r"2 missing \(ctx_fc1.weight, ctx_fc1.bias\)",
    ),
    "a wrong shape": (
        "camvid",
        change({"conv1_2": (np.zeros((2, 2, 3, 5)), np.zeros(2))}, "camvid"),
        r"1 of another shape \(conv1_2.weight is 2x2x3x5, not 2x2x3x3\)",
    ),
    "other classes": ("camvid", layers_of("camvid", classes=4), r"final.weight is 4x8x1x1, not 3x8x1x1"),
    "a longer context": ("kitti", layers_of("camvid"), r"whose context has 7 layers: it also has ctx_conv5_1"),
    "another naming": ("camvid", layers_of("voc"), r"ct_conv1_1.weight is 6x3x3x3, not 3x3x3x3"),
    "a learned deconvolution": (
        "cityscapes",
        CITY | {"ctx_upsample": (CITY["ctx_upsample"][0] * 1.1,)},
        "not the fixed bilinear",
    ),
    "a small deconvolution": (
        "cityscapes",
        CITY | {"ctx_upsample": (np.ones((3, 1, 4, 4)),)},
        "ctx_upsample is 3x1x4x4",
    ),
    "numbers that are none": (
        "camvid",
        change({"fc7": (np.full((FC, FC, 1, 1), np.nan), np.zeros(FC))}, "camvid"),
        r"backbone.layers.fc7.weight has numbers that are not finite",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_fit_is_refused(case, caffemodel, registered, tmp_path, capsys):
    published, layers, said = BROKEN[case]
    path, out = tmp_path / "net.caffemodel", tmp_path / "net.safetensors"
    path.write_bytes(caffemodel(layers))
    assert convert("caffe", path, "--net", f"small_{published}", "-o", out) == 4
    error = capsys.readouterr().err
    assert error.startswith(f"densectx: error: {path}: ")
    assert re.search(said, error), error
    assert list(tmp_path.iterdir()) == [path], "nothing is left behind"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-7],
        lambda content: content[: len(content) // 2],
        lambda content: b"\xa2\x06\x80\x80\x80\x80\x08" + content,  # a length of 2^31
        lambda content: b"",
        lambda content: b"no Caffe model at all",
    ],
)
def test_damage_has_status_4(damage, caffemodel, registered, tmp_path, capsys):
    path = tmp_path / "net.caffemodel"
    path.write_bytes(damage(caffemodel(layers_of("camvid"))))
    for net in (["--net", "small_camvid"], []):
        assert convert("caffe", path, *net, "-o", tmp_path / "out.safetensors") == 4
        assert f"{path}: is damaged or no Caffe model" in capsys.readouterr().err


def test_a_file_of_the_whole_network_fills_the_front_end(caffemodel, registered, tmp_path, capsys):
    path, out = tmp_path / "net.caffemodel", tmp_path / "front.safetensors"
    path.write_bytes(caffemodel(layers_of("voc")))
    assert convert("caffe", path, "--net", "small_front", "-o", out) == 0
    assert "left over: ct_conv1_1, ct_conv1_2, ct_conv2_1" in capsys.readouterr().out
    (tmp_path / "odd.caffemodel").write_bytes(caffemodel(layers_of("voc", fc=5)))
    assert convert("caffe", tmp_path / "odd.caffemodel", "-o", tmp_path / "odd.safetensors") == 2
    assert "no known net fits it; give --net, one of dilation10_cityscapes, " in capsys.readouterr().err


def test_usage(caffemodel, registered, tmp_path, capsys):
    path, out = tmp_path / "net.caffemodel", tmp_path / "net.safetensors"
    path.write_bytes(caffemodel(layers_of("kitti")))
    net = ("--net", "small_kitti")

    def said(*arguments, status=2):
        assert convert(*arguments) == status
        return capsys.readouterr().err

    assert "invalid choice: 'cafe'" in said("cafe", path, "-o", out)
    assert "ends in .safetensors" in said("caffe", path, *net, "-o", tmp_path / "net.ckpt")
    assert "did you mean 'small_kitti'" in said("caffe", path, "--net", "small_kiti", "-o", out)
    assert "no network with the paper's front end" in said("caffe", path, "--net", "drn_d_22", "-o", out)
    assert "has no frontend_vgg16" in said("vgg", path, "--net", "drn_d_22", "-o", out)
    assert "none.caffemodel: no such file" in said("caffe", tmp_path / "none.caffemodel", *net, "-o", out, status=4)
    assert convert("caffe", path, *net, "-o", out) == 0
    before = out.read_bytes()
    assert "exists; choose another name, or give --overwrite" in said("caffe", path, *net, "-o", out)
    assert convert("caffe", path, *net, "-o", out, "--overwrite") == 0
    assert out.read_bytes() == before, "the same bytes again"
    assert "is the file that is read" in said("vgg", out, "-o", out, "--overwrite")
    with pytest.raises(SystemExit):
        convert("--help")
    assert "dilation8_pascal_voc" in capsys.readouterr().out


def test_the_file_is_a_safetensors_file_with_our_header(caffemodel, registered, tmp_path):
    path, out = tmp_path / "net.caffemodel", tmp_path / "folder" / "net.safetensors"
    layers = layers_of("kitti")
    path.write_bytes(caffemodel(layers))
    assert convert("caffe", path, "--net", "small_kitti", "-o", out) == 0
    with safe_open(out, "np") as opened:
        info = json.loads(opened.metadata()["densectx"])
        assert np.array_equal(opened.get_tensor("backbone.layers.conv4_2.weight"), layers["conv4_2"][0])
        assert np.array_equal(opened.get_tensor("context.shared.layers.12.bias"), layers["ctx_final"][1])
    assert info["format"] == 1
    assert info["model"] == small("kitti")
    assert out.stat().st_mode & 0o777 == path.stat().st_mode & 0o777
    assert sorted(p.name for p in out.parent.iterdir()) == ["net.safetensors"]


def test_a_full_disk_leaves_what_was_there(caffemodel, registered, tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "net.caffemodel", tmp_path / "net.safetensors"
    path.write_bytes(caffemodel(layers_of("kitti")))
    out.write_bytes(b"before")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert convert("caffe", path, "--net", "small_kitti", "-o", out, "--overwrite") == 8
    assert "net.safetensors: cannot be written: No space left on device" in capsys.readouterr().err
    assert out.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.caffemodel", "net.safetensors"]


# VGG-16 of ImageNet ---------------------------------------------------------------------------------------------------

STAGES = [WIDTH, WIDTH, "M", *[2 * WIDTH] * 2, "M", *[4 * WIDTH] * 3, "M", *[8 * WIDTH] * 3, "M", *[8 * WIDTH] * 3, "M"]


@pytest.fixture
def vgg16():
    """torchvision's VGG-16, thin; its keys and layout are theirs."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = torchvision_vgg.VGG(torch.nn.Identity(), num_classes=5)
    net.features = torchvision_vgg.make_layers(STAGES)
    net.classifier[0] = torch.nn.Linear(8 * WIDTH * 49, FC)
    net.classifier[3], net.classifier[6] = torch.nn.Linear(FC, FC), torch.nn.Linear(FC, 5)
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.normal_(layer.bias, std=0.1)
    return net.eval()


def answers(backbone, x):
    """{layer: its output behind the ReLU} of a front end for a picture with its surroundings."""
    found = {}
    handles = [
        layer.register_forward_hook(lambda module, args, y, name=name: found.update({name: y.relu()}))
        for name, layer in backbone.layers.items()
    ]
    backbone.valid(x)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def test_torchvisions_vgg_answers_in_the_front_end_as_in_torchvision(vgg16, registered, tmp_path, capsys):
    torch.save(vgg16.state_dict(), tmp_path / "vgg16.pth")
    assert convert("vgg", tmp_path / "vgg16.pth", "--net", "small_front", "-o", tmp_path / "v.safetensors") == 0
    said = capsys.readouterr().out
    assert "taken: conv1_1, conv1_2, conv2_1" in said
    assert "fresh: projection (initialised as the net starts)\nleft over: classifier.6\n" in said
    assert "conv1_1 is changed from torchvision's and timm's RGB to the net's BGR" in said
    front = densectx.load(tmp_path / "v.safetensors").backbone.double()
    vgg16.double()
    picture = torch.rand(1, 3, 410, 418, dtype=torch.float64)
    standardised = (picture - torch.tensor(IMAGENET.mean).view(3, 1, 1)) / torch.tensor(IMAGENET.std).view(3, 1, 1)
    # padded and valid convolutions see pools in the same phase from pixel 6 on, which is cell 6 behind conv4_3
    found = answers(front, picture[..., 6:, 6:])
    theirs = vgg16.features[:23](standardised)
    mine = found["conv4_3"][..., :38, :38]
    assert (mine - theirs[..., 6:44, 6:44]).abs().max() < 1e-5 * theirs.abs().max()
    for index, name in ((24, "conv5_1"), (26, "conv5_2"), (28, "conv5_3")):
        assert torch.equal(front.layers[name].weight, vgg16.features[index].weight)
    # fc6 sees every fourth of 25 x 25 cells, in the order in which torchvision flattens 7 x 7
    seen = found["conv5_3"][..., :25:4, :25:4]
    hidden = vgg16.classifier[:2](seen.flatten(1))
    assert torch.allclose(found["fc6"][..., 0, 0], hidden, atol=1e-9)
    assert torch.allclose(found["fc7"][..., 0, 0], vgg16.classifier[3:5](hidden), atol=1e-9)


def test_timm_and_safetensors_and_caffe_files_give_the_same_net(vgg16, caffemodel, registered, tmp_path):
    state = vgg16.state_dict()
    timm = {key: value for key, value in state.items() if key.startswith("features.")}
    for index, name in ((0, "fc1"), (3, "fc2")):
        weight, bias = state[f"classifier.{index}.weight"], state[f"classifier.{index}.bias"]
        timm[f"pre_logits.{name}.weight"] = weight.view(FC, -1, *((7, 7) if index == 0 else (1, 1)))
        timm[f"pre_logits.{name}.bias"] = bias
    torch.save({"state_dict": timm | {"head.fc.weight": torch.zeros(3, FC)}}, tmp_path / "timm.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in timm.items()}, tmp_path / "timm.safetensors")
    names = [name for name, _ in FRONT]
    indices = [i for i, layer in enumerate(vgg16.features) if isinstance(layer, torch.nn.Conv2d)]
    layers = {
        name: (state[f"features.{i}.weight"].numpy(), state[f"features.{i}.bias"].numpy())
        for name, i in zip(names, indices, strict=True)
    }
    layers |= {
        name: (state[f"classifier.{i}.weight"].numpy(), state[f"classifier.{i}.bias"].numpy())
        for name, i in (("fc6", 0), ("fc7", 3), ("fc8", 6))
    }
    (tmp_path / "vgg.caffemodel").write_bytes(caffemodel(layers, old=True, legacy=True))
    nets = {}
    for name in ("timm.pth", "old.pth", "timm.safetensors", "vgg.caffemodel"):
        out = tmp_path / f"from-{name}.safetensors"
        assert convert("vgg", tmp_path / name, "--net", "small_voc", "-o", out) == 0
        nets[name] = densectx.load(out).state_dict()
    caffe = nets.pop("vgg.caffemodel")
    for other in nets.values():
        for key, value in nets["timm.pth"].items():
            assert torch.equal(value, other[key]), key
            assert torch.equal(value, caffe[key]) or key.startswith("backbone.layers.conv1_1"), key
    assert torch.equal(caffe["backbone.layers.conv1_1.weight"], state["features.0.weight"]), "BGR as it is"


def test_a_classifier_of_nan_leaves_the_features(vgg16, registered, tmp_path, capsys):
    for parameter in vgg16.classifier.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    torch.save(vgg16.state_dict(), tmp_path / "features.pth")
    assert convert("vgg", tmp_path / "features.pth", "--net", "small_front", "-o", tmp_path / "v.safetensors") == 0
    said = capsys.readouterr().out
    assert "fresh: backbone.layers.fc6, backbone.layers.fc7, projection" in said
    assert "its classifier is NaN" in said
    front = densectx.load(tmp_path / "v.safetensors").backbone
    x = torch.rand(1, 3, 9, 9)
    mean = torch.tensor(FEATURES.mean).view(3, 1, 1)
    expected = vgg16.features[0].weight.new_tensor(0) + F.conv2d((x - mean) * 255, *vgg16.features[0].parameters())
    got = front.layers["conv1_1"](x.flip(1) * 255 - front.mean)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert front.layers["fc6"].weight.std() > 0


def test_a_net_that_pads_with_zeros_differs_at_the_border_and_says_so(vgg16, registered, tmp_path, capsys):
    config = small("front")
    config["backbone"] |= {"padding": "each", "tile": None}
    MODELS.register("small_padded")(lambda: config)
    torch.save(vgg16.state_dict(), tmp_path / "vgg16.pth")
    try:
        assert convert("vgg", tmp_path / "vgg16.pth", "--net", "small_padded", "-o", tmp_path / "v.safetensors") == 0
    finally:
        MODELS.unregister("small_padded")
    assert "conv1_1 differs at the very border" in capsys.readouterr().out


def test_vgg_files_that_do_not_fit(vgg16, registered, tmp_path, capsys):
    state = vgg16.state_dict()
    cases = {
        "missing.pth": ({k: v for k, v in state.items() if k != "features.21.bias"}, "1 missing (conv4_3.bias)"),
        "gray.pth": (state | {"features.0.weight": torch.zeros(2, 1, 3, 3)}, "conv1_1.weight is 2x1x3x3, not 2x3x3x3"),
        "wide.pth": (state | {"classifier.3.weight": torch.zeros(8, 9)}, "fc7.weight is 8x9, not 8x8x1x1"),
        "none.pth": ([1, 2], "holds a list without tensors"),
        "text.pth": (b"text", "cannot be read as a file of torch"),
        "bad.safetensors": (b"text of some length", "cannot be read as safetensors"),
    }
    for name, (content, said) in cases.items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        assert convert("vgg", path, "--net", "small_front", "-o", tmp_path / "v.safetensors") == 4
        error = capsys.readouterr().err
        assert f"{path}: " in error
        assert said in error


# full size ------------------------------------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
import densectx.published.convert
from densectx.cli import main
def peak():  # of this process; getrusage also knows the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
assert main(["convert", *sys.argv[1:]]) == 0
print(before, peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_memory_of_a_full_network_is_that_of_its_largest_layer(old, caffemodel, tmp_path):
    """141 million weights, 565 MB; fc6 alone has 411 MB."""
    path, out = tmp_path / "voc.caffemodel", tmp_path / "voc.safetensors"
    layers = layers_of("voc", width=64, fc=4096, classes=21)
    assert sum(a.size for arrays in layers.values() for a in arrays) == 134346581 + 6803139
    with path.open("wb") as file:
        for name, arrays in layers.items():
            file.write(caffemodel({name: arrays}, old=old))
    command = [sys.executable, "-c", PEAK, "caffe", str(path), "--net", "dilation8_pascal_voc", "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split()[-2:])
    assert peak - before < 1.2 * 4 * layers["fc6"][0].size / 1024, f"{before} kB before, {peak} kB at most"
    with safe_open(out, "np") as opened:
        for name, key in (("fc6", "backbone.layers.fc6"), ("ct_fc1", "context.shared.layers.12")):
            assert np.array_equal(opened.get_tensor(f"{key}.weight"), layers[name][0])
    path.unlink()  # a gigabyte that pytest would keep
    out.unlink()


@pytest.mark.slow
def test_torchvisions_vgg16_fills_the_front_end(tmp_path, capsys):
    state = torchvision_vgg.vgg16().state_dict()
    torch.save(state, tmp_path / "vgg16.pth")
    assert convert("vgg", tmp_path / "vgg16.pth", "-o", tmp_path / "v.safetensors") == 0
    assert "134,346,581 parameters" in capsys.readouterr().out
    with safe_open(tmp_path / "v.safetensors", "pt") as opened:
        fc6 = opened.get_tensor("backbone.layers.fc6.weight")
    assert torch.equal(fc6, state["classifier.0.weight"].view(4096, 512, 7, 7))
    (tmp_path / "vgg16.pth").unlink()
    (tmp_path / "v.safetensors").unlink()
