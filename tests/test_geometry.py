"""Receptive fields: derived, measured, and what they promise to those who cut pictures."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from densectx.backbones.base import Backbone
from densectx.errors import ConfigError
from densectx.inspection.geometry import geometry, receptive_fields
from densectx.inspection.halo import halo, task_geometry
from densectx.inspection.measured import measured, supports
from densectx.inspection.spans import regular
from densectx.inspection.tracing import trace
from densectx.model import DenseModel
from densectx.nn.context import ContextModule
from densectx.nn.resize import bicubic, deconvolution, interp_map, log_interp_map, reflect101, upsample
from densectx.registry import BACKBONES, CONTEXTS
from densectx.types import SourceInfo

SETTINGS = settings(max_examples=30, deadline=None)
SMALL = st.integers(1, 3)


class Run(nn.Module):
    """A function as a module, of modules that it has as attributes."""

    def __init__(self, function, **parts):
        super().__init__()
        self.parts, self.function = nn.ModuleDict(parts), function

    def forward(self, x):
        return self.function(x, **self.parts) if len(self.parts) else self.function(x)


def positive(module):
    """Weights above zero, so that no path cancels another one."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return module.double().eval()


def gradient_ends(module, shape, axis):
    """First and last input index of every output index along an axis, by autograd; None where there is none."""
    x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    y = module(x)
    ends = []
    for index in range(y.shape[2 + axis]):
        (gradient,) = torch.autograd.grad(y.select(2 + axis, index).sum(), x, retain_graph=True)
        seen = gradient.abs().sum((0, 1, 3 - axis))
        places = (seen > 1e-11 * seen.max()).nonzero()
        ends.append((int(places[0]), int(places[-1])) if len(places) and seen.max() > 0 else None)
    return ends


def derived_ends(module, shape, axis):
    found = trace(module, shape)
    spans = found.axes(found.output)[axis]
    others = tuple(d for d in range(4) if d != 2 + axis)
    size = found.output.shape[2 + axis]
    lo = np.broadcast_to(spans.lo.min(others), size)
    hi = np.broadcast_to(spans.hi.max(others), size)
    return [(int(a), int(b)) if a <= b else None for a, b in zip(lo, hi, strict=True)]


def check_everywhere(module, shape):
    """Theory and gradient at every row and column, borders included."""
    positive(module)
    for axis in (0, 1):
        assert derived_ends(module, shape, axis) == gradient_ends(module, shape, axis)


# ---- operations against autograd


