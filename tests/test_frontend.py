"""The front end of Yu & Koltun, its margin, the ways of upsampling, and pictures with their surroundings."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from densectx.backbones.frontend import FrontEndVGG16
from densectx.errors import ConfigError
from densectx.model import DenseModel
from densectx.nn.resize import deconvolution, interp_map, reflect101, upsample
from densectx.published import dilation
from densectx.types import SourceInfo

NETS = ("frontend_vgg16", "dilation8_pascal_voc", "dilation8_camvid", "dilation7_kitti", "dilation10_cityscapes")


# section 1 of the paper's layer list ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "cells"), [(500, 16), (628, 32), (852, 60), (900, 66), (1100, 91), (1396, 128)])
def test_valid_convolutions_leave_the_published_number_of_cells(size, cells):
    net = FrontEndVGG16(width=1, fc=1)
    assert net.valid(torch.zeros(1, 3, size, 380))[0].shape == (1, 1, cells, 1)


def test_pools_round_up_as_caffes_do():
    net = FrontEndVGG16(width=1, fc=1)
    assert net.valid(torch.zeros(1, 3, 380, 1640))[0].shape == (1, 1, 1, 159)


@pytest.mark.parametrize(
    ("name", "front", "context"),
    [
        ("frontend_vgg16", 134_346_581, 0),
        ("dilation8_pascal_voc", 134_346_581, 6_803_139),
        ("dilation8_camvid", 134_305_611, 7_832),
        ("dilation7_kitti", 134_305_611, 6_732),
        ("dilation10_cityscapes", 134_338_387, 29_792),
    ],
)
def test_parameters_are_the_published_ones(name, front, context, thin):
    model = thin(name, width=64, fc=4096, device="meta")
    assert sum(p.numel() for part in (model.backbone, model.projection) for p in part.parameters()) == front
    assert sum(p.numel() for p in model.context.parameters()) == context
    assert sum(p.numel() for p in model.parameters()) == front + context


def test_layers_are_those_of_the_paper():
    """Against the list written out, on a picture mirrored by numpy."""
    torch.manual_seed(0)
    net = FrontEndVGG16(mean=(1.0, 20.0, 100.0), width=2, fc=3).double().eval()
    weights = net.state_dict()
    assert all(not key.startswith("mean") for key in weights)
    picture = torch.rand(3, 24, 40, dtype=torch.float64)
    x = np.pad(picture.numpy(), ((0, 0), (186, 186), (186, 186)), mode="reflect")[::-1].copy() * 255
    x = torch.from_numpy(x - np.array([1.0, 20.0, 100.0])[:, None, None])[None]
    for names, dilation_, pool in (
        (("conv1_1", "conv1_2"), 1, True),
        (("conv2_1", "conv2_2"), 1, True),
        (("conv3_1", "conv3_2", "conv3_3"), 1, True),
        (("conv4_1", "conv4_2", "conv4_3"), 1, False),
        (("conv5_1", "conv5_2", "conv5_3"), 2, False),
        (("fc6",), 4, False),
        (("fc7",), 1, False),
    ):
        for name in names:
            x = F.conv2d(x, weights[f"layers.{name}.weight"], weights[f"layers.{name}.bias"], dilation=dilation_)
            x = x.clamp_min(0)
        if pool:
            x = F.max_pool2d(x, 2, ceil_mode=True)
    torch.testing.assert_close(net(picture[None])[0], x, rtol=1e-12, atol=1e-12)
    assert x.shape == (1, 3, 3, 5)


def test_padding_each_has_the_same_weights_and_agrees_far_from_borders():
    torch.manual_seed(0)
    margin, each = (FrontEndVGG16(mean=(0, 0, 0), width=2, fc=3, padding=p).double().eval() for p in ("margin", "each"))
    each.load_state_dict(margin.state_dict())
    x = torch.rand(1, 3, 400, 408, dtype=torch.float64)
    a, b = margin(x)[0], each(x)[0]
    assert a.shape == b.shape == (1, 3, 50, 51)
    # cell i of the one sees the pixels around 8 i + 3.5, of the other too: "same" padding keeps the centres
    inner = (..., slice(24, 26), slice(24, 27))
    torch.testing.assert_close(a[inner], b[inner], rtol=1e-10, atol=1e-10)


def test_two_tiles_a_multiple_of_the_stride_apart_equal_the_whole():
    torch.manual_seed(0)
    net = FrontEndVGG16(width=2, fc=3).double().eval()
    x = torch.rand(1, 3, 388, 484, dtype=torch.float64)
    whole = net.valid(x)[0]
    parts = [net.valid(x[..., left : left + 436])[0] for left in (0, 48)]
    torch.testing.assert_close(torch.cat([parts[0][..., :6], parts[1]], -1), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"padding": "same"}, "padding"),
        ({"width": 0}, "width"),
        ({"mean": [1, 2]}, "mean"),
        ({"tile": [900]}, "tile"),
        ({"tile": [372, 900]}, "tile"),
        ({"tile": [900, 900], "padding": "each"}, "tile"),
    ],
)
def test_options_that_cannot_work(options, said):
    with pytest.raises(ConfigError, match=said):
        FrontEndVGG16(**options)


# surroundings ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("N07")
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.lists(st.integers(0, 20), min_size=4, max_size=4))
def test_reflect101_is_numpys_reflect_at_every_size(height, width, margins):
    top, bottom, left, right = margins
    x = torch.rand(2, height, width, dtype=torch.float64)
    expected = np.pad(x.numpy(), ((0, 0), (top, bottom), (left, right)), mode="reflect")
    assert np.array_equal(reflect101(x, *margins).numpy(), expected)


def test_reflect101_cuts_off_what_is_negative():
    x = torch.rand(1, 9, 8)
    assert torch.equal(reflect101(x, -2, -1, -3, 0), x[:, 2:-1, 3:])


def test_a_model_sees_the_surroundings_that_it_is_given(thin):
    torch.manual_seed(0)
    model = thin("dilation8_camvid").double()
    scene = torch.rand(1, 3, 500, 480, dtype=torch.float64)
    middle = scene[..., 186:-186, 186:-186]  # 128 x 108: not a multiple of 8 on one side
    real = model({"segmentation": scene}, {"segmentation": 186})["segmentation"]
    assert real.shape == (1, 11, 128, 108)
    mirrored = model({"segmentation": middle})["segmentation"]
    assert (real - mirrored).abs().max() > 1e-3
    middle = middle[..., :104]
    mirrored = model({"segmentation": middle})["segmentation"]
    made_up = torch.from_numpy(np.pad(middle.numpy(), ((0, 0), (0, 0), (186, 186), (186, 186)), mode="reflect"))
    torch.testing.assert_close(model({"segmentation": made_up}, {"segmentation": 186})["segmentation"], mirrored)


def test_more_surroundings_than_needed_change_nothing_and_fewer_are_mirrored(thin):
    torch.manual_seed(0)
    model = thin("dilation8_camvid").double()
    scene = torch.rand(1, 3, 464, 472, dtype=torch.float64)
    enough = model({"segmentation": scene[..., 14:-14, 14:-14]}, {"segmentation": 186})["segmentation"]
    more = model({"segmentation": scene}, {"segmentation": 200})["segmentation"]
    assert torch.equal(enough, more)
    fewer = model({"segmentation": scene[..., 180:-180, 180:-180]}, {"segmentation": 20})["segmentation"]
    assert fewer.shape == more.shape


def test_to_other_backbones_surroundings_are_part_of_the_picture():
    torch.manual_seed(0)
    config = {
        "backbone": {"name": "plain", "width": 8},
        "projection": {"channels": 8},
        "context": {"name": "basic", "dilations": [1, 2]},
        "tasks": {
            "sr": {"name": "super_resolution", "source": "x", "scale": 2, "head": {"name": "decoder", "width": 8}}
        },
    }
    model = DenseModel.from_config(config, {"x": SourceInfo()}).eval()
    x = torch.rand(1, 3, 30, 26)
    whole, part = model({"sr": x})["sr"], model({"sr": x}, {"sr": 5})["sr"]
    assert torch.equal(part, whole[..., 10:-10, 10:-10])


# upsampling (T11) -----------------------------------------------------------------------------------------------------


@pytest.mark.fault("N07")
def test_interp_map_is_the_published_loop():
    maps = torch.rand(1, 3, 7, 9, dtype=torch.float64)
    zoomed = interp_map(maps, 8)[0].numpy()
    prob = maps[0].numpy()
    for h in range(6 * 8):
        for w in range(8 * 8):
            r, c, rt, ct = h // 8, w // 8, h / 8 - h // 8, w / 8 - w // 8
            v0 = rt * prob[:, r + 1, c] + (1 - rt) * prob[:, r, c]
            v1 = rt * prob[:, r + 1, c + 1] + (1 - rt) * prob[:, r, c + 1]
            assert np.allclose(zoomed[:, h, w], (1 - ct) * v0 + ct * v1, rtol=0, atol=1e-14)
    assert np.allclose(zoomed[:, 48:], zoomed[:, 48:49], rtol=0, atol=1e-14)  # behind the last cell


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_the_fixed_deconvolution_is_bilinear_and_fades_at_the_border(factor):
    x = torch.rand(2, 3, 5, 6, dtype=torch.float64)
    faded, bilinear, edge = deconvolution(x, factor), upsample(x, factor), factor // 2
    assert faded.shape == bilinear.shape
    inner = (..., slice(edge, -edge), slice(edge, -edge))
    torch.testing.assert_close(faded[inner], bilinear[inner], rtol=0, atol=1e-15)
    assert (faded[..., 0, edge:-edge] < bilinear[..., 0, edge:-edge]).all()
    padded = deconvolution(F.pad(x, (1, 1, 1, 1), mode="replicate"), factor)
    torch.testing.assert_close(padded[..., factor:-factor, factor:-factor], bilinear, rtol=0, atol=1e-15)


def test_interp_map_answers_with_interpolated_probabilities_and_trains_on_the_cells(thin):
    torch.manual_seed(0)
    model = thin("dilation8_camvid").double()
    x = torch.rand(1, 3, 40, 48, dtype=torch.float64)
    scores = model.context["shared"](model.projection(model.backbone(x)[-1])).detach().requires_grad_()
    output = model.task("segmentation").head([scores], x)
    probabilities = model.task("segmentation").postprocess(output, x)
    torch.testing.assert_close(probabilities, interp_map(scores.softmax(1), 8), rtol=1e-12, atol=1e-14)
    labels = torch.randint(0, 11, (1, 5, 6))
    F.cross_entropy(output[..., ::8, ::8], labels).backward()
    ours = scores.grad.clone()
    scores.grad = None
    F.cross_entropy(scores, labels).backward()  # the paper's: softmax loss on labels at stride 8
    torch.testing.assert_close(ours, scores.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_the_published_networks_answer_at_any_size(name, thin):
    model = thin(name)
    for size in ((1, 1), (9, 17), (40, 33)):
        answer = model.predict(torch.rand(3, *size))["segmentation"]
        assert answer.shape[1:] == size
        torch.testing.assert_close(answer.sum(0), torch.ones(size), rtol=0, atol=1e-5)


def test_final_starts_small_as_published(thin):
    weight = thin("dilation8_camvid", fc=4096).projection.weight
    assert 0.00095 < weight.std().item() < 0.00105


def test_classes_and_colours_of_the_road_scenes():
    info = SourceInfo.from_config(dilation.dilation7_kitti()["sources"]["scenes"])
    assert dict(zip(info.classes, info.palette, strict=True))["Road"] == (128, 64, 128)
    assert (len(info.classes), info.classes[0], info.palette[2]) == (11, "Building", (128, 128, 128))  # 2 is Sky
