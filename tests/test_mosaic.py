"""The data set that needs no download."""

import itertools
import sys
import time

import numpy as np
import pytest
import torch

from densectx.data import mosaic
from densectx.data.mosaic import SOURCES, Mosaic, split_areas
from densectx.errors import ConfigError


def test_samples():
    data = Mosaic(split="train", size=[96, 64])
    assert len(data) == 4096
    assert data.info.size == (96, 64)
    for index in range(8):
        sample = data[index]
        image, mask = sample["image"], sample["mask"]
        assert image.shape == (3, 96, 64)
        assert image.dtype == torch.float32
        assert 0 <= image.min() < image.max() <= 1
        assert mask.shape == (96, 64)
        assert mask.dtype == torch.int64
        assert 2 <= len(mask.unique()) <= 6
        assert 0 <= mask.min() <= mask.max() < len(SOURCES)
        assert not sample["gray"]
    with pytest.raises(IndexError):
        data[4096]
    assert data.name(3) == "mosaic/train/3"


def test_determined_by_seed_split_and_index():
    first, same = Mosaic(split="train")[5], Mosaic(split="train")[5]
    assert all(torch.equal(first[key], same[key]) for key in first)
    others = [Mosaic(split="train", seed=1)[5], Mosaic(split="val")[5], Mosaic(split="train")[6]]
    assert not any(torch.equal(first["image"], other["image"]) for other in others)
    assert torch.equal(Mosaic(split="val")[5]["image"], Mosaic(split="test")[5]["image"])


def test_all_classes_come_up_and_have_their_own_colour():
    data = Mosaic(split="val", size=32)
    assert len(data) == 64
    assert set(torch.cat([sample["mask"].unique() for sample in data]).tolist()) == set(range(len(SOURCES)))
    info = data.info
    assert info.classes == tuple(SOURCES)
    distances = [np.abs(np.subtract(a, b)).sum() for a, b in itertools.combinations(info.palette, 2)]
    assert min(distances) > 60
    assert all(source.terms and source.credit for source in SOURCES.values())


@pytest.mark.parametrize("shape", [(1, 1), (7, 10), (300, 451), (512, 512)])
def test_areas_share_no_pixel(shape):
    count = {part: np.zeros(shape, int) for part in ("train", "val")}
    for part, areas in split_areas(*shape).items():
        for top, left, height, width in areas:
            count[part][top : top + height, left : left + width] += 1
    assert (count["train"] + count["val"] == 1).all()  # disjoint, and nothing is left out


def test_no_pixel_of_validation_is_trained_on(monkeypatch):
    """A photograph that is black where training may look and white where validation may (the lower right quarter)."""
    marked = np.zeros((200, 300, 3), np.uint8)
    marked[100:, 150:] = 255
    monkeypatch.setattr(mosaic, "_photograph", lambda name: marked)
    for index in range(40):
        assert Mosaic(split="train")[index]["image"].max() == 0
        assert Mosaic(split="val")[index]["image"].min() == 1


def test_patches_are_where_the_mask_says(monkeypatch):
    names = list(SOURCES)
    monkeypatch.setattr(mosaic, "_photograph", lambda name: np.full((90, 80, 3), names.index(name) * 20, np.uint8))
    for index in range(10):
        sample = Mosaic(split="train", size=40)[index]
        assert torch.equal((sample["image"] * 255).round().long()[1], sample["mask"] * 20)


def test_any_size_and_few_names():
    assert Mosaic(split="val", size=[1, 3])[0]["mask"].shape == (1, 3)
    large = Mosaic(split="val", size=[700, 40], regions=[1, 1], names=["rocket", "chelsea"])[0]
    assert large["image"].shape == (3, 700, 40)
    mask = Mosaic(split="train", regions=[6, 6], names=["rocket", "chelsea"])[0]["mask"]
    assert set(mask.unique().tolist()) <= {0, 1}


def test_reflection_repeats():
    index = mosaic._span(11, 3, np.random.default_rng(0))
    assert index.tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1]


def test_photographs_are_read_once_and_only():
    assert mosaic._photograph("coffee") is mosaic._photograph("coffee")
    assert mosaic._photograph("coffee").shape == (400, 600, 3)
    assert mosaic._photograph("retina")[..., 0].min() > 100  # nothing of the black frame
    with pytest.raises(ValueError, match="read-only"):
        mosaic._photograph("brick")[0] = 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["rockets", "grass"]}, "did you mean 'rocket'"),
        ({"names": ["rocket"]}, "at least two"),
        ({"names": ["rocket", "rocket"]}, "different"),
        ({"size": 0}, "size"),
        ({"length": 0}, "length"),
        ({"val_length": -1}, "val_length"),
        ({"regions": [4, 2]}, "regions"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        Mosaic(split="train", **options)


def test_without_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ConfigError, match=r"pip install scikit-image\."):
        Mosaic(split="train")


def test_fast_enough():
    data = Mosaic(split="train")
    for index in range(20):  # decodes the photographs
        data[index]
    start = time.process_time()
    for index in range(50):
        data[index]
    assert time.process_time() - start < 1.5  # 100 a second is the aim; room for a loaded machine
