"""The readers of folders, on files written here and, where it is, on real data."""

import errno
import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from tifffile import imwrite

from densectx.data import fingerprint
from densectx.data.base import MissingSplitError
from densectx.data.fields import Fields
from densectx.data.files import Files
from densectx.data.folder import Folder
from densectx.data.image_mask import ImageMask
from densectx.data.paired import Paired
from densectx.data.remap import ClassMasks
from densectx.errors import ConfigError, DataError
from densectx.palette import voc_palette
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


# -- listing


def test_many_files_are_listed_in_no_time(tmp_path):
    for number in range(4):
        folder = tmp_path / f"train/{number:02d}"
        folder.mkdir(parents=True)
        for name in range(1000):
            (folder / f"{name}.png").touch()
    started = time.process_time()
    assert len(Folder(str(tmp_path), split="train")) == 4_000
    assert time.process_time() - started < 2  # a tenth of a second


@pytest.mark.fault("I24")
def test_only_hidden_files(tmp_path):
    (tmp_path / "train").mkdir()
    write(tmp_path / "train/.a.png")
    with pytest.raises(DataError, match="train: no file with one of the extensions"):
        len(Folder(str(tmp_path), split="train"))


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


def test_a_folder_that_cannot_be_listed_is_named(tree, monkeypatch):
    scandir = os.scandir

    def denied(path):
        if os.path.basename(path) == "deep":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    (tree / "train/deep").mkdir()
    monkeypatch.setattr(os, "scandir", denied)  # nothing is denied to root
    with pytest.raises(DataError, match=r"train/deep: the folder cannot be listed: Permission denied"):
        len(Folder(str(tree), split="train"))


@pytest.mark.parametrize("where", ["root", "split"])
def test_a_folder_out_of_reach_is_named(tree, where):
    far = "x" * 300  # which the system refuses to look up, as it does below a folder that may not be entered
    root = tree / far if where == "root" else tree
    with pytest.raises(DataError, match="xxx: cannot be opened: File name too long"):
        len(Folder(str(root), split="train", splits={"train": {"from": [far]}}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels: expected 1 or 3"),
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


@pytest.fixture
def cities(tmp_path):
    """Two folders of images that are numbered alike."""
    for city in ("cityA", "cityB"):
        for number in range(2):
            write(tmp_path / f"images/train/{city}/{number}.png")
            write(tmp_path / f"labels/train/{city}/{number}.png", mode="L", value=0)
    write(tmp_path / "images/train/cityB/7.png")
    write(tmp_path / "labels/train/cityB/7.png", mode="L", value=0)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("cityA/1.png", ["cityA/1"]),
        ("images/train/cityA/1.jpg labels/train/cityA/1.png", ["cityA/1"]),
        ("/elsewhere/cityA/1", ["cityA/1"]),
        ("./cityA/1.png", ["cityA/1"]),
        ("yA/1.png", []),
        ("cityA/7.png", []),
        ("1.png", ["cityA/1", "cityB/1"]),
        ("7", ["cityB/7"]),
    ],
)
def test_folders_in_a_list_count(cities, line, named):
    (cities / "list.txt").write_text(line + "\n")
    everything = ["cityA/0", "cityA/1", "cityB/0", "cityB/1", "cityB/7"]
    options = {"split": "train", **LAYOUT}

    def keys(dataset):
        return [Path(name).relative_to(cities / "images/train").with_suffix("").as_posix() for name in names(dataset)]

    kept = keys(ImageMask(str(cities), exclude="list.txt", **options))
    assert kept == [key for key in everything if key not in named]
    listed = ImageMask(str(cities), lists="list.txt", **options)
    if len(named) == 1:
        assert keys(listed) == named
    else:
        said = "is 2 times" if named else "is not"
        with pytest.raises(DataError, match=rf"list.txt, line 1: '{line[:-4]}' {said} in .*images/train"):
            len(listed)


