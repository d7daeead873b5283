"""The readers of folders, on files written here and, where it is, on real data."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from densectx.data.folder import Folder
from densectx.data.image_mask import ImageMask
from densectx.data.presets import PRESETS, voc_palette
from densectx.errors import ConfigError, DataError
from densectx.registry import DATASETS
from densectx.types import SourceInfo

DATA = os.environ.get("DENSECTX_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="real data: set DENSECTX_DATA to its folder")
RNG = np.random.default_rng(0)


def write(path, size=(4, 6), mode="RGB", value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if mode == "RGB" else size
    array = RNG.integers(0, 256, shape) if value is None else np.full(shape, value)
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


def names(dataset):
    return [dataset.name(index) for index in range(len(dataset))]


# -- folder


@pytest.fixture
def tree(tmp_path):
    for name in ("train/b.png", "train/a/z.JPG", "train/a/k.webp", "val/c.tiff", "val/d.png", "e.bmp"):
        write(tmp_path / name)
    (tmp_path / "train/notes.txt").write_text("no image")
    write(tmp_path / "train/.hidden.png")
    write(tmp_path / "train/.cache/x.png")
    return tmp_path


def relative(dataset, root):
    return [str(Path(name).relative_to(root)) for name in names(dataset)]


def test_folder_order_and_selection(tree):
    assert relative(Folder(str(tree), split="train"), tree) == ["train/a/k.webp", "train/a/z.JPG", "train/b.png"]
    assert relative(Folder(str(tree), split="val"), tree) == ["val/c.tiff", "val/d.png"]
    splits = {
        "train": {"from": ["."], "include": ["?", "z.*"]},
        "val": {"from": ["val", "train/a", "val"], "include": ["[dk]"]},
        "test": None,
    }
    everything = ["e.bmp", "train/a/k.webp", "train/a/z.JPG", "train/b.png", "val/c.tiff", "val/d.png"]
    assert relative(Folder(str(tree), split="train", splits=splits), tree) == everything
    assert relative(Folder(str(tree), split="val", splits=splits), tree) == ["train/a/k.webp", "val/d.png"]
    assert len(Folder(str(tree), split="test", splits=splits)) == 0
    assert relative(Folder(str(tree), split="train", include=["b*"]), tree) == ["train/b.png"]


def test_folder_samples(tree):
    gray = write(tree / "train/g.png", mode="L")
    dataset = Folder(str(tree), split="train", channels=1)
    sample = dataset[names(dataset).index(str(gray))]
    assert sample["image"].shape == (1, 4, 6)
    assert sample["gray"].item() is True
    assert dataset[0]["gray"].item() is False
    assert dataset.info == SourceInfo(channels=1)
    assert "mask" not in sample
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["image"], dataset[0]["image"])


def test_folder_links(tree):
    (tree / "elsewhere").symlink_to(tree / "val")
    (tree / "val/loop").symlink_to(tree)
    splits = {"train": {"from": ["elsewhere"]}}
    assert relative(Folder(str(tree), split="train", splits=splits), tree)[:1] == ["elsewhere/c.tiff"]


def test_folder_root_is_relative_to_the_working_directory(tree, monkeypatch):
    monkeypatch.chdir(tree.parent)
    assert len(Folder(tree.name, split="val")) == 2
    monkeypatch.setenv("HOME", str(tree))
    assert len(Folder("~", split="val")) == 2


def test_folder_errors_name_the_path(tree):
    (tree / "empty").mkdir()
    for split, message in (
        ({"from": ["trian"]}, "trian: no such folder"),
        ({"from": ["e.bmp"]}, "e.bmp: is not a folder"),
        ({"from": ["empty"]}, "empty: no file with one of the extensions"),
        ({"from": ["train"], "include": ["q*"]}, r"train: no image matches q\*"),
    ):
        dataset = Folder(str(tree), split="train", splits={"train": split})  # files are not touched yet
        with pytest.raises(DataError, match=message):
            len(dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "channels: expected 1 or 3"),
        ({"splits": {"trian": {"from": ["a"]}}}, "unknown split 'trian'; did you mean 'train'"),
        ({"splits": {"train": {"form": ["a"], "from": []}}}, "unknown key 'form'; did you mean 'from'"),
        ({"splits": {"train": {"from": []}}}, "empty"),
        ({"splits": {"train": {"from": "a"}}}, "splits.train.from: expected a list"),
        ({"splits": {"train": ["a"]}}, "splits.train: expected a mapping"),
        ({"splits": {"train": {"from": ["a"], "labels": 1}}}, "splits.train.labels"),
        ({"splits": ["a"]}, "splits: expected a mapping"),
        ({"include": "a*"}, "include: expected a list"),
    ],
)
def test_folder_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        Folder("nowhere", split="train", **options)


# -- image_mask


@pytest.fixture
def pairs(tmp_path):
    for subset, stems in {"train": "abc", "val": "d"}.items():
        for stem in stems:
            write(tmp_path / "images" / subset / f"{stem}.jpg")
            write(tmp_path / "labels" / subset / f"{stem}.png", mode="L", value=ord(stem) - ord("a"))
    write(tmp_path / "labels/train/unused.png", mode="L", value=0)
    return tmp_path


LAYOUT = {"images": "images/{subset}", "masks": "labels/{subset}", "classes": ["x", "y", "z"]}


def test_pairs_are_matched_by_stem(pairs):
    dataset = ImageMask(str(pairs), split="train", **LAYOUT)
    assert [Path(name).name for name in names(dataset)] == ["a.jpg", "b.jpg", "c.jpg"]
    for index, sample in enumerate(dataset):
        assert sample["image"].shape == (3, 4, 6)
        assert (sample["mask"] == index).all()
        assert not sample["gray"]
        if index == 2:
            break
    assert dataset.info == SourceInfo(
        classes=("x", "y", "z"), palette=((0, 0, 0), (128, 0, 0), (0, 128, 0)), keys=("image", "mask")
    )


def test_lists_name_stems_or_paths(pairs):
    (pairs / "train.txt").write_text("/old/place/c.png /old/labels/c.png\n\na\n")
    dataset = ImageMask(str(pairs), split="train", lists="{subset}.txt", **LAYOUT)
    assert [Path(name).name for name in names(dataset)] == ["a.jpg", "c.jpg"]
    chosen = {"train": {"from": ["train"], "include": ["c*"]}}
    assert len(ImageMask(str(pairs), split="train", lists="{subset}.txt", splits=chosen, **LAYOUT)) == 1
    (pairs / "train.txt").write_text("a\nq.v1\n")
    with pytest.raises(DataError, match=r"train.txt, line 2: 'q.v1' is not in .*images/train"):
        len(ImageMask(str(pairs), split="train", lists="{subset}.txt", **LAYOUT))
    (pairs / "train.txt").write_text("\n")
    with pytest.raises(DataError, match=r"train.txt: the list of images is empty"):
        len(ImageMask(str(pairs), split="train", lists="{subset}.txt", **LAYOUT))
    with pytest.raises(DataError, match=r"val.txt: the list of images cannot be read"):
        len(ImageMask(str(pairs), split="val", lists="{subset}.txt", **LAYOUT))


def test_missing_and_ambiguous_files(pairs):
    (pairs / "labels/train/b.png").unlink()
    with pytest.raises(DataError, match=r"images/train/b.jpg: no label file 'b' .* in .*labels/train"):
        len(ImageMask(str(pairs), split="train", **LAYOUT))
    write(pairs / "images/val/d.png")
    with pytest.raises(DataError, match=r"d.jpg and .*d.png have the same stem"):
        len(ImageMask(str(pairs), split="val", **LAYOUT))


def test_a_split_without_labels(pairs):
    splits = {"test": {"from": ["train"], "labels": False}}
    sample = ImageMask(str(pairs), split="test", splits=splits, **LAYOUT)[0]
    assert set(sample) == {"image", "gray"}


def test_sizes_must_agree(pairs):
    write(pairs / "labels/train/b.png", size=(4, 5), mode="L", value=0)
    with pytest.raises(DataError, match=r"b.jpg is 4x6 but its label .*b.png is 4x5"):
        ImageMask(str(pairs), split="train", **LAYOUT)[1]


def test_ids_must_be_known(pairs):
    mask = np.zeros((4, 6), np.uint8)
    mask[0, :3], mask[1, 0], mask[2] = 5, 200, 255
    Image.fromarray(mask).save(pairs / "labels/train/a.png")
    message = r"a.png: unknown class ids 5 \(3 pixels\), 200 \(1 pixels\); known are 0..2 and ignore_index 255"
    with pytest.raises(DataError, match=message):
        ImageMask(str(pairs), split="train", **LAYOUT)[0]
    mask[mask == 5], mask[mask == 200] = 0, 0
    Image.fromarray(mask).save(pairs / "labels/train/a.png")
    assert ImageMask(str(pairs), split="train", **LAYOUT)[0]["mask"].unique().tolist() == [0, 255]
    with pytest.raises(DataError, match=r"255 \(6 pixels\); known are 0..2 and ignore_index 7"):
        ImageMask(str(pairs), split="train", ignore_index=7, **LAYOUT)[0]


def annotations(maps):
    cells = np.empty((1, len(maps)), dtype=object)
    for index, boundaries in enumerate(maps):
        cells[0, index] = {"Segmentation": boundaries.astype(np.uint16), "Boundaries": boundaries.astype(np.uint8)}
    return {"groundTruth": cells}


def test_boundaries_are_the_mean_of_the_annotators(tmp_path):
    write(tmp_path / "images/train/a.jpg")
    maps = RNG.integers(0, 2, (5, 4, 6))
    label = tmp_path / "groundTruth/train/a.mat"
    label.parent.mkdir(parents=True)
    savemat(label, annotations(maps))
    dataset = ImageMask(str(tmp_path), split="train", preset="bsds500", splits={"train": {"from": ["train"]}})
    target = dataset[0]["target"]
    assert target.dtype == torch.float32
    torch.testing.assert_close(target, torch.from_numpy(maps.mean(0))[None].float())
    assert dataset.info.keys == ("image", "target")
    savemat(label, annotations(maps[..., :5]))
    with pytest.raises(DataError, match=r"a.jpg is 4x6 but its label .*a.mat is 4x5"):
        dataset[0]
    for content in (b"", b"MATLAB 5.0 MAT-file" + bytes(200)):
        label.write_bytes(content)
        with pytest.raises(DataError, match=r"a.mat: no BSDS500 ground truth"):
            dataset[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "camvit"}, "did you mean 'camvid'"),
        ({}, "needs 'images' and 'masks' or 'boundaries'"),
        ({"images": "a"}, "needs 'images' and 'masks' or 'boundaries'"),
        ({"images": "a", "masks": "b"}, "needs 'classes'"),
        ({"images": "a", "masks": "b", "classes": ["x"], "palette": [[0, 0, 0], [1, 1, 1]]}, "2 colours for 1 classes"),
        ({"images": "a", "masks": "b", "classes": ["x"], "palette": [[0, 0, 256]]}, "values in 0..255"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        ImageMask("nowhere", split="train", **options)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_known_without_files_and_can_be_overridden(preset):
    info = DATASETS.build({"name": "image_mask", "root": "nowhere", "preset": preset}, split="train").info
    assert len(info.classes) == len(info.palette) == {"camvid": 11, "voc": 21, "bsds500": 0}[preset]
    changed = ImageMask("nowhere", split="train", preset=preset, ignore_index=99, masks="m", classes=["a", "b"])
    assert changed.info.ignore_index == 99
    assert changed.info.classes == ("a", "b")
    assert len(changed.info.palette) == 2
    assert changed.images == PRESETS[preset]["images"]


def test_voc_palette_is_the_devkit_one():
    table = {0: (0, 0, 0), 1: (128, 0, 0), 7: (128, 128, 128), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    palette = voc_palette(256)
    assert all(palette[index] == colour for index, colour in table.items())
    assert palette[255] == (224, 224, 192)  # void
    assert len(set(palette)) == 256


@needs_data
def test_camvid():
    root = Path(DATA, "camvid")
    train = ImageMask(str(root), split="train", preset="camvid")
    assert (len(train), len(ImageMask(str(root), split="val", preset="camvid"))) == (367, 101)
    splits = {
        "train": {"from": ["train"], "include": ["0006R0*", "0016E5*"]},
        "val": {"from": ["train"], "include": ["0001TP*"]},
    }
    parts = [ImageMask(str(root), split=s, preset="camvid", splits=splits) for s in ("train", "val")]
    assert [len(part) for part in parts] == [305, 62]
    assert not set(names(parts[0])) & set(names(parts[1]))
    sample = parts[1][0]
    assert sample["image"].shape == (3, *train.info.size)
    assert sample["mask"].shape == train.info.size
    table = [row for row in json.loads((root / "classes.json").read_text()) if not row["ignore"]]
    assert train.info.classes == tuple(row["name"] for row in table)
    assert train.info.palette == tuple(tuple(row["rgb"]) for row in table)


@needs_data
def test_bsds500():
    root = str(Path(DATA, "bsds500"))
    sets = {split: ImageMask(root, split=split, preset="bsds500") for split in ("train", "val", "test")}
    assert {split: len(dataset) for split, dataset in sets.items()} == {"train": 400, "val": 100, "test": 100}
    assert names(sets["val"]) == names(sets["test"])
    sample = sets["val"][0]
    assert sample["target"].shape == (1, *sample["image"].shape[1:])
    assert 0 < sample["target"].max() <= 1
    assert sample["target"].mean() < 0.2
