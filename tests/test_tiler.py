"""The tiler: windows that give the answer of the whole picture, and blended ones that say how far they are off."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densectx import BACKBONES
from densectx.checkpoint import save_safetensors
from densectx.cli import main
from densectx.data import windowed
from densectx.data.reader import read_image
from densectx.data.windowed import WindowedFile
from densectx.errors import ConfigError, DataError, MemoryLimitError, NumericError
from densectx.inference import tiling as tiling_module
from densectx.inference.blend import run_blended
from densectx.inference.predictor import Predictor
from densectx.inference.sinks import FileSink
from densectx.inference.tiler import Held, Kept, Setting, plan_blend
from densectx.inference.tiling import Tiling
from densectx.inference.windows import Halo, cost, exact_lines, overlapping_lines, weights
from densectx.model import DenseModel
from densectx.types import SourceInfo

INFO = SourceInfo(classes=("sky", "road", "tree"), keys=("image", "mask"))
DECODER = {"name": "decoder", "width": 4, "depth": 1}
TASKS = {
    "segmentation": {"name": "segmentation", "source": "x"},
    "denoising": {"name": "denoising", "source": "x", "sigma": [0, 50], "head": DECODER},
    "sr": {"name": "super_resolution", "source": "x", "scale": 3, "head": DECODER},
    "clean": {"name": "denoising", "source": "x", "sigma": 25, "head": "sub_pixel"},
    "shuffled": {"name": "super_resolution", "source": "x", "scale": 3, "head": "sub_pixel"},
    "pre": {"name": "super_resolution", "source": "x", "scale": 2, "upsampling": "pre", "head": DECODER},
    "colour": {"name": "colorization", "source": "x", "head": DECODER},
}


def build(backbone, tasks=("segmentation",), dilations=(1, 2), channels=3, **model):
    torch.manual_seed(0)
    config = {
        "backbone": backbone,
        "projection": {"channels": 8},
        "context": {"name": "basic", "dilations": list(dilations), "init_noise": 0.5},
        "tasks": {key: TASKS[key] for key in tasks},
        **model,
    }
    built = DenseModel.from_config(config, {"x": SourceInfo(channels, INFO.classes, keys=INFO.keys)}).eval()
    with torch.no_grad():  # features of about 1: rounding grows with them, and softmax makes it absolute
        size = built.trunk(torch.rand(1, channels, 64, 64))[-1].std()
        next(m for m in built.projection.modules() if isinstance(m, torch.nn.Conv2d)).weight.div_(size)
    for parameter in built.parameters():  # heads that start at zero would agree with anything
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return built


def tiling(model, text=None, tasks=None, say=lambda line: None):
    keys = list(model.tasks) if tasks is None else tasks
    return Tiling(model, keys, Setting.parse(text), lambda x, options: model.predict(x, keys, options), say)


def numbers(model):
    return {f"{key}.{name}": 20.0 for key in model.tasks for name in model.task(key).options}


PLAIN = {"name": "plain", "width": 6}
SMALL = {
    "plain, all tasks": (lambda: build(PLAIN, TASKS), 1),
    "plain, gray": (lambda: build({**PLAIN, "in_channels": 1}, ["denoising", "sr"], channels=1), 1),
    "unshuffled": (lambda: build({**PLAIN, "unshuffle": 2}, ["clean", "shuffled"]), 2),
    "stride 2": (lambda: build({"name": "timm", "model": "resnet18", "levels": 1, "output_stride": 8}, ["sr"]), 2),
    "stride 4": (
        lambda: build({"name": "timm", "model": "resnet18", "levels": 2, "output_stride": 8}, ["sr", "denoising"]),
        4,
    ),
}


@pytest.fixture(scope="module", params=SMALL)
def small(request):
    make, stride = SMALL[request.param]
    model = make()
    assert model.stride == stride
    return tiling(model, "exact:4")


def relative(found, expected):
    return (found - expected).abs().max().item() / expected.abs().max().item()


def allowed(key):
    """Rounding; the curve of sRGB, 13 times as steep in the dark, makes more of it for colours."""
    return 5e-5 if key == "colour" else 1e-5


@pytest.mark.fault("F03")
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 97), st.integers(1, 97), st.integers(5, 15), st.integers(0, 9))
def test_exact_tiles_equal_the_whole(small, height, width, core, seed):
    image = torch.rand(small.channels, height, width, generator=torch.Generator().manual_seed(seed))
    small.setting = Setting("exact", core * 4)
    whole = small.model.predict(image, options=numbers(small.model))
    for key, answer in small(image, numbers(small.model)).items():
        assert answer.shape == whole[key].shape
        assert relative(answer, whole[key]) < allowed(key)


@pytest.mark.fault("F03")
@pytest.mark.parametrize(
    ("backbone", "stride"), [(PLAIN, 4), ({**PLAIN, "unshuffle": 2}, 4), ({**PLAIN, "unshuffle": 2}, 3)]
)
def test_tiles_of_colour_bins_begin_with_a_cell(backbone, stride):
    TASKS["bins"] = {"name": "colorization", "source": "x", "target": "bins", "stride": stride, "head": DECODER}
    tiles = tiling(build(backbone, ["bins"]), "exact")
    assert tiles.step == math.lcm(tiles.model.stride, stride)
    for height, width in ((97, 113), (61, 40), (5, 90)):
        image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))
        tiles.setting = Setting("exact", 2 * tiles.step)
        assert relative(tiles(image, {})["bins"], tiles.model.predict(image)["bins"]) < 5e-5


@pytest.fixture(scope="module")
def bayer():
    TASKS["bayer"] = {"name": "demosaicing", "source": "x", "head": DECODER}
    return tiling(build(PLAIN, ["bayer"]), "exact")


@pytest.mark.fault("F03")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 97), st.integers(1, 97), st.integers(5, 15), st.integers(0, 9))
def test_tiles_of_a_mosaic_begin_with_its_first_colour(bayer, height, width, core, seed):
    """Its pattern begins anew in each window: one that starts at an odd pixel would be another mosaic."""
    assert (bayer.model.stride, bayer.step) == (1, 2)
    image = torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed))
    bayer.setting = Setting("exact", core * 2)
    assert relative(bayer(image, {})["bayer"], bayer.model.predict(image)["bayer"]) < 1e-5
    for setting in (Setting("blend", core * 2), Setting()):
        bayer.setting = setting
        plan = bayer.plan(height * 9, width * 9, whole=False)
        assert all(line.seen.start % 2 == 0 for line in (*plan.rows, *plan.columns))


def test_tiles_of_a_mosaic_and_of_a_strided_model_start_where_both_begin(bayer):
    strided = build({"name": "timm", "model": "resnet18", "levels": 2, "output_stride": 8}, ["bayer"])
    assert tiling(strided).step == 4
    for text in ("exact:15", "15"):
        with pytest.raises(ConfigError, match=r"15 pixels.* multiples of 2;"):
            tiling(bayer.model, text)
    assert tiling(build(PLAIN), "exact:15").step == 1


@pytest.mark.fault("F03")
def test_every_size(small):
    for size in range(1, 98):
        small.setting = Setting("exact", max(size // 12 * 4, 4))
        image = torch.rand(small.channels, size, 9)
        whole = small.model.predict(image, options=numbers(small.model))
        for key, answer in small(image, numbers(small.model)).items():
            assert relative(answer, whole[key]) < allowed(key)


# every stride and scale of the registry: tiny variants; what only width or depth tells apart is there once
STRIDES = {
    "stride 8, vgg": ({"name": "dilated_vgg16"}, ["segmentation"], (1,)),
    "stride 8, front end": ({"name": "frontend_vgg16", "width": 2, "fc": 4}, ["segmentation"], (1,)),
    "stride 8, resnet": ({"name": "timm", "model": "resnet10t", "output_stride": 8}, ["segmentation", "sr4"], (1,)),
    "stride 16, resnet": ({"name": "timm", "model": "resnet10t", "output_stride": 16}, ["segmentation"], (1,)),
    "stride 32, resnet": ({"name": "timm", "model": "resnet10t", "output_stride": 32}, ["segmentation", "sr2"], (1,)),
    "stride 8, drn": ({"name": "drn", "arch": "d_22"}, ["segmentation"], (1,)),
    "stride 8, convnext": ({"name": "timm", "model": "convnext_atto", "output_stride": 8}, ["segmentation"], (1,)),
}
SCALES = {f"sr{n}": {"name": "super_resolution", "source": "x", "scale": n, "head": DECODER} for n in (2, 3, 4)}
TASKS |= SCALES


@pytest.mark.fault("F03")
def test_tiles_of_a_zeroed_trunk_equal_the_whole():
    """Its maps are constant but where convolutions pad them with zeros: at each border of a picture, not of a tile."""
    model = build(PLAIN, ["denoising", "segmentation"])
    model.ablate = "trunk_zero"
    for parameter in model.context.parameters():  # as after training: zeros without biases would stay zeros
        torch.nn.init.normal_(parameter)
    tiles = tiling(model, "exact:16")
    image = torch.rand(3, 61, 83, generator=torch.Generator().manual_seed(0))
    whole = model.predict(image, options=numbers(model))
    for key, answer in tiles(image, numbers(model)).items():
        assert relative(answer, whole[key]) < 1e-5
    assert model.ablate == "trunk_zero"


@pytest.fixture(scope="module", params=["sr2", "sr3", "sr4"])
def enlarging(request):
    return tiling(build(PLAIN, [request.param]), "exact:4"), SCALES[request.param]["scale"]


@pytest.mark.fault("F03")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 97), st.integers(1, 97), st.integers(3, 15))
def test_every_scale(enlarging, height, width, core):
    tiles, scale = enlarging
    tiles.setting = Setting("exact", core * 4)
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))
    (key, answer), *_ = tiles(image, {}).items()
    assert answer.shape == (3, height * scale, width * scale)
    assert relative(answer, tiles.model.predict(image)[key]) < 1e-5


def every_stride(name, heights, widths):
    """Exact equals whole at each height and width, in tiles of one and of several strides."""
    backbone, tasks, dilations = STRIDES[name]
    model = build(backbone, tasks, dilations)
    tiles = tiling(model, "exact")
    if tiles.halo is None:
        pytest.fail(f"{name}: the field is not finite")
    count = 0
    for height, width in zip(heights, widths, strict=True):
        image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))
        whole = model.predict(image, options=numbers(model))
        tiles.setting = Setting("exact", model.stride * (1 + height % 3))
        for key, answer in tiles(image, numbers(model)).items():
            scale = model.task(key).scale
            assert answer.shape[1:] == (height * scale, width * scale)
            assert relative(answer, whole[key]) < 1e-5, (height, width, key)
            count += 1
    return count


@pytest.mark.fault("F03")
@pytest.mark.parametrize("name", [name for name in STRIDES if "resnet" in name])
def test_strides_at_some_sizes(name, record_property):
    """A strip longer than two halos, so that there are tiles of their own; and small pictures."""
    record_property("count", every_stride(name, [1, 8, 33, 97], [7, 640, 11, 96]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.fault("F03")
@pytest.mark.parametrize("name", STRIDES)
def test_strides_at_every_size(name, record_property):
    sizes = list(range(1, 98))
    strip = every_stride(name, [1, 8, 33, 97], [7, 640, 11, 96])
    record_property("count", strip + every_stride(name, sizes, [9] * 97) + every_stride(name, [9] * 97, sizes))


def test_every_backbone_of_the_registry_has_a_stride_that_is_tested():
    """By names alone: what is not in these tables differs in width or depth only."""
    families = {"plain", "dilated_vgg16", "frontend_vgg16", "timm", "drn"}
    for name in BACKBONES.names():
        family = re.sub(r"^dilated_resnet\d+$", "timm", re.sub(r"^drn_.*", "drn", name))
        assert family in families or BACKBONES.entry(name).entry_point is not None, name


@pytest.mark.parametrize(
    "backbone",
    [
        {"name": "frontend_vgg16", "width": 2, "fc": 4},
        {"name": "frontend_vgg16", "width": 2, "fc": 4, "padding": "each"},
        "dilated_vgg16",
        "dilated_resnet18",
    ],
    ids=["front end", "front end, padded", "vgg", "resnet"],
)
def test_large_fields_with_pictures_larger_and_smaller_than_two_halos(backbone):
    model = build(backbone, ["segmentation"], dilations=(1,))
    tiles = tiling(model, "exact")
    halo = tiles.halo
    assert 90 < halo.left < 500
    generator = torch.Generator().manual_seed(0)
    for height, width in ((40, halo.left * 2 + 101), (halo.top + 9, 64)):
        tiles.setting = Setting("exact", 96)
        image = torch.rand(3, height, width, generator=generator)
        plan = tiles.plan(height, width)
        assert plan.windows > 1 or width < halo.left * 2
        whole = model.predict(image)["segmentation"]
        assert relative(tiles(image, {})["segmentation"], whole) < 1e-5


def test_a_halo_of_one_stride_less_is_not_enough():
    """The field is what the model needs, not more: with fewer pixels the answer changes."""
    model = build(PLAIN, ["segmentation"], dilations=(1, 2, 4))
    tiles = tiling(model, "exact:16")
    image = torch.rand(3, 64, 64)
    whole = model.predict(image)["segmentation"]
    exact = relative(tiles(image, {})["segmentation"], whole)
    halo = tiles.halo
    tiles.__dict__["halo"] = type(halo)(*(side - 1 for side in (halo.top, halo.bottom, halo.left, halo.right)))
    assert relative(tiles(image, {})["segmentation"], whole) > 100 * max(exact, 1e-7)


def test_a_field_larger_than_the_picture_is_one_pass():
    tiles = tiling(build(PLAIN), "exact:8")
    assert tiles.plan(5, 5).windows == 1
    assert tiles.plan(50, 50).windows == 49


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        ({"context": {"name": "aspp", "rates": [1]}}, "context.shared"),
        ({"backbone": {"name": "timm", "model": "seresnet18", "output_stride": 8}}, "se"),
        ({"norm": "group", "backbone": "dilated_resnet18"}, "bn1"),
    ],
)
def test_what_sees_the_whole_picture_is_refused_and_named(model, layer):
    built = build(**{"backbone": PLAIN, **model})
    with pytest.raises(ConfigError, match=f"--tile exact: layer '[a-z0-9_.]*{layer}"):
        tiling(built, "exact")
    assert tiling(built).plan(3000, 3000).mode in ("whole", "blend")


# blended windows ------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(2, 12), st.integers(1, 40), st.sampled_from([1, 2, 8]))
def test_weights_of_overlapping_windows_sum_to_one(size, units, overlap, stride):
    side = units * stride
    overlap = min(overlap, side - stride)
    lines = overlapping_lines(size, side, overlap, stride)
    total = np.zeros(size)
    for line, weight in zip(lines, weights(lines), strict=True):
        assert line.kept.start % stride == 0
        assert line.kept.stop - line.kept.start <= side
        assert (weight > 0).all()
        total[line.kept] += weight
    assert np.allclose(total, 1, rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(2, 8), st.sampled_from([1, 2, 3]))
def test_windows_that_agree_blend_into_the_same(height, width, units, scale):
    image = torch.rand(2, height, width)

    def larger(x):
        return {"t": x.repeat_interleave(scale, 1).repeat_interleave(scale, 2)}

    sink = Kept(height * scale, width * scale)
    seams = run_blended(larger, Held(image), {"t": sink}, {"t": scale}, plan_blend(height, width, units * 4, 4))
    torch.testing.assert_close(sink.value, larger(image)["t"], rtol=1e-5, atol=1e-6)
    assert seams == {"t": 0.0}


def test_the_seam_error_is_the_largest_difference_of_neighbours():
    """Windows that answer with their own number: 0, 1, 2, ... differ by one along a row and by a row's length down."""
    count = iter(range(100))
    plan = plan_blend(16, 40, 16, 4)
    assert (len(plan.rows), len(plan.columns)) == (1, 3)
    sink = Kept(16, 40)
    seams = run_blended(
        lambda x: {"t": torch.full_like(x, next(count))}, Held(torch.rand(1, 16, 40)), {"t": sink}, {"t": 1}, plan
    )
    assert seams == {"t": 1.0}
    assert sink.value[0, 0, 0] == 0
    assert sink.value[0, 0, 39] == 2
    assert (sink.value[0, 0].diff() >= 0).all()  # no jump back: the weights fall evenly