def test_the_longest_path_that_a_line_ends_in_is_meant(cities):
    write(cities / "images/train/1.png")
    write(cities / "labels/train/1.png", mode="L", value=0)
    (cities / "list.txt").write_text("old/cityA/1.png\nold/cityC/1.png\n")
    dataset = ImageMask(str(cities), split="train", lists="list.txt", **LAYOUT)
    assert [Path(name).parent.name for name in names(dataset)] == ["train", "cityA"]


@pytest.mark.parametrize("kind", ["masks", "targets", "paired"])
def test_labels_are_found_by_every_link_to_them(tmp_path, kind):
    for side in ("left", "right"):
        write(tmp_path / f"images/train/{side}/0.png")
    write(tmp_path / "labels/train/left/0.png", mode="L", value=0)
    labels = tmp_path / "labels/train"
    (labels / "right").symlink_to("left")
    for loop, to in (("left/loop", ".."), ("left/up", labels / "right")):  # which lead back to where they are
        (labels / loop).symlink_to(to)
    if kind == "paired":
        dataset = Paired(str(tmp_path), split="train", input="images/{subset}", target="labels/{subset}")
    else:
        options = {kind: "labels/{subset}", "classes": ["x"] if kind == "masks" else None}
        dataset = ImageMask(str(tmp_path), split="train", images="images/{subset}", **options)
    assert [Path(name).parent.name for name in names(dataset)] == ["left", "right"]
    assert all(set(dataset[i]) & {"mask", "target"} for i in range(2))


def test_labels_of_which_only_the_extension_differs(pairs):
    (pairs / "labels/train/a.png").rename(pairs / "labels/train/a.npy")
    with pytest.raises(DataError, match=r"a.jpg: no label file 'a' \(.bmp .jpeg .* .webp\) in .*labels/train"):
        len(ImageMask(str(pairs), split="train", **LAYOUT))


def test_a_subset_that_is_missing_beside_one_that_is_there_is_a_mistake(pairs):
    for order in (["train", "trian"], ["trian", "train"]):
        dataset = ImageMask(str(pairs), split="test", splits={"test": {"from": order}}, **LAYOUT)
        with pytest.raises(DataError, match=r"images/trian: no such folder, though .*images/train is there") as caught:
            len(dataset)
        assert not isinstance(caught.value, MissingSplitError)


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


@pytest.mark.fault("I18")
def test_sizes_must_agree(pairs):
    write(pairs / "labels/train/b.png", size=(4, 5), mode="L", value=0)
    with pytest.raises(DataError, match=r"b.jpg is 4x6 but its label .*b.png is 4x5"):
        ImageMask(str(pairs), split="train", **LAYOUT)[1]


@pytest.mark.fault("I16")
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


def test_no_class_is_unlabelled_unless_somebody_says_so():
    def ignored(count, **options):
        classes = [f"c{i}" for i in range(count)]
        return ImageMask("nowhere", split="train", **{**LAYOUT, "classes": classes, **options}).info.ignore_index

    assert ignored(255) == 255
    with pytest.raises(ConfigError, match=r"ignore_index: 255, the default, is the id of class 'c255'.* such as 300"):
        ignored(300)
    assert ignored(11, preset="camvid") == 11
    with pytest.raises(ConfigError, match=r"ignore_index: 11, that of the preset, is .* class 'c11'.* such as 255"):
        ignored(32, preset="camvid")
    assert ignored(32, preset="camvid", ignore_index=0) == 0


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
    assert dataset.info.target == "map"
    savemat(label, annotations(maps[..., :5]))
    with pytest.raises(DataError, match=r"a.jpg is 4x6 but its label .*a.mat is 4x5"):
        dataset[0]
    for content in (b"", b"MATLAB 5.0 MAT-file" + bytes(200)):
        label.write_bytes(content)
        with pytest.raises(DataError, match=r"a.mat: no BSDS500 ground truth"):
            dataset[0]


