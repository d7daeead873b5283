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
from tifffile import TiffFile, TiffWriter, imwrite

from densectx.data import limits
from densectx.data.labels import read_colours, read_field, read_mask, read_two_levels
from densectx.data.reader import is_deep, read_image
from densectx.data.windowed import WindowedFile
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
    for channels in (0, True, 2.5, "3"):
        with pytest.raises(ConfigError, match="1 or 3"):
            read_image(tmp_path / "a.png", channels)


@pytest.mark.fault("I04")
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


@pytest.mark.fault("I09")
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


@pytest.mark.fault("I09")
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
    path = tmp_path / "low.png"
    for depth in (1, 2, 4):
        ids = np.array([[0, 1]])
        path.write_bytes(png(ids, 0, depth, chunks=[(b"tRNS", struct.pack(">H", 1))]))
        assert read_image(path, 1)[0].flatten().tolist() == [0, 1], depth
        assert read_mask(path).tolist() == ids.tolist()
        with pytest.raises(DataError, match="has transparent pixels"):
            read_colours(path)
    path = tmp_path / "deep.png"
    path.write_bytes(png(RNG.integers(0, 65536, (2, 2, 3)), 2, 16, chunks=[(b"tRNS", struct.pack(">HHH", 1, 2, 3))]))
    with pytest.raises(DataError, match="transparent colour in 16-bit"):
        read_image(path)


OLD = int(PIL.__version__.partition(".")[0]) < 13
UNREADABLE = pytest.mark.skipif(OLD, reason="Pillow before 13 cannot read the YCbCr TIFF it writes: a DataError there")


@pytest.mark.fault("I09")
@pytest.mark.parametrize("mode", ["CMYK", pytest.param("YCbCr", marks=UNREADABLE), "1", "P"])
def test_other_modes_match_pillow(tmp_path, mode):
    converted = Image.fromarray(COLOUR).convert(mode)
    image, gray = read_image(saved(tmp_path / "a.tif", converted))
    assert gray == (mode == "1")
    torch.testing.assert_close(image, chw(np.asarray(converted.convert("RGB"))), rtol=0, atol=1e-7)


@pytest.mark.fault("I09")
@pytest.mark.parametrize(
    ("mode", "readers"),
    [("F", [read_mask]), ("I", [read_image]), ("LAB", [read_image, read_mask]), ("PA", [read_image, read_mask])],
)
def test_unknown_modes_are_refused(tmp_path, mode, readers):
    path = saved(tmp_path / "a.tif", Image.new(mode, (4, 3)))
    for read in readers:
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


@pytest.mark.fault("I07")
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


@pytest.mark.fault("I08")
@pytest.mark.parametrize(("mode", "extension"), [("RGB", "png"), ("RGBA", "png"), ("LA", "png"), ("RGB", "webp")])
def test_masks_with_colours_are_refused(tmp_path, mode, extension):
    path = saved(tmp_path / f"m.{extension}", Image.new(mode, (4, 3)))
    with pytest.raises(DataError, match=rf"m\.{extension}: mode {mode} "):
        read_mask(path)


def test_lossy_masks_are_refused(tmp_path):
    with pytest.raises(DataError, match="JPEG file cannot hold class ids"):
        read_mask(saved(tmp_path / "m.jpg", Image.fromarray(GRAY)))


def test_lossy_tiffs_are_no_labels(tmp_path):
    path = saved(tmp_path / "m.tif", Image.fromarray(GRAY), compression="jpeg")
    assert read_image(path)[1]
    for read in (read_mask, read_field, read_two_levels, read_colours):
        with pytest.raises(DataError, match=r"m.tif: a TIFF compressed as JPEG, .* cannot hold labels"):
            read(path)
    imwrite(path, GRAY.astype(np.int32), compression="zlib")
    read_mask(path)
    with TiffFile(path, mode="r+") as file:
        file.pages[0].tags[259].overwrite(34712)
    for read in (read_mask, read_field):
        with pytest.raises(DataError, match=r"m.tif: a TIFF compressed as JPEG2000"):
            read(path)


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


@pytest.mark.fault("I01")
@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_truncated_lossy_files(tmp_path, kind):
    path = saved(tmp_path / f"a.{kind}", Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=rf"a\.{kind}"):
        read_image(path)


