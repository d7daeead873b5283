"""The context module against Yu & Koltun (2016): table 1, equations 4 and 5, the published Caffe filler."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.nn import ContextModule
from densectx.nn.context import identity_
from densectx.registry import CONTEXTS


def build(name, channels, **options):
    return CONTEXTS.build({"name": name, **options}, in_channels=channels)


@pytest.mark.parametrize(
    ("name", "field"), [("basic", 67), ("large", 67), ("context7", 35), ("context10", 259), ("none", 1)]
)
def test_receptive_fields_of_the_paper(name, field):
    assert build(name, 2).receptive_field == field


@pytest.mark.parametrize(
    ("name", "channels", "count"),
    [
        ("basic", 21, 28_392),
        ("basic", 11, 7_832),
        ("large", 21, 6_803_139),
        ("large", 11, 1_867_129),
        ("context7", 11, 6_732),
        ("context10", 19, 29_792),
    ],
)
def test_parameter_counts_of_the_paper(name, channels, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name, channels).parameters()) == count


@pytest.mark.parametrize("padding", ["each", "once"])
def test_basic_starts_as_exactly_max_x_0(padding):
    x = torch.randn(2, 5, 9, 40)
    assert torch.equal(build("basic", 5, init_noise=0, padding=padding)(x), x.clamp_min(0))


@pytest.mark.parametrize("padding", ["each", "once"])
def test_large_starts_as_max_x_0_in_float64(padding):
    x = torch.randn(1, 3, 7, 5, dtype=torch.float64)
    y = build("large", 3, init_noise=0, padding=padding).double()(x)
    assert (y - x.clamp_min(0)).abs().max() < 4e-15


def test_residual_form_starts_as_the_identity_for_signed_features():
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(build("basic", 4, init_noise=0, residual=True)(x), x)


@pytest.mark.parametrize(("c_in", "c_out", "groups"), [(4, 4, 4), (4, 8, 4), (8, 4, 4), (6, 12, 3)])
def test_identity_init_equals_the_published_caffe_filler(c_in, c_out, groups):
    """caffe-dilation, filler.hpp, IdentityFiller, written out as its loops."""
    expected = torch.zeros(c_out, c_in, 3, 3)
    for group in range(groups):
        for out in range(group * c_out // groups, (group + 1) * c_out // groups):
            for inp in range(group * c_in // groups, (group + 1) * c_in // groups):
                expected[out, inp, 1, 1] = groups / c_out
    conv = torch.nn.Conv2d(c_in, c_out, 3)
    identity_(conv, groups, noise=0.0)
    assert torch.equal(conv.weight, expected)
    assert torch.equal(conv.bias, torch.zeros(c_out))


def test_noise_leaves_the_identity_taps_and_scales_with_width():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(32, 128, 3)
    identity_(conv, 32, noise=0.1)
    off = conv.weight[conv.weight != 0.25]
    assert (conv.weight == 0.25).sum() == 128
    assert off.std().item() == pytest.approx(0.1 * 0.25, rel=0.05)


def test_the_stack_is_the_one_of_table_1():
    """Against the layers written straight in torch.nn.functional."""
    torch.manual_seed(0)
    module = build("basic", 3, init_noise=0.5).double()
    x = torch.randn(1, 3, 20, 24, dtype=torch.float64)
    convs = [layer for layer in module.layers if isinstance(layer, torch.nn.Conv2d)]
    y = x
    for conv, dilation in zip(convs[:-1], (1, 1, 2, 4, 8, 16, 1), strict=True):
        y = F.conv2d(y, conv.weight, conv.bias, padding=dilation, dilation=dilation).clamp_min(0)
    y = F.conv2d(y, convs[-1].weight, convs[-1].bias)
    assert torch.allclose(module(x), y, atol=1e-12)


def test_without_options_it_is_the_basic_one():
    for ours, basic in zip(ContextModule(3).layers, build("basic", 3).layers, strict=True):
        assert repr(ours) == repr(basic)


def test_random_starts_as_he_et_al_say():
    torch.manual_seed(0)
    for layer in ContextModule(64, (1, 2), init="random").layers:
        if isinstance(layer, torch.nn.Conv2d):
            fan_in = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)
            assert not layer.bias.any()


def test_padding_once_and_each_differ_only_near_the_border():
    torch.manual_seed(0)
    each = build("basic", 2, init_noise=0.3).double()
    once = build("basic", 2, init_noise=0.3, padding="once").double()
    once.load_state_dict(each.state_dict())
    x = torch.randn(1, 2, 80, 80, dtype=torch.float64)
    difference = (each(x) - once(x)).abs()
    assert difference[..., 33:-33, 33:-33].max() < 1e-14
    assert difference.max() > 1e-3


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_receptive_field_is_the_measured_support(dilations):
    """Positive weights without noise in the way: the gradient's support is the receptive field."""
    module = ContextModule(1, dilations).double()
    for p in module.parameters():
        torch.nn.init.constant_(p, 0.5)
    field = int(module.receptive_field)
    x = torch.ones(1, 1, 1, 2 * field + 1, dtype=torch.float64, requires_grad=True)
    module(x)[0, 0, 0, field].backward()
    taps = x.grad[0, 0, 0].nonzero().flatten()
    assert taps.max() - taps.min() + 1 == field


@pytest.mark.parametrize(("norm", "field"), [(None, 7), ("batch", 7), ("group", math.inf)])
def test_group_norms_see_every_cell(norm, field):
    torch.manual_seed(0)
    module = ContextModule(8, (1, 2), norm=norm, init="random").eval()
    assert module.receptive_field == field
    x = torch.rand(1, 8, 1, 40, requires_grad=True)
    module(x)[0, :, 0, 20].sum().backward()
    assert bool(x.grad[..., 0].any()) == math.isinf(field)


def test_aspp_is_finite_without_pooling_and_says_so():
    assert build("aspp", 2).receptive_field == math.inf
    assert build("aspp", 2, pooling=False, rates=[2, 5]).receptive_field == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dilations": []}, r"dilations \(\) and widths \(\) must be"),
        ({"widths": [1, 2]}, "equally many positive"),
        ({"dilations": [0]}, "equally many positive"),
        ({"padding": "both"}, "padding 'both' is not 'each' or 'once'"),
        ({"init": "he"}, "init 'he' is not 'identity' or 'random'"),
        ({"init_noise": math.nan}, "init_noise nan is negative or no finite number"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ContextModule(2, **options)