@pytest.fixture
def coloured(tmp_path):
    """One image and a mask of colours: red, green, blue, and (7, 7, 7) twice."""
    write(tmp_path / "images/train/a.jpg")
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :2], pixels[:, 2:4], pixels[:, 4:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    (tmp_path / "labels/train").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "labels/train/a.png")
    return tmp_path, pixels


COLOURS = {**LAYOUT, "palette": [[255, 0, 0], [0, 255, 0], [0, 0, 255]]}


@pytest.mark.fault("I08")
def test_masks_of_colours(coloured):
    root, pixels = coloured
    path = root / "labels/train/a.png"
    expected = torch.tensor([0, 0, 1, 1, 2, 2]).expand(4, 6)
    assert torch.equal(ImageMask(str(root), split="train", colors=True, **COLOURS)[0]["mask"], expected)
    with pytest.raises(DataError, match=r"a.png: mode RGB .* is not read here"):
        ImageMask(str(root), split="train", **COLOURS)[0]
    Image.fromarray(pixels).quantize(8).save(path)  # a palette file gives its colours
    assert torch.equal(ImageMask(str(root), split="train", colors=True, **COLOURS)[0]["mask"], expected)
    pixels[2, 3:5], pixels[3, 0] = (7, 7, 7), (255, 0, 1)
    Image.fromarray(pixels).save(path)
    message = (
        r"a.png: undeclared colours \(7, 7, 7\) \(2 pixels, first at row 2, column 3\), "
        r"\(255, 0, 1\) \(1 pixels, first at row 3, column 0\); declare"
    )
    with pytest.raises(DataError, match=message):
        ImageMask(str(root), split="train", colors=True, **COLOURS)[0]
    several = {"ignore": [7, 7, 7], "x": [[255, 0, 0], [255, 0, 1]]}
    mask = ImageMask(str(root), split="train", colors=several, **COLOURS)[0]["mask"]
    assert mask[2].tolist() == [0, 0, 1, 255, 255, 2]
    assert mask[3, 0] == 0


def test_transparent_masks_of_colours_are_refused(coloured):
    root, pixels = coloured
    alpha = np.full((4, 6, 1), 255, np.uint8)
    dataset = ImageMask(str(root), split="train", colors=True, **COLOURS)
    Image.fromarray(np.concatenate([pixels, alpha], 2)).save(root / "labels/train/a.png")
    assert dataset[0]["mask"].unique().tolist() == [0, 1, 2]
    alpha[0, 0] = 0
    Image.fromarray(np.concatenate([pixels, alpha], 2)).save(root / "labels/train/a.png")
    with pytest.raises(DataError, match=r"a.png: has transparent pixels"):
        dataset[0]


@pytest.mark.fault("I08")
@given(seed=st.integers(0, 2**32), count=st.integers(2, 40))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_colours_are_the_inverse_of_a_palette(tmp_path, seed, count):
    rng = np.random.default_rng(seed)
    palette = [tuple(int(v) for v in code.to_bytes(3, "big")) for code in map(int, rng.choice(2**24, count, False))]
    ids = rng.integers(0, count, (5, 7))
    Image.fromarray(np.array(palette, np.uint8)[ids]).save(tmp_path / "m.png")
    masks = ClassMasks([str(i) for i in range(count)], tuple(palette), 255, colours=True)
    assert torch.equal(masks.read(tmp_path / "m.png", Files()), torch.from_numpy(ids))


def remapped(root, ids, remap, **options):
    Image.fromarray(np.array(ids, np.uint8).repeat(4, 0)).save(root / "labels/train/a.png")
    layout = {**LAYOUT, **options}
    return ImageMask(str(root), split="train", remap=remap, **layout)[0]["mask"][0].tolist()


