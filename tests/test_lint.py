"""``densectx lint`` on small trees with one fault each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tifffile import imwrite

from densectx import DATASETS, LOSSES, cli
from densectx.data.base import Dataset
from densectx.data.causes import size_of_file
from densectx.data.reader import read_image
from densectx.data.survey import class_weights
from densectx.types import SourceInfo
from densectx.yamlfile import parse_yaml

CONFIG = """
data:
  sources:
    scenes:
      name: image_mask
      root: {root}
      images: images/{{subset}}
      masks: masks/{{subset}}
      classes: [sky, road, car]
      ignore_index: 255
      {extra}
"""


@pytest.fixture
def tree(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "scenes"
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).save(
                root / "images" / split / f"{split}{i}.png"
            )
            mask = rng.integers(0, 2, (12, 16), np.uint8)
            mask[0, :3] = 2
            mask[1, 0] = 255
            Image.fromarray(mask).save(root / "masks" / split / f"{split}{i}.png")
    return root


@pytest.fixture
def lint(tree, tmp_path, capsys):
    def lint(*arguments, extra=""):
        config = tmp_path / "config.yaml"
        config.write_text(CONFIG.format(root=tree, extra=extra))
        status = cli.main(["lint", str(config), "--num-workers", "0", *arguments])
        return status, capsys.readouterr().out

    return lint


def found(lint, **options):
    status, out = lint("--json", **options)
    report = json.loads(out)
    assert report["format"] == 1
    return status, report, [(p["severity"], p["split"], p["message"]) for p in report["problems"]]


def test_good_data(tree, lint):
    status, report, problems = found(lint)
    assert (status, problems) == (0, [])
    train = report["sources"]["scenes"]["splits"]["train"]
    masks = np.stack([np.asarray(Image.open(f)) for f in sorted((tree / "masks" / "train").iterdir())])
    assert train["pixels"] == [int((masks == i).sum()) for i in range(3)]
    assert train["images"] == [4, 4, 4]
    assert train["samples"] == 4
    assert train["sizes"] == [[12, 16], [12, 16]]
    assert set(report["sources"]["scenes"]["splits"]) == {"train", "val"}, "no test folder: not asked for"


@pytest.mark.fault("I20")
def test_leaks_are_found_by_content(tree, lint, record_property):
    image = Image.open(tree / "images" / "train" / "train1.png")
    image.save(tree / "images" / "val" / "val0.png", compress_level=1)  # other bytes, the same picture
    shutil.copy(tree / "images" / "train" / "train2.png", tree / "images" / "train" / "train3.png")
    status, _, problems = found(lint)
    assert status == 0, "training would not break"
    assert [(s, split) for s, split, _ in problems] == [("warning", "train"), ("warning", "val")]
    assert "train2.png" in problems[0][2]
    assert "train3.png" in problems[0][2]
    assert "val0.png is also" in problems[1][2]
    assert "train1.png" in problems[1][2]
    record_property("evidence", problems[1][2].replace(str(tree), "ROOT"))


@pytest.mark.fault("I01")
@pytest.mark.fault("I16")
@pytest.mark.fault("I18")
def test_every_unusable_sample_is_named(tree, lint):
    broken = tree / "images" / "train" / "train0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    Image.fromarray(np.full((12, 16), 9, np.uint8)).save(tree / "masks" / "train" / "train1.png")
    Image.fromarray(np.zeros((3, 16), np.uint8)).save(tree / "masks" / "val" / "val1.png")
    status, report, problems = found(lint)
    assert status == 3
    assert [s for s, _, _ in problems] == ["error"] * 3
    for (_, _, message), parts in zip(
        problems, (["train0.png"], ["train1.png", "9"], ["val1.png", "12x16", "3x16"]), strict=True
    ):
        assert all(part in message for part in parts), message
    assert report["sources"]["scenes"]["splits"]["train"]["unusable"] == 2


def test_what_training_passes_over_does_not_break_it(tree, lint):
    (tree / "images/train/train0.png").write_bytes(b"garbage")
    Image.fromarray(np.full((12, 16), 9, np.uint8)).save(tree / "masks/train/train1.png")
    Image.fromarray(np.full((12, 16), 9, np.uint8)).save(tree / "masks/train/train2.png")
    assert lint()[0] == 3
    skip = ("--json", "--data.on_corrupt", "skip")
    status, out = lint(*skip)
    report = json.loads(out)
    assert status == 0
    assert [p["severity"] for p in report["problems"] if p["kind"] in ("unusable", "ids")] == ["warning"] * 4
    assert report["sources"]["scenes"]["splits"]["train"]["unusable"] == 3
    status, out = lint(*skip, extra="augment: {crop: 64}")  # which is passed over nowhere
    assert status == 3
    assert "smaller than crop 64x64" in out
    (tree / "images/train/train3.png").write_bytes(b"garbage")
    assert lint(*skip)[0] == 3, "nothing is left"
    shutil.copy(tree / "images/val/val0.png", tree / "images/train/train3.png")
    (tree / "images/val/val1.png").write_bytes(b"garbage")
    assert lint(*skip)[0] == 3, "evaluation passes over nothing"


@pytest.mark.parametrize("command", ["lint", "shard"])
def test_a_test_split_that_is_there_and_broken(tree, tmp_path, lint, capsys, command):
    def status():
        if command == "lint":
            code, out = lint()
            return code, out
        code = cli.main(["shard", str(tmp_path / "config.yaml"), "-o", str(tmp_path / "out"), "--overwrite"])
        return code, capsys.readouterr().err

    assert lint()[0] == 0
    assert status()[0] == 0, "not there"
    shutil.copytree(tree / "images/val", tree / "images/test")
    code, said = status()
    assert code == 3
    assert "masks/test: no such folder; of a split without labels set labels: false" in said
    shutil.copytree(tree / "masks/val", tree / "masks/test")
    assert status()[0] == 0
    (tree / "masks/test/val1.png").unlink()
    code, said = status()
    assert code == 3
    assert "images/test/val1.png: no label file 'val1'" in said


@pytest.mark.fault("I17")
def test_unlabelled_masks_and_absent_classes_are_warned_of(tree, lint):
    for i in range(4):
        Image.fromarray(np.full((12, 16), 255 if i == 2 else 0, np.uint8)).save(
            tree / "masks" / "train" / f"train{i}.png"
        )
    status, _, problems = found(lint)
    messages = [message for _, split, message in problems if split == "train"]
    assert status == 0
    assert "train2.png: not one pixel is labelled" in messages[0]
    assert messages[1:] == ["class 'road' occurs nowhere.", "class 'car' occurs nowhere."]


def test_what_augmentation_refuses_is_an_error(lint):
    status, _, problems = found(lint, extra="augment: {crop: 64, scale: [0.5, 2.0]}")
    assert status == 3
    assert len(problems) == 4
    assert "smaller than crop 64x64" in problems[0][2]


def test_what_augmentation_and_batch_size_rule_out_is_refused(lint):
    assert lint(extra="augment: {scale: [0.5, 1.5]}")[0] == 2


def test_text_and_missing_folder(tree, lint):
    status, out = lint()
    assert status == 0
    assert "scenes train: 4 samples, 12x16, 0 gray" in out
    line = next(line for line in out.splitlines() if "loss:" in line)
    assert LOSSES.build(parse_yaml(line, "lint")["loss"], classes=3).class_weights.shape == (3,)
    assert out.endswith("0 errors, 0 warnings.\n")
    shutil.rmtree(tree / "images" / "val")
    status, out = lint()
    assert status == 3
    assert "no such folder" in out


def test_workers_find_the_same(tree, lint):
    assert lint("--json") == lint("--json", "--num-workers", "2")


def test_class_weights_are_those_of_enet():
    pixels = [70, 30, 0]
    expected = 1 / torch.tensor([1.02 + 0.7, 1.02 + 0.3, 1.02]).log()
    assert class_weights(pixels) == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize(("text", "part"), [("model: {}", "no data"), ("data: {sourcs: {}}", "did you mean 'sources'")])
def test_configs_without_data(tmp_path, capsys, text, part):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    assert cli.main(["lint", str(config)]) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("text", ["data: {num_workers: 4}", "data: {sources: null}", "data: {sources: {}}"])
def test_an_overlay_without_sources(tmp_path, capsys, text):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    assert cli.main(["lint", str(config)]) == 2
    assert "data.sources is missing; the configs folder of densectx has examples." in capsys.readouterr().err


def test_every_option_of_the_data_is_known(tree, tmp_path, capsys):
    more = tmp_path / "more.yaml"
    more.write_text("data: {timeout: 30, on_corrupt: skip, steps_per_epoch: 5, sampling: alternate, num_workers: 3}")
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=tree, extra=""))
    assert cli.main(["lint", str(config), "-c", str(more), "--num-workers", "0"]) == 0, capsys.readouterr().err


def test_flags_of_fit_are_merged_last(lint):
    assert (
        lint("--data.sources.scenes.classes", "[sky, road, car]", "--data.num_workers=3", "--model.norm", "group")[0]
        == 0
    )
    assert lint("--data.sources.scenes.classes", "[sky, road]")[0] == 3, "id 2 is none of these"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--data.sources.scenes.root", "elsewhere", "none.yaml"], "'none.yaml' does not exist"),
        (["{config}", "--data.sources.scenes.rot", "elsewhere"], "did you mean 'root'?"),
        (["{config}", "--data.sources.scenes.root"], "--data.sources.scenes.root needs a value"),
        (["{config}", "--date.sources.scenes.root", "x"], "unknown option '--date.sources.scenes.root'"),
    ],
)
def test_flags_that_cannot_be_merged(tmp_path, capsys, arguments, part):
    (tmp_path / "config.yaml").write_text(CONFIG.format(root=tmp_path, extra=""))
    assert cli.main(["lint", *(text.replace("{config}", str(tmp_path / "config.yaml")) for text in arguments)]) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (
            ["--model.tasks.seg", "{name: segmentation, source: scene}"],
            "seg.source: unknown source 'scene'; did you mean 'scenes'? Known: scenes. (flag)",
        ),
        (["--model.tasks.seg", "{name: segmentation, source: [scenes]}"], "seg.source: unknown source \"['scenes']\""),
        (["--model.optimiser.class_path", "Adam"], "'model.optimiser' (flag); did you mean 'optimizer'?"),
        (["-c", "{more}"], "more.yaml); did you mean 'trainer'?"),
    ],
)
@pytest.mark.parametrize("command", ["lint", "shard"])
def test_what_fit_refuses_of_a_config_is_refused(tree, tmp_path, capsys, command, arguments, part):
    (tmp_path / "more.yaml").write_text("trianer: {max_steps: 5}")
    (tmp_path / "config.yaml").write_text(CONFIG.format(root=tree, extra=""))
    words = [text.replace("{more}", str(tmp_path / "more.yaml")) for text in arguments]
    out = ["-o", str(tmp_path / "out")] if command == "shard" else []
    assert cli.main([command, str(tmp_path / "config.yaml"), "--num-workers", "0", *out, *words]) == 2
    assert part in capsys.readouterr().err


def test_the_number_of_workers_is_checked(lint, capsys):
    assert lint("--num-workers", "-1")[0] == 2
    config = ["lint", "there-is-none.yaml", "--num-workers", "-1"]
    assert cli.main(config) == 2
    assert "--num-workers: expected a whole number of at least 0, got -1." in capsys.readouterr().err


# files against what the config says of them


def masks_of(tree, split="train"):
    return sorted((tree / "masks" / split).iterdir())


def kinds(report):
    return [problem["kind"] for problem in report["problems"]]


PALETTE = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_masks_of_colours_where_ids_are_expected(tree, lint):
    for file in masks_of(tree):
        mask = np.asarray(Image.open(file)).copy()
        mask[mask == 255] = 0
        Image.fromarray(np.array(PALETTE, np.uint8)[mask]).save(file)
    status, report, problems = found(lint, extra=f"palette: {[list(c) for c in PALETTE]}")
    assert status == 3
    assert kinds(report) == ["colours", *["unusable"] * 4]
    assert "4 masks are pictures of colours" in problems[0][2]
    assert "100% of their pixels" in problems[0][2]
    assert "set colors: true" in problems[0][2]
    _, text = lint(extra=f"palette: {[list(c) for c in PALETTE]}")
    assert [line[:46] for line in text.splitlines() if line.startswith("error")] == [
        "error: scenes train: 4 masks are pictures of c",
        "error: and 4 more (--json prints all)",
    ]
    fixed, report, problems = found(
        lint, extra=f"palette: {[list(c) for c in PALETTE]}, colors: true".replace(", colors", "\n      colors")
    )
    assert fixed == 3, "val still has ids"
    assert [(p["split"], p["kind"]) for p in report["problems"]] == [("val", "indices"), *[("val", "unusable")] * 2]
    assert "leave 'colors' out" in problems[0][2]


def test_palettes_of_files_that_name_other_classes(tree, lint):
    for number, file in enumerate(masks_of(tree)):
        image = Image.fromarray(np.asarray(Image.open(file)), "P")
        own = [PALETTE[1], PALETTE[0], PALETTE[2]] if number else PALETTE
        image.putpalette([value for colour in own for value in colour] + [0] * (3 * 253))
        image.save(file)
    extra = f"palette: {[list(c) for c in PALETTE]}"
    status, report, problems = found(lint, extra=extra)
    assert (status, kinds(report)) == (0, ["palette"])
    assert "id 0 ('sky') is (0, 255, 0) in 3 files, which is declared for 'road'" in problems[0][2]
    assert "id 2" not in problems[0][2]
    assert found(lint)[1]["problems"] == [], "without a declared palette there is nothing to disagree with"


def test_ids_that_pillow_cannot_hold_are_ids_all_the_same(tree, lint):
    for file in masks_of(tree):
        imwrite(file.with_suffix(".tif"), np.asarray(Image.open(file)).astype(np.int64))
        file.unlink()
    status, report, _ = found(lint, extra=f"palette: {[list(c) for c in PALETTE]}")
    assert (status, report["problems"]) == (0, [])


def test_gray_palettes_say_nothing(tree, lint):
    for file in masks_of(tree):
        image = Image.fromarray(np.asarray(Image.open(file)), "P")
        image.putpalette([value for value in range(256) for _ in range(3)])
        image.save(file)
    assert found(lint, extra=f"palette: {[list(c) for c in PALETTE]}")[2] == []


def test_ids_that_begin_at_1(tree, lint):
    for split in ("train", "val"):
        for file in masks_of(tree, split):
            mask = np.asarray(Image.open(file)).copy()
            mask[mask < 3] += 1
            Image.fromarray(mask).save(file)
    status, report, problems = found(lint)
    assert status == 3
    assert kinds(report).count("ids") == 2
    assert "4 masks hold ids that are no classes" in problems[0][2]
    assert '("0": ignore, "1": sky, ...)' in problems[0][2]


def test_masks_of_0_and_255(tree, lint):
    for split in ("train", "val"):
        for file in masks_of(tree, split):
            Image.fromarray(np.repeat(np.uint8([[0, 1, 255, 255]]), 12, 0).repeat(4, 1)).save(file)
    status, report, problems = found(lint)
    assert (status, kinds(report)) == (0, ["absent"] * 2)
    assert "50% of the pixels are ignore_index 255: is that the class?" in problems[0][2]
    assert report["sources"]["scenes"]["splits"]["train"]["ignored"] == 4 * 12 * 8
    assert '"0": sky, "1": road, "255": car}.' in problems[0][2]
    for split in ("train", "val"):
        for file in masks_of(tree, split):
            mask = np.uint8(np.arange(12 * 16).reshape(12, 16) % 2)
            mask[0, 0] = 255
            Image.fromarray(mask).save(file)
    _, _, problems = found(lint)
    assert "class 'car' occurs nowhere. 0.521% of the pixels are ignore_index 255" in problems[0][2]
    status, _, problems = found(lint, extra='remap: {"0": sky, "1": road, "255": car}')
    assert (status, problems) == (0, [])


def test_few_bits_in_16_bit_files(tree, lint):
    for file in (tree / "images").glob("*/*.png"):
        numbers = np.asarray(Image.open(file).convert("L")).astype(np.uint16) * 16
        Image.fromarray(numbers).save(file)
    status, report, problems = found(lint)
    assert (status, kinds(report)) == (0, ["depth"] * 2)
    assert "the 4 images of 16 bits hold numbers up to 3824, and 65535 is white" in problems[0][2]
    assert "If the numbers have 12 bits, set value_range: [0, 4095]." in problems[0][2]
    assert found(lint, extra="value_range: [0, 4095]")[2] == []


def test_labels_that_are_turned_or_of_another_size(tree, lint):
    for file in masks_of(tree):
        Image.fromarray(np.asarray(Image.open(file)).T.copy()).save(file)
    for file in masks_of(tree, "val"):
        Image.fromarray(np.asarray(Image.open(file)).repeat(2, 0).repeat(2, 1)).save(file)
    status, report, problems = found(lint)
    assert status == 3
    assert [k for k in kinds(report) if k != "unusable"] == ["turned", "ratio"]
    messages = [message for _, _, message in problems]
    assert any("4 labels have height and width exchanged" in m for m in messages)
    assert any("2 labels are 2 times as large as their images" in m and "resize one" in m for m in messages)


@pytest.mark.parametrize("extension", ["tif", "jpg", "png"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_of_a_turned_file_is_that_of_its_picture(tmp_path, extension, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{extension}"
    Image.new("RGB", (7, 5)).save(path, exif=exif)
    assert size_of_file(str(path)) == tuple(read_image(path)[0].shape[1:])


def test_images_of_different_sizes_in_a_batch(tree, lint):
    for kind in ("images", "masks"):
        file = tree / kind / "train" / "train0.png"
        Image.open(file).crop((0, 0, 14, 12)).save(file)
    status, report, problems = found(lint)
    assert (status, kinds(report)) == (3, ["sizes"])
    assert "batch_size is 4" in problems[0][2]
    for extra in ("batch_size: 1", "augment: {crop: 8}", "augment: {pad: true}"):
        assert found(lint, extra=extra)[:1] == (0,), extra


# pictures that do not lie on each other


def scene(rng, height=96, width=112):
    """A picture with structure at every scale."""
    pixels = np.zeros((height, width, 3))
    for side in (3, 6, 12, 24, 48):
        part = rng.normal(0, side**-0.7, (side, side, 3)).astype(np.float32)
        for c in range(3):
            pixels[..., c] += np.asarray(
                Image.fromarray(part[..., c]).resize((width, height), Image.Resampling.BICUBIC)
            )
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    return (pixels * 255).round().astype(np.uint8)


@pytest.fixture
def pairs(tmp_path, capsys):
    rng = np.random.default_rng(1)
    large = [scene(rng) for _ in range(6)]
    for split in ("train", "val"):
        for kind in ("input", "target"):
            (tmp_path / kind / split).mkdir(parents=True)
    for number, picture in enumerate(large):
        noisy = (picture[:88, :104] + rng.normal(0, 20, (88, 104, 3))).clip(0, 255).astype(np.uint8)
        split = "val" if number > 3 else "train"
        Image.fromarray(noisy).save(tmp_path / "input" / split / f"{number}.png")
        Image.fromarray(picture[:88, :104]).save(tmp_path / "target" / split / f"{number}.png")

    def lint(scale=1):
        config = tmp_path / "pairs.yaml"
        spec = f"{{name: paired, root: {tmp_path}, input: 'input/{{subset}}', target: 'target/{{subset}}', scale: {scale}}}"
        config.write_text(f"data: {{sources: {{pairs: {spec}}}}}")
        status = cli.main(["lint", str(config), "--num-workers", "0", "--json"])
        report = json.loads(capsys.readouterr().out)
        return status, [(p["split"], p["kind"], p["message"]) for p in report["problems"]]

    lint.folder, lint.pictures = tmp_path / "target", large
    return lint


def test_pairs_that_lie_on_each_other(pairs):
    assert pairs() == (0, [])
    for number, picture in enumerate(pairs.pictures):
        split = "val" if number > 3 else "train"
        large = picture[:88, :104].repeat(2, 0).repeat(2, 1)
        Image.fromarray(large).save(pairs.folder / split / f"{number}.png")
    assert pairs(2) == (0, [])
    status, problems = pairs(1)
    assert status == 3
    assert problems[0][1] == "ratio"
    assert "4 labels are 2 times as large as their images" in problems[0][2]
    assert "set scale: 2" in problems[0][2]


def test_shifted_pairs(pairs):
    Image.fromarray(pairs.pictures[1][3:91, 5:109]).save(pairs.folder / "train" / "1.png")
    status, problems = pairs()
    assert status == 0
    assert [(split, kind) for split, kind, _ in problems] == [("train", "shift")]
    assert "1.png: its target is shifted against it by 3 pixels up and 5 pixels to the left." in problems[0][2]
    for number in range(4):
        Image.fromarray(pairs.pictures[number][:88, 2:106]).save(pairs.folder / "train" / f"{number}.png")
    _, problems = pairs()
    assert [kind for _, kind, _ in problems] == ["shift"]
    assert "4 of 4 targets are shifted against their images by 2 pixels to the left" in problems[0][2]


def test_pairs_of_different_scenes(pairs):
    Image.fromarray(pairs.pictures[2][:88, :104]).save(pairs.folder / "train" / "1.png")
    Image.fromarray(pairs.pictures[0][:88, :104][:, ::-1]).save(pairs.folder / "train" / "0.png")
    _, problems = pairs()
    assert [(split, kind) for split, kind, _ in problems] == [("train", "scene")] * 2
    assert problems[0][2].endswith("0.png: its target is turned or mirrored.")
    assert problems[1][2].endswith("1.png: its target shows something else.")


def masked_scenes(root, moved):
    rng = np.random.default_rng(2)
    for kind in ("images", "masks"):
        shutil.rmtree(root / kind / "train")
        (root / kind / "train").mkdir()
    for number in range(8):
        areas = np.asarray(Image.fromarray(scene(rng)[..., 0]).resize((112, 96), Image.Resampling.BOX))
        mask = np.digitize(areas, [100, 150]).astype(np.uint8)
        image = (np.array([60, 120, 190])[mask][..., None] + rng.normal(0, 25, (96, 112, 3))).clip(0, 255)
        Image.fromarray(image[8:-8, 8:-8].astype(np.uint8)).save(root / "images" / "train" / f"{number}.png")
        down, right = moved
        part = mask[8 - down : 88 - down, 8 - right : 104 - right]
        Image.fromarray(part).save(root / "masks" / "train" / f"{number}.png")


def test_masks_beside_the_edges(tree, lint):
    masked_scenes(tree, (0, 0))
    assert "mask_shift" not in kinds(found(lint)[1])
    masked_scenes(tree, (1, -1))
    assert "mask_shift" not in kinds(found(lint)[1]), "annotators are no better"
    masked_scenes(tree, (4, -5))
    status, report, problems = found(lint)
    assert status == 0
    assert "mask_shift" in kinds(report)
    message = next(message for _, _, message in problems if "masks lie beside" in message)
    assert "moved by 4 pixels up and 5 pixels to the right" in message


# copies


def test_copies_in_the_validation(tree, lint):
    rng = np.random.default_rng(3)
    for number, split in enumerate(("train", "train", "val", "val")):
        picture = Image.fromarray(scene(rng))
        picture.save(tree / "images" / split / f"{split}{number % 2}.png")
        Image.fromarray(rng.integers(0, 3, (96, 112), np.uint8)).save(
            tree / "masks" / split / f"{split}{number % 2}.png"
        )
    quiet = [p for p in found(lint, extra="batch_size: 1")[1]["problems"] if p["kind"] in ("leak", "near_leak")]
    assert quiet == []
    picture = Image.open(tree / "images" / "train" / "train1.png").resize((56, 48), Image.Resampling.BICUBIC)
    picture.save(tree / "images" / "val" / "val0.jpg", quality=60)
    (tree / "images" / "val" / "val0.png").unlink()
    Image.fromarray(np.zeros((48, 56), np.uint8)).save(tree / "masks" / "val" / "val0.png")
    _, report, problems = found(lint, extra="batch_size: 1")
    assert [p["kind"] for p in report["problems"] if "leak" in p["kind"]] == ["near_leak"]
    message = next(message for _, _, message in problems if "leak" in message)
    assert "val0.jpg is nearly" in message
    assert "train1.png of scenes's train" in message


# no false alarms


@pytest.mark.parametrize("name", ["segmentation_camvid", "denoising_bsds500"])
def test_nothing_to_say_of_good_data(data_root, name, capsys, monkeypatch):
    monkeypatch.setenv("DENSECTX_DATA", str(data_root))
    config = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    assert cli.main(["lint", str(config), "--json", "--num-workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_nothing_to_say_of_mosaics(tmp_path, capsys):
    config = tmp_path / "mosaic.yaml"
    config.write_text("data: {sources: {mosaic: {name: mosaic, size: 96, length: 200}}}")
    assert cli.main(["lint", str(config), "--json", "--num-workers", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_different_photographs_are_not_near(data_root):
    from densectx.data.likeness import near, print_of
    from densectx.data.reader import read_image

    files = sorted((data_root / "bsds500" / "images").rglob("*.jpg"))[:120]
    prints = [print_of(read_image(file)[0]) for file in files]
    assert None not in prints
    assert sorted(near(prints, prints)) == [(i, i) for i in range(len(files))]


@pytest.mark.slow  # a minute on two cores that do nothing else; no time is asserted
def test_ten_thousand_files(tmp_path, capsys, record_property):
    import time

    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            (tmp_path / kind / split).mkdir(parents=True)
    for number in range(5000):
        split = "val" if number % 10 == 0 else "train"
        picture = scene(rng, 240, 320)
        Image.fromarray(picture).save(tmp_path / "images" / split / f"{number:04}.jpg", quality=90)
        Image.fromarray((picture[..., 0] // 86).astype(np.uint8)).save(tmp_path / "masks" / split / f"{number:04}.png")
    (tmp_path / "big.yaml").write_text(CONFIG.format(root=tmp_path, extra=""))
    start = time.monotonic()
    assert cli.main(["lint", str(tmp_path / "big.yaml"), "--json", "--num-workers", "2"]) == 0
    seconds = time.monotonic() - start
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert sum(split["samples"] for split in report["sources"]["scenes"]["splits"].values()) == 5000
    record_property("evidence", f"10 000 files of 320 x 240 in {seconds:.0f} s")


def test_samples_of_a_data_set_of_another_package_are_looked_at(tmp_path, capsys):
    class Loud(Dataset):
        info = SourceInfo()
        samples = (torch.full((3, 8, 8), 255.0), torch.rand(8, 8, 3), np.zeros((3, 8, 8), np.float32))

        def __init__(self, *, split):
            self.split = split

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            return {"image": self.samples[index]}

        def name(self, index):
            return f"loud/{index}"

    DATASETS.register("test-loud")(Loud)
    config = tmp_path / "config.yaml"
    config.write_text("data: {sources: {x: {name: test-loud}}}\n")
    try:
        assert cli.main(["lint", str(config), "--num-workers", "0"]) == 3
    finally:
        DATASETS.unregister("test-loud")
    out = capsys.readouterr().out
    assert "image of loud/0 is from 255 to 255; scale to sRGB 0..1." in out
    assert "image of loud/1 is (8, 8, 3) float32; make it (3, H, W) float32." in out
    assert "'image' of loud/2 is a ndarray; make it a tensor." in out


def test_ids_of_a_data_set_of_another_package_are_named(tmp_path, capsys):
    """What reads masks here refuses them; others may not."""

    class Wrong(Dataset):
        info = SourceInfo(classes=("a", "b"), keys=("image", "mask"))

        def __init__(self, *, split):
            self.split = split

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"image": torch.rand(3, 8, 8), "mask": torch.full((8, 8), (5, -1)[index])}

        def name(self, index):
            return f"wrong/{index}"

    DATASETS.register("test-wrong")(Wrong)
    config = tmp_path / "config.yaml"
    config.write_text("data: {sources: {x: {name: test-wrong}}}\n")
    try:
        assert cli.main(["lint", str(config), "--num-workers", "0"]) == 3
    finally:
        DATASETS.unregister("test-wrong")
    out = capsys.readouterr().out
    assert "wrong/0: the mask has 5 (64 pixels), which are no classes; expected 0..1, or 255" in out
    assert "wrong/1: the mask has -1 (64 pixels)" in out
