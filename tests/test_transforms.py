"""Augmentation keeps image, mask and target aligned; checked with pictures of their own coordinates."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

from densectx.data import geometry
from densectx.data.mix import cutmix
from densectx.data.transforms import Augment
from densectx.errors import ConfigError, DataError
from densectx.rng import generator
from densectx.types import SourceInfo


def coordinates(height, width):
    """Image and target hold (row, column) / 1000, the mask row * 1000 + column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows / 1000, columns / 1000, torch.zeros_like(rows)]).float()
    return {"image": image, "mask": rows * 1000 + columns, "target": image[:2] + 1, "gray": torch.tensor(False)}


sizes = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(st.tuples(sizes, sizes), st.tuples(st.integers(1, 90), st.integers(1, 90)))
def test_ids_are_resized_as_by_torchvision(old, new):
    mask = torch.arange(old[0] * old[1]).reshape(old)
    valid = mask % 3 == 0
    got = geometry.resize({"image": torch.zeros(1, *old), "mask": mask, "valid": valid}, new, SourceInfo())
    expected = F.resize(mask[None], list(new), F.InterpolationMode.NEAREST_EXACT)[0]
    between = [(2 * torch.arange(n) + 1) * o % (2 * n) == 0 for o, n in zip(old, new, strict=True)]
    clear = ~(between[0][:, None] | between[1])  # else either of two pixels is the nearest
    assert torch.equal(got["mask"][clear], expected[clear])
    assert torch.equal(got["valid"], got["mask"] % 3 == 0)


@pytest.mark.parametrize("value", [2**24 + 1, 2**31 - 1, 2**32 - 1, 2**62 + 1, -(2**31) + 1])
def test_every_id_stays_what_it_is(value):
    mask = torch.full((8, 8), value)
    info = SourceInfo(ignore_index=value)
    got = geometry.resize({"image": torch.zeros(1, 8, 8), "mask": mask}, (5, 11), info)["mask"]
    assert torch.equal(got, torch.full((5, 11), value))


@settings(max_examples=60, deadline=None)
@given(height=sizes, width=sizes, data=st.data(), seed=st.integers(0, 2**31))
def test_crop_and_flip_are_exact(height, width, data, seed):
    crop = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    out = Augment(crop=crop, flip=True)(coordinates(height, width), generator(seed))
    assert out["image"].shape == (3, *crop)
    assert out["mask"].shape == crop
    assert out["target"].shape == (2, *crop)
    rows, columns = out["mask"] // 1000, out["mask"] % 1000
    assert torch.equal(out["image"][0], rows / 1000)
    assert torch.equal(out["image"][1], columns / 1000)
    assert torch.equal(out["target"], out["image"][:2] + 1)
    steps = columns.diff(dim=1).unique().tolist()  # one contiguous window, mirrored or not
    assert steps in ([], [1], [-1])
    assert (rows.diff(dim=0) == 1).all()