def test_remap(pairs):
    ids = [[0, 1, 2, 7, 9, 255]]
    table = {0: "ignore", 1: "x", 2: "x", 7: 2, 9: "y"}
    assert remapped(pairs, ids, table) == [255, 0, 0, 2, 1, 255]
    assert remapped(pairs, ids, {"x": "z", "*": "y"}) == [2, 1, 1, 1, 1, 255]
    assert remapped(pairs, ids, {"0": 0, "*": "ignore", "255": "y"}, ignore_index=99) == [0, 99, 99, 99, 99, 1]
    with pytest.raises(
        DataError, match=r"a.png: unknown class ids 7 \(4 pixels\), 9 \(4 pixels\); known are 0, 1, 2 and"
    ):
        remapped(pairs, ids, {0: 0, 1: 1, 2: 2})
    preset = {"preset": "camvid", "lists": None, "classes": ["flat", "rest"]}
    listed = {"train": {"from": ["train"], "include": ["a"]}}
    (pairs / "train.txt").write_text("a")
    names_of_preset = {"Road": "flat", "Pavement": "flat", "*": "rest"}
    assert remapped(pairs, [[3, 4, 0, 10, 11, 3]], names_of_preset, splits=listed, **preset) == [0, 0, 1, 1, 11, 0]


@pytest.mark.parametrize("value", [-1, 70_000, 5])
def test_ids_of_any_size_are_refused_or_mapped(pairs, value):
    ids = np.zeros((4, 6), np.int32)
    ids[1, 2:] = value
    (pairs / "labels/train/a.png").unlink()
    imwrite(pairs / "labels/train/a.tif", ids)
    with pytest.raises(DataError, match=rf"a.tif: unknown class ids {value} \(4 pixels\); known are 0..2"):
        ImageMask(str(pairs), split="train", **LAYOUT)[0]
    mask = ImageMask(str(pairs), split="train", remap={0: 0, value: "z"}, **LAYOUT)[0]["mask"]
    assert torch.equal(mask, torch.from_numpy(ids == value).long() * 2)
    imwrite(pairs / "labels/train/a.tif", ids.astype(np.float32))
    with pytest.raises(DataError, match=r"a.tif: mode F "):
        ImageMask(str(pairs), split="train", **LAYOUT)[0]


def test_a_mask_a_class(tmp_path):
    write(tmp_path / "images/train/a.jpg")
    holds = RNG.integers(0, 2, (3, 4, 6))
    for name, label, level in zip("xyz", holds, (255, 1, 7), strict=True):
        (tmp_path / f"labels/{name}/train").mkdir(parents=True)
        Image.fromarray((label * level).astype(np.uint8)).save(tmp_path / f"labels/{name}/train/a.png")
    layout = {**LAYOUT, "masks": "labels/{class}/{subset}"}
    dataset = ImageMask(str(tmp_path), split="train", **layout)
    sample = dataset[0]
    assert set(sample) == {"image", "gray", "target"}
    assert torch.equal(sample["target"], torch.from_numpy(holds).float())
    assert (dataset.info.keys, dataset.info.target, len(dataset.info.classes)) == (("image", "target"), "labels", 3)
    assert (0, 0, 0) not in dataset.info.palette, "a class that nobody would see"
    many = {**layout, "classes": [f"c{i}" for i in range(300)]}  # there are no ids, so none that means unlabelled
    assert len(ImageMask(str(tmp_path), split="train", **many).info.classes) == 300
    (tmp_path / "labels/y/train/a.png").rename(tmp_path / "labels/y/train/b.png")
    with pytest.raises(DataError, match=r"a.jpg: no label file 'a' .* in .*labels/y/train"):
        len(ImageMask(str(tmp_path), split="train", **layout))
    write(tmp_path / "labels/y/train/a.png", mode="L")
    with pytest.raises(DataError, match=r"y/train/a.png: has the values .* beside 0; a mask of one class"):
        dataset[0]
    write(tmp_path / "labels/y/train/a.png", size=(4, 5), mode="L", value=1)
    with pytest.raises(DataError, match=r"x/train/a.png is 4x6 but .*y/train/a.png is 4x5"):
        dataset[0]
    for options, message in (
        ({"target_scale": 0.0}, "target_scale: expected"),
        ({"target_channels": 0}, "target_channels: expected"),
        ({"remap": {0: 1}}, "remap and colors are for masks of class ids"),
        ({"colors": True}, "remap and colors are for masks of class ids"),
        ({"targets": "t"}, "targets and 'masks' with {class} are both targets"),
    ):
        with pytest.raises(ConfigError, match=message):
            ImageMask(str(tmp_path), split="train", **layout, **options)