def test_numbers_of_pixels_ask_for_blended_windows(capsys):
    model = build(PLAIN, context={"name": "aspp", "rates": [1]})
    said = []
    tiles = tiling(model, "32", say=said.append)
    answer = tiles(torch.rand(3, 70, 50), {})["segmentation"]
    torch.testing.assert_close(answer.sum(0), torch.ones(70, 50), rtol=0, atol=1e-5)
    assert any("differ by up to" in line for line in said)


# what does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["half", "exact:", "exact:0", "-5", "exact:x", "0", ""])
def test_settings_that_say_nothing(text):
    with pytest.raises(ConfigError, match="--tile"):
        Setting.parse(text)


def test_tiles_that_are_no_multiple_of_the_stride_are_refused():
    with pytest.raises(ConfigError, match="multiple"):
        exact_lines(100, 12, 4, 4, 8)
    with pytest.raises(ConfigError, match="multiple"):
        overlapping_lines(100, 12, 2, 8)


@pytest.mark.parametrize(("period", "least"), [(1, 4), (2, 4), (3, 6), (8, 16)])
def test_blended_windows_that_share_nothing_are_refused(period, least):
    """A quarter of 3 pixels is none: there would be nothing to blend or to measure."""
    model = build(PLAIN)
    model.task("segmentation").period = period
    for side in range(1, least):
        with pytest.raises(ConfigError, match=rf"windows of {side} pixels.* at least {least}\."):
            tiling(model, str(side))
    answer = tiling(model, str(least))(torch.rand(3, least + 3, 2 * least), {})["segmentation"]
    torch.testing.assert_close(answer.sum(0), torch.ones(least + 3, 2 * least), rtol=0, atol=1e-5)


