"""Image files against Pillow, raw bytes written here, and damaged files."""

import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
import PIL
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from densectx.data import reader
from densectx.data.reader import read_image, read_mask
from densectx.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = COLOUR[..., 0]


def sub_filtered(row, step):
    data = np.frombuffer(row, np.uint8).astype(int)
    data[step:] -= data[:-step].copy()
    return b"\1" + (data % 256).astype(np.uint8).tobytes()


def png(pixels, colour_type, depth, *, header=None, chunks=(), interlaced=False, filtered=False):
    """A PNG written by hand, so that depth and colour type are what the test says."""
    height, width = header or pixels.shape[:2]

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    passes = [pixels]
    if interlaced:  # Adam7
        starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        passes = [pixels[top::down, left::right] for top, left, down, right in starts]
    if depth < 8:
        bits = ((pixels[..., None] >> np.arange(depth - 1, -1, -1)) & 1).reshape(len(pixels), -1)
        rows = np.packbits(bits.astype(np.uint8), axis=1)
    else:
        rows = [row.astype(">u2" if depth == 16 else np.uint8) for part in passes if part.size for row in part]
    step = depth // 8 * (pixels.shape[2] if pixels.ndim == 3 else 1)
    raw = b"".join(sub_filtered(row.tobytes(), step) if filtered else b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
    body = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in body)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def chw(array, white=255):
    array = np.asarray(array, np.float64).reshape(*array.shape[:2], -1) / white
    return torch.from_numpy(array).permute(2, 0, 1).float()


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "ppm", "webp"])
def test_colour_is_exact(tmp_path, extension):
    path = saved(
        tmp_path / f"a.{extension}", Image.fromarray(COLOUR), **({"lossless": True} if extension == "webp" else {})
    )
    image, gray = read_image(path)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert not gray
    torch.testing.assert_close(image, chw(COLOUR), rtol=0, atol=1e-7)


def test_gray_is_replicated_or_kept(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(GRAY))
    three, gray = read_image(path)
    one, _ = read_image(path, 1)
    assert gray
    assert three.shape == (3, 5, 7)
    assert one.shape == (1, 5, 7)
    assert torch.equal(three, one.expand(3, -1, -1))
    torch.testing.assert_close(one, chw(GRAY), rtol=0, atol=1e-7)


def test_colour_as_one_channel_is_bt601(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(COLOUR))
    image, gray = read_image(path, 1)
    assert not gray
    expected = np.asarray(Image.fromarray(COLOUR).convert("L"))  # rounded to 8 bits
    assert (image[0].numpy() * 255 - expected).__abs__().max() < 0.51


def test_channels_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="1 or 3"):
        read_image(tmp_path / "a.png", 2)


@pytest.mark.parametrize("form", [{}, {"filtered": True}, {"interlaced": True}])
@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (3, 2), (2, 4), (4, 6)])
def test_16_bit_png_keeps_its_depth(tmp_path, channels, colour_type, form):
    pixels = RNG.integers(0, 65536, (5, 7, channels))
    pixels[0, 0], pixels[0, 1] = 65535, 0
    path = tmp_path / "a.png"
    path.write_bytes(png(pixels, colour_type, 16, **form))
    image, gray = read_image(path)
    values = pixels / 65535
    if channels in (2, 4):
        values = values[..., :-1] * values[..., -1:] + 1 - values[..., -1:]
    assert gray == (channels < 3)
    torch.testing.assert_close(image, chw(values, 1).expand(3, -1, -1), rtol=0, atol=2e-7)
    if channels in (1, 3):
        assert image[0, 0, 0] == 1


def test_16_bit_gray_tiff(tmp_path):
    pixels = RNG.integers(0, 65536, (5, 7)).astype(np.uint16)
    image, gray = read_image(saved(tmp_path / "a.tif", Image.fromarray(pixels)), 1)
    assert gray
    torch.testing.assert_close(image, chw(pixels, 65535), rtol=0, atol=1e-7)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_low_depth_gray(tmp_path, depth):
    pixels = RNG.integers(0, 2**depth, (5, 8))
    path = tmp_path / "a.png"
    path.write_bytes(png(pixels, 0, depth))
    image, gray = read_image(path, 1)
    assert gray
    torch.testing.assert_close(image, chw(pixels, 2**depth - 1))  # white is white
    assert torch.equal(read_mask(path), torch.from_numpy(pixels))  # ids are the file's values, not Pillow's


