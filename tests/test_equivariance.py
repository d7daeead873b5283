"""Shift-equivariance errors of the context module, of pooling networks and of the paper's front end."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from densectx.backbones.frontend import FrontEndVGG16
from densectx.errors import ConfigError
from densectx.inspection.equivariance import equivariance
from densectx.inspection.references import SegNetLike, UNetLike, circular, references
from densectx.nn import ContextModule

SHIFTS = range(1, 17)


def image(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def rough(network, seed=0):
    """Random weights in place of the identity."""
    torch.manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return network.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [-1, -2])
def test_a_circular_context_module_commutes_with_every_shift(dtype, dim):
    network = references()["context"].to(dtype)
    found = equivariance(network, image(1, 3, 40, 48, dtype=dtype), SHIFTS, 0, dim=dim)
    assert [error.shift for error in found] == list(SHIFTS)
    assert all(error.whole == error.interior == 0 for error in found)


@pytest.mark.parametrize("name", ["segnet", "unet"])
@pytest.mark.parametrize("seed", [0, 1])
def test_pooling_networks_commute_with_multiples_of_their_stride_only(name, seed):
    network = references(seed=seed)[name]
    for error in equivariance(network, image(1, 3, 64, 64), SHIFTS, 0):
        if error.shift % 8:
            assert error.whole > 0.05
        else:
            assert error.whole < 1e-6
    whole = {error.shift: error.whole for error in equivariance(network, image(1, 3, 64, 64), (1, 2, 4), 0)}
    assert whole[1] > whole[2] > whole[4]  # the finer the shift, the more of the poolings it goes against


@pytest.mark.parametrize("padding", ["each", "once"])
def test_zero_padding_is_felt_at_the_borders_only(padding):
    network = rough(ContextModule(4, padding=padding))
    for error in equivariance(network, image(1, 4, 60, 110), SHIFTS, 33):
        assert 0.1 < error.whole < 1
        assert error.interior < 1e-6


def test_the_margin_is_as_wide_as_it_has_to_be():
    network = rough(ContextModule(2)).double()
    x = image(1, 2, 20, 100, dtype=torch.float64)
    assert equivariance(network, x, [3], 33)[0].interior < 1e-12
    assert equivariance(network, x, [3], 32)[0].interior > 1e-6


def test_the_valid_front_end_commutes_with_multiples_of_8():
    network = rough(FrontEndVGG16(width=8, fc=16))
    x = torch.rand(1, 3, 372 + 32, 372 + 96, generator=torch.Generator().manual_seed(0))
    found = equivariance(lambda t: network.valid(t)[0], x, (8, 16, 24), 0, scale=Fraction(1, 8))
    assert all(error.interior < 1e-6 for error in found)
    with torch.no_grad():  # written out: a shift of 8 k pixels is one of k cells
        y = network.valid(x)[0]
        for cells in (1, 2, 3):
            shifted = network.valid(x.roll(8 * cells, -1))[0]
            assert torch.allclose(shifted[..., cells:], y[..., :-cells], rtol=0, atol=1e-5 * float(y.abs().max()))
    others = equivariance(lambda t: network.valid(t)[0], x, (1, 2, 4, 7), 0, scale=Fraction(1, 8))
    assert all(error.interior > 0.05 for error in others)


def test_the_measure_is_the_formula():
    """Against numpy, of a network that is equivariant nowhere: multiplication by a fixed map."""
    weights = image(1, 1, 5, 30, dtype=torch.float64)
    x = image(2, 1, 5, 30, dtype=torch.float64)[:, :, :, :] + 1
    found = equivariance(lambda t: t * weights, x, [4, -3], 2)
    for error, shift in zip(found, (4, -3), strict=True):
        expected = np.roll((x * weights).numpy(), shift, -1)
        actual = np.roll(x.numpy(), shift, -1) * weights.numpy()
        cut = slice(2 + abs(shift), 30 - 2 - abs(shift))
        for value, part in ((error.whole, slice(None)), (error.interior, cut)):
            rms = [np.sqrt(np.mean(a[..., part] ** 2)) for a in (actual - expected, expected)]
            assert value == pytest.approx(rms[0] / rms[1], rel=1e-12)


def test_outputs_of_another_scale():
    def finer(t):
        return F.interpolate(t, scale_factor=2.0, mode="nearest")

    assert equivariance(finer, image(1, 1, 4, 16), [1, 5], 0, scale=2)[1] == (5, 0, 0)
    coarser = equivariance(lambda t: F.avg_pool2d(t, 4), image(1, 1, 4, 32), [4, 2], 0, scale=Fraction(1, 4))
    assert coarser[0] == (4, 0, 0)
    assert coarser[1].whole > 0.1


def test_no_interior_left_and_nothing_to_compare():
    network = circular(ContextModule(1))
    assert equivariance(network, image(1, 1, 32, 32), [8], 8)[0].interior is None
    assert equivariance(network, image(1, 1, 32, 32), [1], float("inf"))[0].interior is None
    assert equivariance(network, image(1, 1, 32, 33), [8], 8)[0].interior == 0
    assert equivariance(lambda t: t * 0, image(1, 1, 8, 8), [1], 0)[0] == (1, 0, 0)


@pytest.mark.parametrize(("margin", "options"), [(-1, {}), (0, {"dim": 1}), (0, {"scale": 0})])
def test_what_cannot_be_is_refused(margin, options):
    with pytest.raises(ConfigError):
        equivariance(lambda t: t, image(1, 1, 8, 8), [1], margin, **options)


def test_references_have_the_shape_of_their_input_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    networks = references(channels=2, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert list(networks) == ["context", "segnet", "unet"]
    for name, network in networks.items():
        assert not network.training
        x = image(2, 2, 24, 32)
        assert network(x).shape == x.shape
        assert torch.equal(references(channels=2, seed=1)[name](x), network(x))


def test_segnet_puts_values_back_where_they_came_from():
    """With identity convolutions one level is: keep the maximum of each 2x2 block, zero the rest."""
    network = SegNetLike(channels=1, width=1, depth=1)
    for conv in (network.down[0], network.up[0], network.last):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    expected = torch.where(x == F.max_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3), x, 0.0)
    assert torch.equal(network(x), expected)


def test_unet_joins_what_was_before_the_pooling():
    network = UNetLike(channels=1, width=1, depth=2)
    for conv in (*network.down, network.bottom, network.last):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    for conv in network.up:  # the skip plus half of what comes from below
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
        conv.weight.data[0, :, 1, 1] = torch.tensor([1.0, 0.5])
    x = torch.rand(1, 1, 8, 8)
    half, quarter = F.max_pool2d(x, 2), F.max_pool2d(x, 4)

    def up(t, n):
        return t.repeat_interleave(n, 2).repeat_interleave(n, 3)

    assert torch.allclose(network(x), x + 0.5 * up(half, 2) + 0.25 * up(quarter, 4))