def test_a_window_that_does_not_fit_is_halved_and_said():
    model = build(PLAIN, dilations=(1,))
    said = []

    def run(image, options):
        if image.shape[-1] > 40:
            raise torch.OutOfMemoryError("out of memory")
        return model.predict(image, ["segmentation"], options)

    tiles = Tiling(model, ["segmentation"], Setting(), run, said.append)
    image = torch.rand(3, 60, 150)
    assert relative(tiles(image, {})["segmentation"], model.predict(image)["segmentation"]) < 1e-5
    assert sum("does not fit" in line for line in said) == 3  # 150, 75, 37 with its halo of 3, 18
    with pytest.raises(MemoryLimitError, match="too small"):
        Tiling(model, ["segmentation"], Setting("whole"), run)(image, {})


@pytest.mark.parametrize("text", ["whole", "exact:8", "32"])
def test_classes_are_kept_as_numbers_where_only_these_are_written(text):
    model, image = build(PLAIN, dilations=(1,)), torch.rand(2, 3, 40, 56)
    setting, cpu = Setting.parse(text), torch.device("cpu")
    found, whole = (
        Predictor(model, None, {}, cpu, "32", setting, ids=ids)(image)["segmentation"] for ids in (True, False)
    )
    assert (found.dtype, found.shape) == (torch.uint8, (2, 1, 40, 56))
    assert torch.equal(found[:, 0], whole.argmax(1).byte())
    with pytest.raises(NumericError, match="not finite"):
        Predictor(model, None, {}, cpu, "32", setting, ids=True)(image * torch.nan)