@pytest.mark.fault("I01")
def test_truncated_deep_png(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(RNG.integers(0, 65536, (40, 40, 3)), 2, 16)[:-3000])
    with pytest.raises(DataError, match=r"a\.png"):
        read_image(path)


@pytest.mark.fault("I14")
@pytest.mark.parametrize("side", [12_000, 20_000, 65_535])
def test_bombs_are_refused_from_the_header(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(np.zeros((1, 1, 3)), 2, 8, header=(side, side)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"bomb\.png"):
            read_image(path)


@pytest.mark.fault("I14")
def test_the_limit_is_ours(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.fromarray(GRAY))
    monkeypatch.setattr(limits, "MAX_PIXELS", 34)
    with pytest.raises(DataError, match="5x7 pixels, more than the limit of 34"):
        read_image(path)
    monkeypatch.setattr(limits, "MAX_PIXELS", 35)
    read_image(path)


@pytest.mark.fault("I02")
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


# -- TIFF and .npy of numbers


FORMS = [
    {},
    {"tile": (16, 16)},
    {"compression": "zlib"},
    {"compression": "zlib", "predictor": 2, "rowsperstrip": 2},
    {"byteorder": ">"},
    {"bigtiff": True},
    {"planarconfig": "separate"},
]


@pytest.mark.fault("I04")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_16_bit_colour_tiff_keeps_its_depth(tmp_path, form):
    pixels = RNG.integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    pixels[0, 0], pixels[0, 1] = 65535, 0
    stored = np.moveaxis(pixels, 2, 0) if "planarconfig" in form else pixels
    imwrite(tmp_path / "a.tif", stored, photometric="rgb", **form)
    image, gray = read_image(tmp_path / "a.tif")
    assert not gray
    assert image.is_contiguous()
    torch.testing.assert_close(image, chw(pixels, 65535), rtol=0, atol=1e-7)
    assert image[:, 0, :2].T.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert is_deep(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_float_files(tmp_path, dtype, channels):
    pixels = RNG.random((5, 7, channels)).astype(dtype)
    imwrite(tmp_path / "a.tif", pixels.squeeze(), photometric="rgb" if channels == 3 else "minisblack")
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "b.npy", np.asfortranarray(np.moveaxis(pixels, 2, 0)).astype(np.dtype(dtype).newbyteorder(">")))
    for name in ("a.tif", "a.npy", "b.npy"):
        image, gray = read_image(tmp_path / name)
        assert gray == (channels == 1)
        assert image.dtype == torch.float32
        assert torch.equal(image, chw(pixels, 1).expand(3, -1, -1))
        one, _ = read_image(tmp_path / name, 1)
        assert one.shape == (1, 5, 7)
        assert is_deep(tmp_path / name)


@pytest.mark.fault("I05")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    pixels = RNG.random((5, 7, 3)).astype(np.float32)
    pixels[2, 3, 1] = value
    imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    np.save(tmp_path / "a.npy", pixels)
    for name in ("a.tif", "a.npy"):
        with pytest.raises(DataError, match=rf"{name}: 1 of 105 values are NaN or infinite"):
            read_image(tmp_path / name)


@pytest.mark.fault("I05")
def test_values_out_of_range_are_refused_or_declared(tmp_path):
    pixels = np.linspace(-2, 6, 30, dtype=np.float64).reshape(5, 6)
    imwrite(tmp_path / "a.tif", pixels)
    with pytest.raises(DataError, match=r"a.tif: values from -2 to 6 leave the range 0 to 1; set value_range"):
        read_image(tmp_path / "a.tif")
    image, _ = read_image(tmp_path / "a.tif", 1, [-2, 6])
    torch.testing.assert_close(image, torch.linspace(0, 1, 30).reshape(1, 5, 6))
    with pytest.raises(DataError, match=r"values from -2 to 6 leave the range -1 to 9"):
        read_image(tmp_path / "a.tif", 1, [-1, 9])
    imwrite(tmp_path / "b.tif", np.arange(30, dtype=np.int16).reshape(5, 6))
    with pytest.raises(DataError, match=r"int16, which has no white of its own; set value_range"):
        read_image(npy(tmp_path, np.zeros((2, 2), np.int16)))
    assert read_image(tmp_path / "b.tif", 1, (0, 29))[0].max() == 1
    twelve = np.array([[0, 4095]], np.uint16)
    Image.fromarray(twelve).save(tmp_path / "c.tif")
    assert read_image(tmp_path / "c.tif", 1, (0, 4095))[0].tolist() == [[[0, 1]]]
    Image.fromarray(twelve).save(tmp_path / "c.png")
    assert read_image(tmp_path / "c.png", 1, (0, 4095))[0].tolist() == [[[0, 1]]]
    with pytest.raises(DataError, match=r"c.png: values from 0 to 4095 leave the range 0 to 1023; set value_range"):
        read_image(tmp_path / "c.png", 1, (0, 1023))
    Image.fromarray(twelve.astype(np.uint8)).save(tmp_path / "d.png")
    with pytest.raises(DataError, match=r"d.png: 'value_range' is for TIFF, .npy and 16-bit PNG files"):
        read_image(tmp_path / "d.png", 1, (0, 4095))
    for bad in ([0], [1, 1], [0, np.nan], [0, True], ["a", 1]):
        with pytest.raises(ConfigError, match="value_range: expected"):
            read_image(tmp_path / "a.tif", 1, bad)


def npy(folder, array):
    np.save(folder / "x.npy", array)
    return folder / "x.npy"


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
def test_n_channels(tmp_path, channels):
    pixels = RNG.integers(0, 65536, (channels, 20, 21)).astype(np.uint16)
    imwrite(tmp_path / "pages.tif", pixels, photometric="minisblack")
    imwrite(tmp_path / "planes.tif", pixels, photometric="minisblack", planarconfig="separate")
    inside = np.moveaxis(pixels, 0, 2)
    imwrite(tmp_path / "samples.tif", inside, photometric="minisblack", planarconfig="contig", compression="zlib")
    np.save(tmp_path / "first.npy", pixels)
    np.save(tmp_path / "last.npy", inside)
    with TiffFile(tmp_path / "pages.tif") as pages, TiffFile(tmp_path / "planes.tif") as planes:
        assert (len(pages.pages), len(planes.pages)) == (channels, 1)
    for path in tmp_path.iterdir():
        image, gray = read_image(path, channels)
        assert not gray
        assert torch.equal(image, torch.from_numpy(pixels.astype(np.float32) / np.float32(65535))), path.name
        for other in (channels + 1, 3):
            with pytest.raises(DataError, match=rf"{path.name}: has ({channels} (channels|frames)|shape)"):
                read_image(path, other)
    for path in (saved(tmp_path / "a.png", Image.fromarray(COLOUR)), tmp_path / "none.tif"):
        with pytest.raises(DataError, match=path.name):
            read_image(path, channels)


def test_reduced_copies_are_left_out(tmp_path):
    pixels = RNG.integers(0, 65536, (4, 32, 32)).astype(np.uint16)
    with TiffWriter(tmp_path / "a.tif") as file:
        file.write(pixels, photometric="minisblack", planarconfig="separate")
        file.write(pixels[:, ::2, ::2], photometric="minisblack", planarconfig="separate", subfiletype=1)
    assert read_image(tmp_path / "a.tif", 4)[0].shape == (4, 32, 32)


@pytest.mark.parametrize(("kind", "name"), [("unassalpha", "unassociated"), ("assocalpha", "associated")])
@pytest.mark.parametrize("colours", [1, 3])
def test_alpha_of_a_16_bit_tiff_is_composited_over_white(tmp_path, kind, name, colours):
    values = RNG.random((5, 7, colours))
    alpha = RNG.random((5, 7, 1))
    stored = np.concatenate([values * (alpha if name == "associated" else 1), alpha], 2)
    stored = (stored * 65535).round().astype(np.uint16)
    photometric = "rgb" if colours == 3 else "minisblack"
    imwrite(tmp_path / "a.tif", stored, photometric=photometric, planarconfig="contig", extrasamples=[kind])
    image, gray = read_image(tmp_path / "a.tif")
    assert gray == (colours == 1)
    torch.testing.assert_close(image, chw(values * alpha + 1 - alpha, 1).expand(3, -1, -1), rtol=0, atol=2e-5)
    raw, _ = read_image(tmp_path / "a.tif", 4) if colours == 3 else read_image(tmp_path / "a.tif", 2)
    torch.testing.assert_close(raw, chw(stored, 65535), rtol=0, atol=1e-7)


def test_a_fourth_sample_without_meaning_is_refused(tmp_path):
    pixels = RNG.integers(0, 65536, (5, 7, 4)).astype(np.uint16)
    imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unspecified"])
    with pytest.raises(DataError, match=r"a.tif: has 4 channels, expected 3; set 'channels'"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("extra", ["unassalpha", "unspecified", None])
def test_a_sample_beside_the_colours_is_alpha_if_the_file_says_so(tmp_path, colours, extra):
    path, pixels = tmp_path / "a.tif", RNG.integers(0, 256, (5, 7, colours + 1), dtype=np.uint8)
    photometric = "rgb" if colours == 3 else "minisblack"
    imwrite(path, pixels, photometric=photometric, planarconfig="contig", extrasamples=[extra or "unspecified"])
    if extra is None:  # as others write it
        with TiffFile(path, mode="r+") as file:
            file.filehandle.seek(file.pages[0].tags[338].offset)
            file.filehandle.write(struct.pack("<H", 65000))  # a private tag
    elif extra == "unassalpha":
        alpha = pixels[..., -1:] / 255
        expected = chw(pixels[..., :-1] / 255 * alpha + 1 - alpha, 1).expand(3, -1, -1)
        torch.testing.assert_close(read_image(path)[0], expected, rtol=0, atol=1e-6)
        return
    for read in (read_image, read_colours):
        with pytest.raises(DataError, match=r"a\.tif"):
            read(path)
    if colours == 3:
        with pytest.raises(DataError, match=r"has 4 channels.* not declared as alpha.* set 'channels' to 4"):
            read_image(path)
        torch.testing.assert_close(read_image(path, 4)[0], chw(pixels), rtol=0, atol=1e-7)


def test_inverted_and_turned_tiffs(tmp_path):
    pixels = RNG.random((5, 7)).astype(np.float32)
    imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    assert torch.equal(read_image(tmp_path / "a.tif", 1)[0], 1 - chw(pixels, 1))
    with pytest.raises(DataError, match=r"a.tif: is stored turned or inverted"):
        read_field(tmp_path / "a.tif")
    imwrite(tmp_path / "b.tif", pixels, extratags=[(274, "H", 1, 6, True)])
    assert torch.equal(read_image(tmp_path / "b.tif", 1)[0], torch.rot90(chw(pixels, 1), -1, (1, 2)))
    with pytest.raises(DataError, match=r"b.tif: is stored turned or inverted"):
        read_field(tmp_path / "b.tif")


def windows_of(path, value_range=None):
    """A whole file, gray or of 1 channel, by windows."""
    file = WindowedFile(path, 3, value_range)
    return file.read(slice(0, file.shape[1]), slice(0, file.shape[2]))


@pytest.mark.parametrize(("bits", "dtype"), [(2, "uint8"), (4, "uint8"), (12, "uint16")])
def test_packed_bits_have_no_white_of_their_own(tmp_path, bits, dtype):
    imwrite(tmp_path / "a.tif", np.ones((5, 8), dtype))
    with TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages[0].tags[258].overwrite(bits)
    with pytest.raises(DataError, match=f"a.tif: holds {dtype} up to {2**bits - 1}, which has no white of its own"):
        WindowedFile(tmp_path / "a.tif")
    assert WindowedFile(tmp_path / "a.tif", value_range=(0, 2**bits - 1)).shape == (1, 5, 8)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_parts_that_a_sparse_tiff_leaves_out_are_0(tmp_path, compression):
    """As GDAL writes them (SPARSE_OK): a part of zeros has no bytes in the file."""
    pixels = RNG.integers(1, 256, (32, 48), dtype=np.uint8)
    pixels[16:, 16:32] = 0
    parts = [pixels[y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16, 32)]
    stored = (part if part.any() else None for part in parts)
    options = {"shape": (32, 48), "dtype": np.uint8, "tile": (16, 16), "compression": compression}
    imwrite(tmp_path / "sparse.tif", stored, photometric="minisblack", **options)
    with TiffFile(tmp_path / "sparse.tif") as file:
        assert file.pages[0].databytecounts[4] == 0
    assert np.array_equal(windows_of(tmp_path / "sparse.tif")[0].numpy() * 255, pixels)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(("dtype", "white"), [("u1", 255), ("u2", 65535), ("f4", 1)])
def test_where_0_is_white_it_is_read_as_white(tmp_path, dtype, white, byteorder, compression):
    pixels = RNG.integers(0, white + 1, (5, 7)) if white > 1 else RNG.random((5, 7))
    pixels[0, 0], pixels[0, 1] = 0, white
    pixels, options = pixels.astype(dtype), {"byteorder": byteorder, "compression": compression}
    imwrite(tmp_path / "white.tif", pixels, photometric="miniswhite", **options)
    imwrite(tmp_path / "black.tif", pixels, photometric="minisblack", **options)
    for value_range in (None, (0, white), (-1, 2 * white)):
        black, gray = read_image(tmp_path / "black.tif", 1, value_range)
        image, same = read_image(tmp_path / "white.tif", 1, value_range)
        assert gray == same is True
        torch.testing.assert_close(image, 1 - black, rtol=0, atol=1e-7)
        torch.testing.assert_close(windows_of(tmp_path / "black.tif", value_range), black, rtol=0, atol=1e-7)
        torch.testing.assert_close(windows_of(tmp_path / "white.tif", value_range), image, rtol=0, atol=1e-7)
        assert value_range == (-1, 2 * white) or image[0, 0, :2].tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_only_the_gray_of_a_transparent_picture_is_inverted(tmp_path, kind):
    gray, alpha = RNG.random((5, 7)), RNG.random((5, 7))
    premultiplied = gray * alpha if kind == "assocalpha" else gray
    stored = np.stack([premultiplied, alpha], -1).astype(np.float32)
    imwrite(tmp_path / "a.tif", stored, photometric="miniswhite", planarconfig="contig", extrasamples=[kind])
    over_white = chw((1 - gray) * alpha + (1 - alpha), 1)
    torch.testing.assert_close(read_image(tmp_path / "a.tif", 1)[0], over_white, rtol=0, atol=1e-6)


@pytest.mark.parametrize("read", [read_mask, read_colours, read_field, read_two_levels])
@pytest.mark.parametrize("dtype", ["bool", "u1", "u2"])
def test_masks_whose_0_is_white_are_refused(tmp_path, dtype, read):
    ids = RNG.integers(0, 2, (5, 7)).astype(dtype)
    imwrite(tmp_path / "a.tif", ids, photometric="miniswhite")
    with pytest.raises(DataError, match=r"a.tif: stored as MinIsWhite.*photometric='minisblack'"):
        read(tmp_path / "a.tif")


@pytest.mark.fault("I01")
@pytest.mark.parametrize("form", FORMS[:4], ids=str)
def test_truncated_tiffs_never_give_an_image(tmp_path, form):
    path = tmp_path / "a.tif"
    imwrite(path, RNG.random((40, 40, 3)).astype(np.float32), photometric="rgb", **{**form, "predictor": None})
    content = path.read_bytes()
    for part in range(0, 100, 5):
        path.write_bytes(content[: len(content) * part // 100])
        for read in (read_image, read_field):
            with pytest.raises(DataError, match=r"a\.tif"):
                read(path)


@pytest.mark.fault("I01")
@pytest.mark.parametrize("tag", [273, 279])
def test_missing_parts_are_not_filled_in(tmp_path, tag):
    path = tmp_path / "a.tif"
    imwrite(path, np.ones((8, 8, 3), np.float32), photometric="rgb", rowsperstrip=2, compression="zlib")
    with TiffFile(path, mode="r+") as file:
        entry = file.pages[0].tags[tag]
        entry.overwrite([*entry.value[:-1], 0])
    with pytest.raises(DataError, match=r"a.tif: damaged or truncated \(parts of the image are missing\)"):
        read_image(path)


@pytest.mark.fault("I02")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from([*FORMS, "npy"]), data=st.data())
def test_damaged_numbers_raise_nothing_but_our_error(tmp_path, form, data):
    path = tmp_path / ("a.npy" if form == "npy" else "a.tif")
    pixels = (
        np.random.default_rng(0)
        .integers(0, 65536, (3, 5, 7) if "planarconfig" in form else (5, 7, 3))
        .astype(np.uint16)
    )
    np.save(path, pixels) if form == "npy" else imwrite(path, pixels, photometric="rgb", **form)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(400, len(content) - 1)))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    for channels in (3, 5):
        with suppress(DataError):
            image, _ = read_image(path, channels)
            assert image.shape[0] == channels
            assert image.isfinite().all()
    for read in (read_field, read_mask, read_colours):
        with suppress(DataError):
            assert read(path).shape[-1] > 0


@pytest.mark.fault("I14")
def test_bombs_of_numbers_are_refused_from_the_header(tmp_path):
    path = npy(tmp_path, np.zeros((2, 2), np.float32))
    content = path.read_bytes().replace(b"(2, 2), ", b"(65535, 65535), ").replace(b" " * 20, b" " * 12, 1)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npy"):
        read_image(path)
    tiff = tmp_path / "a.tif"
    imwrite(tiff, np.zeros((16, 16, 3), np.float32), photometric="rgb", compression="zlib")
    with TiffFile(tiff, mode="r+") as file:
        for tag in (256, 257, 278):
            file.pages[0].tags[tag].overwrite(65535)
    with pytest.raises(DataError, match=r"a.tif: 65535x65535 pixels, more than the limit"):
        read_image(tiff)
    imwrite(tiff, np.zeros((16, 16, 3), np.float32), photometric="rgb", compression="zlib")
    with TiffFile(tiff, mode="r+") as file:
        for tag in (256, 257, 278):
            file.pages[0].tags[tag].overwrite(12000)
    with pytest.raises(DataError, match=r"a.tif: declares 12000x12000 pixels in \d+ bytes"):
        read_image(tiff)


def test_a_width_that_is_a_text_is_refused_at_once(tmp_path):
    path = tmp_path / "a.tif"
    imwrite(path, np.zeros((16, 16, 3), np.uint16), photometric="rgb")
    with TiffFile(path) as file:
        width = file.pages[0].tags[256]
        assert (width.count, width.valueoffset) == (1, width.offset + 8)
        place = width.offset + 2
    content = bytearray(path.read_bytes())
    content[place] = 2  # ASCII
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tif"):
        read_image(path)


def test_channels_count_in_the_limit(tmp_path, monkeypatch):
    path = npy(tmp_path, np.zeros((7, 5, 7), np.float32))
    monkeypatch.setattr(limits, "MAX_PIXELS", 81)
    with pytest.raises(DataError, match=r"7 channels of 5x7 pixels, more than the limit of 243 numbers"):
        read_image(path, 7)
    monkeypatch.setattr(limits, "MAX_PIXELS", 82)
    assert read_image(path, 7)[0].shape == (7, 5, 7)


def test_npy_files_are_checked(tmp_path):
    for array, message in (
        (np.zeros((2, 2), complex), "holds complex128"),
        (np.zeros((2, 2), bool), "holds bool"),
        (np.zeros(3), r"has shape \(3,\)"),
        (np.zeros((1, 3, 2, 2)), "has shape"),
        (np.zeros((0, 4), np.uint8), "damaged|empty"),
        (np.array([{}, 1], object), "damaged"),
    ):
        with pytest.raises(DataError, match=rf"x.npy: {message}"):
            read_image(npy(tmp_path, array))
    (tmp_path / "zip.npy").write_bytes(b"PK\3\4" + bytes(100))
    for name in ("zip.npy", "missing.npy"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)
    assert read_mask(npy(tmp_path, np.array([[0, -3]]))).tolist() == [[0, -3]]
    with pytest.raises(DataError, match="holds float64; class ids are whole numbers"):
        read_mask(npy(tmp_path, np.zeros((2, 2))))


def test_a_compression_without_its_package_is_named(tmp_path):
    path = tmp_path / "a.tif"
    imwrite(path, np.ones((8, 8, 3), np.uint16), photometric="rgb", compression="zlib")
    with TiffFile(path, mode="r+") as file:
        file.pages[0].tags[259].overwrite(5)  # LZW
    with pytest.raises(DataError, match=r"a.tif: (its compression needs a package more|damaged)"):
        read_image(path)


def test_depth_of_files(tmp_path):
    for array, deep in ((COLOUR, False), (GRAY, False), (GRAY.astype(np.uint16), True)):
        for extension in ("png", "tif"):
            assert is_deep(saved(tmp_path / f"a.{extension}", Image.fromarray(array))) == deep
    assert not is_deep(npy(tmp_path, GRAY))
    assert not is_deep(saved(tmp_path / "a.jpg", Image.fromarray(COLOUR)))
