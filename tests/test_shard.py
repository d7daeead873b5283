"""Tar shards: the very samples, the same training, and every way a shard can be wrong."""

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader

import densectx.shard
from densectx.cli import main
from densectx.data import shards
from densectx.data.blob import Blob
from densectx.data.shards import Shards
from densectx.data.shards_format import pack, unpack
from densectx.data.shards_index import MEMBERS, SAMPLES, Index, Shard, SplitFiles, Table
from densectx.errors import DataError
from densectx.registry import DATASETS
from densectx.testing import check_dataset
from densectx.types import SourceInfo

CLASSES = ["sky", "road", "tree"]


def picture(path, size=(20, 14), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)


def ids(path, values, size=(20, 14), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.choice(np.array(values, np.uint8), (size[1], size[0])), "L")
    image.save(path)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Files of every kind of data set."""
    root = tmp_path_factory.mktemp("data")
    exif = Image.Exif()
    exif[274] = 6
    for split, count in (("train", 5), ("val", 2)):
        for i in range(count):
            stem = f"{split}{i}"
            picture(root / "images" / split / f"{stem}.jpg", seed=i, quality=80)
            ids(root / "masks" / split / f"{stem}.png", [0, 1, 2, 255], seed=i)
            ids(root / "labels" / split / f"{stem}.png", [7, 8, 9], seed=i)
            colours = np.array([[70, 130, 180], [128, 64, 128], [107, 142, 35]], np.uint8)
            path = root / "colours" / split / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(colours[np.asarray(Image.open(root / "labels" / split / f"{stem}.png")) - 7]).save(path)
            for number, name in enumerate(CLASSES):
                ids(root / "many" / split / name / f"{stem}.png", [0, 255], seed=10 * i + number)
            depth = root / "depth" / split / f"{stem}.png"
            depth.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 65536, (14, 20), dtype=np.uint16)).save(depth)
            mat = root / "mat" / split / f"{stem}.mat"
            mat.parent.mkdir(parents=True, exist_ok=True)
            maps = np.empty((1, 3), object)
            for k in range(3):
                maps[0, k] = {"Boundaries": np.random.default_rng(i + k).integers(0, 2, (14, 20), dtype=np.uint8)}
            savemat(mat, {"groundTruth": maps})
            picture(root / "small" / split / f"{stem}.png", (10, 7), seed=i)
            picture(root / "large" / split / f"{stem}.png", (20, 14), seed=i)
        picture(root / "mixed" / split / "turned.jpg", exif=exif)
        Image.fromarray(np.random.default_rng(0).integers(0, 65536, (9, 8), dtype=np.uint16)).save(
            root / "mixed" / split / "deep.png"
        )
        Image.new("RGBA", (5, 6), (10, 20, 30, 77)).save(root / "mixed" / split / "alpha.png")
        (root / "floats" / split).mkdir(parents=True)
        np.save(root / "floats" / split / "a.npy", np.random.default_rng(1).random((4, 6, 7), dtype=np.float32) * 9)
    (root / "m.csv").write_text(
        "image,mask,target,split\n"
        "images/train/train0.jpg,masks/train/train0.png,depth/train/train0.png,train\n"
        "images/train/train1.jpg,,,train\n"
        "images/val/val0.jpg,masks/val/val0.png,,val\n"
    )
    return root


def sources(root):
    """Every data set of densectx, and every kind of label."""
    masks = {"name": "image_mask", "root": str(root), "images": "images/{subset}"}
    return {
        "folder": {"name": "folder", "root": str(root / "mixed")},
        "gray": {"name": "folder", "root": str(root / "images"), "channels": 1},
        "spectral": {"name": "folder", "root": str(root / "floats"), "channels": 4, "value_range": [0, 9]},
        "ids": {**masks, "masks": "masks/{subset}", "classes": CLASSES},
        "remapped": {
            **masks,
            "masks": "labels/{subset}",
            "classes": CLASSES,
            "remap": {"7": "tree", "8": "sky", "9": "ignore"},
        },
        "colours": {
            **masks,
            "masks": "colours/{subset}",
            "classes": CLASSES,
            "palette": [[70, 130, 180], [128, 64, 128], [107, 142, 35]],
            "colors": True,
        },
        "labels": {**masks, "masks": "many/{subset}/{class}", "classes": CLASSES},
        "maps": {**masks, "targets": "depth/{subset}"},
        "scaled": {**masks, "targets": "depth/{subset}", "target_scale": 0.001, "invalid": 3},
        "boundaries": {**masks, "boundaries": "mat/{subset}"},
        "paired": {
            "name": "paired",
            "root": str(root),
            "input": "small/{subset}",
            "target": "large/{subset}",
            "scale": 2,
        },
        "manifest": {"name": "manifest", "file": str(root / "m.csv"), "target": "map", "classes": CLASSES},
        "concat": {
            "name": "concat",
            "parts": [
                {"name": "folder", "root": str(root / "images"), "splits": {"val": None, "test": None}},
                {"name": "folder", "root": str(root / "mixed"), "splits": {"test": None}},
            ],
        },
        "mosaic": {"name": "mosaic", "size": [18, 22], "length": 7, "val_length": 3},
    }


RAW = {"folder", "gray", "spectral", "ids", "maps", "boundaries", "paired", "manifest", "concat"}
"""Those of :func:`sources` of which no member is encoded anew."""


def config(path, sources, **data):
    path.write_text(yaml.safe_dump({"data": {"sources": sources, "num_workers": 0, **data}}))
    return str(path)


def shard(*arguments, workers=0, status=0):
    assert main(["shard", *map(str, arguments), "--num-workers", str(workers)]) == status


@pytest.fixture(scope="module")
def every(tree, tmp_path_factory):
    """All sources as shards of two or three samples each."""
    folder = tmp_path_factory.mktemp("every")
    shard(config(folder / "c.yaml", sources(tree)), "-o", folder / "out", "--size", "8kB")
    return folder / "out"


def same(a, b):
    """Samples bit by bit, with the order of their keys."""
    assert list(a) == list(b)
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
        assert a[key].numpy().tobytes() == b[key].numpy().tobytes(), key


@pytest.mark.parametrize("name", sources(Path("x")))
def test_samples_are_those_of_the_data_set(tree, every, name):
    for split in ("train", "val", "test"):
        original = DATASETS.build(sources(tree)[name], split=split)
        found = DATASETS.build({"name": "shards", "root": str(every / name)}, split=split)
        assert found.info == original.info
        if split == "test" and name != "mosaic":  # a folder that is not there
            assert len(found) == 0
            continue
        assert len(found) == len(original) > 0
        for index in range(len(original)):
            same(found[index], original[index])
            assert os.path.basename(found.name(index)) == os.path.basename(original.name(index))
        with pytest.raises(IndexError):
            found[len(original)]


def test_files_are_kept_as_they_were(tree, every):
    summary = json.loads((every / "shards.json").read_text())
    encoded = {name: sum(split["encoded"] for split in splits.values()) for name, splits in summary["sources"].items()}
    assert {name for name, count in encoded.items() if count == 0} == RAW
    assert encoded["remapped"] == encoded["scaled"] == 7  # the masks and maps; the images are files
    content = {}
    for path in sorted((every / "boundaries").glob("train-*.tar")):
        with tarfile.open(path) as tar:
            content |= {member.name: tar.extractfile(member).read() for member in tar}
    for i in range(5):
        assert content[f"0000000{i}.image.jpg"] == (tree / f"images/train/train{i}.jpg").read_bytes()
        assert content[f"0000000{i}.target.mat"] == (tree / f"mat/train/train{i}.mat").read_bytes()
        assert json.loads(content[f"0000000{i}.json"]) == {"gray": False, "name": f"train{i}.jpg", "tensors": []}
    assert str(tree).encode() not in b"".join(path.read_bytes() for path in every.rglob("*") if path.is_file())


def test_odd_tensors_come_back_bit_by_bit():
    info = SourceInfo(keys=("image", "mask", "target"), classes=("a",), target="map")
    sample = {
        "image": torch.tensor([[[0.1, 1 / 255], [-0.0, 1e-40]]]).expand(3, 2, 2),
        "gray": torch.tensor(True),
        "mask": torch.tensor([[0, 70000], [-1, 255]]),
        "target": torch.tensor([[[float("nan"), float("inf")], [-0.0, 3.0]]]),
        "valid": torch.tensor([[True, False], [False, True]]),
        "surround": torch.tensor(3),
    }
    packed = pack(sample, "x", {}, info)
    assert packed.files == 0
    for extension, content in packed.members.items():
        key = extension.partition(".")[0]
        if key != "json":
            same({key: unpack(key, Blob(extension, content), encoded=True, info=info)}, {key: sample[key].contiguous()})
    with pytest.raises(DataError, match=r"'edges' is torch\.float32"):
        pack({**sample, "edges": torch.zeros(1)}, "x", {}, info)


def test_the_contract_of_a_data_set(every):
    reason = {"reads_nothing_when_built": "the index says what the source is"}
    check_dataset({"name": "shards", "root": str(every / "ids")}, expected_failed_checks=reason)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_bytes_from_any_number_of_workers(tree, every, tmp_path):
    names = ("remapped", "boundaries", "labels")
    some = {name: sources(tree)[name] for name in names}
    shard(config(tmp_path / "c.yaml", some), "-o", tmp_path / "out", "--size", "8kB", workers=2)
    for name in names:
        assert contents(tmp_path / "out" / name) == contents(every / name)


def test_tar_and_webdataset_read_them(every, tree):
    path = every / "ids" / "train-000000.tar"
    listed = subprocess.run(["tar", "tvf", path], check=True, capture_output=True, text=True, timeout=20).stdout
    assert "00000000.image.jpg" in listed
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset: pip install webdataset")
    urls = sorted(str(path) for path in (every / "ids").glob("train-*.tar"))
    assert len(urls) > 1
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    original = DATASETS.build(sources(tree)["ids"], split="train")
    assert [sample["__key__"] for sample in found] == [f"{i:08d}" for i in range(len(original))]
    for index, sample in enumerate(found):
        assert sorted(key for key in sample if key[0] != "_") == ["image.jpg", "json", "mask.png"]
        assert sample["json"]["name"] == f"train{index}.jpg"
        assert torch.equal(
            torch.from_numpy(np.asarray(sample["image.jpg"]).copy()).permute(2, 0, 1) / 255, original[index]["image"]
        )


def killed_after(samples, arguments):
    """In a process of its own: the command, killed when so many samples are written."""

    def progress(self, done):
        if done == samples:
            os.kill(os.getpid(), signal.SIGKILL)

    densectx.shard._Progress.__call__ = progress
    main(arguments)


@pytest.mark.parametrize("samples", [1, 3, 4])
def test_a_killed_run_is_gone_on_with(tree, every, tmp_path, samples, capsys):
    file = config(tmp_path / "c.yaml", {"ids": sources(tree)["ids"]})
    out = tmp_path / "out"
    arguments = ["shard", file, "-o", str(out), "--size", "8kB", "--num-workers", "0"]
    process = multiprocessing.get_context("fork").Process(target=killed_after, args=(samples, arguments))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "shards.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (out / "ids").glob("train-*.tar")}
    assert len(before) == {1: 0, 3: 1, 4: 1}[samples]
    assert main(arguments) == 0
    assert {name: (out / "ids" / name).stat().st_mtime_ns for name in before} == before, "finished shards are kept"
    assert {k: v for k, v in contents(out).items() if k.startswith("ids")} == {
        k: v for k, v in contents(every).items() if k.startswith("ids")
    }
    assert sorted(path.name for path in out.iterdir()) == ["ids", "shards.json"]


@pytest.mark.parametrize("left", [0, 3, 40, -30])
def test_a_damaged_table_of_a_killed_run_is_written_again(tree, every, tmp_path, left):
    file = config(tmp_path / "c.yaml", {"ids": sources(tree)["ids"]})
    arguments = ["shard", file, "-o", str(tmp_path / "out"), "--size", "8kB", "--num-workers", "0"]
    process = multiprocessing.get_context("fork").Process(target=killed_after, args=(3, arguments))
    process.start()
    process.join(30)
    part = tmp_path / "out/ids/.train-000000.tar.part"
    head, _, rest = part.read_bytes().partition(b"\n")
    part.write_bytes(head + b"\n" + rest[:left])
    assert main(arguments) == 0
    assert contents(tmp_path / "out")["ids/train-000000.tar"] == contents(every)["ids/train-000000.tar"]


def without_space(arguments, queue):
    """In a process of its own: the command, whose files may not grow beyond a shard and a half."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
    queue.put(main(arguments))