OPERATIONS = {
    "conv": lambda: nn.Conv2d(2, 2, 3, padding=1),
    "conv 3x5, stride 2x1, dilation 1x2": lambda: nn.Conv2d(2, 4, (3, 5), (2, 1), (1, 3), (1, 2)),
    "grouped conv": lambda: nn.Conv2d(2, 4, 3, groups=2, bias=False),
    "same": lambda: nn.Conv2d(2, 2, 4, padding="same", dilation=2),
    "reflect": lambda: nn.Conv2d(2, 2, 5, padding=2, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(2, 2, 5, padding=2, padding_mode="replicate"),
    "circular": lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(2, 2, 3, 2, 1, output_padding=1),
    "transposed with gaps": lambda: nn.ConvTranspose2d(2, 2, 1, 2),
    "transposed, dilation": lambda: nn.ConvTranspose2d(2, 4, 3, 3, 2, dilation=2, groups=2),
    "mean pool": lambda: nn.AvgPool2d(3, 2, 1),
    "mean pool, ceil": lambda: nn.AvgPool2d(2, 2, ceil_mode=True),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((4, 5)),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "nearest to a size": lambda: nn.Upsample(size=(20, 7)),
    "bilinear 2": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "bilinear 3": lambda: nn.Upsample(scale_factor=3, mode="bilinear"),
    "bilinear corners": lambda: nn.Upsample(size=(27, 29), mode="bilinear", align_corners=True),
    "bilinear, smaller": lambda: Run(lambda x: F.interpolate(x, size=(5, 4), mode="bilinear", antialias=True)),
    "bicubic": lambda: Run(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
    "bicubic, smaller": lambda: Run(lambda x: F.interpolate(x, size=(7, 6), mode="bicubic", antialias=True)),
    "area": lambda: Run(lambda x: F.interpolate(x, scale_factor=0.5, mode="area")),
    "pixel shuffle": lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.PixelShuffle(2)),
    "pixel unshuffle": lambda: Run(lambda x: F.pixel_unshuffle(x[..., :12, :12], 3)),
    "channel shuffle": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ChannelShuffle(2)),
    "flip": lambda: Run(lambda x: x.flip(2) + x.roll(3, 3)),
    "strided slice": lambda: Run(lambda x: x[..., 1::2, ::3]),
    "index": lambda: Run(lambda x: x[:, :, torch.tensor([3, 1, 1, 0])].index_select(3, torch.tensor([5, 2]))),
    "pads": lambda: Run(lambda x: F.pad(F.pad(x, (2, -1, 0, 3)), (1, 2, 3, 0), mode="reflect")),
    "cat of places": lambda: Run(lambda x: torch.cat([x, x[..., :3], torch.ones_like(x)], 3)),
    "cat of channels": lambda: Run(
        lambda x, a, b: b(torch.cat([x, a(x)], 1)), a=nn.Conv2d(2, 1, 5, padding=2), b=nn.Conv2d(3, 1, 3, groups=1)
    ),
    "depthwise of unlike channels": lambda: Run(
        lambda x, a, b: b(torch.cat([x, a(x)], 1))[:, :1],
        a=nn.Conv2d(2, 2, 5, padding=2),
        b=nn.Conv2d(4, 4, 3, groups=4),
    ),
    "written in place": lambda: Run(_written),
    "rows and columns as tokens": lambda: Run(lambda x: x.flatten(2).transpose(1, 2).mT.unflatten(2, (12, 13)) * 2),
    "windows": lambda: Run(_windows),
    "unfold": lambda: Run(lambda x: F.unfold(x, 3, padding=1, stride=2).unflatten(2, (6, 7)).mean(1, keepdim=True)),
    "tensor.unfold": lambda: Run(lambda x: x.unfold(2, 4, 3).mean(-1) + x.unfold(2, 2, 3).sum(-1)[:, :, :3]),
    "repeat": lambda: Run(lambda x: x.repeat(1, 1, 2, 1).repeat_interleave(2, 3)),
    "mean of rows": lambda: Run(lambda x: x + x.mean(2, keepdim=True)),
    "context padded once": lambda: ContextModule(2, (1, 2), padding="once"),
    "reflect101": lambda: Run(lambda x: reflect101(x, 30, 1, -2, 3)),
    "bicubic as MATLAB": lambda: Run(lambda x: bicubic(x, up=2)),
    "upsample 3": lambda: Run(lambda x: upsample(x, 3)),
    "upsample 6": lambda: Run(lambda x: upsample(x, 6)),
    "deconvolution": lambda: Run(lambda x: deconvolution(x, 4)),
    "interp_map": lambda: Run(lambda x: interp_map(x, 3)),
    "log_interp_map": lambda: Run(lambda x: log_interp_map(x, 2)),
}


def _written(x):
    y = torch.zeros_like(x)
    y[..., 2:5, :] = x[..., :3, :]
    y[..., 4:6] += x[..., :2]
    z = y.view(y.shape)
    y.add_(x.flip(3))
    return z


def _windows(x):
    x = F.pad(x, (0, 2))[..., :12, :]
    windows = x.unflatten(2, (3, 4)).unflatten(4, (3, 5)).permute(0, 2, 4, 1, 3, 5)
    seen = windows + windows.mean((4, 5), keepdim=True)
    return seen.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_as_autograd_sees_it(name):
    torch.manual_seed(0)
    module = OPERATIONS[name]()
    if name in ("mean of rows", "adaptive"):  # global along an axis: what is left is what is seen beside that
        found = trace(module, (1, 2, 12, 13))
        assert bool(found.axes(found.output)[0].causes) == (name == "mean of rows")
        return
    check_everywhere(module, (1, 2, 12, 13))


