"""Whether the data of a run are those that it began with."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from densectx.cli import main
from densectx.data import fingerprint
from densectx.data.fingerprint import File, Listing, compare, differences, take, write
from densectx.data.module import DataModule
from densectx.errors import DataError

CONFIG = """
model:
  backbone: {name: plain, width: 4}
  projection: {channels: 4}
  context: context7
  tasks:
    segmentation: {name: segmentation, source: a}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}
data:
  sources:
    a: {name: image_mask, root: data, images: "images/{subset}", masks: "masks/{subset}", classes: [x, y], batch_size: 2}
  num_workers: 0
trainer:
  accelerator: cpu
  val_check_interval: 2
  check_val_every_n_epoch: null
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Five images with masks in the working directory, two of them for validation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for kind in ("images", "masks"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"data/images/{split}/{i}.png")
            Image.fromarray(rng.integers(0, 2, (8, 9), dtype=np.uint8)).save(f"data/masks/{split}/{i}.bmp")
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path / "data"


def datasets(**sources):
    specs = sources or yaml.safe_load(CONFIG)["data"]["sources"]
    return DataModule(specs, num_workers=0).datasets


def edit(path):
    """Another pixel, the same size."""
    pixels = np.array(Image.open(path))
    pixels[0, 0] ^= 1
    size = path.stat().st_size
    Image.fromarray(pixels).save(path)
    assert path.stat().st_size == size


def remove(data):
    (data / "images/train/2.png").unlink()


def add(data):
    shutil.copy(data / "images/train/1.png", data / "images/train/3.png")
    shutil.copy(data / "masks/train/1.bmp", data / "masks/train/3.bmp")


def grow(data):
    with open(data / "images/val/0.png", "ab") as file:
        file.write(b"more")


CHANGES = {
    "added": (add, "a train: data/images/train/3.png is new"),
    "removed": (remove, "a train: data/images/train/2.png is gone"),
    "mask": (lambda data: edit(data / "masks/train/1.bmp"), "a train: data/masks/train/1.bmp has another content"),
    "size": (grow, "a val: data/images/val/0.png has"),
}


@pytest.mark.fault("T21")
def test_a_run_goes_on_with_the_same_data_only(data, tmp_path, capsys, caplog, record_property):
    fit = ["fit", "-c", "c.yaml", "--name", "run", "--no-report"]
    assert main([*fit, "--trainer.max_steps", "2"]) == 0
    run = tmp_path / "runs/run/0"
    go_on = [*fit, "--trainer.max_steps", "4", "--allow-changed", "trainer.max_steps", "--resume", str(run)]
    before = (run / "data.json").read_bytes()
    shutil.copytree(data, tmp_path / "kept")
    for change, message in CHANGES.values():
        change(data)
        assert main(go_on) == 3
        error = capsys.readouterr().err
        assert message in error
        assert "--allow-changed data" in error
        assert (run / "data.json").read_bytes() == before
        shutil.rmtree(data)
        shutil.copytree(tmp_path / "kept", data)
    record_property("count", len(CHANGES))
    steps = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert steps == 2, "nothing was trained on other data"
    for path in data.rglob("*"):
        os.utime(path, ns=(1, 1))  # as after a copy to another node
    assert main(go_on) == 0
    assert "data differ" not in capsys.readouterr().err
    edit(data / "masks/train/1.bmp")
    longer = [*fit, "--trainer.max_steps", "6", "--allow-changed", "trainer.max_steps", "--resume", "auto"]
    assert main(longer) == 3
    assert main([*longer, "--allow-changed", "data"]) == 0
    assert "--allow-changed data: goes on with other data: a train: data/masks/train/1.bmp has another" in caplog.text
    assert json.loads((run / "data.json").read_text()) != json.loads(before)
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.fault("T21")
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_named_and_changes_the_fingerprint(data, name):
    change, message = CHANGES[name]
    old = take(datasets())
    short = fingerprint.fingerprint(old)
    assert len(short) == 16
    assert list(differences(old, take(datasets(), old))) == []
    change(data)
    new = take(datasets(), old)
    assert any(message in text for text in differences(old, new))
    assert short != fingerprint.fingerprint(new) == fingerprint.fingerprint(take(datasets()))