def test_no_space_left(tree, every, tmp_path, capfd):
    file = config(tmp_path / "c.yaml", {"ids": sources(tree)["ids"]})
    out = tmp_path / "out"
    arguments = ["shard", file, "-o", str(out), "--num-workers", "0"]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=without_space, args=([*arguments, "--size", "1GB"], queue))
    process.start()
    process.join(30)
    assert queue.get() == 8
    assert "cannot be written: File too large; free space or choose another -o" in capfd.readouterr().err
    assert [path.name for path in out.rglob("*") if path.is_file()] == [".shards.json"]
    assert main([*arguments, "--size", "1GB"]) == 0
    assert len(list((out / "ids").glob("train-*.tar"))) == 1


def test_what_is_there_is_kept_refused_or_replaced(tree, tmp_path, capsys):
    copy = tmp_path / "data"
    shutil.copytree(tree / "images", copy)
    file = config(tmp_path / "c.yaml", {"a": {"name": "folder", "root": str(copy)}})
    out = tmp_path / "out"
    shard(file, "-o", out, "--size", "1kB")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    shard(file, "-o", out, "--size", "1kB", "--json")
    assert json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["status"] == "skipped"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    (out / "a" / "train-000002.tar").unlink()
    shard(file, "-o", out, "--size", "1kB")
    assert (out / "a" / "train-000002.tar").exists(), "what is missing is written again"
    shard(file, "-o", out, "--size", "2kB", status=2)
    assert "--overwrite" in capsys.readouterr().err
    (copy / "train" / "train4.jpg").unlink()
    (out / "a" / "notes.txt").write_text("mine")
    shard(file, "-o", out, "--size", "1kB", status=2)
    shard(file, "-o", out, "--size", "1kB", "--overwrite")
    assert sorted(path.name for path in (out / "a").glob("train-*")) == [f"train-00000{i}.tar" for i in range(4)]
    assert (out / "a" / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    for flags in ((), ("--overwrite",)):
        shard(file, "-o", tmp_path / "other", *flags, status=2)
        assert "is no output of `densectx shard`" in capsys.readouterr().err
    (copy / "val" / "val0.jpg").write_bytes(b"no picture")
    shard(file, "-o", tmp_path / "bad", status=3)
    assert "val0.jpg: not a readable image" in capsys.readouterr().err
    assert not (tmp_path / "bad" / "shards.json").exists()
    shard(file, "-o", tmp_path / "bad", "--size", "huge", status=2)
    shard(config(tmp_path / "d.yaml", {"a/up": {"name": "mosaic"}}), "-o", tmp_path / "up", status=2)
    assert "data.sources.a/up: is no name for a folder" in capsys.readouterr().err


def test_a_sample_need_not_say_that_it_is_gray():
    for channels in (1, 3):
        packed = pack({"image": torch.zeros(channels, 4, 5)}, "a", {}, SourceInfo(channels=channels))
        assert json.loads(packed.members["json"])["gray"] is (channels == 1)


def test_overwriting_leaves_what_is_not_ours_and_what_is_read(tree, tmp_path, capsys):
    out, folder = tmp_path / "out", {"name": "folder", "root": str(tree / "images")}
    shard(config(tmp_path / "c.yaml", {"a": folder, "b": folder}), "-o", out, "--size", "1kB")
    (out / "site").mkdir()
    others = [out / "site" / "index.json", out / "site" / "train.npz", out / "site" / ".film.part"]
    for path in others:
        path.write_text("mine")
    again = config(tmp_path / "d.yaml", {"c": {"name": "shards", "root": str(out / "a")}})
    shard(again, "-o", out, "--overwrite", status=2)
    assert f"data.sources.c is read from there ({out / 'a' / 'index.json'})" in capsys.readouterr().err
    assert (out / "a" / "index.json").exists()
    shard(config(tmp_path / "e.yaml", {"a": folder}), "-o", out, "--size", "1kB", "--overwrite")
    assert all(path.read_text() == "mine" for path in others)
    assert list((out / "b").iterdir()) == []
    (out / "shards.json").write_text("{}")
    shard(config(tmp_path / "e.yaml", {"a": folder}), "-o", out, "--overwrite", status=2)
    assert "its shards.json is damaged" in capsys.readouterr().err


def test_usage(tree, tmp_path, capsys):
    folder = {"a": {"name": "folder", "root": str(tree / "images")}}
    file, out = config(tmp_path / "c.yaml", folder, timeout=30.0), tmp_path / "out"
    for size in ("1iB", "1KI", "0", "1TB"):
        shard(file, "-o", out, "--size", size, status=2)
        assert f"--size {size!r}: expected a size such as 256MB or 1GB." in capsys.readouterr().err
    shard(file, "-o", out, workers=-1, status=2)
    assert "--num-workers: expected a whole number of at least 0, got -1." in capsys.readouterr().err
    shard(config(tmp_path / "overlay.yaml", None), "-o", out, status=2)
    assert "data.sources is missing; the configs folder of densectx has examples." in capsys.readouterr().err
    assert not out.exists()
    shard(file, "-o", out, "--data.sources.a.root", tmp_path / "nowhere", status=3)
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
    shard(file, "-o", out, "--size", "1MiB")  # data.timeout is an option of a fit, so the config may have it


@pytest.fixture
def ids_(every, tmp_path):
    """A copy of one source that a test may damage."""
    shutil.copytree(every / "ids", tmp_path / "ids")
    return tmp_path / "ids"


def opened(folder, split="train"):
    return Shards(str(folder), split=split)


def test_flipped_bits_are_found_or_harmless(ids_, record_property):
    path = ids_ / "train-000000.tar"
    whole = path.read_bytes()
    count = Index.read(ids_ / "index.json").splits["train"].shards[0].samples
    expected = [opened(ids_)[index] for index in range(count)]
    table = opened(ids_)._table
    rng = np.random.default_rng(0)
    found = 0
    inside = [
        (int(m["offset"]) - 512, int(m["offset"] + m["size"]))
        for m in table.members[: int(table.samples["first"][count])]
    ]
    for place in rng.integers(0, 8 * inside[-1][1], 400).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        data, errors = opened(ids_), []
        for index in range(count):
            try:
                same(data[index], expected[index])
            except DataError as error:
                errors.append(str(error))
        assert len(errors) <= 1
        found += len(errors)
        in_member = any(begin <= place // 8 < end for begin, end in inside)
        assert len(errors) == in_member, place  # outside are padding and the JSON, which nothing is read from
        assert all("train-000000.tar: member 0000000" in text and "densectx shard" in text for text in errors)
    record_property("count", 400)
    assert found > 200


@pytest.mark.parametrize("size", [0, 1, 511, 5000, -1])
def test_shards_that_are_not_whole_are_refused_when_opened(ids_, size):
    path = ids_ / "train-000000.tar"
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(DataError, match=r"train-000000.tar: has \d+ bytes, index.json says \d+: not whole"):
        len(opened(ids_))
    path.unlink()
    with pytest.raises(DataError, match=r"train-000000.tar: cannot be opened: No such file.*copy it again"):
        len(opened(ids_))
    assert len(opened(ids_, "val")) == 2


def test_a_shard_that_shrinks_while_it_is_read(ids_):
    data = opened(ids_)
    assert len(data) == 5
    os.truncate(Path(data.name(4)).parent, 700)
    with pytest.raises(DataError, match=r"train-00000\d.tar: ends \d+ bytes before byte"):
        data[4]


def rewrite(path, change):
    """Every header of a tar file changed in place, with the right checksum of headers."""
    content = bytearray(path.read_bytes())
    offset = 0
    while any(content[offset : offset + 512]):
        header = tarfile.TarInfo.frombuf(bytes(content[offset : offset + 512]), "ascii", "strict")
        size = header.size
        change(header)
        content[offset : offset + 512] = header.tobuf(tarfile.USTAR_FORMAT)
        offset += 512 + size + -size % 512
    path.write_bytes(content)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_and_other_members_are_refused(ids_, kind):
    def change(header):
        header.type, header.linkname = kind, "/etc/passwd"

    rewrite(ids_ / "train-000000.tar", change)
    with pytest.raises(
        DataError, match=r"train-000000.tar: member 00000000.image.jpg: (is no regular file|its header)"
    ):
        opened(ids_)[0]


@pytest.mark.parametrize("name", ["../../up.jpg", "/etc/up.jpg", "00000001.image.jpg"])
def test_names_lead_nowhere(ids_, tmp_path, name):
    def change(header):
        header.name = name

    before = contents(tmp_path)
    rewrite(ids_ / "train-000000.tar", change)
    with pytest.raises(DataError, match=rf"member 00000000.image.jpg: its header says '{name}'"):
        opened(ids_)[0]
    assert contents(tmp_path).keys() == before.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format=2), r"has format 2, this densectx reads 1; use the densectx that"),
        (lambda index: index["info"]["classes"].reverse(), "damaged.*SHA-256 is another one"),
        (lambda index: index.pop("sha256"), "damaged, or no index"),
        (lambda index: index.pop("splits"), "damaged"),
    ],
)
def test_an_index_that_is_not_the_right_one(ids_, change, message, capsys, tmp_path):
    index = json.loads((ids_ / "index.json").read_text())
    change(index)
    (ids_ / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=rf"index.json: {message}"):
        opened(ids_)