def test_answers_that_do_not_fit_are_refused_before_they_are_computed(monkeypatch):
    monkeypatch.setattr(tiling_module, "free_bytes", lambda device: 4e6)
    monkeypatch.setattr(tiling_module, "_SMALL", 1000)
    model, sizes = build(PLAIN, dilations=(1,)), []

    def run(image, options):
        sizes.append(image.shape[-1])
        return model.predict(image, ["segmentation"], options)

    image = torch.rand(3, 600, 800)
    count = len(model.config["sources"][model.task("segmentation").source]["classes"])
    with pytest.raises(MemoryLimitError, match=f"600x800 pixels take {600 * 800 * 4 * count / 1e9:.1f} GB.*--tasks"):
        Tiling(model, ["segmentation"], Setting("exact", 64), run)(image, {})
    assert max(sizes) < 64
    ids = Tiling(model, ["segmentation"], Setting("exact", 64), run, classes={"segmentation": count})
    assert ids(image, {})["segmentation"].nbytes == 600 * 800


def wide(monkeypatch, halo, text=None, *, step=1, share=500.0, free=1 << 40, run=None, say=lambda line: None):
    """A tiling of a model of such a field, whose pass takes so many bytes a pixel."""
    monkeypatch.setattr(tiling_module, "free_bytes", lambda device: free)
    model = build(PLAIN, dilations=(1,))
    tiles = Tiling(model, ["segmentation"], Setting.parse(text), run or model.predict, say)
    tiles.step = step
    tiles.__dict__ |= {"halo": Halo(halo, halo, halo, halo), "_bytes": share}
    return tiles


