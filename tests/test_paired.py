"""Pairs of pictures: matching, suffixes, sizes, formats."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from densectx.data.module import DataModule
from densectx.data.paired import Paired
from densectx.errors import ConfigError, DataError
from densectx.types import SourceInfo

RNG = np.random.default_rng(0)


def write(path, height=4, width=6):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def names(dataset):
    return [Path(dataset.name(index)).name for index in range(len(dataset))]


LAYOUT = {"input": "{subset}/input", "target": "{subset}/target"}


def test_pairs_are_matched_by_stem(tmp_path):
    for stem in "ba":
        write(tmp_path / f"train/input/{stem}.bmp")
        write(tmp_path / f"train/target/{stem}.png")
    write(tmp_path / "train/target/unused.png")
    image, target = write(tmp_path / "train/input/sub/c.png"), write(tmp_path / "train/target/sub/c.png")
    dataset = Paired(str(tmp_path), split="train", **LAYOUT)
    assert names(dataset) == ["a.bmp", "b.bmp", "c.png"]
    sample = dataset[2]
    assert torch.equal(sample["image"], image)
    assert torch.equal(sample["target"], target)
    assert sample["gray"].item() is False
    assert dataset.info == SourceInfo(keys=("image", "target"), target="image", scale=1)
    only = {"train": {"from": ["train"], "include": ["a"]}}
    assert names(Paired(str(tmp_path), split="train", splits=only, **LAYOUT)) == ["a.bmp"]
    inputs = {"test": {"from": ["train"], "labels": False}}
    assert set(Paired(str(tmp_path), split="test", splits=inputs, **LAYOUT)[0]) == {"image", "gray"}
    (tmp_path / "train/target/b.png").unlink()
    with pytest.raises(DataError, match=r"input/b.bmp: no target 'b' \(.bmp .* .webp\) in .*train/target"):
        len(Paired(str(tmp_path), split="train", **LAYOUT))


@pytest.mark.fault("I21")
@pytest.mark.parametrize("scale", [2, 3])
def test_scale_and_suffix(tmp_path, scale):
    write(tmp_path / f"LR/X{scale}/0001x{scale}.png", 4, 5)
    write(tmp_path / f"LR/X{scale}/stray.png")
    write(tmp_path / "HR/0001.png", 4 * scale, 5 * scale)
    options = {
        "input": "LR/X{scale}",
        "target": "HR",
        "suffix": "x{scale}",
        "splits": {"train": {"from": ["."]}},
        "scale": scale,
    }
    dataset = Paired(str(tmp_path), split="train", **options)
    assert names(dataset) == [f"0001x{scale}.png"]
    assert dataset[0]["target"].shape == (3, 4 * scale, 5 * scale)
    assert dataset.info.scale == scale
    write(tmp_path / "HR/0001.png", 4 * scale, 5 * scale + 1)
    message = (
        rf"0001x{scale}.png is 4x5 and its target .*0001.png is {4 * scale}x{5 * scale + 1} .*a ratio of {scale} x"
    )
    with pytest.raises(DataError, match=rf"{message} .*'scale' is {scale}, which expects {4 * scale}x{5 * scale}"):
        dataset[0]
    with pytest.raises(DataError, match=r"no file whose stem ends with 'z9'"):
        len(Paired(str(tmp_path), split="train", **{**options, "suffix": "z9"}))


@pytest.mark.fault("I21")
def test_sizes_agree_without_scale(tmp_path):
    write(tmp_path / "train/input/a.png", 4, 6)
    write(tmp_path / "train/target/a.png", 8, 12)
    with pytest.raises(DataError, match=r"input/a.png is 4x6 but its label .*target/a.png is 8x12"):
        Paired(str(tmp_path), split="train", **LAYOUT)[0]


def test_channels_hold_for_both(tmp_path):
    for folder in ("input", "target"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        np.save(tmp_path / "train" / folder / "a.npy", RNG.random((5, 4, 6)))
    sample = Paired(str(tmp_path), split="train", channels=5, **LAYOUT)[0]
    assert sample["image"].shape == sample["target"].shape == (5, 4, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs 'input' and 'target'"),
        ({"input": "a"}, "needs 'input' and 'target'"),
        ({"preset": "div2"}, "did you mean 'div2k'"),
        ({"preset": "div2k"}, "needs 'scale'"),
        ({**LAYOUT, "scale": 0}, "scale: expected a whole number"),
        ({**LAYOUT, "scale": 1.5}, "scale: expected a whole number"),
        ({**LAYOUT, "channels": -1}, "channels"),
        ({**LAYOUT, "value_range": [1, 0]}, "lo < hi"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        Paired("nowhere", split="train", **options)


def test_batches(tmp_path):
    for stem in "abc":
        write(tmp_path / f"train/input/{stem}.png", 4, 5)
        write(tmp_path / f"train/target/{stem}.png", 8, 10)
    spec = {"name": "paired", "root": str(tmp_path), "scale": 2, "batch_size": 2, **LAYOUT}
    data = DataModule({"sr": spec}, num_workers=0)
    assert data.info()["sr"].scale == 2
    batch = next(iter(data.train_dataloader()))["sr"]
    assert batch["image"].shape == (2, 3, 4, 5)
    assert batch["target"].shape == (2, 3, 8, 10)