def test_index_and_table_belong_together(ids_, every):
    shutil.copy(every / "remapped" / "train.npz", ids_ / "train.npz")
    with pytest.raises(DataError, match=r"train.npz: is not the table that index.json names"):
        len(opened(ids_))
    (ids_ / "train.npz").unlink()
    with pytest.raises(DataError, match=r"train.npz: cannot be opened"):
        len(opened(ids_))
    for name in ("../x.tar", "/x.tar", ".hidden", "a\\b", ""):
        index = Index(SourceInfo(), {"train": SplitFiles("train.npz", "", (Shard(name, 1, "", 1),))})
        (ids_ / "index.json").write_bytes(index.to_bytes())
        with pytest.raises(DataError, match="is no plain file name"):
            opened(ids_)
    with pytest.raises(DataError, match=r"nowhere/index.json: no such file; `densectx shard CONFIG -o DIR`"):
        opened(ids_ / "nowhere")


def test_lint_names_shard_and_member(ids_, tmp_path, capsys):
    path = ids_ / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    file = config(tmp_path / "c.yaml", {"a": {"name": "shards", "root": str(ids_)}})
    assert main(["lint", file, "--num-workers", "0"]) == 3
    assert "train-000000.tar: member 00000000.image.jpg: is damaged" in capsys.readouterr().out