def test_processes_share_the_memory_of_a_device(monkeypatch):
    monkeypatch.setattr(tiling_module, "free_bytes", lambda device: 2e9)
    model = build(PLAIN, dilations=(1,))
    for sharing, windows in ((1, 1), (4, 4)):  # half of 2 GB, or of a fourth of it; the pass takes 0.9 GB
        tiles = Tiling(model, ["segmentation"], Setting(), model.predict, sharing=sharing)
        tiles.__dict__ |= {"_bytes": 400.0}
        assert min(tiles.plan(1500, 1500).windows, 4) == windows


def window(plan):
    """Pixels of the largest one."""
    sides = [max(line.seen.stop - line.seen.start for line in lines) for lines in (plan.rows, plan.columns)]
    return sides[0] * sides[1]


@pytest.mark.parametrize(
    ("halo", "step", "share"), [(488, 8, 600.0), (488, 8, 6000.0), (1500, 8, 900.0), (300, 1, 9e3)], ids=str
)
@pytest.mark.parametrize("text", [None, "exact"])
@pytest.mark.parametrize("whole", [False, True])
def test_wide_fields_cost_no_more_than_four_times_the_work(monkeypatch, halo, step, share, text, whole):
    tiles = wide(monkeypatch, halo, text, step=step, share=share, free=int(1e8 * share))  # a pass may take half of it
    plan = tiles.plan(20000, 20000, whole=whole)
    assert plan.mode == "exact"
    assert cost(plan.rows, plan.columns) < 4.1


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 600),
    st.sampled_from([1, 2, 8, 32]),
    st.floats(10, 1e4),
    st.integers(0, 1 << 36),
    st.tuples(st.integers(1, 30000), st.integers(1, 30000)),
    st.booleans(),
)
def test_windows_of_any_field_and_memory_are_few_and_fit(halo, step, share, free, size, whole):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiles = wide(monkeypatch, halo, step=step, share=share, free=free)
        plan = tiles.plan(*size, whole=whole)
    assert cost(plan.rows, plan.columns) <= (2 + step / max(2 * halo, step)) ** 2
    if plan.mode == "exact":
        # a window starts up to a step before its halo
        assert window(plan) <= max(1 << 20, free / 2 / share) * (1 + step / (2 * halo + step)) ** 2


