"""What heads compute, by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.model import DenseModel
from densectx.registry import BACKBONES, HEADS
from densectx.types import Feature, SourceInfo


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_unshuffled_pixels_come_back(side):
    """A trunk and head whose convolutions pass everything on answer with the image: no pixel is lost or moved."""
    trunk = BACKBONES.build({"name": "plain", "width": 3 * side**2, "unshuffle": side})
    head = HEADS.build("sub_pixel", features=trunk.features, out_channels=3)
    for conv in (trunk.layers[-2], head.exit):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    x = torch.rand(2, 3, 5 * side, 4 * side)
    features = trunk(x)
    assert features[-1].shape == (2, 3 * side**2, 5, 4)
    assert torch.equal(head(features, x), x)


def test_enlarged_pixels_are_channels_of_a_cell():
    """Channel c r r + i r + j of a cell is pixel (i, j) of channel c, as in Shi et al. (2016)."""
    head = HEADS.build("sub_pixel", features=[Feature(8, 1)], out_channels=2, scale=2)
    torch.nn.init.dirac_(head.exit.weight)
    torch.nn.init.zeros_(head.exit.bias)
    cells = torch.rand(1, 8, 3, 2)
    y = head([cells], torch.rand(1, 3, 3, 2))
    assert y.shape == (1, 2, 6, 4)
    for c in range(2):
        for i in range(2):
            for j in range(2):
                assert torch.equal(y[:, c, i::2, j::2], cells[:, 4 * c + 2 * i + j])


LEVELS = (Feature(3, 2), Feature(4, 4), Feature(5, 4), Feature(6, 8), Feature(7, 8))


def pyramid(**options):
    torch.manual_seed(0)
    return HEADS.build({"name": "pyramid", "width": 5, **options}, features=LEVELS, out_channels=2).eval()


def test_pyramid_joins_the_deepest_map_of_each_finer_stride():
    head, rng = pyramid(norm=None), torch.Generator().manual_seed(1)
    maps = [torch.randn(1, f.channels, 16 // f.stride, 24 // f.stride, generator=rng) for f in LEVELS]

    def twice(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    joined = F.relu(twice(head.enter(maps[4])) + head.laterals[0](maps[2]))
    expected = F.interpolate(
        head.exit(F.relu(head.merges[0][0](joined))), scale_factor=4, mode="bilinear", align_corners=False
    )
    assert torch.allclose(head(maps, torch.zeros(1, 3, 16, 24)), expected, atol=1e-6)


@pytest.mark.parametrize(("stride", "joined"), [(1, 2), (2, 2), (4, 1), (8, 0), (16, 0)])
def test_pyramid_leaves_out_levels_finer_than_its_stride(stride, joined):
    head = pyramid(stride=stride)
    maps = [torch.randn(1, f.channels, 16 // f.stride, 24 // f.stride) for f in LEVELS]
    assert len(head.laterals) == joined
    assert head(maps, torch.zeros(1, 3, 16, 24)).shape == (1, 2, 16, 24)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="width 0"):
        pyramid(width=0)
    for dropout in (20, -0.1, 1.0, math.nan):
        with pytest.raises(ConfigError, match=rf"'pyramid': dropout {dropout} is not in \[0, 1\)"):
            pyramid(dropout=dropout)
        with pytest.raises(ConfigError, match=rf"'linear': dropout {dropout} is not in \[0, 1\)"):
            HEADS.build({"name": "linear", "dropout": dropout}, features=LEVELS, out_channels=2)
    with pytest.raises(ConfigError, match="unshuffle 0"):
        BACKBONES.build({"name": "plain", "unshuffle": 0})


@pytest.mark.parametrize(
    ("task", "channels", "info"),
    [
        ({"name": "segmentation", "mode": "binary"}, 1, SourceInfo(classes=("a", "b"), keys=("image", "mask"))),
        (
            {"name": "segmentation", "mode": "multilabel"},
            2,
            SourceInfo(classes=("a", "b"), keys=("image", "target"), target="labels"),
        ),
        ({"name": "regression"}, 1, SourceInfo(keys=("image", "target"), target="map")),
        ({"name": "regression", "outputs": 2}, 2, SourceInfo(keys=("image", "target"), target="map")),
        ({"name": "denoising"}, 3, SourceInfo()),
        ({"name": "colorization"}, 2, SourceInfo()),
    ],
)
def test_interpolated_probabilities_are_of_exclusive_classes(task, channels, info):
    """``interp_map`` answers with log-probabilities that sum to one: 0 everywhere for one channel."""
    config = {"backbone": "plain", "projection": {"channels": channels}, "context": "none"}
    config["tasks"] = {"t": {**task, "source": "s", "head": {"name": "upsample", "method": "interp_map"}}}
    with pytest.raises(ConfigError, match="interp_map is for classes of which each pixel has one"):
        DenseModel.from_config(config, {"s": info})