def test_a_hundred_thousand_members_open_at_once(tmp_path):
    count = 50_000
    samples = np.zeros(count, SAMPLES)
    samples["first"] = 2 * np.arange(count)
    members = np.zeros(2 * count, MEMBERS)
    members["offset"] = 512 + 1024 * np.arange(2 * count)
    members["extension"] = np.tile([b"image.jpg", b"mask.png"], count)
    names = b"".join(b"a/long/folder/of/images/%08d.jpg\0" % i for i in range(count))
    content = Table(samples, members, np.frombuffer(names, np.uint8)).to_bytes()
    (tmp_path / "train.npz").write_bytes(content)
    with open(tmp_path / "train-000000.tar", "wb") as file:
        file.truncate(1024 * 2 * count)
    tars = (Shard("train-000000.tar", 1024 * 2 * count, "", count),)
    files = SplitFiles("train.npz", hashlib.sha256(content).hexdigest(), tars)
    (tmp_path / "index.json").write_bytes(Index(SourceInfo(), {"train": files}).to_bytes())
    start = time.process_time()
    data = opened(tmp_path)
    assert len(data) == count
    assert data.name(count - 1).endswith("/00049999.jpg")
    assert time.process_time() - start < 2


def test_workers_that_inherit_open_files(every):
    data = opened(every / "ids")
    expected = [data[index] for index in range(len(data))]  # opens the shards here
    order = [4, 0, 3, 1, 2] * 8
    for index, sample in zip(order, DataLoader(data, batch_size=None, sampler=order, num_workers=2), strict=True):
        same(sample, expected[index])