def test_a_wide_field_without_the_memory_for_it_blends_and_says_so(monkeypatch):
    said = []
    tiles = wide(monkeypatch, 488, step=8, free=1 << 30, say=said.append)
    plan = tiles.plan(20000, 20000, whole=False)
    assert plan.mode == "blend"
    assert window(plan) == 512**2
    assert said == ["densectx: exact windows of 1952 pixels do not fit into memory: blended ones are taken."]
    tiles = wide(monkeypatch, 488, "exact", step=8, free=3 << 29)
    plan = tiles.plan(20000, 20000, whole=False)
    assert plan.mode == "exact"
    assert 4 < cost(plan.rows, plan.columns) < 25
    tiles = wide(monkeypatch, 488, "exact", step=8, free=1 << 30)
    with pytest.raises(MemoryLimitError, match=r"--tile exact: .*--tile N"):
        tiles.plan(20000, 20000, whole=False)
    assert wide(monkeypatch, 488, "exact:8", step=8, free=1 << 30).plan(2000, 2000).mode == "exact"


@pytest.mark.timeout(60)
def test_windows_that_do_not_fit_are_not_made_ever_more(monkeypatch):
    def run(image, options):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(MemoryLimitError, match="too small"):
        wide(monkeypatch, 20, "exact", run=run)(torch.rand(3, 30, 30), {})
    said = []
    model = build(PLAIN, dilations=(1,))

    def small(image, options):
        return model.predict(image, options=options) if image.shape[-1] <= 64 else run(image, options)

    tiles = wide(monkeypatch, 50, run=small, say=said.append)
    answer = tiles(torch.rand(3, 200, 300), {})["segmentation"]
    torch.testing.assert_close(answer.sum(0), torch.ones(200, 300), rtol=0, atol=1e-5)
    assert any("blended windows" in line for line in said)


def test_other_errors_of_a_pass_are_not_taken_for_memory():
    def run(image, options):
        raise RuntimeError("broken")

    tiles = Tiling(build(PLAIN), ["segmentation"], Setting("exact", 8), run)
    with pytest.raises(RuntimeError, match="broken"):
        tiles(torch.rand(3, 40, 40), {})


@pytest.mark.parametrize("tile", ["500", "exact:500"])
def test_a_side_that_suits_no_picture_is_refused_before_any(tmp_path, capsys, tile):
    """A small picture would have been taken as a whole."""
    model = build({"name": "timm", "model": "resnet10t", "output_stride": 8}, dilations=(1,))
    save_safetensors(model, tmp_path / "m.safetensors")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((20, 30, 3), np.uint8), photometric="rgb")
    arguments = ["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "a.tif"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--tile", tile]) == 2
    assert "500 pixels" in (said := capsys.readouterr().err)
    assert "multiples of 8;" in said
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--tile", tile.replace("500", "504")]) == 0


# pictures larger than memory ------------------------------------------------------------------------------------------