def test_alpha_is_composited_over_white(tmp_path):
    alpha = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)
    for array in (COLOUR, GRAY[..., None]):
        mode = "RGBA" if array.shape[2] == 3 else "LA"
        path = saved(tmp_path / f"{mode}.png", Image.fromarray(np.concatenate([array, alpha], 2), mode))
        image, gray = read_image(path)
        a = alpha / 255
        expected = array / 255 * a + 1 - a
        assert gray == (mode == "LA")
        torch.testing.assert_close(image, chw(expected, 1).expand(3, -1, -1), rtol=0, atol=1e-6)


def test_transparent_colours_are_white(tmp_path):
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image, gray = read_image(saved(tmp_path / "p.png", palette, transparency=1))
    assert not gray
    assert (image * 255).round().int()[:, 0].T.tolist() == [[10, 20, 30], [255] * 3, [70, 80, 90]]
    image, gray = read_image(saved(tmp_path / "l.png", Image.fromarray(np.array([[3, 9]], np.uint8)), transparency=9))
    assert gray
    assert (image[0] * 255).round().int().tolist() == [[3, 255]]
    bits = Image.fromarray(np.array([[0, 1]], bool))
    image, gray = read_image(saved(tmp_path / "1.png", bits, transparency=0))
    assert (image[0] * 255).round().int().tolist() == [[255, 255]]
    path = tmp_path / "deep.png"
    path.write_bytes(png(RNG.integers(0, 65536, (2, 2, 3)), 2, 16, chunks=[(b"tRNS", struct.pack(">HHH", 1, 2, 3))]))
    with pytest.raises(DataError, match="transparent colour in 16-bit"):
        read_image(path)


OLD = int(PIL.__version__.partition(".")[0]) < 13
UNREADABLE = pytest.mark.skipif(OLD, reason="Pillow before 13 cannot read the YCbCr TIFF it writes: a DataError there")


@pytest.mark.parametrize("mode", ["CMYK", pytest.param("YCbCr", marks=UNREADABLE), "1", "P"])
def test_other_modes_match_pillow(tmp_path, mode):
    converted = Image.fromarray(COLOUR).convert(mode)
    image, gray = read_image(saved(tmp_path / "a.tif", converted))
    assert gray == (mode == "1")
    torch.testing.assert_close(image, chw(np.asarray(converted.convert("RGB"))), rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", ["F", "I", "LAB", "PA"])
def test_unknown_modes_are_refused(tmp_path, mode):
    path = saved(tmp_path / "a.tif", Image.new(mode, (4, 3)))
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=rf"a\.tif: mode {mode} "):
            read(path)


def test_16_bit_files_that_pillow_would_reduce_are_refused(tmp_path):
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 2 1 65535\n" + bytes(12))
    with pytest.raises(DataError, match=r"a\.ppm: mode RGB"):
        read_image(path)
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 2 1 3\n\x00\x03")
    assert read_image(path, 1)[0].flatten().tolist() == [0, 1]
    with pytest.raises(DataError, match=r"a\.pgm: mode L"):  # values are stretched: ids would change
        read_mask(path)


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, extension, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = saved(tmp_path / f"a.{extension}", Image.fromarray(COLOUR), exif=exif)
    with Image.open(path) as file:
        expected = np.asarray(ImageOps.exif_transpose(file))
    image, _ = read_image(path)
    assert image.shape[1:] == ((5, 7) if orientation < 5 else (7, 5))
    torch.testing.assert_close(image, chw(expected), rtol=0, atol=1e-7)
    mask = saved(tmp_path / "mask.png", Image.fromarray(GRAY), exif=exif)
    if orientation == 1:
        assert torch.equal(read_mask(mask), torch.from_numpy(GRAY).long())
    else:
        with pytest.raises(DataError, match=f"EXIF orientation {orientation}"):
            read_mask(mask)