@st.composite
def layers(draw):
    channels, stack, size = 2, [], 16
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "pool", "up", "transposed", "shuffle"]))
        k, s, d, p = draw(st.integers(1, 4)), draw(SMALL), draw(SMALL), draw(st.integers(0, 3))
        if kind == "conv":
            reach = d * (k - 1) + 1
            if size + 2 * p < reach:
                continue
            stack.append(nn.Conv2d(channels, channels, k, s, p, d))
        elif kind == "pool" and p <= k // 2 and size + 2 * p >= k:
            stack.append(nn.AvgPool2d(k, s, p, ceil_mode=draw(st.booleans())))
        elif kind == "up":
            mode = draw(st.sampled_from(["nearest", "bilinear", "bicubic"]))
            stack.append(nn.Upsample(scale_factor=s, mode=mode))
        elif kind == "transposed" and (size - 1) * s - 2 * p + d * (k - 1) + 1 > 0:
            stack.append(nn.ConvTranspose2d(channels, channels, k, s, p, dilation=d))
        elif kind == "shuffle" and size % 2 == 0:
            stack += [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, channels, 1)]
        size = nn.Sequential(*stack)(torch.empty(1, channels, 16, 16)).shape[-1]
        if size > 64 or size < 2:
            break
    return nn.Sequential(*stack)


@pytest.mark.parametrize(
    "last", [nn.Conv2d(2, 2, 1, padding=1), nn.ConvTranspose2d(2, 2, 1, 2), nn.Conv2d(2, 2, 2, padding=2)]
)
def test_places_that_see_padding_alone_where_all_others_see_the_same(last):
    check_everywhere(nn.Sequential(nn.Conv2d(2, 2, 3, 2, 2, 2), last), (1, 2, 4, 4))


@SETTINGS
@given(layers())
def test_random_stacks_as_autograd_sees_them(stack):
    check_everywhere(stack, (1, 2, 16, 16))


# ---- what is derived from it


def test_table_1_of_the_paper():
    fields = receptive_fields(ContextModule(3), torch.empty(1, 3, 8, 8))
    assert [layer.field[0] for layer in fields] == [3, 5, 9, 17, 33, 65, 67, 67]
    assert {(layer.h.stride, layer.h.offset) for layer in fields} == {(Fraction(1), 0.0)}
    assert fields[5].operation == "conv 3x3, dilation 16"
    assert fields[5].layer == "layers.10"


@pytest.mark.parametrize(
    ("context", "field"), [("basic", 67), ("large", 67), ("context7", 35), ("context10", 259), ("none", 1)]
)
def test_fields_of_contexts(context, field):
    module = CONTEXTS.build(context, "context", in_channels=2)
    (output,) = geometry(module, (1, 2, 1, 1)).outputs
    assert output.field == (field, field) == (module.receptive_field,) * 2


@SETTINGS
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_any_dilations(dilations):
    module = ContextModule(1, dilations)
    (output,) = geometry(module, (1, 1, 1, 1)).outputs
    assert output.field[1] == 1 + 2 * sum(dilations)
    one = measured(module, 1, 1, output.w, 1)
    assert one.agrees
    assert one.field == output.field[1]


@pytest.mark.parametrize(("side", "cells"), [(500, 16), (628, 32), (852, 60), (900, 66), (1100, 91), (1396, 128)])
def test_sizes_of_the_front_end(side, cells):
    with torch.device("meta"):
        front = BACKBONES.build({"name": "frontend_vgg16", "width": 1, "fc": 1}, "backbone")
        (features,) = front.valid(torch.empty(1, 3, side, 1640))
    assert features.shape[2:] == (cells, 159)  # 159 columns only where pools round up


def test_front_end_sees_380_pixels():
    with torch.device("meta"):
        front = BACKBONES.build("frontend_vgg16", "backbone")
    *_, last = (layer for layer in receptive_fields(front, torch.empty(1, 3, 8, 8)) if "1x1" not in layer.operation)
    assert last.layer == "layers.fc6"
    # cell i covers 8 i - 186 .. 8 i + 193 with its centre at 8 i + 3.5
    assert (last.h.step, last.h.period, last.h.first, last.h.last) == (8, 1, (-186,), (193,))
    assert (last.h.offset, last.field) == (3.5, (380, 380))
    (support,) = supports(front, (1, 3, 392, 392), lambda h, w: [(24, 24)], lambda front, x: front(x)[-1])
    assert support.size == (380, 380)
    assert support.first == (6, 6)
    assert support.rows[6:386].all()


