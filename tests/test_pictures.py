"""Pictures of an inspection: what is drawn is what was computed, read back from the pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import center_of_mass, label
from skimage.color import rgb2lab

from densectx.errors import ConfigError, NumericError
from densectx.inspection.canvas import EDGE, Canvas
from densectx.inspection.colours import BLUE, EMPTY, GREEN, PAPER, RED, diverging, sequential, shades
from densectx.inspection.coverage import coverage
from densectx.inspection.kernels import gallery
from densectx.inspection.pictures import figure1, gallery_picture, growth, heat_map


def where(image, colour):
    """Pixels of exactly a colour, (H, W)."""
    return (np.asarray(image) == colour).all(2)


def span(mask):
    """First and last row and column of what is set."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], rows[-1], columns[0], columns[-1]


def panels(image, count):
    """(count, H, W) parts of a figure of one row of panels, without the legend."""
    grounds = where(image, EMPTY) | where(image, BLUE) | where(image, GREEN)
    top, bottom, _, _ = span(grounds & (grounds.sum(1, keepdims=True) > 400))
    parts, found = label(grounds.any(0, where=np.arange(image.height)[:, None] < bottom))
    gaps = [np.flatnonzero(parts == n + 1) for n in range(found)]
    joined = [gaps[0]]  # lines between cells are of another colour; panels are far apart
    for columns in gaps[1:]:
        if columns[0] - joined[-1][-1] < 10:
            joined[-1] = np.concatenate([joined[-1], columns])
        else:
            joined.append(columns)
    assert len(joined) == count
    pixels = np.asarray(image)
    return [pixels[top : bottom + 1, columns[0] : columns[-1] + 1] for columns in joined]


@pytest.mark.parametrize("dilations", [(1, 2, 4), (1, 3, 9), (2, 2, 2), (1, 4, 8), (2, 1)])
def test_dots_and_fields_of_figure_1_are_those_of_the_coverage(dilations):
    image = figure1(dilations)
    cells = coverage(dilations).field + 2
    cell = min(40, 340 / cells)
    for layer, pixels in enumerate(panels(image, len(dilations))):
        corner = np.array(pixels.shape[:2]) / 2 - cell * cells / 2
        found = coverage(dilations[: layer + 1])
        marks, count = label(np.abs(pixels.astype(int) - RED).sum(2) < 60)
        dots = np.array(center_of_mass(marks > 0, marks, range(1, count + 1))) + 0.5
        taps = [-dilations[layer], 0, dilations[layer]]
        expected = corner + (np.array([(row, column) for row in taps for column in taps]) + cells / 2) * cell
        assert count == 9
        assert np.linalg.norm(dots[:, None] - expected, axis=2).min(0).max() < 1
        first = (cells - found.field) // 2
        for row in range(cells):  # a corner of each cell, beside the dot and the lines
            for column in range(cells):
                y, x = np.rint(corner + (np.array([row, column]) + 0.15) * cell).astype(int)
                inside = all(0 <= place - first < found.field for place in (row, column))
                seen = inside and found.taps[row - first] and found.taps[column - first]
                assert tuple(pixels[y, x]) in ((BLUE, GREEN) if seen else (EMPTY,)), (layer, row, column)


def test_green_is_what_the_central_tap_sees():
    pixels = panels(figure1((1, 2, 4)), 3)[2]
    top, bottom, left, right = span((pixels == GREEN).all(2))
    cell = pixels.shape[1] / 17
    assert (bottom - top + 1) / cell == pytest.approx(7, abs=0.15)
    assert (top + bottom + 1) / 2 == pytest.approx(pixels.shape[0] / 2, abs=1)
    assert (left + right + 1) / 2 == pytest.approx(pixels.shape[1] / 2, abs=1)


def test_panels_go_on_in_a_new_row_and_small_fields_are_enlarged():
    short, long = figure1((1, 1, 2, 4)), figure1((1, 1, 2, 4, 8, 16, 1))
    assert long.width == short.width
    assert long.height > 1.7 * short.height
    blue = where(long, BLUE)
    assert blue[:, : long.width // 4].sum() > 500  # 3x3 of 69x69 cells would be a speck


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 4))
def test_figure_1_takes_any_stack(dilations, kernel):
    image = figure1(dilations, kernel)
    assert image.mode == "RGB"
    assert 200 < image.width < 2000
    assert image.height < 1200
    assert image.getpixel((0, 0)) == image.getpixel((image.width - 1, image.height - 1)) == PAPER


def test_bars_and_squares_of_growth_are_to_scale():
    sides = [3, 5, 9, 17, 33, 65, 67]
    image = growth([(f"layer {n}", side) for n, side in enumerate(sides)])
    bars = []
    for side, colour in zip(sides, shades(len(sides)), strict=True):
        mask = where(image, colour)
        parts, count = label(mask)
        boxes = [span(parts == n + 1) for n in range(count)]
        _, _, left, right = max(boxes, key=lambda box: box[2])  # the bar stands right of the squares
        bars.append(right - left + 1)
        square = [box for box in boxes if box[2] < EDGE + 260]
        width = max(box[3] for box in square) - min(box[2] for box in square) + 1
        assert width / 260 == pytest.approx(side / 67, abs=0.02)
    assert np.allclose(np.array(bars) / bars[-1], np.array(sides) / 67, atol=0.01)


