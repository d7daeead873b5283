"""Colour conversions against independent formulas."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from densectx.nn.colour import as_rgb, grey, rgb_to_ycbcr, ycbcr_to_rgb


def test_ycbcr_is_that_of_jpeg_and_undone_outside_of_the_range_too():
    x = torch.randint(0, 256, (3, 17, 19), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    jpeg = pil_to_tensor(to_pil_image(x).convert("YCbCr")).double()
    ours = rgb_to_ycbcr(x[None].double())[0] + torch.tensor([0.0, 128.0, 128.0])[:, None, None]
    assert (ours - jpeg).abs().max() <= 1, "Pillow rounds"
    wild = torch.randn(2, 3, 5, 7, dtype=torch.float64) * 3
    assert torch.allclose(ycbcr_to_rgb(rgb_to_ycbcr(wild)), wild, atol=1e-12)
    assert torch.equal(rgb_to_ycbcr(wild)[:, :1], grey(wild))


@pytest.mark.parametrize(("channels", "taken"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_pictures_of_any_number_of_channels_can_be_shown(channels, taken):
    x = torch.rand(2, channels, 4, 5)
    assert torch.equal(as_rgb(x), x[:, taken])