@pytest.mark.parametrize(
    ("factor", "offset", "function"),
    [
        (2, -0.25, upsample),
        (8, -0.4375, upsample),
        (3, -1 / 3, upsample),
        (4, 0, interp_map),
        (4, -0.375, deconvolution),
    ],
)
def test_offset_of_enlargement(factor, offset, function):
    """Half-pixel alignment: the centre of output 0 lies at (0 + 0.5) / f - 0.5; cell i at f i for interp_map."""
    (output,) = geometry(Run(lambda x: function(x, factor)), (1, 1, 1, 1)).outputs
    assert output.h.stride == Fraction(1, factor)
    weights = torch.autograd.functional.jacobian(
        lambda x: function(x[None, None, None].expand(1, 1, 9, 9), factor)[0, 0, 4 * factor], torch.zeros(9)
    )
    for phase in range(factor):
        places = weights[4 * factor + phase].nonzero().flatten()
        assert (output.h.first[phase], output.h.last[phase]) == (int(places[0]) - 4, int(places[-1]) - 4)
    centre = (weights[4 * factor : 5 * factor] @ torch.arange(9.0)).mean() - 4
    assert centre == pytest.approx(offset + (factor - 1) / 2 / factor, abs=1e-6)


def test_global_layers_are_named():
    squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1), nn.Sigmoid())
    module = Run(lambda x, conv, squeeze: conv(x) * squeeze(x), conv=nn.Conv2d(2, 2, 3, padding=1), squeeze=squeeze)
    found = geometry(module, (1, 2, 8, 8))
    (output,) = found.outputs
    assert output.field == (math.inf, math.inf)
    assert output.causes == ("parts.squeeze.0",)
    assert output.h.local == 3, "what is seen beside the global part"
    assert found.layers[0].field == (3, 3)
    assert found.layers[1].operation == "global: mean"


@pytest.mark.parametrize(
    ("layer", "infinite"),
    [
        (nn.GroupNorm(1, 4), True),
        (nn.InstanceNorm2d(4), True),
        (nn.BatchNorm2d(4), False),
        (nn.Softmax2d(), False),
        (Run(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)), False),
        (Run(lambda x: F.layer_norm(x, x.shape[1:])), True),
        (Run(lambda x: x.flatten(2).softmax(2).unflatten(2, x.shape[2:])), True),
        (Run(lambda x: F.interpolate(F.adaptive_avg_pool2d(x, 3), size=x.shape[2:], mode="bilinear")), True),
        (Run(lambda x: _attention(x)), True),
        (Run(lambda x: x.cumsum(3)), True),
    ],
)
def test_what_is_global(layer, infinite):
    (output,) = geometry(nn.Sequential(nn.Conv2d(4, 4, 3), layer), (1, 4, 16, 16)).outputs
    assert math.isinf(output.field[1]) == infinite
    assert bool(output.causes) == infinite


def _attention(x):
    tokens = x.flatten(2).mT[:, None]
    return x + F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mT.unflatten(2, x.shape[2:])


def test_large_views_are_followed_when_they_are_used():
    """Who shares memory with what is written matters only if it is read again."""

    def added(x, conv):
        y = conv(x).permute(0, 2, 3, 1)
        return y.add_(x.roll(1, 2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    (output,) = geometry(Run(added, conv=nn.Conv2d(64, 64, 1)), (1, 64, 64, 64)).outputs
    assert output.field == (2, 1)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: F.grid_sample(x, torch.zeros(1, 4, 4, 2, device=x.device), align_corners=True), "grid_sampl"),
        (lambda x: torch.fft.fft2(x).real, "fft"),
        (lambda x: x[:, :, x[0, 0, 0].argsort()], "index"),
    ],
)
def test_unknown_operations_are_refused_by_name(function, name):
    module = nn.Sequential(nn.Conv2d(1, 1, 1), Run(function))
    with pytest.raises(ConfigError, match=f"cannot be derived through '.*{name}.*' of layer '1'"):
        geometry(module, (1, 1, 8, 8))


def test_nothing_is_changed_or_copied():
    module = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1)).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    geometry(module, (1, 1, 8, 8))
    supports(module, (1, 1, 8, 8))
    assert module.training
    assert not module[0]._forward_hooks
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ([0, 1, 2, 3], "1111"),
        ([2, 1, 0, 1, 2, 3, 4, 3, 2], "001111100"),
        ([0, 0, 1, 1, 2, 2], "111111"),
        ([5, 6, 0, 1, 2, 3, 4], "0011111"),
        ([0, 0, 0, 1, 2, 3, 3, 3], "00111100"),
        ([7], "1"),
    ],
)
def test_regular(sequence, expected):
    assert "".join(map(str, regular(np.array(sequence)).astype(int))) == expected


