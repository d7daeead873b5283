"""Augmentation keeps image, mask and target aligned; checked with pictures of their own coordinates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densectx.data.transforms import Augment
from densectx.errors import ConfigError, DataError
from densectx.rng import generator


def coordinates(height, width):
    """Image and target hold (row, column) / 1000, the mask row * 1000 + column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows / 1000, columns / 1000, torch.zeros_like(rows)]).float()
    return {"image": image, "mask": rows * 1000 + columns, "target": image[:2] + 1, "gray": torch.tensor(False)}


sizes = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(height=sizes, width=sizes, data=st.data(), seed=st.integers(0, 2**31))
def test_crop_and_flip_are_exact(height, width, data, seed):
    crop = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    out = Augment(crop=crop, flip=True)(coordinates(height, width), generator(seed))
    assert out["image"].shape == (3, *crop)
    assert out["mask"].shape == crop
    assert out["target"].shape == (2, *crop)
    rows, columns = out["mask"] // 1000, out["mask"] % 1000
    assert torch.equal(out["image"][0], rows / 1000)
    assert torch.equal(out["image"][1], columns / 1000)
    assert torch.equal(out["target"], out["image"][:2] + 1)
    steps = columns.diff(dim=1).unique().tolist()  # one contiguous window, mirrored or not
    assert steps in ([], [1], [-1])
    assert (rows.diff(dim=0) == 1).all()


@settings(max_examples=40, deadline=None)
@given(height=st.integers(8, 40), width=st.integers(8, 40), low=st.floats(0.4, 2), seed=st.integers(0, 2**31))
def test_scaling_keeps_labels_aligned(height, width, low, seed):
    augment = Augment(scale=[low, low * 1.5], crop=8, flip=True)
    sample = coordinates(height, width)
    if low * 1.5 * min(height, width) < 8:
        with pytest.raises(DataError, match="smaller than crop 8x8"):
            augment(sample, generator(seed))
        return
    out = augment(sample, generator(seed))
    assert out["image"].shape == (3, 8, 8)
    place = torch.stack([out["mask"] // 1000, out["mask"] % 1000]) / 1000
    # nearest picks a centre within half a source pixel; the antialiasing window is cut at the border (1/scale pixels)
    reach = (0.5 + 1.01 * max(1, 1 / low)) / 1000
    assert (out["image"][:2] - place).abs().max() <= reach
    torch.testing.assert_close(out["target"] - 1, out["image"][:2], rtol=0, atol=1e-5)
    assert out["mask"].dtype == torch.int64


def test_every_window_and_both_sides_come_up():
    augment, sample = Augment(crop=[3, 4], flip=True), coordinates(5, 6)
    seen = {int(augment(sample, generator(seed))["mask"][0].min()) for seed in range(200)}
    assert seen == {row * 1000 + column for row in range(3) for column in range(3)}
    mirrored = sum(int(augment(sample, generator(seed))["mask"][0].diff()[0] < 0) for seed in range(200))
    assert 70 < mirrored < 130


def test_scales_are_within_bounds_and_the_lower_one_covers_the_crop():
    sample = coordinates(20, 40)
    heights = {Augment(scale=[0.5, 2])(sample, generator(seed))["mask"].shape for seed in range(300)}
    assert min(heights) == (10, 20)
    assert max(heights) == (40, 80)
    assert all(abs(width - 2 * height) <= 1 for height, width in heights)
    for seed in range(50):
        assert Augment(scale=[0.1, 1.1], crop=20)(sample, generator(seed))["mask"].shape == (20, 20)


def test_unlabelled_targets_stay_unlabelled():
    sample = coordinates(16, 16)
    sample["target"][:, :8] = float("nan")
    target = Augment(scale=[2, 2])(sample, generator(0))["target"]
    assert target[:, :15].isnan().all()
    assert not target[:, 17:].isnan().any()


def test_scaled_images_stay_in_range():
    sample = {"image": torch.rand(3, 9, 9).round()}
    for scale in (0.7, 1.6):
        out = Augment(scale=[scale, scale])(sample, generator(0))["image"]
        assert out.min() >= 0
        assert out.max() <= 1


@pytest.mark.parametrize("gray", [False, True])
def test_colour_changes_the_image_only(gray):
    sample = coordinates(6, 6)
    sample["image"] = torch.rand(3, 6, 6)
    sample["gray"] = torch.tensor(gray)
    if gray:
        sample["image"] = sample["image"][:1].expand(3, -1, -1).contiguous()
    before = {key: value.clone() for key, value in sample.items()}
    out = Augment(color=0.5)(sample, generator(1))
    assert not torch.equal(out["image"], sample["image"])
    assert out["image"].min() >= 0
    assert out["image"].max() <= 1
    assert torch.equal(out["mask"], before["mask"])
    assert torch.equal(out["target"], before["target"])
    assert all(torch.equal(sample[key], before[key]) for key in before)  # the input is left alone
    if gray:
        assert torch.equal(out["image"][0], out["image"][1])
    one = Augment(color=0.5)({"image": torch.rand(1, 6, 6)}, generator(1))
    assert one["image"].shape == (1, 6, 6)


def test_only_the_generator_decides():
    augment, sample = Augment(scale=[0.5, 2], crop=8, flip=True, color=0.3), coordinates(16, 16)
    first = augment(sample, generator(3))
    torch.rand(7)
    torch.manual_seed(5)
    again, other = augment(sample, generator(3)), augment(sample, generator(4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["image"], other["image"])


def test_nothing_set_changes_nothing():
    sample = coordinates(5, 5)
    out = Augment()(sample, generator(0))
    assert all(torch.equal(out[key], sample[key]) for key in sample)


def test_errors_of_data():
    with pytest.raises(DataError, match=r"image 5x6 is smaller than crop 8x8 even at scale 1.2; choose a smaller crop"):
        Augment(scale=[0.5, 1.2], crop=8)(coordinates(5, 6), generator(0))
    with pytest.raises(DataError, match="mask is 4x6 but its image is 5x6"):
        Augment(flip=True)({**coordinates(5, 6), "mask": torch.zeros(4, 6, dtype=torch.int64)}, generator(0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"flipp": True}, "unknown option 'flipp'; did you mean 'flip'"),
        ({"scale": [2, 1]}, "a.scale: expected"),
        ({"scale": [0, 1]}, "a.scale: expected"),
        ({"scale": 2}, "a.scale: expected"),
        ({"scale": ["a", "b"]}, "a.scale: expected"),
        ({"crop": 0}, "a.crop: expected"),
        ({"crop": [8]}, "a.crop: expected"),
        ({"crop": "ab"}, "a.crop: expected"),
        ({"crop": 2.5}, "a.crop: expected"),
        ({"color": 1.5}, "a.color: expected"),
        ({"color": True}, "a.color: expected"),
        ({"flip": 1}, "a.flip: expected"),
        (7, "a: expected a mapping"),
    ],
)
def test_errors_of_config(config, message):
    with pytest.raises(ConfigError, match=message):
        Augment.from_config(config, "a")
