"""Well-known layouts, as their archives unpack, and sets of several of them."""

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from densectx.data import class_names, limits
from densectx.data.labels import read_sbd
from densectx.data.presets import PRESETS
from densectx.data.transforms import Augment
from densectx.errors import ConfigError, DataError
from densectx.palette import voc_palette
from densectx.registry import DATASETS

RNG = np.random.default_rng(0)
SPLITS = ("train", "val", "test")


def image(path, height=4, width=6):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def mask(path, ids, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = np.resize(np.asarray(ids, np.uint8), (4, 6))
    picture = Image.fromarray(ids)
    if palette:
        picture.putpalette([value for colour in palette for value in colour])
    picture.save(path)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def build(name, root, preset, **options):
    spec = {"name": name, "root": str(root), "preset": preset, **options}
    return {split: DATASETS.build(spec, split=split) for split in SPLITS}


@pytest.mark.parametrize("preset", ["camvid", "camvid_road", "cityscapes"])
def test_copies_of_another_size_may_be_cropped_as_they_are(preset):
    info = build("image_mask", "nowhere", preset)["train"].info
    assert Augment(crop=[1500, 3000], info=info).size == (1500, 3000)  # samples that are smaller say so


def names(dataset):
    return [Path(dataset.name(index)).stem for index in range(len(dataset))]


def stems(data):
    return {split: names(dataset) for split, dataset in data.items()}


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name in PRESETS for preset in PRESETS[name]])
def test_presets_are_known_without_files(name, preset):
    options = {"scale": 2} if name == "paired" else {}
    info = build(name, "nowhere", preset, **options)["train"].info
    counts = {"ade20k": 150, "camvid": 11, "camvid_road": 11, "cityscapes": 19, "kitti": 19, "kitti_road": 11}
    counts |= {"sbd": 21, "voc": 21, "voc_aug": 21}
    assert len(info.classes) == len(info.palette) == len(set(info.classes)) == counts.get(preset, 0)
    with pytest.raises(ConfigError, match=f"did you mean '{preset}'"):
        build(name, "nowhere", f"{preset}x", **options)


@pytest.mark.parametrize("preset", PRESETS["image_mask"])
def test_options_replace_those_of_a_preset(preset):
    changed = build("image_mask", "nowhere", preset, ignore_index=99, masks="m", classes=["a", "b"])["train"]
    assert changed.info.ignore_index == 99
    assert changed.info.classes == ("a", "b")
    assert len(changed.info.palette) == 2
    assert changed.folders["images"] == PRESETS["image_mask"][preset]["images"]


def voc(root, train=("2007_01", "2007_02"), val=("2008_01",)):
    for stem in (*train, *val, "2009_99"):
        image(root / f"JPEGImages/{stem}.jpg")
    for stem in (*train, *val):
        mask(root / f"SegmentationClass/{stem}.png", [0, 15, 20, 255], voc_palette(256))
    lists = root / "ImageSets/Segmentation"
    text(lists / "train.txt", *train)
    text(lists / "val.txt", *val)
    text(lists / "test.txt", "2009_99")
    return root


def test_voc(tmp_path):
    data = build("image_mask", voc(tmp_path), "voc")
    assert stems(data) == {"train": ["2007_01", "2007_02"], "val": ["2008_01"], "test": ["2009_99"]}
    assert data["train"][0]["mask"].unique().tolist() == [0, 15, 20, 255]
    assert "mask" not in data["test"][0]


def test_voc_aug(tmp_path):
    voc(tmp_path)
    for stem in ("2007_01", "2007_02", "2008_01", "2009_99"):
        mask(tmp_path / f"SegmentationClassAug/{stem}.png", [1, 20, 255])
    lines = [f"/JPEGImages/{s}.jpg /SegmentationClassAug/{s}.png" for s in ("2007_01", "2007_02", "2009_99")]
    text(tmp_path / "ImageSets/Segmentation/trainaug.txt", *lines)
    data = build("image_mask", tmp_path, "voc_aug")
    assert stems(data)["train"] == ["2007_01", "2007_02", "2009_99"]
    assert stems(data)["val"] == ["2008_01"]
    assert data["train"][2]["mask"].unique().tolist() == [1, 20, 255]
    assert data["val"][0]["mask"].shape == (4, 6)