# ---- measured = derived for what is registered


SAMPLES = [{"name": "timm", "model": model} for model in ("convnext_atto", "regnetx_002", "mobilenetv4_conv_small")]
INFINITE = [{"name": "timm", "model": model} for model in ("regnety_002", "efficientnet_b0", "convnextv2_atto")]
FINITE = [
    *(name for name in BACKBONES.names() if name != "timm"),
    {"name": "dilated_vgg16", "pools": "dilated"},
    *SAMPLES,
]
LONG = ("dilated_resnet101", "drn_d_105", "drn_c_42", "drn_c_58", "drn_d_38", "drn_d_54", "dilated_resnet34")
FLAT = {"name": "aspp", "pooling": False}
ALL_CONTEXTS = [FLAT if name == "aspp" else name for name in CONTEXTS.names()]


class Trunk(nn.Module):
    def __init__(self, backbone, context="none"):
        super().__init__()
        self.backbone: Backbone = BACKBONES.build(backbone, "backbone")
        self.context = CONTEXTS.build(context, "context", in_channels=self.backbone.features[-1].channels)
        self.cell = max(feature.stride for feature in self.backbone.features)

    def forward(self, x):
        return self.context(self.backbone(x)[-1])


def name_of(spec):
    return spec if isinstance(spec, str) else "-".join(str(value) for value in spec.values())


def agrees(backbone, context):
    with torch.device("meta"):
        trunk = Trunk(backbone, context)
    channels = trunk.backbone.in_channels
    (output,) = geometry(trunk, (1, channels, trunk.cell, trunk.cell)).outputs
    for axis, extent in enumerate((output.h, output.w)):
        one = measured(trunk, channels, trunk.cell, extent, axis)
        assert (one.first, one.last) == one.expected, (axis, one)
    return trunk, output


@pytest.mark.parametrize("backbone", [spec for spec in FINITE if spec not in LONG], ids=name_of)
def test_measured_support_of_backbones(backbone):
    trunk, output = agrees(backbone, "none")
    assert output.h.stride == trunk.cell


@pytest.mark.parametrize("context", ALL_CONTEXTS, ids=name_of)
@pytest.mark.parametrize("backbone", ["plain", "dilated_vgg16", "dilated_resnet18"])
def test_measured_support_of_backbone_and_context(backbone, context):
    trunk, output = agrees(backbone, context)
    (alone,) = geometry(Trunk(backbone), (1, 3, trunk.cell, trunk.cell)).outputs
    assert output.field[0] == alone.field[0] + (trunk.context.receptive_field - 1) * trunk.cell


@pytest.mark.slow
@pytest.mark.parametrize("context", ALL_CONTEXTS, ids=name_of)
@pytest.mark.parametrize("backbone", FINITE, ids=name_of)
def test_measured_support_of_all_pairs(backbone, context):
    agrees(backbone, context)


@pytest.mark.parametrize("backbone", INFINITE, ids=name_of)
def test_infinite_backbones(backbone):
    with torch.device("meta"):
        trunk = Trunk(backbone)
    (output,) = geometry(trunk, (1, 3, 8, 8)).outputs
    assert output.field == (math.inf, math.inf)
    assert all("backbone.net" in cause for cause in output.causes)


def test_pooling_makes_aspp_infinite():
    with torch.device("meta"):
        trunk = Trunk("dilated_vgg16", "aspp")
    (output,) = geometry(trunk, (1, 3, 8, 8)).outputs
    assert output.field == (math.inf, math.inf)
    assert output.causes == ("context",)


# ---- halos


def model_of(tasks, backbone="plain", context=None, projection=None, channels=3):
    config = {
        "backbone": backbone,
        "projection": projection or {"channels": 4, "activation": "relu"},
        "context": context or {"name": "basic", "dilations": [1, 2], "init": "random"},
        "tasks": tasks,
    }
    torch.manual_seed(0)
    info = SourceInfo(channels=channels, classes=("a", "b", "c", "d"), keys=("image", "mask"))
    return DenseModel.from_config(config, {"s": info}).double().eval()