LAYOUTS = [
    {},
    {"tile": (32, 48)},
    {"rowsperstrip": 7},
    {"tile": (16, 16), "compression": "zlib"},
    {"rowsperstrip": 5, "compression": "zlib", "predictor": True},
    {"planarconfig": "separate", "tile": (32, 32)},
    {"bigtiff": True, "tile": (16, 16)},
    {"byteorder": ">"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_windows_of_a_tiff_are_those_of_the_whole(tmp_path, layout, dtype, channels):
    values = np.random.default_rng(0).random((101, 77, 3) if channels == 3 else (101, 77))
    values = values.astype(dtype) if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)
    if dtype == np.float32:
        layout = {key: value for key, value in layout.items() if key != "predictor"}
    if "planarconfig" in layout:
        if channels == 1:
            pytest.skip("one channel has no planes")
        values = np.moveaxis(values, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb" if channels == 3 else "minisblack", **layout)
    whole = read_image(tmp_path / "a.tif", 3)[0][:channels]
    file = WindowedFile(tmp_path / "a.tif")
    assert file.shape == whole.shape
    for part in ((slice(0, 101), slice(0, 77)), (slice(13, 50), slice(31, 70)), (slice(100, 101), slice(76, 77))):
        torch.testing.assert_close(file.read(*part), whole[:, part[0], part[1]], rtol=0, atol=1e-7)


@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
def test_windows_of_a_tiff_of_many_channels(tmp_path, planarconfig):
    values = np.random.default_rng(0).integers(0, 1 << 16, (5, 50, 40), dtype=np.uint16)
    pixels = values if planarconfig == "separate" else np.moveaxis(values, 0, 2)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig=planarconfig)
    whole = read_image(tmp_path / "a.tif", 5)[0]
    file = WindowedFile(tmp_path / "a.tif", 5)
    torch.testing.assert_close(file.read(slice(3, 20), slice(5, 40)), whole[:, 3:20, 5:40], rtol=0, atol=1e-7)
    tifffile.imwrite(tmp_path / "b.tif", values[:4].transpose(1, 2, 0), photometric="rgb", extrasamples=["unassalpha"])
    with pytest.raises(DataError, match=r"transparent or turned"):
        WindowedFile(tmp_path / "b.tif", 3)


@pytest.mark.parametrize("shape", [(50, 40), (3, 50, 40), (50, 40, 3)])
def test_windows_of_an_array_file(tmp_path, shape):
    np.save(tmp_path / "a.npy", (np.random.default_rng(0).random(shape) * 255).astype(np.uint8))
    file = WindowedFile(tmp_path / "a.npy")
    whole = read_image(tmp_path / "a.npy", 3)[0]
    part = file.read(slice(3, 20), slice(5, 40))
    torch.testing.assert_close(part, whole[: len(part), 3:20, 5:40])


def test_damaged_large_files_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64), np.uint8), tile=(16, 16))
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[: len(content) - 300])
    with pytest.raises(DataError, match=r"cut\.tif"):
        WindowedFile(tmp_path / "cut.tif")
    tifffile.imwrite(tmp_path / "nan.tif", np.full((64, 64), np.nan, np.float32), tile=(16, 16))
    with pytest.raises(DataError, match="not finite"):
        WindowedFile(tmp_path / "nan.tif").read(slice(0, 8), slice(0, 8))
    with pytest.raises(
        DataError, match=r"pages-in-circles\.tif: has more than 64 pages"
    ):  # found by benchmarks/fuzz.py
        WindowedFile(Path(__file__).with_name("fixtures") / "pages-in-circles.tif")
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((4, 64, 64), np.uint8), photometric="minisblack")
    with pytest.raises(DataError, match="pages"):
        WindowedFile(tmp_path / "pages.tif")


@pytest.fixture
def by_windows(monkeypatch):
    """Pictures of more than 2000 pixels count as larger than memory."""
    monkeypatch.setattr(windowed, "WINDOWED_FROM", 2000)