@settings(max_examples=40, deadline=None)
@given(height=st.integers(8, 40), width=st.integers(8, 40), low=st.floats(0.4, 2), seed=st.integers(0, 2**31))
def test_scaling_keeps_labels_aligned(height, width, low, seed):
    augment = Augment(scale=[low, low * 1.5], crop=8, flip=True)
    sample = coordinates(height, width)
    if low * 1.5 * min(height, width) < 8:
        with pytest.raises(DataError, match="smaller than crop 8x8"):
            augment(sample, generator(seed))
        return
    out = augment(sample, generator(seed))
    assert out["image"].shape == (3, 8, 8)
    place = torch.stack([out["mask"] // 1000, out["mask"] % 1000]) / 1000
    # nearest picks a centre within half a source pixel; the antialiasing window is cut at the border (1/scale pixels)
    reach = (0.5 + 1.01 * max(1, 1 / low)) / 1000
    assert (out["image"][:2] - place).abs().max() <= reach
    torch.testing.assert_close(out["target"] - 1, out["image"][:2], rtol=0, atol=1e-5)
    assert out["mask"].dtype == torch.int64


def test_every_window_and_both_sides_come_up():
    augment, sample = Augment(crop=[3, 4], flip=True), coordinates(5, 6)
    seen = {int(augment(sample, generator(seed))["mask"][0].min()) for seed in range(200)}
    assert seen == {row * 1000 + column for row in range(3) for column in range(3)}
    mirrored = sum(int(augment(sample, generator(seed))["mask"][0].diff()[0] < 0) for seed in range(200))
    assert 70 < mirrored < 130


def test_scales_are_within_bounds_and_the_lower_one_covers_the_crop():
    sample = coordinates(20, 40)
    heights = {Augment(scale=[0.5, 2])(sample, generator(seed))["mask"].shape for seed in range(300)}
    assert min(heights) == (10, 20)
    assert max(heights) == (40, 80)
    assert all(abs(width - 2 * height) <= 1 for height, width in heights)
    for seed in range(50):
        assert Augment(scale=[0.1, 1.1], crop=20)(sample, generator(seed))["mask"].shape == (20, 20)


def test_unlabelled_targets_stay_unlabelled():
    sample = coordinates(16, 16)
    sample["target"][:, :8] = float("nan")
    target = Augment(scale=[2, 2])(sample, generator(0))["target"]
    assert target[:, :15].isnan().all()
    assert not target[:, 17:].isnan().any()


def test_scaled_images_stay_in_range():
    sample = {"image": torch.rand(3, 9, 9).round()}
    for scale in (0.7, 1.6):
        out = Augment(scale=[scale, scale])(sample, generator(0))["image"]
        assert out.min() >= 0
        assert out.max() <= 1


@pytest.mark.parametrize("gray", [False, True])
def test_colour_changes_the_image_only(gray):
    sample = coordinates(6, 6)
    sample["image"] = torch.rand(3, 6, 6)
    sample["gray"] = torch.tensor(gray)
    if gray:
        sample["image"] = sample["image"][:1].expand(3, -1, -1).contiguous()
    before = {key: value.clone() for key, value in sample.items()}
    out = Augment(color=0.5)(sample, generator(1))
    assert not torch.equal(out["image"], sample["image"])
    assert out["image"].min() >= 0
    assert out["image"].max() <= 1
    assert torch.equal(out["mask"], before["mask"])
    assert torch.equal(out["target"], before["target"])
    assert all(torch.equal(sample[key], before[key]) for key in before)  # the input is left alone
    if gray:
        assert torch.equal(out["image"][0], out["image"][1])
    one = Augment(color=0.5)({"image": torch.rand(1, 6, 6)}, generator(1))
    assert one["image"].shape == (1, 6, 6)


def test_only_the_generator_decides():
    augment, sample = Augment(scale=[0.5, 2], crop=8, flip=True, color=0.3), coordinates(16, 16)
    first = augment(sample, generator(3))
    torch.rand(7)
    torch.manual_seed(5)
    again, other = augment(sample, generator(3)), augment(sample, generator(4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["image"], other["image"])


def test_nothing_set_changes_nothing():
    sample = coordinates(5, 5)
    out = Augment()(sample, generator(0))
    assert all(torch.equal(out[key], sample[key]) for key in sample)


def test_errors_of_data():
    with pytest.raises(DataError, match=r"image 5x6 is smaller than crop 8x8 even at scale 1.2; choose a smaller crop"):
        Augment(scale=[0.5, 1.2], crop=8)(coordinates(5, 6), generator(0))
    with pytest.raises(DataError, match="mask is 4x6 but its image is 5x6"):
        Augment(flip=True)({**coordinates(5, 6), "mask": torch.zeros(4, 6, dtype=torch.int64)}, generator(0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad": "yes"}, "a.pad: expected true or false, got 'yes'"),
        ({"rotate90": 90}, "a.rotate90: expected true or false, got 90"),
        ({"vertical_flip": 1}, "a.vertical_flip: expected"),
        ({"vertical_flp": True}, "did you mean 'vertical_flip'"),
        ({"cutmix": 2}, "a.cutmix: expected a number in 0..1, got 2"),
        ({"cutmix": True, "crop": 4}, "a.cutmix: expected"),
        ({"flipp": True}, "unknown option 'flipp'; did you mean 'flip'"),
        ({"scale": [2, 1]}, "a.scale: expected"),
        ({"scale": [0, 1]}, "a.scale: expected"),
        ({"scale": 2}, "a.scale: expected"),
        ({"scale": ["a", "b"]}, "a.scale: expected"),
        ({"crop": 0}, "a.crop: expected"),
        ({"crop": [8]}, "a.crop: expected"),
        ({"crop": "ab"}, "a.crop: expected"),
        ({"crop": 2.5}, "a.crop: expected"),
        ({"color": 1.5}, "a.color: expected"),
        ({"color": True}, "a.color: expected"),
        ({"flip": 1}, "a.flip: expected"),
        (7, "a: expected a mapping"),
    ],
)
def test_errors_of_config(config, message):
    with pytest.raises(ConfigError, match=message):
        Augment.from_config(config, "a")


# -- everything geometric at once

INFO = SourceInfo(classes=tuple("abcdefghij"), ignore_index=10**6, keys=("image", "mask", "target"))


def scene(height, width, kind, scale):
    """Mask: row * 1000 + column. Image: both / 1000. Target: of kind labels the mask's remainder by 3 in three
    channels; of kind image the image; else, and at any scale > 1, the coordinates on its own grid, in image pixels."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = rows * 1000 + columns
    image = torch.stack([rows / 1000, columns / 1000, torch.zeros_like(rows)]).float()
    if scale > 1 or kind == "map":
        fine = [(torch.arange(n * scale, dtype=torch.float64) + 0.5) / scale - 0.5 for n in (height, width)]
        target = torch.stack(torch.meshgrid(*fine, indexing="ij")).float() / 1000
    else:
        target = image if kind == "image" else one_of_three(mask)
    return {"image": image, "mask": mask, "target": target}


def one_of_three(mask):
    return torch.stack([(mask % 3 == rest).float() for rest in range(3)])


def random_options(rng):
    def side():
        return rng.randint(1, 16)

    options = {"flip": rng.random() < 0.5, "vertical_flip": rng.random() < 0.5, "rotate90": rng.random() < 0.5}
    if rng.random() < 0.75:
        options["crop"] = [side(), side()]
        options["pad"] = rng.random() < 0.5
        if rng.random() < 0.4:
            options["rare"] = {"classes": rng.sample("abcdefghij", 3), "probability": 1.0}
    if rng.random() < 0.4:
        low = rng.uniform(0.4, 2)
        options["scale"] = [low, low * rng.uniform(1, 1.5)]
    return options


@pytest.mark.fault("I29")
def test_a_thousand_random_parameters_keep_labels_and_image_together(record_property):
    record_property("count", 1000)
    done, seed, seen, refused = 0, 0, Counter(), []
    while done < 1000:
        seed += 1
        rng = random.Random(seed)
        kind, scale = rng.choice(["map", "labels", "image"]), rng.choice([1, 1, 2, 3])
        info = SourceInfo(**{**INFO.__dict__, "target": kind, "scale": scale})
        options = random_options(rng)
        augment = Augment(**options, info=info)
        sample = scene(rng.randint(1, 24), rng.randint(1, 24), kind, scale)
        try:
            out = augment(sample, generator(seed))
        except DataError as error:
            refused.append((str(error), options))
            continue
        agree(sample, out, options, kind, scale)
        done += 1
        seen.update({kind, f"x{scale}", *(key for key, value in options.items() if value)})
    assert min(seen.values()) > 100, seen  # every kind and option had its share
    assert all("smaller than crop" in message and not options.get("pad") for message, options in refused)


def agree(sample, out, options, kind, scale):
    height, width = out["image"].shape[-2:]
    assert out["mask"].shape == (height, width)
    assert out["target"].shape[-2:] == (height * scale, width * scale)
    if "crop" in options:
        assert [height, width] == options["crop"]
    else:
        assert options.get("scale") or sample["image"].shape == out["image"].shape
    valid = out.get("valid", torch.ones(height, width, dtype=torch.bool))
    assert ("valid" in out) == bool(options.get("pad"))
    assert torch.equal(out["mask"] == INFO.ignore_index, ~valid)
    fine = valid.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    assert torch.equal(out["target"].isnan().any(0), ~fine)
    assert torch.equal(out["target"].isnan().all(0), ~fine)
    h, w = int(valid.any(1).sum()), int(valid.any(0).sum())
    assert valid[:h, :w].all()  # padded at the bottom and on the right
    image, mask, target = out["image"][:, :h, :w], out["mask"][:h, :w], out["target"][:, : h * scale, : w * scale]
    last = out["image"][:, torch.arange(height).clamp(max=h - 1)][:, :, torch.arange(width).clamp(max=w - 1)]
    assert torch.equal(last, out["image"])
    place = torch.stack([mask // 1000, mask % 1000])
    if scale == 1 and kind == "image":
        assert torch.equal(target, image)
    if scale == 1 and kind == "labels":
        assert torch.equal(target, one_of_three(mask))
    if "scale" in options:
        reach = 0.5 + 1.01 * max(1, 1 / options["scale"][0])
        assert (image[:2] - place / 1000).abs().max() <= reach / 1000
        return
    assert torch.equal(image[:2], (place / 1000).float())
    if scale > 1 or kind == "map":
        cells = torch.nn.functional.avg_pool2d(target[None], scale)[0]
        torch.testing.assert_close(cells, image[:2], rtol=0, atol=1e-6)
    down, across = place.diff(dim=1).flatten(1).unique(dim=1), place.diff(dim=2).flatten(1).unique(dim=1)
    steps = [step.flatten().tolist() for step in (down, across) if step.numel()]
    assert all(sorted(map(abs, step)) == [0, 1] for step in steps)  # one step everywhere, along one axis
    if len(steps) == 2:
        assert steps[0][0] * steps[1][0] + steps[0][1] * steps[1][1] == 0
    if "rare" in options:
        ids = {"abcdefghij".index(name) for name in options["rare"]["classes"]} & set(sample["mask"].flatten().tolist())
        assert not ids or ids & set(mask.flatten().tolist())


def test_all_turns_and_mirrors_come_up_evenly():
    def counts(**options):
        sample = coordinates(4, 4)
        out = [Augment(**options)(sample, generator(seed))["mask"].flatten().tolist() for seed in range(800)]
        return Counter(map(tuple, out))

    turns = counts(rotate90=True)
    expected = {tuple(coordinates(4, 4)["mask"].rot90(k).flatten().tolist()) for k in range(4)}
    assert set(turns) == expected
    assert all(150 < count < 250 for count in turns.values())
    assert len(counts(rotate90=True, flip=True, vertical_flip=True)) == 8
    assert len(counts(flip=True, vertical_flip=True)) == 4


def test_turns_keep_the_size_of_the_result():
    def seen(height, width, **options):
        augment = Augment(rotate90=True, **options)
        out = [augment(coordinates(height, width), generator(seed))["mask"] for seed in range(40)]
        assert len({mask.shape for mask in out}) == 1
        return out[0].shape, {(mask[0] // 1000).unique().numel() == 1 for mask in out}

    assert seen(4, 6) == ((4, 6), {True})  # rows stay rows: by 180 only
    assert seen(5, 5) == ((5, 5), {True, False})
    assert seen(6, 9, crop=[3, 5]) == ((3, 5), {True, False})
    assert seen(4, 6, crop=[4, 6]) == ((4, 6), {True})
    assert seen(6, 4, crop=[4, 6]) == ((4, 6), {False})  # fits only when it is turned
    assert seen(4, 6, crop=[4, 6], pad=True) == ((4, 6), {True, False})
    with pytest.raises(DataError, match="smaller than crop 4x6"):
        seen(4, 5, crop=[4, 6])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (30, 5)])
def test_padding_takes_images_of_every_size(height, width):
    augment = Augment(scale=[0.5, 2], crop=[8, 12], pad=True, rotate90=True, flip=True, color=0.2, info=INFO)
    for seed in range(20):
        out = augment(coordinates(height, width), generator(seed))
        assert out["image"].shape == (3, 8, 12)
        assert out["image"].isfinite().all()
        assert out["valid"].any()
        assert torch.equal(out["valid"], out["mask"] != INFO.ignore_index)
    big = Augment(crop=8, pad=True)(coordinates(20, 20), generator(0))
    assert big["valid"].all()  # always there, so that every batch has it


@pytest.mark.parametrize("width", [1, 2, 3])
def test_results_of_one_column(width):
    """Antialiased interpolation to one column is wrong in torch (2.15, CPU); to one row it is right."""
    image = torch.rand(3, 12, width, generator=generator(0))
    out = Augment(scale=[1 / 3, 1 / 3])({"image": image}, generator(0))["image"]
    assert out.shape == (3, 4, 1)
    tent = (1 - (torch.arange(12) - torch.tensor([1.0, 4, 7, 10])[:, None]).abs() / 3).clamp(min=0)
    rows = tent / tent.sum(1, keepdim=True)
    factor = max(width, 1)
    columns = (1 - (torch.arange(width) - (width - 1) / 2).abs() / factor).clamp(min=0)
    expected = torch.einsum("ih,chw,w->ci", rows, image, columns / columns.sum())
    torch.testing.assert_close(out[..., 0], expected)


def test_padding_does_not_raise_the_scale():
    sample = coordinates(20, 20)
    heights = [
        int(Augment(scale=[0.5, 1], crop=20, pad=True)(sample, generator(seed))["valid"].any(1).sum())
        for seed in range(100)
    ]
    assert min(heights) < 12
    assert max(heights) > 18


# -- rare classes


def test_crops_around_rare_classes():
    mask = torch.zeros(30, 40, dtype=torch.int64)
    mask[3, 35] = 1  # one pixel
    mask[20:25, 5:15] = 2
    sample = {"image": torch.zeros(3, 30, 40), "mask": mask}
    info = SourceInfo(classes=("ground", "pole", "car", "none"), keys=("image", "mask"))

    def crops(rare, count=300):
        augment = Augment(crop=6, rare=rare, info=info)
        return [augment(sample, generator(seed))["mask"] for seed in range(count)]

    found = Counter()
    for crop in crops({"classes": ["pole", 2, "none"], "probability": 1}):
        assert (crop == 1).any() or (crop == 2).any()
        found[bool((crop == 1).any())] += 1
    assert 110 < found[True] < 190  # classes evenly, not pixels; an absent one takes no part
    where = {tuple(crop.nonzero()[0].tolist()) for crop in crops({"classes": ["pole"], "probability": 1})}
    assert {row for row, _ in where} == {0, 1, 2, 3}  # nothing above row 0 to take
    assert {column for _, column in where} == {1, 2, 3, 4, 5}  # nor right of column 39
    half = sum(bool((crop == 1).any()) for crop in crops({"classes": ["pole"], "probability": 0.5}))
    assert 110 < half < 200
    plain = [Augment(crop=6, info=info)(sample, generator(seed))["mask"] for seed in range(300)]
    assert sum(bool((crop == 1).any()) for crop in plain) < 30
    for options in ({"classes": ["none"], "probability": 1}, {"classes": ["pole"], "probability": 0}):
        places = {tuple(crop.shape) for crop in crops(options, 5)}
        assert places == {(6, 6)}
    unlabelled = {"image": sample["image"]}
    assert set(Augment(crop=6, rare={"classes": ["pole"]}, info=info)(unlabelled, generator(0))) == {"image"}


@pytest.mark.parametrize(
    ("options", "info", "message"),
    [
        ({"crop": 4, "rare": {"classes": ["i", "jj"]}}, INFO, r"a.rare.classes: unknown class 'jj'"),
        ({"crop": 4, "rare": {"classes": ["Polle"]}}, SourceInfo(classes=("Pole",), keys=("mask",)), "mean 'Pole'"),
        ({"crop": 4, "rare": {"classes": [10]}}, INFO, r"a.rare.classes: expected class names or ids in 0..9, got 10"),
        ({"crop": 4, "rare": {"classes": [True]}}, INFO, "a.rare.classes"),
        ({"crop": 4, "rare": {"classes": []}}, INFO, "a.rare.classes: expected a list"),
        ({"crop": 4, "rare": {"classes": "a"}}, INFO, "a.rare.classes: expected a list"),
        ({"crop": 4, "rare": {"class": ["a"]}}, INFO, "a.rare: unknown option 'class'; did you mean 'classes'"),
        ({"crop": 4, "rare": {"classes": ["a"], "probability": 2}}, INFO, "a.rare.probability: expected"),
        ({"crop": 4, "rare": ["a"]}, INFO, "a.rare: expected {classes"),
        ({"crop": 4, "rare": {"classes": ["a"]}}, SourceInfo(), "a.rare: the source has no masks"),
        ({"rare": {"classes": ["a"]}}, INFO, "a.rare: .* there is no crop; set a.crop"),
        ({"cutmix": 0.5, "scale": [0.5, 1]}, INFO, "a.cutmix: needs samples of one size; set a.crop"),
        ({"cutmix": 0.5, "scale": [1, 2]}, SourceInfo(size=(8, 8)), "a.cutmix: needs samples of one size"),
        ({"crop": 9}, SourceInfo(size=(8, 20)), r"a.crop: 9x9 is larger than the images, 8x20, .* or pad: true"),
        ({"crop": [9, 7], "scale": [0.5, 1.1]}, SourceInfo(size=(8, 20)), "a.crop: 9x7 is larger"),
        ({"color": 0.1}, SourceInfo(channels=4), "a.color: is for 1 or 3 channels, the source has 4"),
    ],
)
@pytest.mark.fault("C11")
def test_impossible_combinations_are_refused_before_data_is_read(options, info, message):
    with pytest.raises(ConfigError, match=message):
        Augment.from_config(options, "a", info)


def test_possible_combinations():
    wide = SourceInfo(size=(8, 20))
    assert Augment(crop=9, pad=True, info=wide).size == (9, 9)
    assert Augment(crop=[20, 8], rotate90=True, info=wide).size == (20, 8)
    assert Augment(crop=[12, 8], scale=[0.5, 1.5], info=wide).size == (12, 8)
    assert Augment(cutmix=0.5, info=wide).size == (8, 20)
    assert Augment(scale=[1, 2], pad=True, info=wide).size is None


# -- kinds of targets


def test_paired_images_are_recoloured_together():
    clean = torch.rand(3, 8, 8, generator=generator(0))
    image = clean.clone()
    image[:, :4] = torch.rand(3, 4, 8, generator=generator(1))  # damaged above, equal below
    sample = {"image": image, "target": clean}
    info = SourceInfo(target="image")
    for seed in range(20):
        out = Augment(color=0.6, info=info)(sample, generator(seed))
        assert not torch.equal(out["image"], image)
        assert torch.equal(out["image"][:, 4:], out["target"][:, 4:])
        assert out["target"].min() >= 0
        assert out["target"].max() <= 1
    for kind in ("map", "none", "labels"):
        out = Augment(color=0.6, info=SourceInfo(target=kind))(sample, generator(0))
        assert torch.equal(out["target"], clean)


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_is_torchvisions(channels):
    image, rng = torch.rand(channels, 7, 9, generator=generator(0)), generator(5)
    out = Augment(color=0.8, info=SourceInfo(channels=channels))({"image": image}, generator(5))["image"]
    factors = [0.2 + 1.6 * float(torch.rand((), generator=rng)) for _ in range(3)]
    expected = F.adjust_contrast(F.adjust_brightness(image, factors[0]), factors[1])
    torch.testing.assert_close(out, F.adjust_saturation(expected, factors[2]), rtol=0, atol=1e-6)


def test_gray_images_of_colour_targets_and_missing_pixels():
    rng = generator(0)
    target = torch.rand(3, 6, 6, generator=rng)
    target[:, 0, 0] = torch.nan
    sample = {"image": torch.rand(1, 6, 6, generator=rng), "target": target}
    out = Augment(color=0.5, info=SourceInfo(channels=1, target="image"))(sample, generator(1))
    assert torch.equal(out["target"].isnan(), target.isnan())
    assert out["image"].isfinite().all()


def test_labels_keep_their_values():
    labels = (torch.rand(2, 11, 13, generator=generator(0)) < 0.5).float()
    labels[0, :3] = torch.nan
    sample = {"image": torch.rand(3, 11, 13), "target": labels}
    out = Augment(scale=[0.6, 1.7], info=SourceInfo(target="labels"))(sample, generator(2))["target"]
    assert set(out.nan_to_num(5).unique().tolist()) == {0, 1, 5}
    assert not out[1].isnan().any()


def test_the_size_of_a_larger_target_is_checked():
    info = SourceInfo(target="image", scale=2)
    sample = {"image": torch.rand(3, 5, 6), "target": torch.rand(3, 10, 12)}
    assert Augment(crop=[4, 3], info=info)(sample, generator(0))["target"].shape == (3, 8, 6)
    assert Augment(scale=[1.5, 1.5], info=info)(sample, generator(0))["target"].shape[-1] == 18
    with pytest.raises(DataError, match=r"the target is 5x6 but its image is 5x6 .*; expected 10x12, 2 times it"):
        Augment(info=info)({**sample, "target": torch.rand(3, 5, 6)}, generator(0))


# -- CutMix


@settings(max_examples=60, deadline=None)
@given(
    height=sizes,
    width=sizes,
    scale=st.integers(1, 3),
    labels=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 2**31),
)
def test_cutmix_pastes_one_box_of_everything(height, width, scale, labels, seed):
    info = SourceInfo(ignore_index=7, target="map", scale=scale)

    def side(value, mask, target):
        sample = {"image": torch.full((3, height, width), value), "valid": torch.full((height, width), value > 0.5)}
        if mask:
            sample["mask"] = torch.full((height, width), round(value * 10))
        if target:
            sample["target"] = torch.full((1, height * scale, width * scale), value)
        return {**sample, "gray": torch.tensor(False)}

    mine, other = side(0.2, *labels[:2]), side(0.8, *labels[2:])
    before = {key: value.clone() for key, value in mine.items()}
    out = cutmix(mine, other, generator(seed), info)
    assert all(torch.equal(mine[key], before[key]) for key in before)
    assert set(out) == set(mine) | set(other)
    box = out["image"][0] == 0.8
    rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
    if box.any():
        assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert int(box.sum()) == (int(rows[-1] - rows[0]) + 1) * (int(columns[-1] - columns[0]) + 1)
    assert torch.equal(out["valid"], box)
    if "mask" in out:
        inside, outside = (8 if labels[2] else 7), (2 if labels[0] else 7)
        assert torch.equal(out["mask"], torch.where(box, inside, outside))
    if "target" in out:
        fine = box.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        known = torch.tensor([0.2 if labels[1] else -1, 0.8 if labels[3] else -1])
        assert torch.equal(out["target"][0].nan_to_num(-1), known[fine.long()])


def test_the_share_of_the_box_is_uniform_and_its_place_anywhere():
    mine, other = ({"image": torch.full((1, 64, 64), value)} for value in (0.0, 1.0))
    boxes = [cutmix(mine, other, generator(seed), SourceInfo())["image"][0] for seed in range(500)]
    shares = torch.stack([box.mean() for box in boxes]).sort().values
    assert (shares - torch.linspace(0, 1, 500)).abs().max() < 0.08  # Kolmogorov-Smirnov at 0.1 % is 0.087
    assert (torch.stack(boxes).mean(0)[[0, 0, -1, -1], [0, -1, 0, -1]] > 0.01).all()


def test_gray_and_colour_are_not_mixed_and_sizes_must_agree():
    def sample(size, gray):
        return {"image": torch.rand(3, size, size), "gray": torch.tensor(gray)}

    mine = sample(8, True)
    assert cutmix(mine, sample(8, False), generator(0), SourceInfo()) is mine
    assert cutmix(mine, sample(8, True), generator(0), SourceInfo()) is not mine
    with pytest.raises(DataError, match=r"cutmix of an image 8x8 with one of 9x9; set augment.crop"):
        cutmix(mine, sample(9, True), generator(0), SourceInfo())