def test_growth_of_what_is_global():
    image = growth([("conv", 3), ("pool", float("inf"))], unit="pixels")
    bars = []
    for colour in shades(2):
        columns = np.flatnonzero(where(image, colour)[:, image.width // 2 :].any(0))
        bars.append(columns[-1] - columns[0])
    assert bars[0] == pytest.approx(0.8 * bars[1], rel=0.05)
    assert growth([("pool", float("inf"))]).width > 300


def test_heat_map_shows_each_number_in_its_colour_and_the_bar_the_range():
    values = torch.arange(20.0).view(4, 5)
    image = heat_map(values, "numbers")
    pixels = np.asarray(image)
    cell, top = 460 / 5, EDGE + 40
    for row in range(4):
        for column in range(5):
            at = pixels[round(top + (row + 0.5) * cell), round(EDGE + (column + 0.5) * cell)]
            assert np.array_equal(at, sequential(float(values[row, column]) / 19))
    bar = pixels[top : top + round(4 * cell), EDGE + 460 + 30]
    expected = sequential(np.linspace(1, 0, len(bar)))
    assert np.abs(bar.astype(int) - expected).max() <= 4


def test_squares_of_a_heat_map_have_their_sides():
    image = heat_map(np.zeros((41, 41)), field=21, effective=11)
    red = np.abs(np.asarray(image).astype(int) - RED).sum(2) < 40
    red[EDGE + 460 :] = False  # the legend
    top, bottom, left, right = span(red)
    cell = 460 / 41
    for first, last in ((top, bottom), (left, right)):
        assert (last - first + 1) / cell == pytest.approx(21, abs=0.3)
        assert (first + last + 1) / 2 == pytest.approx(EDGE + 230, abs=1)
    inner = red.copy()
    inner[: top + 8] = inner[bottom - 8 :] = False
    inner[:, : left + 8] = inner[:, right - 8 :] = False
    first, last, _, _ = span(inner)
    assert (last - first + 1) / cell == pytest.approx(11, abs=0.3)
    outline = inner[first : first + 3].any(0)
    assert 0.3 < outline.sum() / (11 * cell) < 0.8  # dashes


def test_squares_away_from_the_middle_and_beyond_the_map():
    aside = heat_map(np.zeros((20, 20)), field=5, centre=(4.0, 15.0))
    red = np.abs(np.asarray(aside).astype(int) - RED).sum(2) < 40
    top, bottom, left, right = span(red[: EDGE + 460])
    assert ((top + bottom + 1) / 2, (left + right + 1) / 2) == pytest.approx((EDGE + 4.5 * 23, EDGE + 15.5 * 23), abs=1)
    none = np.abs(np.asarray(heat_map(np.zeros((20, 20)), field=50)).astype(int) - RED).sum(2) < 40
    assert not none[: EDGE + 460].any()


@pytest.mark.parametrize("shape", [(1, 1), (30, 70), (900, 900), (7, 600)])
def test_heat_maps_of_any_shape(shape):
    image = heat_map(
        torch.rand(shape), "a title that is wider than any map of this width would be, to see that it fits"
    )
    assert image.width >= 460
    assert image.height > 460 * shape[0] / max(shape)


@pytest.mark.parametrize(("values", "error"), [(torch.zeros(3), ConfigError), (np.zeros((0, 4)), ConfigError)])
def test_what_is_no_map_is_refused(values, error):
    with pytest.raises(error):
        heat_map(values)


def test_other_things_that_cannot_be_drawn():
    with pytest.raises(NumericError):
        heat_map(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ConfigError):
        figure1(())
    for fields in ([], [("a", 0.0)], [("a", float("nan"))]):
        with pytest.raises(ConfigError):
            growth(fields)


def test_gallery_shows_the_kernels():
    found = gallery(0, count=3)
    pixels = np.asarray(gallery_picture(found))
    for row, kernels in enumerate(found):
        for column, kernel in enumerate(kernels):
            left, top = EDGE + column * (135 + 14), EDGE + 44 + 32 + row * (135 + 78)
            shown = pixels[top + 2 : top + 135 : 5, left + 2 : left + 135 : 5]
            assert np.array_equal(shown, diverging((kernel / kernel.abs().max()).numpy()))


def test_the_same_arguments_give_the_same_pixels():
    for draw in (lambda: figure1((1, 2, 5)), lambda: gallery_picture(gallery(1)), lambda: growth([("a", 3), ("b", 9)])):
        assert draw().tobytes() == draw().tobytes()


def lightness(colours):
    return rgb2lab(colours[None] / 255.0)[0, :, 0]


def test_the_scale_grows_evenly_in_lightness():
    found = lightness(sequential(np.linspace(0, 1, 201)))
    assert (np.diff(found) > -0.5).all()  # rounding to 8 bits
    assert found[0] < 15
    assert found[-1] > 93
    assert np.abs(found - np.interp(np.arange(201), [0, 200], [found[0], found[-1]])).max() < 8


def test_the_two_sided_scale_is_even_handed():
    values = np.linspace(0, 1, 101)
    up, down = lightness(diverging(values)), lightness(diverging(-values))
    assert (np.diff(up) < 0.5).all()
    assert np.abs(up - down).max() < 8
    assert np.ptp(diverging(0.0)) <= 2  # zero is gray
    red, blue = diverging(1.0), diverging(-1.0)
    assert red[0] > red[2] + 60
    assert blue[2] > blue[0] + 60


def test_edges_are_smooth_and_text_is_drawn():
    canvas = Canvas(40, 30)
    canvas.dot(15, 15, 8, RED)
    image = canvas.finish()
    assert image.size == (40, 30)
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 10
    assert where(image, RED).sum() == pytest.approx(np.pi * 7.5**2, rel=0.1)
    canvas.text(5, 15, "words", 13)
    assert canvas.finish().tobytes() != image.tobytes()