SEGMENT = {"name": "segmentation", "source": "s"}
TINY_FRONT = {"name": "frontend_vgg16", "width": 2, "fc": 4, "padding": "each"}
MODELS = {
    "linear head": lambda: model_of({"t": SEGMENT}, {"name": "dilated_resnet18", "levels": 2}),
    "decoder": lambda: model_of(
        {"t": {"name": "denoising", "source": "s", "sigma": [0, 50]}}, {"name": "dilated_resnet18", "levels": 2}
    ),
    "pyramid": lambda: model_of(
        {"t": {**SEGMENT, "head": {"name": "pyramid", "width": 4}}}, {"name": "dilated_resnet18", "levels": 2}
    ),
    "unshuffled": lambda: model_of(
        {"t": {"name": "super_resolution", "source": "s", "scale": 3, "head": "sub_pixel"}},
        {"name": "plain", "unshuffle": 2},
    ),
    "enlargement": lambda: model_of({"t": {"name": "super_resolution", "source": "s", "scale": 3}}),
    "enlarged before": lambda: model_of(
        {"t": {"name": "super_resolution", "source": "s", "scale": 2, "upsampling": "pre"}}
    ),
    "front end": lambda: model_of({"t": SEGMENT}, TINY_FRONT),
    "deconvolution": lambda: model_of(
        {"t": {**SEGMENT, "head": {"name": "upsample", "method": "deconvolution"}}}, TINY_FRONT
    ),
    "interp_map": lambda: model_of(
        {"t": {**SEGMENT, "head": {"name": "upsample", "method": "interp_map"}}}, TINY_FRONT
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_halo_is_exact(name):
    """A window answers as the whole input, further than the halo from its ends; nearer it does not."""
    model = MODELS[name]()
    task, found = model.task("t"), halo(model, "t")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # as ReLUs pass most of what is positive, no path is dead
            nn.init.uniform_(module.weight, 0.1, 1.0)
    ratio, cell = Fraction(task.scale, task.input_scale), model.stride * task.input_scale
    start = cell * math.ceil(found.left / cell)
    length = cell * math.ceil((found.left + found.right + 3 * cell) / cell)
    total = start + length + cell * math.ceil(found.right / cell)
    x = torch.rand(1, task.channels, cell, total, dtype=torch.float64)
    whole = model({"t": x})["t"]
    window = model({"t": x[..., start : start + length]})["t"]
    same = torch.isclose(whole[..., int(start * ratio) : int((start + length) * ratio)], window, rtol=1e-9, atol=1e-12)
    same = same.all(0).all(0).all(0)
    places = torch.arange(window.shape[-1]) * task.input_scale // task.scale
    inside = (places >= found.left) & (places < length - found.right)
    assert inside.sum() >= cell
    assert same[inside].all()
    if model.stride > 1:  # how far the outermost paths weigh is below what can be told here: see what is measured above
        return
    first, last = int(inside.nonzero()[0]), int(inside.nonzero()[-1])
    assert not same[max(first - found.period[1], 0) : first].all(), "no more than is needed"
    assert not same[last + 1 : last + 1 + found.period[1]].all()


def test_halo_of_a_global_layer():
    model = model_of({"t": SEGMENT}, context="aspp")
    found = halo(model, "t")
    assert found.left == math.inf
    assert found.causes == ("context.shared",)


def test_unknown_task():
    with pytest.raises(ConfigError, match="did you mean 't'"):
        task_geometry(model_of({"t": SEGMENT}), "tt")


def test_basic_behind_the_front_end():
    """380 + 66 cells of 8 pixels."""
    config = {"name": "frontend_vgg16", "width": 1, "fc": 2}
    model = model_of({"t": SEGMENT}, config, {"name": "basic"})
    layers = task_geometry(model, "t").layers
    assert next(layer for layer in layers if layer.layer == "context.shared.layers.14").field == (908, 908)
    assert {layer.layer for layer in layers if "pool" in layer.operation} == {"backbone"}


def test_all_registered_backbones_are_measured():
    assert {spec if isinstance(spec, str) else spec["name"] for spec in FINITE} == set(BACKBONES.names())