def test_copies_elsewhere_have_the_same_fingerprint(data, tmp_path):
    old = take(datasets())
    shutil.copytree(data, tmp_path / "copy/of/it")
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, ns=(5, 5))
    spec = {**yaml.safe_load(CONFIG)["data"]["sources"]["a"], "root": str(tmp_path / "copy/of/it")}
    assert fingerprint.fingerprint(take(datasets(a=spec))) == fingerprint.fingerprint(old)
    assert list(differences(old, take(datasets(a=spec), old))) == []


def test_content_is_read_only_where_size_and_time_do_not_tell(data, monkeypatch):
    old = take(datasets())
    read = []
    content = fingerprint._content
    monkeypatch.setattr(fingerprint, "_content", lambda name: read.append(name) or content(name))
    assert take(datasets(), old) == old
    assert read == []
    os.utime(data / "masks/val/1.bmp", ns=(7, 7))
    new = take(datasets(), old)
    assert read == ["data/masks/val/1.bmp"]
    assert list(differences(old, new)) == []


def test_large_data_are_told_by_size_and_time(data, monkeypatch):
    monkeypatch.setattr(fingerprint, "CONTENT_LIMIT", 100)
    monkeypatch.setattr(fingerprint, "_content", None)
    old = take(datasets())
    assert {file.sha256 for listing in old.values() for file in listing.files.values()} == {None}
    os.utime(data / "masks/val/1.bmp", ns=(7, 7))
    (text,) = differences(old, take(datasets(), old))
    assert text.startswith("a val: data/masks/val/1.bmp was changed (its time is another one")


def test_what_names_no_files_is_told_by_its_number_of_samples(data, tmp_path):
    one, two = ({"name": "mosaic", "size": 8, "length": n} for n in (3, 4))
    assert list(differences(take(datasets(a=one)), take(datasets(a=two)))) == ["a train: 4 samples, before 3"]
    file = File(1, 1, None)
    old = {"a train": Listing(2, {"x": file, "y": file})}
    assert list(differences(old, {"a train": Listing(2, {"y": file, "x": file})})) == [
        "a train: the files come in another order"
    ]
    assert list(differences(old, {"b train": old["a train"]})) == ["a train is gone", "b train is new"]


def test_shards_are_told_by_their_index(data):
    assert main(["shard", "c.yaml", "-o", "out", "--num-workers", "0"]) == 0
    spec = {"name": "shards", "root": "out/a"}
    old = take(datasets(a=spec))
    assert [list(listing.files) for listing in old.values()] == [["out/a/index.json"]] * 2
    edit(data / "masks/train/1.bmp")
    assert main(["shard", "c.yaml", "-o", "out", "--num-workers", "0", "--overwrite"]) == 0
    assert "a train: out/a/index.json has another content" in list(differences(old, take(datasets(a=spec), old)))


def test_masks_that_are_given_to_other_images(data, tmp_path):
    def snapshot(third, folder="data"):
        rows = [f"images/train/{i}.png,masks/train/{mask}.bmp,train" for i, mask in ((0, 0), (1, 1), (2, third))]
        (data.parent / folder / "m.csv").write_text("\n".join(["image,mask,split", *rows, "images/val/0.png,,val"]))
        return take(datasets(a={"name": "manifest", "file": f"{folder}/m.csv", "classes": ["x", "y"]}))

    old, new = snapshot(0), snapshot(1)
    message = "a train: files that several samples have, such as a mask, are now those of other samples"
    assert list(differences(old, new)) == [message]
    assert fingerprint.fingerprint(old) != fingerprint.fingerprint(new)
    shutil.copytree(data, tmp_path / "copy")
    assert list(differences(old, snapshot(0, "copy"))) == []
    write(tmp_path, old)
    assert fingerprint.read(tmp_path) == old
    record = json.loads((tmp_path / "data.json").read_text())
    for split in record["splits"].values():
        del split["uses"]  # as records were written before
    (tmp_path / "data.json").write_text(json.dumps(record))
    assert list(differences(fingerprint.read(tmp_path), new)) == []


def test_a_record_that_is_missing_or_damaged(data, tmp_path):
    listed, said = compare(tmp_path, datasets())
    assert "has no data.json" in said
    write(tmp_path, listed)
    assert compare(tmp_path, datasets()) == (listed, "")
    for text in ("", "[]", '{"format": 2, "splits": {}}', '{"format": 1, "splits": {"a train": 3}}'):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(DataError, match=r"data.json: cannot be read .*remove it"):
            compare(tmp_path, datasets())