def sbd(root, train=("2007_02", "2008_01", "2010_05"), val=("2010_06",)):
    for stem in (*train, *val):
        image(root / f"dataset/img/{stem}.jpg")
        path = root / f"dataset/cls/{stem}.mat"
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = np.resize(np.array([0, 7, 20], np.uint8), (4, 6))
        boundaries = np.empty((20, 1), object)
        boundaries[:] = [[np.zeros((4, 6), np.uint8)]] * 20
        savemat(path, {"GTcls": {"Boundaries": boundaries, "Segmentation": ids, "CategoriesPresent": [7, 20]}})
    text(root / "dataset/train.txt", *train)
    text(root / "dataset/val.txt", *val)
    return root


def test_sbd(tmp_path):
    root = sbd(tmp_path / "benchmark_RELEASE")
    voc(tmp_path / "VOC2012")
    data = build("image_mask", root, "sbd")
    assert stems(data) == {"train": ["2007_02", "2008_01", "2010_05"], "val": ["2010_06"], "test": []}
    assert torch.equal(data["train"][0]["mask"], torch.tensor([0, 7, 20]).repeat(8).reshape(4, 6))
    spaced = tmp_path / "spaced"
    for stem in ("my", "my photo", "a", "b"):
        image(spaced / f"images/train/{stem}_left.png")
        mask(spaced / f"masks/train/{stem}.png", [0])
    options = {
        "images": "images/{subset}",
        "masks": "masks/{subset}",
        "suffixes": {"images": "_left"},
        "classes": ["x"],
    }
    for lines, left in [
        (("\ufeffa_left.png", "my photo_left.png"), ["b_left", "my_left"]),
        (("my photo", "b 1", "x.png a.png"), ["a_left", "my photo_left"]),  # the second column is no name
        (("my", "images/train/b.png labels/a.png"), ["a_left", "my photo_left"]),
    ]:
        text(spaced / "out.txt", *lines)
        kept = DATASETS.build("image_mask", split="train", root=str(spaced), exclude="out.txt", **options)
        assert sorted(Path(kept.name(i)).stem for i in range(len(kept))) == left, lines
    held_out = tmp_path / "VOC2012/ImageSets/Segmentation/val.txt"
    assert stems(build("image_mask", root, "sbd", exclude=str(held_out)))["train"] == ["2007_02", "2010_05"]
    text(root / "all.txt", "2007_02", "2008_01.jpg", "2010_05")
    with pytest.raises(DataError, match=r"train.txt: 'exclude' \(all.txt\) leaves no image of 3"):
        len(build("image_mask", root, "sbd", exclude="all.txt")["train"])
    with pytest.raises(DataError, match=r"none.txt: the list of images cannot be read"):
        len(build("image_mask", root, "sbd", exclude="none.txt")["train"])
    (root / "dataset/cls/2007_02.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(DataError, match=r"2007_02.mat: no SBD ground truth"):
        data["train"][0]


def packed_bomb():
    """``GTcls.Segmentation`` of 1 GiB of zeros in about 1 MB: the same deflated block again and again."""
    size = 1 << 30

    def element(kind, content):
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    def matrix(kind, shape, name, content, length):
        head = element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<2i", *shape)) + element(1, name)
        return struct.pack("<II", 14, len(head) + len(content) + length) + head + content

    ids = matrix(9, (1 << 10, size >> 10), b"", struct.pack("<II", 2, size), size)
    names = element(5, struct.pack("<i", 16)) + element(1, b"Segmentation".ljust(16, b"\0"))
    content = matrix(2, (1, 1), b"GTcls", names + ids, size)
    packer = zlib.compressobj(9)
    start = packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = start + block * (size >> 20)
    return b"MATLAB".ljust(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed


def test_mat_files_are_unpacked_up_to_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "a.mat"
    ids = RNG.integers(0, 21, (40, 60), dtype=np.uint8)
    savemat(path, {"other": 1, "GTcls": {"Segmentation": ids}}, do_compression=True)
    assert torch.equal(read_sbd(path), torch.from_numpy(ids.astype(np.int64)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a.mat: no SBD ground truth"):
        read_sbd(path)
    path.write_bytes(packed_bomb())
    assert path.stat().st_size < 1.2e6
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a.mat: 1073\d+ bytes when unpacked, more than the limit of \d+"):
        read_sbd(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e7
    savemat(path, {"GTcls": {"Segmentation": ids}})
    monkeypatch.setattr(limits, "MAX_PIXELS", ids.size - 1)
    with pytest.raises(DataError, match=r"a.mat: 40x60 pixels, more than the limit of 2399"):
        read_sbd(path)


def test_voc_and_sbd_together_leave_out_val(tmp_path):
    parts = [
        {"name": "image_mask", "preset": "voc", "root": str(voc(tmp_path / "VOC2012"))},
        {
            "name": "image_mask",
            "preset": "sbd",
            "root": str(sbd(tmp_path / "SBD")),
            "splits": {"train": {"from": ["train", "val"]}, "val": None},
        },
    ]
    data = {split: DATASETS.build({"name": "concat", "parts": parts}, split=split) for split in SPLITS}
    assert stems(data) == {
        "train": ["2007_01", "2007_02", "2010_05", "2010_06"],
        "val": ["2008_01"],
        "test": ["2009_99"],
    }
    train = data["train"]
    assert "VOC2012" in train.name(1)
    assert [train[i]["mask"].unique().tolist() for i in (0, 3)] == [[0, 15, 20, 255], [0, 7, 20]]
    assert [len(list(dataset)) for dataset in data.values()] == [4, 1, 1]
    assert train.info == build("image_mask", ".", "voc")["train"].info
    with pytest.raises(ConfigError, match=r"parts.1: its ignore_index 7 differ from those of parts.0, 255"):
        DATASETS.build({"name": "concat", "parts": [parts[0], {**parts[1], "ignore_index": 7}]}, split="train")
    with pytest.raises(ConfigError, match=r"data.parts.1: unknown|parts.1.*presett"):
        DATASETS.build({"name": "concat", "parts": [parts[0], {**parts[1], "presett": 1}]}, "data", split="train")
    with pytest.raises(ConfigError, match="parts: empty"):
        DATASETS.build({"name": "concat", "parts": []}, split="train")


def test_a_folder_a_split_may_number_its_images_alike(tmp_path, caplog):
    for part in "ab":
        for subset, count in (("train", 3), ("val", 2), ("test", 1)):
            for number in range(count):
                image(tmp_path / part / subset / f"{number:04d}.png")
    parts = [{"name": "folder", "root": str(tmp_path / part)} for part in "ab"]
    one, both = (
        DATASETS.build({"name": "concat", "parts": some}, "data", split="train") for some in (parts[:1], parts)
    )
    assert len(one) == 3
    assert not caplog.text
    with caplog.at_level("INFO"):
        assert [Path(both.name(i)).relative_to(tmp_path).as_posix() for i in range(len(both))] == ["a/train/0002.png"]
    # parts are told apart by stems, so that VOC and SBD share none: which is said
    assert "parts.0: 2 of 3 images are left out: 1 with a name of parts.1's test, 1 with a name of parts.1's val" in (
        caplog.text
    )
    assert "parts.1: 3 of 3 images are left out:" in caplog.text
    assert "1 with a name of parts.0." in caplog.text


def test_parts_without_files_keep_all_samples():
    parts = [{"name": "mosaic", "size": 32, "length": 6, "val_length": 2, "seed": seed} for seed in (0, 1)]
    data = {split: DATASETS.build({"name": "concat", "parts": parts}, split=split) for split in ("train", "val")}
    assert [len(dataset) for dataset in data.values()] == [12, 4]
    for dataset in data.values():
        images = [sample["image"] for sample in dataset]
        assert len({image.numpy().tobytes() for image in images}) == len(images)


def test_a_test_split_that_is_not_there_is_left_out_of_nothing(tmp_path, caplog):
    for split in ("train", "val"):
        image(tmp_path / f"{split}.png")
        text(tmp_path / f"{split}.csv", "image", f"{split}.png")
    parts = [{"name": "manifest", "file": str(tmp_path / "{split}.csv")}]
    data = {split: DATASETS.build({"name": "concat", "parts": parts}, "data", split=split) for split in SPLITS}
    with caplog.at_level("INFO"):
        assert [len(data[split]) for split in ("train", "val")] == [1, 1]
    assert "parts.0: its test split has no images" in caplog.text
    assert [Path(path).name for path in data["train"].all_files()] == ["train.png", "val.png"]
    with pytest.raises(DataError, match=r"test.csv: the manifest cannot be read"):
        len(data["test"])
    (tmp_path / "val.csv").unlink()
    with pytest.raises(DataError, match=r"val.csv: the manifest cannot be read"):
        len(DATASETS.build({"name": "concat", "parts": parts}, split="train"))


def test_cityscapes(tmp_path):
    for subset, city, frame in (
        ("train", "aachen", 19),
        ("train", "bremen", 0),
        ("val", "lindau", 1),
        ("test", "bonn", 2),
    ):
        stem = f"{city}_{frame:06d}_000019"
        image(tmp_path / f"leftImg8bit/{subset}/{city}/{stem}_leftImg8bit.png")
        folder = tmp_path / f"gtFine/{subset}/{city}"
        mask(folder / f"{stem}_gtFine_labelIds.png", [7, 33, 0, 11, 31, 29])
        mask(folder / f"{stem}_gtFine_instanceIds.png", [0])
        image(folder / f"{stem}_gtFine_color.png")
        text(folder / f"{stem}_gtFine_polygons.json", "{}")
    data = build("image_mask", tmp_path, "cityscapes")
    assert [len(data[split]) for split in SPLITS] == [2, 1, 1]
    assert names(data["train"]) == ["aachen_000019_000019_leftImg8bit", "bremen_000000_000019_leftImg8bit"]
    assert data["train"][0]["mask"][0].tolist() == [
        0,
        18,
        255,
        2,
        16,
        255,
    ]  # road, bicycle, -, building, train, caravan
    assert "mask" not in data["test"][0]
    assert data["train"].info.classes[13] == "car"
    mask(tmp_path / "gtFine/val/lindau/lindau_000001_000019_gtFine_labelIds.png", [7, 40])
    with pytest.raises(DataError, match=r"labelIds.png: unknown class ids 40 \(12 pixels\); known are -1, 0, 1"):
        data["val"][0]
    merged = {"classes": ["person", "other"], "remap": {"person": "person", "rider": 0, "*": "other", 0: "ignore"}}
    dataset = build("image_mask", tmp_path, "cityscapes", **merged)["train"]
    mask(tmp_path / "gtFine/train/aachen/aachen_000019_000019_gtFine_labelIds.png", [24, 25, 0, 7, 33, 26])
    assert dataset[0]["mask"][0].tolist() == [0, 0, 255, 1, 1, 1]
    dataset = build("image_mask", tmp_path, "cityscapes", remap={"rider": "person", 0: "sky"})["train"]  # rest as it is
    assert dataset[0]["mask"][0].tolist() == [11, 11, 10, 0, 18, 13]
    dataset = build("image_mask", tmp_path, "cityscapes", remap={"rider": "person", "*": "ignore"})["train"]
    assert dataset[0]["mask"][0].tolist() == [255, 11, 255, 255, 255, 255]
    dataset = build("image_mask", tmp_path, "cityscapes", remap={25: "person"})["train"]  # a table of other ids
    with pytest.raises(DataError, match=r"unknown class ids 0 .*, 7 .*known are 25 and ignore_index 255"):
        dataset[0]


def test_masks_of_other_ids_than_those_of_a_preset(tmp_path):
    image(tmp_path / "leftImg8bit/train/aachen/aachen_000019_000019_leftImg8bit.png")
    mask(tmp_path / "gtFine/train/aachen/aachen_000019_000019_gtFine_labelTrainIds.png", [7, 18, 255])
    suffixes = {"images": "_leftImg8bit", "masks": "_gtFine_labelTrainIds"}
    with pytest.raises(ConfigError, match=r"suffixes.masks: '_gtFine_labelTrainIds' takes .* remap: {} if the class"):
        build("image_mask", tmp_path, "cityscapes", suffixes=suffixes)
    data = build("image_mask", tmp_path, "cityscapes", suffixes=suffixes, remap={})
    assert data["train"][0]["mask"][0].tolist() == [7, 18, 255] * 2
    assert data["train"].info.classes[7] == "traffic sign"
    data = build("image_mask", tmp_path, "cityscapes", suffixes=suffixes, remap={"road": "road"})
    assert data["train"][0]["mask"][0].tolist() == [0, 255, 255] * 2
    with pytest.raises(ConfigError, match=r"masks: '{subset}/train_ids' takes the place of '{subset}/semantic'"):
        build("image_mask", tmp_path, "kitti", masks="{subset}/train_ids")
    build("image_mask", tmp_path, "kitti", masks="./{subset}/semantic/")  # its own


def test_kitti(tmp_path):
    for number in range(3):
        image(tmp_path / f"training/image_2/{number:06d}_10.png")
        mask(tmp_path / f"training/semantic/{number:06d}_10.png", [26, 23, 4])
        image(tmp_path / f"testing/image_2/{number:06d}_10.png")
    data = build("image_mask", tmp_path, "kitti")
    assert [len(data[split]) for split in SPLITS] == [3, 0, 3]
    assert data["train"][0]["mask"][0].tolist() == [13, 10, 255] * 2
    assert "mask" not in data["test"][0]


def test_road_scenes_have_the_classes_of_the_published_weights(tmp_path):
    image(tmp_path / "kitti/training/image_2/000000_10.png")
    mask(tmp_path / "kitti/training/semantic/000000_10.png", [7, 8, 31, 33, 22, 4])
    kitti = build("image_mask", tmp_path / "kitti", "kitti_road")["train"]
    for subset in SPLITS:
        image(tmp_path / f"camvid/{subset}/a.png")
        mask(tmp_path / f"camvid/{subset}annot/a.png", [0, 3, 4, 8, 10, 11])
        text(tmp_path / f"camvid/{subset}.txt", f"/SegNet/CamVid/{subset}/a.png /SegNet/CamVid/{subset}annot/a.png")
    camvid, own = (build("image_mask", tmp_path / "camvid", preset)["train"] for preset in ("camvid_road", "camvid"))
    assert kitti.info.classes == camvid.info.classes == class_names.ROAD

    def said(dataset):
        return ["void" if i == dataset.info.ignore_index else dataset.info.classes[i] for i in dataset[0]["mask"][0]]

    assert said(kitti) == ["Road", "Sidewalk", "Car", "Bicyclist", "Tree", "void"]
    renamed = {"Pavement": "Sidewalk", "SignSymbol": "Sign"}
    assert said(camvid) == [renamed.get(name, name) for name in said(own)]
    colours = [dict(zip(d.info.classes, d.info.palette, strict=True)) for d in (camvid, own)]
    assert all(colours[0][renamed.get(n, n)] == c for n, c in colours[1].items() if n not in ("Pavement", "Pedestrian"))


def test_ade20k(tmp_path):
    for subset, part in (("training", "train"), ("validation", "val")):
        image(tmp_path / f"images/{subset}/ADE_{part}_00000001.jpg")
        mask(tmp_path / f"annotations/{subset}/ADE_{part}_00000001.png", [0, 1, 150])
    text(tmp_path / "objectInfo150.txt", "Idx")
    data = build("image_mask", tmp_path, "ade20k")
    assert stems(data) == {"train": ["ADE_train_00000001"], "val": ["ADE_val_00000001"], "test": []}
    assert data["val"][0]["mask"][0].tolist() == [255, 0, 149] * 2
    assert (data["val"].info.classes[0], data["val"].info.classes[149]) == ("wall", "flag")
    mask(tmp_path / "annotations/validation/ADE_val_00000001.png", [151])
    with pytest.raises(DataError, match=r"unknown class ids 151"):
        data["val"][0]


def test_div2k(tmp_path):
    for number, part in ((1, "train"), (2, "train"), (801, "valid")):
        image(tmp_path / f"DIV2K_{part}_HR/{number:04d}.png", 12, 24)
        for scale in (2, 3, 4):
            low = tmp_path / f"DIV2K_{part}_LR_bicubic/X{scale}/{number:04d}x{scale}.png"
            image(low, 12 // scale, 24 // scale)
    data = build("folder", tmp_path, "div2k")
    assert stems(data) == {"train": ["0001", "0002"], "val": ["0801"], "test": []}
    for scale in (2, 3, 4):
        data = build("paired", tmp_path, "div2k", scale=scale)
        assert stems(data) == {"train": [f"0001x{scale}", f"0002x{scale}"], "val": [f"0801x{scale}"], "test": []}
        sample = data["val"][0]
        assert sample["image"].shape == (3, 12 // scale, 24 // scale)
        assert sample["target"].shape == (3, 12, 24)