def test_few_files_are_kept_open(every):
    data = opened(every / "ids")
    assert len(list((every / "ids").glob("train-*.tar"))) >= 2
    open_before = len(os.listdir("/proc/self/fd"))
    kept, shards._OPEN = shards._OPEN, 1
    try:
        for index in (0, 4, 0, 4):
            data[index]
        assert len(os.listdir("/proc/self/fd")) == open_before + 1
    finally:
        shards._OPEN = kept


FIT = """
model:
  backbone: {name: plain, width: 4}
  projection: {channels: 4}
  context: context7
  tasks:
    segmentation: {name: segmentation, source: ids}
    denoising: {name: denoising, source: pictures, sigma: [0, 50]}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}
trainer:
  accelerator: cpu
  max_steps: 3
  val_check_interval: 3
  check_val_every_n_epoch: null
  enable_progress_bar: false
  enable_model_summary: false
"""


def test_training_is_the_same(tree, every, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "fit.yaml").write_text(FIT)
    shared = {"batch_size": 2, "augment": {"flip": True, "crop": 8, "scale": [0.5, 1.5]}}
    specs = sources(tree)
    data = {
        "files": {"ids": {**specs["ids"], **shared}, "pictures": {**specs["concat"], **shared}},
        "shards": {
            "ids": {"name": "shards", "root": str(every / "ids"), **shared},
            "pictures": {"name": "shards", "root": str(every / "concat"), **shared},
        },
    }
    found = {}
    for name, both in data.items():
        file = config(tmp_path / f"{name}.yaml", both)
        assert main(["fit", "-c", "fit.yaml", "-c", file, "--name", name, "--no-report"]) == 0
        found[name] = torch.load(tmp_path / "runs" / name / "0" / "checkpoints" / "last.ckpt", weights_only=True)
    a, b = found["files"]["state_dict"], found["shards"]["state_dict"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    metrics = [(tmp_path / "runs" / name / "0" / "metrics.csv").read_text() for name in data]
    assert metrics[0] == metrics[1]