def test_masks(tmp_path):
    ids = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
    palette = Image.fromarray(ids, "P")
    palette.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    for name, image in {
        "p.png": palette,
        "p.tif": palette,
        "l.png": Image.fromarray(ids),
        "l.pgm": Image.fromarray(ids),
        "l.bmp": Image.fromarray(ids),
    }.items():
        mask = read_mask(saved(tmp_path / name, image))
        assert mask.dtype == torch.int64
        assert torch.equal(mask, torch.from_numpy(ids).long()), name
    deep = RNG.integers(0, 65536, (5, 7)).astype(np.uint16)
    for name in ("d.png", "d.tif"):
        assert torch.equal(read_mask(saved(tmp_path / name, Image.fromarray(deep))), torch.from_numpy(deep.astype(int)))
    assert torch.equal(read_mask(saved(tmp_path / "1.png", Image.fromarray(ids > 9))), torch.from_numpy(ids > 9).long())


@pytest.mark.parametrize(("mode", "extension"), [("RGB", "png"), ("RGBA", "png"), ("LA", "png"), ("RGB", "webp")])
def test_masks_with_colours_are_refused(tmp_path, mode, extension):
    path = saved(tmp_path / f"m.{extension}", Image.new(mode, (4, 3)))
    with pytest.raises(DataError, match=rf"m\.{extension}: mode {mode} "):
        read_mask(path)


def test_lossy_masks_are_refused(tmp_path):
    with pytest.raises(DataError, match="JPEG file cannot hold class ids"):
        read_mask(saved(tmp_path / "m.jpg", Image.fromarray(GRAY)))


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_unreadable_files_are_named(tmp_path, read):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    Image.new("P", (3, 3)).save(tmp_path / "gif.png", format="GIF")  # not a format of the table
    big = Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.uint8))
    for name in ("cut.png", "cut.tif", "cut.bmp", "cut.pgm"):
        big.save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    (tmp_path / "zero.png").write_bytes(png(np.zeros((0, 0)), 0, 8))
    Image.new("L", (3, 3)).save(tmp_path / "pages.tif", save_all=True, append_images=[Image.new("L", (3, 3))])
    for path in [*tmp_path.iterdir(), tmp_path / "missing.png"]:
        with pytest.raises(DataError, match=path.name):
            read(path)


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_truncated_lossy_files(tmp_path, kind):
    path = saved(tmp_path / f"a.{kind}", Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=rf"a\.{kind}"):
        read_image(path)


def test_truncated_deep_png(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(RNG.integers(0, 65536, (40, 40, 3)), 2, 16)[:-3000])
    with pytest.raises(DataError, match=r"a\.png"):
        read_image(path)


@pytest.mark.parametrize("side", [12_000, 20_000, 65_535])
def test_bombs_are_refused_from_the_header(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(np.zeros((1, 1, 3)), 2, 8, header=(side, side)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"bomb\.png"):
            read_image(path)


def test_the_limit_is_ours(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.fromarray(GRAY))
    monkeypatch.setattr(reader, "MAX_PIXELS", 34)
    with pytest.raises(DataError, match="5x7 pixels, more than the limit of 34"):
        read_image(path)
    monkeypatch.setattr(reader, "MAX_PIXELS", 35)
    read_image(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["png", "jpg", "tif", "webp", "bmp", "pgm"]), data=st.data())
def test_damaged_bytes_raise_nothing_but_our_error(tmp_path, kind, data):
    path = saved(tmp_path / f"a.{kind}", Image.fromarray(GRAY if kind == "pgm" else COLOUR))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (lambda file: read_image(file)[0], read_mask):
            with suppress(DataError):
                assert read(path).numel() > 0


def test_a_camera_file_with_previews_gives_its_first_picture(tmp_path):
    flat = Image.new("RGB", (6, 4), (200, 100, 50))
    path = saved(tmp_path / "a.jpg", flat, format="MPO", save_all=True, append_images=[Image.new("RGB", (3, 2))])
    image, _ = read_image(path)
    assert image.shape == (3, 4, 6)
    assert (image[0] > 0.7).all()
