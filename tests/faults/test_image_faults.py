"""Faults in data: damaged files, bombs, every kind of pixel, wrong labels, odd sizes, stale caches."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from tifffile import TiffFile, imwrite
from torchvision.io import ImageReadMode, decode_jpeg

from densectx import cli
from densectx.builtin import BUILTIN
from densectx.checkpoint import save_safetensors
from densectx.data.files import Files
from densectx.data.folder import Folder
from densectx.data.image_mask import ImageMask
from densectx.data.labels import read_colours, read_field, read_mask
from densectx.data.paired import Paired
from densectx.data.reader import read_image
from densectx.errors import DataError
from densectx.metrics.confusion import ConfusionMetrics
from densectx.model import DenseModel
from densectx.module import DenseModule
from densectx.types import SourceInfo

ROOT = Path(__file__).resolve().parents[2]


# -- files of every kind, written here


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels, colour_type, depth=8, *, header=None, chunks=(), data=None):
    """A PNG by hand (ISO/IEC 15948), so that depth, colour type, size and packed data are what the test says."""
    height, width = header or pixels.shape[:2]
    if data is None:
        rows = np.ascontiguousarray(pixels, ">u2" if depth == 16 else np.uint8).reshape(len(pixels), -1)
        rows = np.packbits(rows, axis=1) if depth == 1 else rows.view(np.uint8)
        data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows), 9)
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def pillow(mode="RGB", **options):
    def write(path, pixels):
        image = Image.fromarray(pixels)
        if mode == "RGBA":
            image.putalpha(image.convert("L"))
        image.convert(mode).save(path, **options)

    return write


def tiff(scale, dtype, **options):
    return lambda path, pixels: imwrite(path, (pixels * scale).astype(dtype), photometric="rgb", **options)


KINDS = {
    "baseline.jpg": pillow(),
    "progressive.jpg": pillow(progressive=True),
    "restart.jpg": pillow(restart_marker_rows=1),
    "gray.jpg": pillow("L"),
    "cmyk.jpg": pillow("CMYK"),
    "colour.png": pillow(),
    "gray.png": pillow("L"),
    "palette.png": pillow("P"),
    "bits.png": pillow("1"),
    "deep.png": lambda path, pixels: path.write_bytes(png(pixels * 257.0, 2, 16)),
    "lossy.webp": pillow(),
    "lossless.webp": pillow(lossless=True),
    "alpha.webp": pillow("RGBA"),
    "raw.tif": pillow(),
    "lzw.tif": pillow(compression="tiff_lzw"),
    "deflate.tif": pillow("P", compression="tiff_adobe_deflate"),
    "packbits.tif": pillow("L", compression="packbits"),
    "fax.tif": pillow("1", compression="group4"),
    "jpeg.tif": pillow(compression="jpeg"),
    "tiled.tif": tiff(1, np.uint8, tile=(16, 16), compression="zlib"),
    "deep.tif": tiff(257.0, np.uint16, compression="zlib", rowsperstrip=8),
    "float.tif": tiff(1 / 255, np.float32, rowsperstrip=8),
    "colour.bmp": pillow(),
    "colour.ppm": pillow(),
    "gray.pgm": pillow("L"),
    "array.npy": lambda path, pixels: np.save(path, pixels),
}


def scene(height, width, seed=0):
    """Smooth colours in one half, noise in the other: no decoder has it easy with both."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 3 % 256, y * 4 % 256, (x + y) % 256], -1).astype(np.uint8)
    pixels[:, width // 2 :] = np.random.default_rng(seed).integers(0, 256, pixels[:, width // 2 :].shape)
    return pixels


def written(folder, kind, height=64, width=80):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / kind
    KINDS[kind](path, scene(height, width))
    return path


def read(path):
    return read_image(path)[0]


def attempt(reader, path):
    """What a reader gives, or None and its refusal, which must name the file; any other error is not caught."""
    try:
        return reader(path), ""
    except DataError as error:
        message = str(error)
    assert str(path) in message
    return None, message


# -- I01: truncated files


@pytest.mark.fault("I01")
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_refused_or_still_whole(kind, tmp_path, record_property):
    """At every 5 % and at each of the last bytes, which some formats can do without."""
    path = written(tmp_path, kind)
    content = path.read_bytes()
    readers = [read]
    with suppress(DataError):
        read_mask(path)
        readers.append(read_mask)
    cuts = sorted({len(content) * part // 20 for part in range(20)} | set(range(len(content) - 16, len(content))))
    cut = tmp_path / f"cut{path.suffix}"
    refused = 0
    for reader in readers:
        whole = reader(path)
        for length in cuts:
            cut.write_bytes(content[:length])
            found, refusal = attempt(reader, cut)
            if refusal:
                refused += 1
                continue
            assert length >= len(content) - 16, f"{length} of {len(content)} bytes were taken for the image"
            assert torch.equal(found, whole), f"{length} of {len(content)} bytes give another image"
    record_property("count", len(readers) * len(cuts))
    record_property("evidence", f"{kind}: {refused} of {len(readers) * len(cuts)} refused, the others lossless")


def retagged(path, tags, pixels, **options):
    """A TIFF whose header says something else than was written: {tag: value}."""
    imwrite(path, pixels, photometric="rgb", **options)
    with TiffFile(path, mode="r+") as file:
        for tag, value in tags.items():
            if tag in file.pages[0].tags:
                file.pages[0].tags[tag].overwrite(value)


@pytest.mark.fault("I01")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("layout", [{}, {"rowsperstrip": 4}, {"tile": (16, 16)}, {"planarconfig": "separate"}], ids=str)
def test_a_tiff_without_some_of_its_parts_is_refused(dtype, compression, layout, tmp_path):
    """The header says twice the height or width: strips or tiles are missing, which decoders leave black."""
    path = tmp_path / "a.tif"
    pixels = (scene(16, 16) / (255 if dtype == np.float32 else 1)).astype(dtype)
    pixels = np.moveaxis(pixels, 2, 0) if "planarconfig" in layout else pixels
    retagged(path, {}, pixels, compression=compression, **layout)
    assert read(path).shape == (3, 16, 16)
    for tags in ({257: 32}, {256: 32}, {257: 32, 278: 32}, {256: 1 << 20}, {257: 1 << 20}):  # length, width, rows
        retagged(path, tags, pixels, compression=compression, **layout)
        with pytest.raises(DataError, match=r"a\.tif: (damaged|declares)"):
            read(path)


# -- I02: flipped bytes


def flips(folder, count, seed=0):
    """Read so many damaged files, each in two ways; returns {outcome: reads}. Only our errors are caught."""
    rng = random.Random(seed)
    whole = {kind: written(folder, kind, 9, 13).read_bytes() for kind in KINDS}
    outcomes = {"refused": 0, "read": 0}
    readers = [lambda path: read_image(path, 5), read_mask, read_colours, read_field]
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        content = bytearray(whole[kind])
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(min(len(content), rng.choice((40, 200, 1 << 30))))  # headers more often
            content[place] = rng.choice((rng.randrange(256), content[place] ^ 1 << rng.randrange(8)))
        path = folder / f"flipped{Path(kind).suffix}"
        path.write_bytes(content)
        for reader in (read_image, rng.choice(readers)):
            found, refusal = attempt(reader, path)
            outcomes["refused" if refusal else "read"] += 1
            if reader is read_image and found:
                image, _ = found
                assert image.shape[0] == 3, (kind, number)
                assert image.dtype == torch.float32
                assert 0 <= image.min() <= image.max() <= 1, (kind, number)  # NaN is neither
    return outcomes


@pytest.mark.fault("I02")
def test_flipped_bytes_raise_nothing_but_our_error(tmp_path, record_property):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders warn of what they pass over
        outcomes = flips(tmp_path, 2_000)
    assert min(outcomes.values()) > 300, "files are damaged, and not all beyond reading"
    record_property("count", 2_000)
    record_property("evidence", f"2000 files, reads: {outcomes}")


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux counts it")


def apart(work, *arguments):
    """Run a script in a process of its own: what it leaves in ``result``, and its peak memory above idle, in MB."""
    script = f"""
import json, sys, time
from pathlib import Path
from densectx.data.labels import read_colours, read_field, read_mask
from densectx.data.reader import read_image
from densectx.errors import DataError

def peak(reset=False):
    # not ru_maxrss, which starts with the peak of the process that started this one
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

{work}
sys.stdout.write(json.dumps([result, peak() - idle]))
before, more = peak(reset=True), b"x" * (1 << 26)
assert 63 < peak() - before < 66, "memory is not measured"
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


FLIPS = """
import runpy
flips = runpy.run_path(sys.argv[1])["flips"]
idle = peak(reset=True)
result = flips(Path(sys.argv[2]), 50_000, 1)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.fault("I02")
@needs_proc
def test_fifty_thousand_damaged_files_in_bounded_memory(tmp_path, record_property):
    outcomes, megabytes = apart(FLIPS, __file__, tmp_path)
    assert megabytes < 512
    record_property("count", 50_000)
    record_property("evidence", f"50000 files, reads: {outcomes}, peak {megabytes:.0f} MB above idle")


# -- I04, I05: deep and floating-point files

RAMP = np.arange(65536).reshape(256, 256)


@pytest.mark.fault("I04")
@pytest.mark.parametrize("kind", ["gray.png", "colour.png", "gray.tif", "colour.tif", "big-endian.tif", "planes.npy"])
def test_16_bits_keep_every_level(kind, tmp_path, record_property):
    path = tmp_path / kind
    colours = np.stack([RAMP, RAMP[::-1], RAMP.T], -1).astype(np.uint16)
    if kind.endswith("png"):
        path.write_bytes(png(RAMP, 0, 16) if kind == "gray.png" else png(colours, 2, 16))
    elif kind == "planes.npy":
        np.save(path, np.moveaxis(colours, 2, 0))
    else:
        gray = kind == "gray.tif"
        order = ">" if kind == "big-endian.tif" else "<"
        imwrite(path, colours[..., 0] if gray else colours, photometric=None if gray else "rgb", byteorder=order)
    image, gray = read_image(path)
    assert gray == kind.startswith("gray")
    for plane, stored in zip(image, (RAMP,) * 3 if gray else np.moveaxis(colours, 2, 0), strict=True):
        levels = plane.double().numpy() * 65535
        assert np.array_equal(levels.round(), stored)
        assert np.abs(levels - stored).max() < 0.01
        assert len(plane.unique()) == 65536
    assert image.max() == 1
    record_property("evidence", f"{kind}: 65536 of 65536 levels")


@pytest.mark.fault("I05")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("colour", [False, True])
def test_floats_from_0_to_1_are_taken_as_they_are(dtype, colour, tmp_path):
    values = np.random.default_rng(0).random((6, 7, 3) if colour else (6, 7)).astype(dtype)
    values.flat[:2] = 0, 1
    imwrite(tmp_path / "a.tif", values, photometric="rgb" if colour else "minisblack")
    image, gray = read_image(tmp_path / "a.tif")
    expected = torch.from_numpy(values.astype(np.float32).reshape(6, 7, -1)).permute(2, 0, 1)
    assert torch.equal(image, expected.expand(3, -1, -1))
    assert gray != colour


WRONG = {
    "negative": (-0.25, r"values from -0\.25 to 0\.5 leave the range 0 to 1; set value_range"),
    "above 1": (1.5, r"values from 0\.5 to 1\.5 leave the range 0 to 1; set value_range"),
    "0 to 255": (255.0, r"values from 0\.5 to 255 leave the range 0 to 1; set value_range"),
    "NaN": (np.nan, r"1 of 42 values are NaN or infinite"),
    "Inf": (np.inf, r"1 of 42 values are NaN or infinite"),
    "-Inf": (-np.inf, r"1 of 42 values are NaN or infinite"),
}


@pytest.mark.fault("I05")
@pytest.mark.parametrize("what", WRONG)
def test_other_floats_are_refused_and_never_clipped(what, tmp_path):
    value, message = WRONG[what]
    values = np.full((6, 7), 0.5, np.float32)
    values[3, 4] = value
    for name in ("a.tif", "a.npy"):
        imwrite(tmp_path / name, values) if name == "a.tif" else np.save(tmp_path / name, values)
        with pytest.raises(DataError, match=rf"{name}: {message}"):
            read_image(tmp_path / name)
        if np.isfinite(value):  # the range of the files, declared, makes them readable
            low, high = float(values.min()), float(values.max())
            image, _ = read_image(tmp_path / name, 1, (low, high))
            expected = torch.from_numpy((values.astype(np.float64) - low) / (high - low)).float()
            torch.testing.assert_close(image[0], expected, rtol=0, atol=1e-7)
        else:
            with pytest.raises(DataError, match=message):
                read_image(tmp_path / name, 1, (-1e30, 1e30))


# -- I07, I08: masks of palettes and of colours


def palette_file(path, ids, colours, **options):
    image = Image.fromarray(ids, "P")
    image.putpalette(np.asarray(colours, np.uint8).tobytes())
    image.save(path, **options)
    return path


@pytest.mark.fault("I07")
@pytest.mark.parametrize("extension", ["png", "tif", "bmp"])
@pytest.mark.parametrize("classes", [2, 4, 16, 21, 256])
def test_palette_masks_keep_indices(extension, classes, tmp_path):
    """2, 4 and 16 colours are stored in 1, 2 and 4 bits; 21 is PASCAL VOC with 255 as void."""
    rng = np.random.default_rng(classes)
    ids = rng.integers(0, classes, (9, 13)).astype(np.uint8)
    if classes == 21:
        ids[0] = 255
    masks = []
    for name in "ab":  # two palettes, equal ids
        colours = rng.permutation(256 if classes == 21 else classes)[:, None] * [1, 0, 1]
        path = palette_file(tmp_path / f"{name}.{extension}", ids, colours)
        masks.append(read_mask(path))
        colour, gray = read_image(path)
        assert not gray, "as an image it has its colours"
        assert np.array_equal((colour * 255).round().numpy(), np.moveaxis(colours[ids], 2, 0))
    assert torch.equal(masks[0], torch.from_numpy(ids).long())
    assert torch.equal(masks[0], masks[1])


@pytest.mark.fault("I07")
def test_transparent_palette_entries_are_ids_like_others(tmp_path):
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    path = palette_file(tmp_path / "a.png", ids, np.arange(36), transparency=bytes([0, 255, 7]))
    assert torch.equal(read_mask(path), torch.from_numpy(ids).long())


COLOURS = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def labelled(root, mask, image=(9, 13), name="a.png", **options):
    """A source of one image; ``mask`` is what is written, by its own kind, below ``masks/train``."""
    for folder in ("images/train", "masks/train"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(*image)).save(root / "images/train/a.png")
    path = root / "masks/train" / name
    if path.suffix == ".tif":
        imwrite(path, mask)
    else:
        Image.fromarray(mask).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    layout = {"images": "images/{subset}", "masks": "masks/{subset}", "classes": ["sky", "road", "car"], **options}
    return ImageMask(str(root), split="train", **layout)


@pytest.mark.fault("I08")
def test_declared_colours_are_classes(tmp_path):
    ids = np.random.default_rng(0).integers(0, 3, (9, 13))
    expected = torch.from_numpy(ids)
    pixels = np.array(COLOURS, np.uint8)[ids]
    assert torch.equal(labelled(tmp_path, pixels, palette=COLOURS, colors=True)[0]["mask"], expected)
    pixels[4, 5] = 1, 2, 3
    several = {"car": [[0, 0, 255], [1, 2, 3]], "ignore": [9, 9, 9]}
    expected[4, 5] = 2
    assert torch.equal(labelled(tmp_path, pixels, palette=COLOURS, colors=several)[0]["mask"], expected)
    pixels[0, 0] = 9, 9, 9
    expected[0, 0] = 255
    assert torch.equal(labelled(tmp_path, pixels, palette=COLOURS, colors=several)[0]["mask"], expected)


@pytest.mark.fault("I08")
def test_undeclared_colours_are_named_with_a_pixel(tmp_path, record_property):
    pixels = np.full((9, 13, 3), (0, 255, 0), np.uint8)
    with pytest.raises(DataError, match=r"a\.png: mode RGB .*expected .* ids as palette indices or gray values"):
        labelled(tmp_path, pixels)[0]
    pixels[4, 5:8] = 0, 254, 0
    with pytest.raises(DataError) as refused:
        labelled(tmp_path, pixels, palette=COLOURS, colors=True)[0]
    message = str(refused.value).replace(str(tmp_path), "ROOT")
    assert "masks/train/a.png: undeclared colours (0, 254, 0) (3 pixels, first at row 4, column 5)" in message
    record_property("evidence", message)
    (tmp_path / "masks/train/a.png").unlink()
    with pytest.raises(DataError, match=r"a\.jpg: a JPEG file cannot hold class ids"):  # its colours bleed
        labelled(tmp_path, pixels, name="a.jpg", palette=COLOURS, colors=True)[0]


# -- I09: modes


def ycck(cyan, magenta, yellow, black):
    """A JPEG of one colour of ink, stored as Photoshop does: YCbCr of the inks, Adobe's marker with transform 2."""
    luma = 0.299 * cyan + 0.587 * magenta + 0.114 * yellow  # JFIF: ITU-R BT.601
    blue = 128 + (yellow - luma) / 1.772
    red = 128 + (cyan - luma) / 1.402
    stored = np.round([luma, blue, red, 255 - black]).astype(np.uint8)
    file = bytearray(encoded(Image.fromarray(np.tile(255 - stored, (8, 8, 1)), "CMYK"), "JPEG", quality=100))
    file[file.index(b"Adobe") + 11] = 2
    return bytes(file)


def encoded(image, form, **options):
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def over_white(values, alpha):
    return np.asarray(values) / 255 * (alpha / 255) + 1 - alpha / 255


INK = (30, 200, 90, 60)  # cyan, magenta, yellow, black
PRINTED = [(255 - ink) * (255 - INK[3]) / 255**2 for ink in INK[:3]]
FLAT = {  # name -> (bytes of an image of one colour, the sRGB it means by the stated rules, is it gray, tolerance)
    "1.png": (png(np.ones((8, 8)), 0, 1), [1] * 3, True, 0),
    "1-black.png": (png(np.zeros((8, 8)), 0, 1), [0] * 3, True, 0),
    "L.png": (png(np.full((8, 8), 77), 0), [77 / 255] * 3, True, 1e-7),
    "LA.png": (png(np.full((8, 8, 2), (77, 102)), 4), [over_white(77, 102)] * 3, True, 1e-6),
    "P.png": (
        png(np.full((8, 8), 2), 3, chunks=[(b"PLTE", bytes([0, 0, 0, 9, 9, 9, 10, 140, 250]))]),
        np.array([10, 140, 250]) / 255,
        False,
        1e-7,
    ),
    "P-transparent.png": (
        png(np.full((8, 8), 1), 3, chunks=[(b"PLTE", bytes([0, 0, 0, 10, 140, 250])), (b"tRNS", bytes([255, 51]))]),
        over_white([10, 140, 250], 51),
        False,
        1e-6,
    ),
    "RGB.png": (png(np.full((8, 8, 3), (10, 140, 250)), 2), np.array([10, 140, 250]) / 255, False, 1e-7),
    "RGBA.png": (png(np.full((8, 8, 4), (10, 140, 250, 204)), 6), over_white([10, 140, 250], 204), False, 1e-6),
    "RGBA-16.png": (
        png(np.full((8, 8, 4), (2570, 35980, 64250, 52428)), 6, 16),
        over_white([10, 140, 250], 204),
        False,
        1e-6,
    ),
    "I;16.png": (png(np.full((8, 8), 19789), 0, 16), [19789 / 65535] * 3, True, 1e-7),
    "CMYK.jpg": (
        encoded(Image.new("CMYK", (8, 8), INK), "JPEG", quality=100),
        PRINTED,
        False,
        1.5 / 255,
    ),
    "YCCK.jpg": (ycck(*INK), PRINTED, False, 1.5 / 255),
    "CMYK.tif": (encoded(Image.new("CMYK", (8, 8), INK), "TIFF"), PRINTED, False, 0.5 / 255),
    "YCbCr.jpg": (
        encoded(Image.new("RGB", (8, 8), (10, 140, 250)), "JPEG", quality=100),
        np.array([10, 140, 250]) / 255,
        False,
        1.5 / 255,
    ),
    "L.jpg": (encoded(Image.new("L", (8, 8), 77), "JPEG", quality=100), [77 / 255] * 3, True, 1 / 255),
}


@pytest.mark.fault("I09")
@pytest.mark.parametrize("name", FLAT)
def test_modes_have_their_stated_colours(name, tmp_path):
    content, colour, is_gray, tolerance = FLAT[name]
    path = tmp_path / name
    path.write_bytes(content)
    image, gray = read_image(path)
    assert gray == is_gray
    expected = torch.tensor(np.asarray(colour), dtype=torch.float64)[:, None, None].expand(3, 8, 8)
    assert (image - expected).abs().max() <= tolerance + 1e-7
    if path.suffix == ".jpg":  # another decoder
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        assert (image - decode_jpeg(data, ImageReadMode.RGB) / 255).abs().max() < 1.5 / 255


@pytest.mark.fault("I09")
@pytest.mark.parametrize(("mode", "named"), [("LAB", "LAB"), ("I", "I"), ("PA", "PA"), ("LAB 16", "LAB")])
def test_modes_without_a_rule_are_refused(mode, named, tmp_path):
    path = tmp_path / "a.tif"
    if mode == "LAB 16":
        imwrite(path, np.zeros((4, 4, 3), np.uint16), photometric="cielab")
    else:
        Image.new(mode, (4, 4)).save(path)
    with pytest.raises(DataError, match=rf"a\.tif: .*{named}"):
        read_image(path)


# -- I11: colour profiles


def display_p3():
    """A profile of Display P3: sRGB's curve, and the primaries of P3 adapted to D50 (Apple's profile)."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for number in range(struct.unpack_from(">I", profile, 128)[0]):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        if name in primaries:
            struct.pack_into(">3i", profile, offset + 8, *(round(v * 65536) for v in primaries[name]))
    return bytes(profile)


@pytest.mark.fault("I11")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("profile", ["Display P3", "damaged"])
def test_profiles_are_ignored_values_are_srgb(form, profile, tmp_path):
    picture = Image.fromarray(scene(16, 24))
    options = {"lossless": True} if form == "WEBP" else {}
    icc = display_p3() if profile == "Display P3" else b"no profile at all" * 9
    plain, tagged = (tmp_path / f"{name}.{form.lower()}" for name in ("plain", "tagged"))
    picture.save(plain, form, **options)
    picture.save(tagged, form, icc_profile=icc, **options)
    with Image.open(tagged) as file:
        assert file.info["icc_profile"] == icc
    assert torch.equal(read(tagged), read(plain))
    if profile == "Display P3":  # heeding it would make a difference
        srgb = ImageCms.createProfile("sRGB")
        red = ImageCms.profileToProfile(Image.new("RGB", (1, 1), (200, 50, 50)), BytesIO(icc), srgb)
        assert red.getpixel((0, 0))[0] > 210


@pytest.mark.fault("I11")
def test_gamma_and_chromaticities_of_a_png_are_ignored(tmp_path):
    pixels = scene(8, 8)
    tags = [
        (b"gAMA", struct.pack(">I", 100_000)),
        (b"cHRM", struct.pack(">8I", *[31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000])),
    ]
    for colour_type, values in ((2, pixels), (0, pixels[..., 0])):
        for depth in (8, 16):
            (tmp_path / "a.png").write_bytes(png(values, colour_type, depth))
            (tmp_path / "b.png").write_bytes(png(values, colour_type, depth, chunks=tags))
            assert torch.equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))
    assert torch.equal(read_mask(tmp_path / "b.png"), torch.from_numpy(pixels[..., 0]).long())  # ids are no colours


# -- runs


def config(root, source, tasks, **trainer):
    quiet = {"accelerator": "cpu", "logger": True, "enable_progress_bar": False, "enable_model_summary": False}
    return {
        "model": {
            "backbone": {"name": "plain", "width": 4},
            "projection": {"channels": 4},
            "context": "context7",
            "tasks": {key: {"source": "s", **task} for key, task in tasks.items()},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {"sources": {"s": {"root": str(root), **source}}, "num_workers": 0},
        "trainer": {**quiet, "max_steps": 2, "limit_val_batches": 0, "default_root_dir": f"{root}-runs", **trainer},
    }


@pytest.fixture
def densectx(tmp_path, monkeypatch, capsys):
    """Run a command on a config; returns the exit status and what it wrote to stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")  # restored afterwards; set by a run for the ranks it starts

    def run(command, values):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        before = ["-c"] if command == "fit" else []
        after = ["--name", "run"] if command == "fit" else ["--num-workers", "0"]
        status = cli.main([command, *before, "config.yaml", *after])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


SEGMENTATION = {"segmentation": {"name": "segmentation"}}
MASKS = {
    "name": "image_mask",
    "images": "images/{subset}",
    "masks": "masks/{subset}",
    "classes": ["sky", "road", "car"],
    "splits": {"val": {"from": ["train"]}, "test": None},
}


# -- I12, I13: sizes

THIN = [(1, 1), (1, 70), (70, 1), (1, 2), (3, 1)]


@pytest.mark.fault("I12")
def test_thin_images_train(tmp_path, densectx, record_property):
    root = tmp_path / "data"
    for number, (height, width) in enumerate(THIN):
        for folder in ("images/train", "masks/train"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(height, width)).save(root / f"images/train/{number}.png")
        ids = np.arange(height * width, dtype=np.uint8).reshape(height, width) % 3
        Image.fromarray(ids).save(root / f"masks/train/{number}.png")
    source = {**MASKS, "batch_size": 5, "augment": {"pad": True, "crop": 12}}
    tasks = SEGMENTATION | {name: {"name": name} for name in ("denoising", "colorization", "jpeg_deblocking")}
    values = config(root, source, tasks, limit_val_batches=5, val_check_interval=1)
    status, said = densectx("fit", values)
    assert status == 0, said
    (row,) = metrics(tmp_path / "data-runs")[-1:]
    assert all(row[f"val/{key}/{name}"] for key, name in (("segmentation", "miou"), ("denoising", "psnr")))
    record_property("count", len(THIN))


def metrics(runs):
    (path,) = runs.rglob("metrics.csv")
    return list(csv.DictReader(path.read_text().splitlines()))


ALL = SourceInfo(classes=("sky", "road", "car"), keys=("image", "mask"))
SOURCES = {"s": ALL, "map": SourceInfo(keys=("image", "target"), target="map")}
SOURCES["pairs"] = SourceInfo(keys=("image", "target"), target="image")
SOURCE_OF = {"regression": "map", "restoration": "pairs"}


def all_tasks(levels):
    """A model with every task of the package; its network reduces by up to 8."""
    torch.manual_seed(0)
    tasks = {name: {"name": name, "source": SOURCE_OF.get(name, "s")} for name in BUILTIN["tasks"]}
    values = {
        "backbone": {"name": "timm", "model": "resnet10t", "levels": levels},
        "projection": {"channels": 4},
        "context": "context7",
        "tasks": tasks,
    }
    return DenseModel.from_config(values, SOURCES).eval()


@pytest.fixture(scope="module")
def whole_model():
    model = all_tasks(3)
    assert model.stride == 8
    return model


@pytest.mark.fault("I12")
def test_thin_images_are_answered_in_their_size(tmp_path, whole_model, capsys, record_property):
    save_safetensors(whole_model, tmp_path / "m.safetensors")
    for height, width in THIN:
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(scene(height, width)).save(tmp_path / f"in/{height}x{width}.png")
    wanted = "segmentation,denoising,super_resolution,colorization"
    command = ["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    assert cli.main([*command, "--tasks", wanted]) == 0, capsys.readouterr().err
    for height, width in THIN:
        for task in wanted.split(","):
            with Image.open(tmp_path / f"out/{task}/{height}x{width}.png") as answer:
                scale = 2 if task == "super_resolution" else 1
                assert answer.size == (width * scale, height * scale), task
    no_pixels(tmp_path / "in/empty.png", (0, 5))
    assert cli.main([*command, "--tasks", wanted]) == 3
    assert "empty.png" in capsys.readouterr().err
    record_property("count", len(THIN) * 4)


def no_pixels(path, shape):
    """An image without rows or without columns, as its header says."""
    height, width = shape
    if path.suffix == ".png":
        path.write_bytes(png(np.zeros((1, 1, 3)), 2, header=shape))
    elif path.suffix == ".npy":
        np.save(path, np.zeros((*shape, 3), np.uint8))
    elif path.suffix == ".ppm":
        path.write_bytes(b"P6 %d %d 255 \0\0\0" % (width, height))
    elif path.suffix == ".tif":
        retagged(path, {256: width, 257: height}, scene(5, 5))
    else:
        content = bytearray(encoded(Image.new("RGB", (5, 5)), "BMP"))
        struct.pack_into("<ii", content, 18, width, height)
        path.write_bytes(content)


@pytest.mark.fault("I12")
@pytest.mark.parametrize("extension", ["png", "npy", "ppm", "tif", "bmp"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_images_without_pixels_are_refused(extension, shape, tmp_path):
    path = tmp_path / f"empty.{extension}"
    no_pixels(path, shape)
    for reader in (read_image, read_mask, read_field):
        with pytest.raises(DataError, match=re.escape(str(path))):
            reader(path)


@pytest.mark.fault("I13")
def test_answers_have_the_size_of_the_image(whole_model, record_property):
    sizes = []

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(st.integers(1, 70), st.integers(1, 70))
    def check(height, width):
        sizes.append((height, width))
        answers = whole_model.predict(torch.from_numpy(scene(height, width)).permute(2, 0, 1))
        assert set(answers) == set(BUILTIN["tasks"])
        for key, answer in answers.items():
            scale = 2 if key == "super_resolution" else 1
            assert answer.shape[1:] == (height * scale, width * scale), key
            assert answer.isfinite().all(), key

    check()
    odd = sum(bool(height % 8 or width % 8) for height, width in sizes)
    record_property("count", len(sizes) * len(BUILTIN["tasks"]))
    record_property("evidence", f"{len(sizes)} sizes, {odd} not divisible by the stride of 8")


# -- I14: bombs


def zeros():
    """400 MB of zeros, in the 400 kB that deflate makes of them."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(4_000_000)) for _ in range(100)) + packer.flush()


def inflated(path, data):
    """A TIFF of 1 MB of floats whose only strip unpacks to more."""
    imwrite(path, np.zeros((500, 500), np.float32), compression="zlib", rowsperstrip=500)
    with TiffFile(path, mode="r+") as file:
        file.pages[0].tags[273].overwrite(path.stat().st_size)
        file.pages[0].tags[279].overwrite(len(data))
    with open(path, "ab") as file:
        file.write(data)


def bombs(folder):
    """{name: file}: a few bytes that declare, or inflate to, gigabytes."""
    nothing, many = np.zeros((1, 1, 3)), zeros()
    for side in (12_000, 20_000, 65_535):
        content = png(nothing, 2, header=(side, side))
        (folder / f"{side}.png").write_bytes(content + bytes(777 - len(content)))
    (folder / "whole.png").write_bytes(png(None, 0, header=(20_000, 19_999), data=many))  # complete
    for name, start in ((b"zTXt", b"Comment\0\0"), (b"iCCP", b"profile\0\0")):
        chunks = [(name, start + many)]
        (folder / f"{name.decode()}.png").write_bytes(png(nothing, 2, chunks=chunks))
    (folder / "a.gif").write_bytes(b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2\x44\1\0;")
    (folder / "a.ppm").write_bytes(b"P6 65535 65535 255\n" + bytes(99))
    for kind in ("baseline.jpg", "lossless.webp", "colour.bmp"):
        content = bytearray(written(folder, kind, 16, 16).read_bytes())
        (folder / kind).unlink()
        if kind == "baseline.jpg":
            struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, 65_500, 65_500)
        elif kind == "colour.bmp":
            struct.pack_into("<ii", content, 18, 65_535, 65_535)
        else:  # VP8L: 14 bits each of width - 1 and height - 1 behind the byte 0x2f
            place = content.index(b"VP8L") + 9
            sides = struct.unpack_from("<I", content, place)[0] >> 28 << 28 | 16_382 << 14 | 16_382
            struct.pack_into("<I", content, place, sides)
        (folder / f"header.{kind.partition('.')[2]}").write_bytes(content)
    for dtype in (np.uint8, np.float32):
        name, pixels = np.dtype(dtype).name, np.zeros((16, 16, 3), dtype)
        sides, tiled = {256: 65_535, 257: 65_535, 278: 65_535}, {"compression": "zlib", "tile": (16, 16)}
        retagged(folder / f"strips-{name}.tif", sides, pixels, compression="zlib")
        retagged(folder / f"tiles-{name}.tif", {322: 1 << 25}, pixels, **tiled)
        retagged(folder / f"tall-tiles-{name}.tif", {323: 1 << 25}, pixels, **tiled)
        retagged(folder / f"big-{name}.tif", {256: 1 << 31, 257: 1 << 31}, pixels, bigtiff=True)
    inflated(folder / "inflated.tif", many)
    np.save(folder / "a.npy", np.zeros((2, 2), np.float32))
    content = (folder / "a.npy").read_bytes()
    assert len(content) == 144
    header = content.replace(b"(2, 2), }" + b" " * 12, b"(65535, 65535), }" + b" " * 4)
    (folder / "a.npy").write_bytes(header)
    return sorted(folder.iterdir())


READS = """
result, idle = [], peak(reset=True)
for path in sys.argv[1:]:
    for reader in (read_image, read_mask, read_colours, read_field):
        start = time.perf_counter()
        try:
            reader(path)
            said = ""
        except DataError as error:
            said = str(error)
        seconds = time.perf_counter() - start
        result.append({"file": path, "said": said, "megabytes": peak() - idle, "seconds": seconds})
"""


@pytest.mark.fault("I14")
@needs_proc
def test_bombs_cost_neither_memory_nor_time(tmp_path, record_property):
    paths = bombs(tmp_path)
    assert [p.stat().st_size for p in paths if p.name in ("12000.png", "20000.png", "65535.png")] == [777] * 3
    assert max(p.stat().st_size for p in paths) < 2 << 20
    rows, _ = apart(READS, *paths)
    assert len(rows) == 4 * len(paths)
    assert [row for row in rows if row["file"] not in row["said"]] == [], "every one is refused by its name"
    worst = max(rows, key=lambda row: row["megabytes"])
    slowest = max(rows, key=lambda row: row["seconds"])
    record_property("count", len(paths))
    record_property(
        "evidence",
        f"{len(paths)} files x 4 readers: peak {worst['megabytes']:.0f} MB above idle ({Path(worst['file']).name}), slowest"
        f" {slowest['seconds']:.2f} s ({Path(slowest['file']).name})",
    )
    assert worst["megabytes"] < 300
    assert slowest["seconds"] < 6  # three times what an idle machine may take


# -- I16, I17: labels


def wrong_labels(what):
    """(mask, name of the file, options, what the message has beside the file)."""
    mask = np.zeros((9, 13), np.int16)
    mask[2, :3], mask[3] = 2, 255
    known = "known are 0..2 and ignore_index 255"
    if what == "id 5 of 0..2":
        mask[5, 4:11] = 5
        return mask.astype(np.uint8), "a.png", {}, ["unknown class ids 5 (7 pixels)", known]
    if what == "several ids":
        mask[5, 4:11], mask[0, 0] = 5, 77
        return mask.astype(np.uint8), "a.png", {}, ["5 (7 pixels), 77 (1 pixels)", known]
    if what == "255 without ignore_index":
        said = ["unknown class ids 255 (13 pixels)", "known are 0..2 and ignore_index 7"]
        return mask.astype(np.uint8), "a.png", {"ignore_index": 7}, said
    if what == "negative":
        mask[8, 12], mask[8, 11] = -1, -32768
        return mask, "a.tif", {}, ["unknown class ids -32768 (1 pixels), -1 (1 pixels)", known]
    if what == "16-bit instances":
        mask = mask.astype(np.uint16)
        mask[7] = 24_001
        return mask, "a.png", {}, ["unknown class ids 24001 (13 pixels)", known]
    return mask.astype(np.float32), "a.tif", {}, ["expected 1, L, P, I;16: ids as palette indices or gray values"]


@pytest.mark.fault("I16")
@pytest.mark.parametrize(
    "what",
    ["id 5 of 0..2", "several ids", "255 without ignore_index", "negative", "16-bit instances", "floating-point"],
)
def test_unknown_ids_are_refused_by_lint_and_at_step_0(what, tmp_path, densectx, record_property):
    mask, name, options, expected = wrong_labels(what)
    root = tmp_path / "data"
    with pytest.raises(DataError):
        labelled(root, mask, name=name, **options)[0]
    values = config(root, {**MASKS, **options, "batch_size": 1}, SEGMENTATION)
    for command in ("lint", "fit"):
        status, said = densectx(command, values)
        assert status == 3, said
        for part in (str(root / "masks/train" / name), *expected):
            assert part in said, said
        assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.ckpt"))
    record_property("count", 2)
    if what == "id 5 of 0..2":
        record_property(
            "evidence", next(line for line in said.splitlines() if "a.png" in line).replace(str(tmp_path), "")
        )


@pytest.mark.fault("I17")
@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "dice", "tversky", "lovasz"])
def test_a_batch_without_labels_has_no_loss_and_moves_nothing(loss):
    torch.manual_seed(0)
    parts = {"backbone": {"name": "plain", "width": 4}, "projection": {"channels": 4}, "context": "context7"}
    tasks = {"segmentation": {"name": "segmentation", "source": "s", "loss": loss}}
    module = DenseModule(DenseModel.from_config({**parts, "tasks": tasks}, {"s": ALL}), torch.optim.AdamW)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    batch = {"image": torch.rand(2, 3, 12, 12), "gray": torch.zeros(2, dtype=torch.bool)}
    batch |= {"key": torch.tensor([[0, 0], [0, 1]]), "mask": torch.full((2, 12, 12), 255)}
    before = {name: parameter.detach().clone() for name, parameter in module.model.tasks.named_parameters()}
    total = module.training_step({"s": batch}, 0)
    assert total.item() == 0
    total.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert not any(bool(gradient.any()) for gradient in gradients), "neither a value nor NaN"
    module.on_before_optimizer_step(optimizer)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in module.model.tasks.named_parameters())
    batch["mask"][1, 3:] = 1  # one labelled image beside it: as if it were alone
    both, alone = (
        module.training_step({"s": {key: value[rows] for key, value in batch.items()}}, 0)
        for rows in (slice(None), slice(1, None))
    )
    assert both.item() > 0
    assert both.item() == pytest.approx(alone.item(), rel=1e-4)


@pytest.mark.fault("I17")
def test_runs_whose_masks_have_no_label_end_well(tmp_path, densectx):
    root = tmp_path / "data"
    labelled(root, np.full((9, 13), 255, np.uint8))
    tasks = SEGMENTATION | {"denoising": {"name": "denoising"}}
    often = {"limit_val_batches": 1, "val_check_interval": 1, "log_every_n_steps": 1}
    status, said = densectx("fit", config(root, {**MASKS, "batch_size": 1}, tasks, **often))
    assert status == 0
    assert re.search(r"^segmentation +miou +nan ", said, re.MULTILINE), "no number, not 0"
    rows = metrics(tmp_path / "data-runs")
    losses = [float(row["train/denoising/loss"]) for row in rows if row.get("train/denoising/loss")]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert not any(row.get("train/segmentation/loss") for row in rows)
    weights = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.fault("I17")
def test_an_absent_class_is_left_out_and_named(tmp_path, densectx, record_property):
    rng = np.random.default_rng(0)
    truth, answer = rng.integers(0, 2, (2, 2, 9, 13))
    truth[0, 0] = 255
    metric = ConfusionMetrics(3, 255, ALL.classes)
    metric.update(torch.from_numpy(answer), torch.from_numpy(truth))
    values = metric.compute()
    seen = truth != 255
    each = [
        100 * (seen & (truth == k) & (answer == k)).sum() / (seen & ((truth == k) | (answer == k))).sum()
        for k in (0, 1)
    ]
    assert [values[f"iou_{name}"].item() for name in ("sky", "road")] == pytest.approx(each)
    assert values["iou_car"].isnan(), "no number, not 0"
    assert values["miou"].item() == pytest.approx(sum(each) / 2)
    answer[1, 5, 5] = 2  # a wrong answer of a class that does not occur does count
    metric.update(torch.from_numpy(answer), torch.from_numpy(truth))
    assert metric.compute()["iou_car"] == 0
    root = tmp_path / "data"
    labelled(root, truth[0].astype(np.uint8))
    status, said = densectx("lint", config(root, MASKS, SEGMENTATION))
    assert status == 0
    assert "warning: s train: class 'car' occurs nowhere." in said
    record_property("evidence", "iou_car NaN, miou the mean of the other two; lint: class 'car' occurs nowhere")


# -- I18, I21: sizes that do not agree


def turned(path, pixels):
    """An image that is upright only by its EXIF tag."""
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.mark.fault("I18")
@pytest.mark.parametrize("size", [(9, 12), (8, 13), (18, 26), (13, 9), (1, 1)])
def test_masks_of_another_size_are_refused(size, tmp_path, densectx, record_property):
    root = tmp_path / "data"
    dataset = labelled(root, np.zeros(size, np.uint8))
    both = rf"images/train/a\.png is 9x13 but its label .*masks/train/a\.png is {size[0]}x{size[1]}"
    with pytest.raises(DataError, match=both):
        dataset[0]
    values = config(root, {**MASKS, "batch_size": 1, "augment": {"crop": 8, "pad": True}}, SEGMENTATION)
    for command in ("lint", "fit"):
        status, said = densectx(command, values)
        assert status == 3
        assert re.search(both, said), said
    record_property("count", 2)


@pytest.mark.fault("I18")
def test_a_turned_image_needs_a_turned_mask(tmp_path):
    dataset = labelled(tmp_path, np.zeros((9, 13), np.uint8))
    turned(tmp_path / "images/train/a.png", scene(9, 13))
    with pytest.raises(DataError, match=r"a\.png is 13x9 but its label .*a\.png is 9x13"):
        dataset[0]
    Image.new("L", (9, 13)).save(tmp_path / "masks/train/a.png")
    assert dataset[0]["image"].shape[1:] == dataset[0]["mask"].shape == (13, 9)


@pytest.mark.fault("I18")
@pytest.mark.parametrize("kind", ["targets", "labels", "pairs"])
def test_other_labels_of_another_size_are_refused(kind, tmp_path):
    folders = ("images", "depth", "masks/sky", "masks/car", "target")
    for folder in folders:
        (tmp_path / folder / "train").mkdir(parents=True)
        size = (9, 13) if folder in ("images", "masks/sky") else (9, 14)
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / folder / "train" / "a.png")
    images, message = {"images": "images/{subset}"}, r"images/train/a\.png is 9x13 but its label .* is 9x14"
    if kind == "targets":
        dataset = ImageMask(str(tmp_path), split="train", targets="depth/{subset}", **images)
    elif kind == "labels":
        options = {"masks": "masks/{class}/{subset}", "classes": ["sky", "car"]}
        dataset = ImageMask(str(tmp_path), split="train", **options, **images)
        message = r"masks/sky/train/a\.png is 9x13 but .*masks/car/train/a\.png is 9x14"
    else:
        dataset = Paired(str(tmp_path), split="train", input="images/{subset}", target="target/{subset}")
    with pytest.raises(DataError, match=message):
        dataset[0]


def pairs(root, small, large):
    for folder, size in (("small", small), ("large", large)):
        (root / folder / "train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(*size)).save(root / folder / "train" / "a.png")


PAIRED = {"name": "paired", "input": "small/{subset}", "target": "large/{subset}", "batch_size": 1}
PAIRED["splits"] = {"val": {"from": ["train"]}, "test": None}


@pytest.mark.fault("I21")
@pytest.mark.parametrize("large", [(27, 39), (18, 27), (17, 26), (9, 13), (26, 18)])
def test_pairs_of_another_ratio_are_refused(large, tmp_path, densectx, record_property):
    root = tmp_path / "data"
    pairs(root, (9, 13), large)
    task = {"sr": {"name": "super_resolution", "scale": 2, "degradation": "paired"}}
    values = config(root, {**PAIRED, "scale": 2, "augment": {"crop": 8}}, task)
    for command in ("lint", "fit"):
        status, said = densectx(command, values)
        assert status == 3
        for part in ("small/train/a.png is 9x13", f"large/train/a.png is {large[0]}x{large[1]}"):
            assert part in said
        ratio = f"a ratio of {large[0] / 9:.4g} x {large[1] / 13:.4g}, but 'scale' is 2, which expects 18x26"
        assert ratio in said, said
    record_property("count", 2)
    record_property("evidence", ratio)


@pytest.mark.fault("I21")
@pytest.mark.parametrize(("source", "model"), [(2, 3), (3, 2), (2, 4), (None, 2)])
def test_a_model_of_another_scale_is_refused_before_data_is_read(source, model, tmp_path, densectx):
    task = {"sr": {"name": "super_resolution", "scale": model, "degradation": "paired"}}
    status, said = densectx("fit", config(tmp_path / "nowhere", {**PAIRED, "scale": source}, task))
    assert status == 2
    assert f"the targets of source 's' are {source or 1} times as large as its images" in said
    assert f"wants {model} times" in said


# -- I24: empty and very large folders


@pytest.mark.fault("I24")
@pytest.mark.parametrize("what", ["empty", "hidden files", "hidden folders", "other files"])
def test_folders_without_images_are_refused_at_once(what, tmp_path, densectx, record_property):
    root = tmp_path / "data"
    folder = root / "train" / (".cache" if what == "hidden folders" else "")
    folder.mkdir(parents=True)
    for number in range(0 if what == "empty" else 2_000):
        (
            folder / f"{'.' if what == 'hidden files' else ''}{number}.{'txt' if what == 'other files' else 'png'}"
        ).touch()
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"data/train: no file with one of the extensions \.bmp \.jpeg"):
        len(Folder(str(root), split="train"))
    seconds = time.perf_counter() - start
    assert seconds < 6  # three times what an idle machine may take
    record_property("evidence", f"{what}: refused after {1000 * seconds:.0f} ms")
    source = {"name": "folder", "batch_size": 1, "splits": {"val": None, "test": None}}
    status, said = densectx("fit", config(root, source, {"denoising": {"name": "denoising"}}))
    assert status == 3
    assert "data/train: no file" in said


@pytest.mark.fault("I24")
def test_a_hundred_thousand_files_are_listed(tmp_path, record_property):
    for part in range(10):
        folder = tmp_path / f"train/{part}"
        folder.mkdir(parents=True)
        first = folder / "0.png"
        first.touch()
        for number in range(1, 10_000):
            os.link(first, folder / f"{number}.png")
    start = time.perf_counter()
    dataset = Folder(str(tmp_path), split="train")
    assert len(dataset) == 100_000
    seconds = time.perf_counter() - start
    record_property("count", 100_000)
    record_property("evidence", f"100000 files listed in {seconds:.2f} s")
    assert seconds < 15  # three times what an idle machine may take


# -- I30: stale caches


def rewritten(path, seed, how):
    """Other content of the same size in bytes, as an edit leaves it."""
    status = path.stat()
    content = encoded(Image.fromarray(scene(9, 13, seed)), "BMP")
    assert len(content) == status.st_size
    if how == "replaced by rename":
        other = path.with_suffix(".part")
        other.write_bytes(content)
        os.replace(other, path)
    else:
        path.write_bytes(content)
    if how in ("time restored", "replaced by rename"):
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_mtime_ns == status.st_mtime_ns
    elif how == "older":
        os.utime(path, ns=(1, 1))


@pytest.mark.fault("I30")
@pytest.mark.parametrize("how", ["new time", "time restored", "replaced by rename", "older"])
def test_an_edit_is_seen_whatever_size_and_time_say(how, tmp_path, record_property):
    path = tmp_path / "data/a.bmp"
    path.parent.mkdir()
    path.write_bytes(encoded(Image.fromarray(scene(9, 13)), "BMP"))
    files = Files(cache=str(tmp_path / "cache"))
    last = files.image(path)[0]
    for seed in range(1, 6):
        rewritten(path, seed, how)
        for _ in range(2):  # decoded, and kept
            image, _ = files.image(path)
            assert torch.equal(image, read(path))
            assert torch.equal(files.colours(path), torch.from_numpy(read_colours(path)))
        assert not torch.equal(image, last)
        last = image
    record_property("count", 5)


@pytest.mark.fault("I30")
def test_a_damaged_entry_is_made_again_wherever_it_is_hurt(tmp_path, record_property):
    path = tmp_path / "data/a.bmp"
    path.parent.mkdir()
    path.write_bytes(encoded(Image.fromarray(scene(9, 13)), "BMP"))
    files = Files(cache=str(tmp_path / "cache"))
    expected, _ = files.image(path)
    (entry,) = (tmp_path / "cache").rglob("*.cache")
    whole = entry.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        for content in (bytes(flipped), whole[:place]):
            entry.write_bytes(content)
            image, gray = files.image(path)
            assert torch.equal(image, expected)
            assert not gray
            assert entry.read_bytes() == whole
    record_property("count", 2 * len(whole))
    record_property("evidence", f"a bit at each of {len(whole)} bytes flipped, and the file cut there")
