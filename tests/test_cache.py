"""The cache of decoded files: equal to decoding, never stale, whole at every moment."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tifffile import imwrite

from densectx.data import cache as cache_module
from densectx.data.cache import Cache
from densectx.data.files import Files
from densectx.data.folder import Folder
from densectx.data.image_mask import ImageMask
from densectx.data.reader import read_image
from densectx.errors import ConfigError, DataError, StorageError

RNG = np.random.default_rng(0)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data/train"
    folder.mkdir(parents=True)
    Image.fromarray(RNG.integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(folder / "a.jpg")
    Image.fromarray(RNG.integers(0, 256, (8, 9, 4), dtype=np.uint8), "RGBA").save(folder / "alpha.png")
    Image.fromarray(RNG.integers(0, 65536, (8, 9)).astype(np.uint16)).save(folder / "deep.png")
    imwrite(folder / "float.tif", RNG.random((8, 9, 3)).astype(np.float32), photometric="rgb")
    return tmp_path


def entries(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_cached_samples_are_the_decoded_ones(data, monkeypatch):
    plain = Folder(str(data / "data"), split="train")
    kept = Folder(str(data / "data"), split="train", cache=str(data / "cache"))
    first = [kept[index] for index in range(4)]
    monkeypatch.setattr("densectx.data.files.read_image", None)  # nothing is decoded again
    for index in range(4):
        expected = plain.files and read_image(plain.name(index))
        for sample in (first[index], kept[index]):
            assert torch.equal(sample["image"], expected[0])
            assert bool(sample["gray"]) == expected[1]
            assert sample["image"].dtype == torch.float32
    sizes = sorted(path.stat().st_size for path in entries(data / "cache"))
    pixels = 3 * 8 * 9  # JPEG in 8 bits, the 16-bit one in 16, composited and float ones in 32
    assert [round((size - sizes[0]) / pixels) for size in sizes] == [0, 1, 3, 3]


def test_what_memory_keeps_is_the_decoded_file(data, monkeypatch):
    plain = Folder(str(data / "data"), split="train")
    kept = Folder(str(data / "data"), split="train", cache="memory")
    for index in range(4):
        kept[index]["image"].zero_()  # a sample is its user's to change
    monkeypatch.setattr("densectx.data.files.read_image", None)  # nothing is decoded again
    for _ in range(2):
        for index in range(4):
            expected, sample = read_image(plain.name(index)), kept[index]
            assert torch.equal(sample["image"], expected[0])
            assert bool(sample["gray"]) == expected[1]
            sample["image"].zero_()
    assert not (data / "memory").exists()


def test_memory_keeps_nothing_more_when_little_is_free(data, monkeypatch):
    free = iter([1000, 251, 250])
    monkeypatch.setattr("densectx.data.memory_cache.free_memory", lambda: next(free))
    files, decoded = Files(cache="memory"), []
    read = read_image

    def counted(path, *options):
        decoded.append(path.name)
        return read(path, *options)

    monkeypatch.setattr("densectx.data.files.read_image", counted)
    for name in ("a.jpg", "alpha.png", "deep.png"):
        files.image(data / "data/train" / name)
    monkeypatch.setattr("densectx.data.memory_cache.free_memory", lambda: 100)
    decoded.clear()
    for name in ("a.jpg", "alpha.png", "deep.png"):
        files.image(data / "data/train" / name)
    assert decoded == ["deep.png"]


def test_labels_are_kept_exactly(tmp_path):
    (tmp_path / "d").mkdir()
    mask = tmp_path / "d/m.png"
    Image.fromarray(RNG.integers(0, 65536, (5, 6)).astype(np.uint16)).save(mask)
    depth = tmp_path / "d/d.npy"
    np.save(depth, np.array([[0.1, np.nan], [-7e30, np.pi]]))
    plain, kept = Files(), Files(cache=str(tmp_path / "c"))
    for _ in range(2):
        assert torch.equal(kept.mask(mask), plain.mask(mask))
        assert kept.mask(mask).dtype == torch.int64
        assert torch.equal(kept.field(depth).nan_to_num(9), plain.field(depth).nan_to_num(9))
        assert kept.field(depth).dtype == torch.float64
        assert torch.equal(kept.field(mask).long()[0], kept.mask(mask))  # another way to read the same file
    assert len(entries(tmp_path / "c")) == 3


@pytest.mark.fault("I30")
def test_an_edited_source_is_read_again(data):
    path = data / "data/train/a.jpg"
    files = Files(cache=str(data / "cache"))
    before, status = files.image(path)[0], path.stat()
    Image.new("RGB", (9, 8), (1, 2, 3)).save(path)
    assert torch.equal(files.image(path)[0], read_image(path)[0])
    assert not torch.equal(files.image(path)[0], before)
    bitmap = path.with_suffix(".bmp")  # same size and time, other content
    for colour in ((10, 20, 30), (40, 50, 60)):
        Image.new("RGB", (9, 8), colour).save(bitmap)
        os.utime(bitmap, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (files.image(bitmap)[0][:, 0, 0] * 255).round().tolist() == list(colour)
    assert len(entries(data / "cache")) == 2


def test_a_file_that_is_only_touched_stays_valid(data, monkeypatch):
    path = data / "data/train/a.jpg"
    files = Files(cache=str(data / "cache"))
    expected = files.image(path)[0]
    os.utime(path, ns=(1, 1))
    monkeypatch.setattr("densectx.data.files.read_image", None)
    assert torch.equal(files.image(path)[0], expected)


@pytest.mark.fault("I30")
def test_a_source_that_changes_while_it_is_read_is_not_kept(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    cache = Cache(str(tmp_path / "c"))

    def make():
        path.write_bytes(b"2")
        return {"x": torch.tensor([1.0])}

    assert cache.get(path, "", make)["x"].item() == 1
    assert entries(tmp_path / "c") == []


@pytest.mark.fault("I30")
@pytest.mark.parametrize("place", [0, 10, 41, 43, 44, 60, -1, "cut", "empty"])
def test_damaged_entries_are_made_again(data, place):
    path = data / "data/train/a.jpg"
    files = Files(cache=str(data / "cache"))
    expected = files.image(path)[0]
    (entry,) = entries(data / "cache")
    whole = entry.read_bytes()
    content = bytearray(whole)
    if isinstance(place, int):
        content[place] ^= 64
    entry.write_bytes(content if isinstance(place, int) else whole[:100] if place == "cut" else b"")
    assert torch.equal(files.image(path)[0], expected)
    assert entry.read_bytes() == whole


def test_bad_sources_leave_no_entry(data):
    path = data / "data/train/a.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    files = Files(cache=str(data / "cache"))
    for bad in (path, data / "missing.png"):
        with pytest.raises(DataError, match=bad.name):
            files.image(bad)
    assert entries(data / "cache") == []


def test_a_new_format_does_not_take_old_entries(data, monkeypatch):
    path = data / "data/train/a.jpg"
    files = Files(cache=str(data / "cache"))
    files.image(path)
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    files.image(path)
    assert len(entries(data / "cache")) == 2


def test_the_cache_lies_outside_of_the_data(data, monkeypatch):
    for inside in (data / "data", data / "data/train/cache", data / "data/../data/c"):
        with pytest.raises(ConfigError, match=r"cache: .* lies in the folder of the data"):
            Folder(str(data / "data"), split="train", cache=str(inside))
    monkeypatch.chdir(data / "data")
    with pytest.raises(ConfigError, match="lies in the folder of the data"):
        ImageMask(".", split="train", preset="camvid", cache="cache")
    assert not (data / "data/cache").exists()


def test_a_cache_that_cannot_be_written_is_named(data):
    (data / "cache").write_text("a file")
    with pytest.raises(StorageError, match=r"cache: .*cache cannot be written"):
        Files(cache=str(data / "cache")).image(data / "data/train/a.jpg")


WORKER = """
import sys, torch
from pathlib import Path
from densectx.data.files import Files
from densectx.data.reader import read_image
files = Files(cache=sys.argv[2])
for _ in range(8):
    for path in sorted(Path(sys.argv[1]).iterdir()):
        assert torch.equal(files.image(path)[0], read_image(path)[0])
    for entry in Path(sys.argv[2]).rglob("*.cache"):
        if hash((entry, _)) % 2:
            entry.unlink(missing_ok=True)  # others must write it again while we read
"""


def test_processes_share_a_cache(data):
    command = [sys.executable, "-c", WORKER, str(data / "data/train"), str(data / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert [path for path in entries(data / "cache") if path.suffix != ".cache"] == []