@pytest.mark.fault("F07")
@pytest.mark.parametrize(("dtype", "deep"), [(np.uint8, False), (np.uint16, True)])
def test_predict_on_a_large_tiff_is_predict_on_its_picture(tmp_path, by_windows, capsys, dtype, deep):
    model = build(PLAIN, ["segmentation", "denoising", "sr", "colour"])
    save_safetensors(model, tmp_path / "m.safetensors")
    (tmp_path / "in").mkdir()
    values = (np.random.default_rng(0).random((90, 70, 3)) * np.iinfo(dtype).max).astype(dtype)
    tifffile.imwrite(tmp_path / "in" / "a.tif", values, photometric="rgb", tile=(16, 32))
    arguments = ["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "in"), "--set", "denoising.sigma=20"]
    assert main([*arguments, "-o", str(tmp_path / "out"), "--tile", "exact:32", "--raw"]) == 0
    assert "exact, 9 windows" in capsys.readouterr().err
    image = torch.from_numpy(values.astype(np.float32) / np.iinfo(dtype).max).permute(2, 0, 1)
    whole = model.predict(image, options={"denoising.sigma": 20.0})
    for key, answer in whole.items():
        raw = np.load(tmp_path / "out" / key / "a.npy")
        assert np.abs(raw - answer.numpy()).max() < 1e-5 * answer.abs().max().item()
        with tifffile.TiffFile(tmp_path / "out" / key / "a.tif") as tiff:
            page = tiff.pages.first
            stored = page.asarray()
            if key == "segmentation":
                assert page.photometric.name == "PALETTE"
                assert page.colormap[:, 1].tolist() == [128 * 257, 0, 0]  # VOC's second colour
                assert np.array_equal(stored, answer.argmax(0))
            else:
                white = 65535 if deep else 255
                assert stored.dtype == dtype
                expected = (answer.clamp(0, 1) * white).round().permute(1, 2, 0).numpy()
                assert np.abs(stored.astype(float) - expected).max() <= 1
    assert sorted(p.name for p in (tmp_path / "out" / "sr").iterdir()) == ["a.npy", "a.tif"]
    entry = json.loads((tmp_path / "out" / "summary.json").read_text())["inputs"][0]
    assert entry["status"] == "done"
    assert main([*arguments, "-o", str(tmp_path / "out"), "--tile", "exact:32", "--raw"]) == 0
    assert "1 skipped" in capsys.readouterr().out


def test_a_large_gray_float_picture_is_restored_to_floats(tmp_path, by_windows):
    model = build({**PLAIN, "in_channels": 1}, ["denoising"], channels=1)
    save_safetensors(model, tmp_path / "m.safetensors")
    values = np.random.default_rng(0).random((60, 61)).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values, tile=(16, 16))
    arguments = ["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "a.tif"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--tile", "exact:16"]) == 0  # sigma is estimated from the middle
    found = tifffile.imread(tmp_path / "out" / "denoising" / "a.tif")
    assert found.dtype == np.float32
    estimated = json.loads((tmp_path / "out" / "summary.json").read_text())["inputs"][0]["estimated"]
    expected = model.predict(torch.from_numpy(values)[None], options=estimated)["denoising"][0]
    assert np.abs(found - expected.numpy()).max() < 1e-5


def test_a_large_float_picture_is_answered_with_floats(tmp_path, by_windows):
    model = build(PLAIN, ["colour"])
    save_safetensors(model, tmp_path / "m.safetensors")
    values = np.random.default_rng(0).random((60, 61, 3)).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", tile=(16, 16))
    arguments = ["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "a.tif"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--tile", "exact:16"]) == 0
    found = tifffile.imread(tmp_path / "out" / "colour" / "a.tif")
    expected = model.predict(torch.from_numpy(values).permute(2, 0, 1))["colour"].permute(1, 2, 0)
    assert found.dtype == np.float32
    assert np.abs(found - expected.numpy()).max() < 1e-5


def test_a_large_picture_is_not_taken_as_a_whole(tmp_path, by_windows, capsys):
    save_safetensors(build(PLAIN), tmp_path / "m.safetensors")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((60, 61), np.uint8), tile=(16, 16))
    arguments = ["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "a.tif"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--tile", "whole"]) == 3
    assert "a.tif: is too large to be read as a whole, as --tile whole does" in capsys.readouterr().err
    assert main(arguments) == 0


def test_a_large_picture_that_breaks_midway_leaves_nothing(tmp_path, by_windows, capsys):
    save_safetensors(build(PLAIN), tmp_path / "m.safetensors")
    values = np.random.default_rng(0).random((90, 70)).astype(np.float32)
    values[80, 60] = 2
    tifffile.imwrite(tmp_path / "a.tif", values, tile=(16, 16))
    arguments = ["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "a.tif"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--tile", "exact:16"]) == 3
    assert "rows" in capsys.readouterr().err
    assert list((tmp_path / "out" / "segmentation").iterdir()) == []


def test_a_finished_file_stays_when_another_one_fails(tmp_path):
    sink = FileSink(tmp_path, "a.npy", (1, 4, 5), np.dtype(np.float32), "planes", lambda part: part.numpy())
    part = torch.rand(1, 4, 5)
    sink.write(slice(0, 4), slice(0, 5), part)
    sink.finish()
    sink.abandon()
    assert np.array_equal(np.load(tmp_path / "a.npy"), part.numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