def depth(root, **options):
    spec = {
        "name": "image_mask",
        "root": str(root),
        "images": "images/{subset}",
        "targets": "depth/{subset}",
        **options,
    }
    return DATASETS.build(spec, split="train")


@pytest.mark.parametrize("kind", ["png", "tif", "npy"])
def test_maps_of_numbers(tmp_path, kind):
    write(tmp_path / "images/train/a.jpg")
    path = tmp_path / f"depth/train/a.{kind}"
    path.parent.mkdir(parents=True)
    stored = RNG.integers(1, 65536, (4, 6)).astype(np.uint16)
    stored[0, :2] = 0
    if kind == "png":
        Image.fromarray(stored).save(path)
    elif kind == "tif":
        imwrite(path, stored.astype(np.float64))
    else:
        np.save(path, stored.astype(np.float32))
    dataset = depth(tmp_path, target_scale=0.001, invalid=0)
    target = dataset[0]["target"]
    assert target.dtype == torch.float32
    expected = torch.from_numpy(stored * 0.001).float()
    expected[0, :2] = torch.nan
    torch.testing.assert_close(target, expected[None], equal_nan=True, rtol=1e-7, atol=0)
    assert (dataset.info.target, dataset.info.keys, dataset.info.classes) == ("map", ("image", "target"), ())
    assert depth(tmp_path)[0]["target"].isnan().sum() == 0


