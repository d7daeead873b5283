"""A CSV of samples: columns, empty cells, checksums, and every way to get it wrong."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from densectx.data.manifest import Manifest
from densectx.data.module import DataModule
from densectx.errors import ConfigError, DataError
from densectx.registry import DATASETS
from densectx.types import SourceInfo

RNG = np.random.default_rng(0)
CLASSES = {"classes": ["x", "y", "z"]}


@pytest.fixture
def folder(tmp_path):
    for stem in "abcd":
        Image.fromarray(RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)).save(tmp_path / f"{stem}.jpg")
        Image.fromarray(np.full((4, 6), ord(stem) - ord("a"), np.uint8)).save(tmp_path / f"{stem}.png")
        np.save(tmp_path / f"{stem}.npy", np.full((4, 6), 0.5, np.float32))
    return tmp_path


def table(folder, *lines, name="m.csv", encoding="utf-8"):
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return str(path)


def names(dataset):
    return [Path(dataset.name(index)).name for index in range(len(dataset))]


def test_rows_become_samples(folder):
    file = table(
        folder,
        "image,site,mask,target,split",
        "c.jpg,north,c.png,c.npy,train",
        'a.jpg,"south, west",a.png,,train',
        "",
        "b.jpg,,,b.npy,val",
        f"{folder / 'd.jpg'},,,,train",
        encoding="utf-8-sig",
    )
    data = {
        split: Manifest(file, split=split, target="map", invalid=0.5, **CLASSES) for split in ("train", "val", "test")
    }
    assert {split: names(dataset) for split, dataset in data.items()} == {
        "train": ["c.jpg", "a.jpg", "d.jpg"],
        "val": ["b.jpg"],
        "test": [],
    }
    first, second, third = (data["train"][index] for index in range(3))
    assert (first["mask"] == 2).all()
    assert first["target"].shape == (1, 4, 6)
    assert first["target"].isnan().all()
    assert set(second) == {"image", "gray", "mask"}
    assert set(third) == {"image", "gray"}
    assert set(data["val"][0]) == {"image", "gray", "target"}
    assert data["train"].info == SourceInfo(
        classes=("x", "y", "z"),
        palette=((0, 0, 0), (128, 0, 0), (0, 128, 0)),
        keys=("image", "mask", "target"),
        target="map",
    )


def test_a_file_a_split_and_another_root(folder):
    (folder / "lists").mkdir()
    table(folder, "image", "a.jpg", name="lists/train.csv")
    table(folder, "image", "b.jpg", name="lists/val.csv")
    for split, expected in (("train", ["a.jpg"]), ("val", ["b.jpg"])):
        dataset = Manifest(str(folder / "lists/{split}.csv"), split=split, root=str(folder))
        assert names(dataset) == expected
        assert dataset[0]["image"].shape == (3, 4, 6)
    with pytest.raises(DataError, match=r"test.csv: the manifest cannot be read: No such file"):
        len(Manifest(str(folder / "lists/{split}.csv"), split="test"))
    with pytest.raises(DataError, match=r"xxx: the manifest cannot be read: File name too long"):
        len(Manifest(str(folder / ("x" * 300)), split="train", root="."))


def test_a_flipped_byte_is_found_by_the_checksum(folder):
    digest = hashlib.sha256((folder / "a.jpg").read_bytes()).hexdigest()
    file = table(folder, "image,split,sha256", f"a.jpg,train,{digest.upper()}", "b.jpg,train,")
    dataset = Manifest(file, split="train")
    assert dataset[0]["image"].shape == dataset[1]["image"].shape
    content = bytearray((folder / "a.jpg").read_bytes())
    content[-30] ^= 1
    (folder / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"m.csv, line 2: .*a.jpg: its SHA-256 is .* damaged"):
        dataset[0]
    bad = hashlib.sha256(b"").hexdigest()
    file = table(folder, "image,mask,split,mask_sha256", f"b.jpg,b.png,train,{bad}", "c.jpg,,train,")
    dataset = Manifest(file, split="train", **CLASSES)
    with pytest.raises(DataError, match=r"line 2: .*b.png: its SHA-256"):
        dataset[0]
    assert set(dataset[1]) == {"image", "gray"}


def test_pictures_as_targets(folder):
    Image.fromarray(RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(folder / "big.png")
    file = table(folder, "image,target,split", "a.jpg,big.png,train", "b.jpg,c.jpg,train")
    dataset = Manifest(file, split="train", target="image", scale=2)
    assert dataset[0]["target"].shape == (3, 8, 12)
    assert (dataset.info.target, dataset.info.scale) == ("image", 2)
    with pytest.raises(DataError, match=r"line 3: .*b.jpg is 4x6 and its target .*c.jpg is 4x6 .*'scale' is 2"):
        dataset[1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["images,split", "a.jpg,train"], r"line 1: unknown column 'images'; did you mean 'image'"),
        (["image,spilt", "a.jpg,train"], r"line 1: unknown column 'spilt'; did you mean 'split'"),
        (["path,split", "a.jpg,train"], r"line 1: no column 'image'; the header is 'path,split'"),
        (["image,split", "a.jpg,train"], r"line 1: no column 'mask'"),
        (["image,mask", "a.jpg,a.png"], r"line 1: no column 'split'; add one"),
        (["image,mask,split,mask", "a.jpg,,train,"], r"line 1: column 'mask' is there twice"),
        (["image,mask,split", "a.jpg,a.png,trian"], r"line 2: unknown split 'trian'; did you mean 'train'"),
        (["image,mask,split", "a.jpg,a.png,train", "b.jpg,,"], r"line 3: unknown split ''"),
        (["image,mask,split", ",a.png,train"], r"line 2: the cell of 'image' is empty"),
        (["image,mask,split", "a.jpg,train"], r"line 2: 2 cells, the header has 3"),
        (["image,mask,split,sha256", "a.jpg,,train,12ab"], r"line 2: sha256 '12ab' is no SHA-256"),
        (
            ["image,mask,split", "a.jpg,,train", "a.jpg,,val"],
            r"line 3: .*a.jpg is in split 'val', and in 'train' by line 2",
        ),
        (["image,mask,split", "a.jpg,,train", "./b/../a.jpg,,val"], r"line 3: .* and in 'train' by line 2"),
        (["image,mask,split"], r"m.csv: has no rows"),
        ([""], r"line 1: no column 'image'"),
        (["image,mask,split", 'a.jpg,"a.png,train'], r"line \d: is no CSV"),
    ],
)
def test_tables_are_checked(folder, lines, message):
    dataset = Manifest(table(folder, *lines), split="train", **CLASSES)
    with pytest.raises(DataError, match=message):
        len(dataset)


def test_bad_files_are_named_with_their_line(folder):
    (folder / "b.jpg").write_bytes(b"")
    file = table(folder, "image,mask,split", "a.jpg,d.png,train", "b.jpg,,train", "nowhere.jpg,,train")
    dataset = Manifest(file, split="train", **CLASSES)
    for index, message in enumerate(
        (r"line 2: .*d.png: unknown class ids 3 \(24 pixels\)", r"line 3: .*b.jpg", r"line 4")
    ):
        with pytest.raises(DataError, match=rf"m.csv, {message}"):
            dataset[index]
    (folder / "m.csv").write_bytes(b"image,split\n\xff,train\n")
    with pytest.raises(DataError, match=r"m.csv: is no UTF-8"):
        len(Manifest(file, split="train"))


def test_columns_need_their_options(folder):
    file = table(folder, "image,mask,split", "a.jpg,a.png,train")
    with pytest.raises(ConfigError, match="the column 'mask' needs the option 'classes'"):
        len(Manifest(file, split="train"))
    for options, message in (
        ({"target": "depth"}, "'map' or 'image'"),
        ({"scale": 2}, "scale: 2 is for target: image"),
        ({"channels": 0}, "channels"),
    ):
        with pytest.raises(ConfigError, match=message):
            Manifest(file, split="train", **options)


def test_labels_of_some_samples_are_filled_in_a_batch(folder):
    file = table(folder, "image,mask,target,split", "a.jpg,a.png,,train", "b.jpg,,b.npy,train")
    spec = {"name": "manifest", "file": file, "target": "map", "batch_size": 2, **CLASSES}
    batch = next(iter(DataModule({"s": spec}, num_workers=0).train_dataloader()))["s"]
    labelled = (batch["mask"] != 255).flatten(1).all(1)
    known = ~batch["target"].isnan().flatten(1).any(1)
    assert sorted(zip(labelled.tolist(), known.tolist(), strict=True)) == [(False, True), (True, False)]


def test_options_come_from_a_config(folder):
    file = table(folder, "image,mask,split", "a.jpg,b.png,train")
    spec = {"name": "manifest", "file": file, "remap": {"x": "ignore", 1: "z", "*": 0}, **CLASSES}
    sample = DATASETS.build(spec, split="train")[0]
    assert torch.equal(sample["mask"], torch.full((4, 6), 2))
