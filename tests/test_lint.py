"""``densectx lint`` on small trees with one fault each."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from densectx import cli
from densectx.data.survey import class_weights

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


def test_text_and_missing_folder(tree, lint):
    status, out = lint()
    assert status == 0
    assert "scenes train: 4 samples, 12x16, 0 gray" in out
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