def test_maps_are_checked(tmp_path):
    write(tmp_path / "images/train/a.jpg")
    path = tmp_path / "depth/train/a.npy"
    path.parent.mkdir(parents=True)
    values = RNG.random((4, 6))
    values[0, 0], values[1, 1] = np.nan, np.inf
    np.save(path, values)
    with pytest.raises(DataError, match=r"a.npy: 1 values are infinite; set 'invalid'"):
        depth(tmp_path)[0]
    assert depth(tmp_path, invalid=np.inf)[0]["target"].isnan().sum() == 2
    np.save(path, np.array([[1e39, -1e39, 1e-30]]).repeat(4, 0).repeat(2, 1))
    with pytest.raises(DataError, match=r"a.npy: 16 values are too large for float32 \(target_scale 1\); set"):
        depth(tmp_path)[0]
    assert depth(tmp_path, target_scale=0.01)[0]["target"].isfinite().all()
    with pytest.raises(DataError, match=r"a.npy: 24 values are too large for float32"):
        depth(tmp_path, target_scale=1e100)[0]
    np.save(path, RNG.random((3, 4, 6)))
    assert depth(tmp_path, target_channels=3)[0]["target"].shape == (3, 4, 6)
    with pytest.raises(DataError, match=r"a.npy: has shape \(3, 4, 6\); expected 1 channels"):
        depth(tmp_path)[0]
    np.save(path, RNG.random((5, 6)))
    with pytest.raises(DataError, match=r"a.jpg is 4x6 but its label .*a.npy is 5x6"):
        depth(tmp_path)[0]
    np.save(path, np.array([["text"]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"a.npy: damaged"):
        depth(tmp_path)[0]


def test_masks_and_maps_together(pairs):
    for stem in "abc":
        write(pairs / f"depth/train/{stem}_d.png", mode="L", value=3)
    dataset = depth(pairs, suffixes={"targets": "_d"}, masks=LAYOUT["masks"], classes=LAYOUT["classes"])
    assert set(dataset[1]) == {"image", "gray", "mask", "target"}
    assert dataset.info.keys == ("image", "mask", "target")


def test_channels_of_images(tmp_path):
    write(tmp_path / "labels/train/a.png", mode="L", value=1)
    (tmp_path / "images/train").mkdir(parents=True)
    imwrite(
        tmp_path / "images/train/a.tif", RNG.integers(0, 4096, (7, 4, 6)).astype(np.uint16), photometric="minisblack"
    )
    write(tmp_path / "images/train/preview.png")  # no file of 7 channels
    options = {"channels": 7, "value_range": [0, 4095], **LAYOUT}
    dataset = ImageMask(str(tmp_path), split="train", **options)
    assert dataset[0]["image"].shape == (7, 4, 6)
    assert 0.5 < dataset[0]["image"].max() <= 1
    assert len(Folder(str(tmp_path / "images"), split="train", channels=7)) == 1
    assert dataset.info.channels == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "camvit"}, "did you mean 'camvid'"),
        ({}, "needs 'images' and 'masks', 'boundaries' or 'targets'"),
        ({"images": "a"}, "needs 'images' and 'masks', 'boundaries' or 'targets'"),
        ({"images": "a", "masks": "b"}, "needs 'classes'"),
        ({"images": "a", "masks": "b", "classes": ["x"], "palette": [[0, 0, 0], [1, 1, 1]]}, "2 colours for 1 classes"),
        ({"images": "a", "masks": "b", "classes": ["x"], "palette": [[0, 0, 256]]}, "values in 0..255"),
        ({**LAYOUT, "classes": ["x", "x"]}, "classes: 'x' is named twice"),
        ({**LAYOUT, "remap": {0: "w"}}, r"remap.0: unknown class 'w'.*Known: x, y, z, ignore"),
        ({**LAYOUT, "remap": {"w": 0}}, r"remap: unknown class 'w'.*Known: x, y, z, \*; or give its id"),
        ({**LAYOUT, "remap": {0: 3}}, r"remap.0: expected a class name, an id in 0..2"),
        ({**LAYOUT, "remap": {0: 1, "x": 2}}, r"remap: id 0 is given two targets"),
        ({**LAYOUT, "remap": {0: 1}, "colors": True}, "remap: is for files of ids"),
        ({**LAYOUT, "colors": {"w": [0, 0, 0]}}, "colors.w: unknown class 'w'"),
        ({**LAYOUT, "colors": {"x": [0, 0]}}, r"colors.x: expected \[R, G, B\]"),
        ({**LAYOUT, "colors": {"x": [128, 0, 0]}}, r"\(128, 0, 0\) is also the colour of another class"),
        ({**LAYOUT, "suffixes": {"mask": "_m"}}, "suffixes: unknown folder 'mask'; did you mean 'masks'"),
        ({**LAYOUT, "targets": "a", "boundaries": "b"}, "boundaries and targets are both targets"),
        ({**LAYOUT, "target_scale": float("inf")}, "target_scale: expected a finite number"),
        ({**LAYOUT, "channels": 0}, "channels: expected"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        ImageMask("nowhere", split="train", **options)


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
    assert sample["image"].shape == (3, 360, 480)
    assert sample["mask"].shape == (360, 480)
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


@pytest.mark.parametrize("suffix", ["npy", "tif"])
@pytest.mark.parametrize("invalid", [1e20, -3.4028235e38, -9999.9, 0])
def test_the_mark_of_unknown_numbers_is_that_of_the_file_type(tmp_path, suffix, invalid):
    values = np.array([[1, invalid], [2, 3]], np.float32)
    path = tmp_path / f"a.{suffix}"
    np.save(path, values) if suffix == "npy" else imwrite(path, values)
    read = Fields(invalid=invalid).read(path, Files())
    assert read.isnan().tolist() == [[[False, True], [False, False]]]


def test_a_pipe_among_the_images_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    os.mkfifo(tmp_path / "train/a.png")
    os.mkfifo(tmp_path / "train/b.npy")
    data = Folder(str(tmp_path), split="train", channels=3)
    assert len(fingerprint.take({"train": {"x": data}, "val": {}, "test": {}})["x train"].files) == len(data)
    for index in range(len(data)):
        with pytest.raises(DataError, match="is no file"):
            data[index]
