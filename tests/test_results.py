"""benchmarks/results.py, result_table.py and zoo.py on a little run: figures, the page made of them, stored weights."""

import csv
import importlib
import json
import math
import os
import re
import shutil
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import densectx
from densectx import cli

ROOT = Path(__file__).parents[1]
REAL = os.environ.get("DENSECTX_DATA")  # the run's fixture puts its own in its place
CONFIG = """
model:
  backbone: {name: plain, width: 8}
  projection: null
  context: {name: basic, dilations: [1, 2]}
  tasks:
    clean: {name: denoising, source: photographs, sigma: [0, 55], test_sigma: 25, head: {name: decoder, width: 8, depth: 1}}
    large: {name: super_resolution, source: photographs, scale: 2, head: {name: decoder, width: 8, depth: 1}}
    colour: {name: colorization, source: photographs, head: {name: decoder, width: 8, depth: 1}}
    road: {name: segmentation, source: camvid, head: linear}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}
data:
  sources:
    photographs:
      name: folder
      root: ${oc.env:DENSECTX_DATA}/bsds500/images
      splits: {test: null}
      batch_size: 1
    camvid:
      name: image_mask
      preset: camvid
      root: ${oc.env:DENSECTX_DATA}/camvid
      splits: {val: {from: [train]}}
      batch_size: 1
  num_workers: 0
trainer:
  accelerator: cpu
  precision: 32-true
  max_steps: 2
  val_check_interval: 2
  check_val_every_n_epoch: null
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.fixture(scope="module")
def tools():
    """The modules of the benchmarks folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield {name: importlib.import_module(name) for name in ("results", "result_table", "zoo")}
    for name in ("results", "result_table", "zoo", "record"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of four tasks on a few pictures laid out as the real sets: (data folder, config, run folder)."""
    root = tmp_path_factory.mktemp("results")
    data, config = root / "data", root / "tiny.yaml"
    config.write_text(CONFIG)
    numbers = np.random.default_rng(0)

    def photo(path, size=(40, 56)):
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = numbers.integers(0, 256, (5, 7, 3), np.uint8)
        Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(path)

    photo(data / "bsds500" / "images" / "train" / "1.png")
    for stem in ("101085", "101087", "999"):  # the last one is none of BSD68
        photo(data / "bsds500" / "images" / "val" / f"{stem}.png", (160, 240))
    photo(data / "set5" / "baby_GT.bmp")
    photo(data / "set12" / "01.png")
    for stem in ("0001TP_1", "0006R0_2"):
        photo(data / "camvid" / "train" / f"{stem}.png", (360, 480))
        labels = np.repeat(np.arange(12, dtype=np.uint8), 40)
        mask = data / "camvid" / "trainannot" / f"{stem}.png"
        mask.parent.mkdir(exist_ok=True)
        Image.fromarray(np.broadcast_to(labels, (360, 480)).copy()).save(mask)
    lines = [f"/x/train/{stem}.png /x/trainannot/{stem}.png\n" for stem in ("0001TP_1", "0006R0_2")]
    (data / "camvid" / "train.txt").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSECTX_RUN", "")  # a start leaves its run folder there for other ranks; this brings it back
        patch.setenv("DENSECTX_DATA", str(data))
        status = cli.main(["fit", "-c", str(config), "--no-report", "--trainer.default_root_dir", str(root / "runs")])
        assert status == 0
        yield data, config, root / "runs" / "tiny" / "0"


@pytest.fixture(scope="module")
def recorded(tools, run, tmp_path_factory):
    """The result files of the run: (folder, {name: content})."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools["results"], "RESULTS", folder)
        written = tools["results"].record("tiny", run[2], ["-c", str(run[1])], None, "abcdef012", None)
    assert written == sorted(set(written), key=written.index)
    return folder, {path.stem: json.loads(path.read_text()) for path in written}


def test_a_run_from_the_weights_of_another_counts_both(tools, run, recorded, tmp_path, monkeypatch):
    data, config, first = run
    monkeypatch.setenv("DENSECTX_RUN", "")
    monkeypatch.setenv("DENSECTX_DATA", str(data))
    more = ["--init_from", str(first), "--trainer.max_steps", "4"]
    command = ["fit", "-c", str(config), *more, "--name", "more", "--no-report"]
    assert cli.main([*command, "--trainer.default_root_dir", str(tmp_path)]) == 0
    second = tmp_path / "more" / "0"
    monkeypatch.setattr(tools["results"], "RESULTS", tmp_path)
    record, one = tools["results"].record, tools["results"].Trained(first, ["-c", str(config)])
    path, trivial, *_ = record("more", second, ["-c", str(config), *more], ["camvid0001tp"], "abc", None, one)
    assert str(first) not in trivial.read_text()
    assert f"more RUN --first RUN1 -- -c {config} -- -c {config} --init_from RUN1" in trivial.read_text()
    found, before = json.loads(path.read_text()), recorded[1]["tiny-camvid0001tp-miou"]
    assert path.stem == "more-camvid0001tp-miou"
    assert found["command"] == f"{before['command']} && densectx fit -c {config} --init_from RUN --trainer.max_steps 4"
    assert found["config"]["init_from"] == "RUN"
    assert found["curve"][0] == before["curve"][0]
    assert [step for step, _ in found["curve"]] == [2, 4, 6]
    assert 2 < found["steps"] <= 6
    assert found["machine"]["first"] == before["machine"]
    assert found["machine"]["device"] == f"{before['machine']['device']}, then {before['machine']['device']}"
    with pytest.raises(SystemExit, match="did not take its weights"):
        record("more", first, ["-c", str(config)], None, "abc", None, one)
    for file in recorded[0].glob("tiny-*"):
        shutil.copy(file, tmp_path)
    longer = {**before, "curve": [*before["curve"], [5, 0.0]]}  # it went on after its best checkpoint
    (tmp_path / "tiny-camvid0001tp-miou.json").write_text(json.dumps(longer))
    path, *_ = record("more", second, ["-c", str(config), *more], ["camvid0001tp"], "abc", None, before="tiny")
    again = json.loads(path.read_text())
    assert {key: again[key] for key in ("steps", "curve", "value")} == {
        k: found[k] for k in ("steps", "curve", "value")
    }
    assert again["wall_s"] >= before["wall_s"]
    assert again["machine"]["first"] == {
        key: before[key] for key in ("command", "commit", "steps", "wall_s", "machine")
    }
    with pytest.raises(SystemExit, match="no results of none"):
        record("more", second, ["-c", str(config), *more], None, "abc", None, before="none")
    with pytest.raises(SystemExit, match="took no weights"):
        record("more", first, ["-c", str(config)], None, "abc", None, before="tiny")
    for file in second.glob("events.out.tfevents.*"):
        file.unlink()
    assert 0 < tools["results"].wall_seconds(second) < 600, "from the times of the other files"


def test_a_file_a_figure_with_the_keys_that_were_agreed(recorded):
    _, files = recorded
    keys = "name task data metric value per_class config command seed steps commit machine wall_s parameters"
    for stem, content in files.items():
        assert list(content) == [*keys.split(), "macs_per_pixel", "curve"]
        assert content["name"] == stem
        assert math.isfinite(content["value"])
    ours = {stem for stem in files if not stem.startswith("trivial-")}
    assert ours == {
        *(f"tiny-cbsd68-sigma{s}-{m}" for s in (15, 25, 50) for m in ("psnr", "ssim")),
        *(f"tiny-set5-x2-{m}" for m in ("psnr", "ssim")),
        *(f"tiny-bsds500val-{m}" for m in ("ab_psnr", "psnr", "auc", "auc_rebalanced", "colourfulness")),
        *(f"tiny-camvid0001tp-{m}" for m in ("miou", "pixel_accuracy", "class_accuracy")),
    }  # gray sets are for gray models


@pytest.mark.parametrize("sigma", [15, 25, 50])
def test_noise_is_of_the_level_that_is_named(recorded, sigma):
    noisy = recorded[1][f"trivial-noisy-cbsd68-sigma{sigma}-psnr"]
    assert noisy["value"] == pytest.approx(20 * math.log10(255 / sigma), abs=0.05)
    assert noisy["data"] == f"CBSD68, sigma {sigma}"
    assert noisy["parameters"] == noisy["macs_per_pixel"] == noisy["steps"] == 0


def test_figures_are_those_of_the_test_command(recorded, run, tmp_path, capsys):
    data = tmp_path / "sets.yaml"
    data.write_text(
        "data: {sources: {photographs: {splits: {test: {from: [val], include: ['1010*']}}},"
        " camvid: {splits: {test: {from: [train], include: ['0001TP*']}}}}}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSECTX_RUN", "")
        assert cli.main(["test", "-c", str(run[1]), "-c", str(data), "--ckpt_path", str(run[2])]) == 0
    said = dict(re.findall(r"^(\w+) +\w+ +([\d.]+) ", capsys.readouterr().out, re.MULTILINE))
    assert recorded[1]["tiny-cbsd68-sigma25-psnr"]["value"] == pytest.approx(float(said["clean"]), abs=0.006)
    assert recorded[1]["tiny-camvid0001tp-miou"]["value"] == pytest.approx(float(said["road"]), abs=0.006)


def test_what_the_run_left_is_kept(recorded, run):
    one = recorded[1]["tiny-camvid0001tp-miou"]
    assert np.mean(list(one["per_class"].values())) == pytest.approx(one["value"])
    with (run[2] / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/road/miou"]]
    assert one["curve"] == [[2, pytest.approx(float(rows[-1]["val/road/miou"]))]]
    assert (one["steps"], one["seed"], one["commit"]) == (2, 0, "abcdef012")
    assert 0 < one["wall_s"] < 300 or one["wall_s"] == 0  # less than half a second is 0
    assert one["command"] == f"densectx fit -c {run[1]}"
    assert one["config"]["data"]["sources"]["camvid"]["root"] == "${oc.env:DENSECTX_DATA,data}/camvid"
    assert str(run[0]) not in json.dumps(one)
    model = densectx.load(run[2])
    assert one["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    # 3x3 from 3 to 8 channels, two of 8 to 8, 1x1 of the context, 1x1 to 11 classes
    assert one["macs_per_pixel"] == 9 * 3 * 8 + 2 * 9 * 64 + 64 + 8 * 11


def test_another_command_than_that_of_the_run_is_refused(tools, run):
    with pytest.raises(SystemExit, match=r"different: trainer\.max_steps\."):
        tools["results"].record("tiny", run[2], ["-c", str(run[1]), "--trainer.max_steps", "3"], None, None, None)


def test_unknown_set_is_refused(tools, run):
    with pytest.raises(SystemExit, match="no set called set99; known: bsd68"):
        list(tools["results"].figures(run[2], ["set99"]))


def test_bicubic_on_set5_reads_as_published(tools, run, monkeypatch):
    """33.66 dB is published; from 8-bit RGB it is 33.68, without antialiasing it would be 34.45."""
    if REAL is None or not (Path(REAL) / "set5").is_dir():
        pytest.skip("needs DENSECTX_DATA with set5")
    monkeypatch.setenv("DENSECTX_DATA", REAL)
    found = {(one.trivial, one.metric): one.value for one in tools["results"].figures(run[2], ["set5"])}
    assert found["bicubic", "psnr"] == pytest.approx(33.68, abs=0.02)


# the page ------------------------------------------------------------------------------------------------------------

TARGETS = """
- title: Noise
  note: In dB.
  rows:
    - {result: a-psnr, must: 31.63, aim: 31.73, of: [X, Y]}
    - {result: b-psnr, must: 31.63, aim: 31.73, of: [X, Y]}
    - {result: c-psnr, must: 31.63, aim: 31.73, of: [X, Y]}
    - {result: d-psnr, must: 31.63, within: {parameters: 1000}}
    - {result: e-psnr, must: 31.63}
    - {result: f-psnr, must: 31.63, elsewhere: true}
    - {result: g-psnr, must_from: {results: [a-psnr, b-psnr], plus: -0.3}}
    - {result: h-psnr, must_from: {results: [a-psnr, missing-psnr], plus: -0.3}}
    - {share: [a-psnr], of: [b-psnr, c-psnr], must: 40}
"""
VALUES = {"a": 31.625, "b": 31.731, "c": 31.62, "d": 32, "f": 40, "g": 31.44, "h": 31, "failed": 12.34}


@pytest.fixture
def page(tools, tmp_path):
    """The page of some results: {first cell: cells} and its text."""
    for name, value in VALUES.items():
        content = dict.fromkeys(tools["results"].KEYS, "") | {
            "name": f"{name}-psnr",
            "metric": "psnr",
            "value": value,
        }
        content |= {"parameters": 2000, "macs_per_pixel": 600 if name == "a" else 1000, "steps": 10, "wall_s": 90}
        content |= {"command": f"densectx fit -c {name}.yaml", "machine": {"device": "an abacus"}, "seed": 3}
        (tmp_path / f"{name}-psnr.json").write_text(json.dumps(content | {"commit": "0123456789"}))
    (tmp_path / "older.json").write_text(json.dumps({"tasks": {}, "command": "densectx fit -c older.yaml"}))
    (tmp_path / "faults.json").write_text("[]")
    (tmp_path / "targets.yaml").write_text(TARGETS)
    tools["result_table"].write_readme(tmp_path, tmp_path / "targets.yaml", tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row for row in rows}, text


def test_what_was_reached_is_said(page):
    rows, _ = page
    said = {name: row[6] for name, row in rows.items() if name.endswith("-psnr")}
    assert said == {
        "a-psnr": "no, -0.01",  # 31.625 rounds to 31.62
        "b-psnr": "must and aim",
        "c-psnr": "no, -0.01",
        "d-psnr": "no: parameters above 1000",
        "e-psnr": "not run",
        "f-psnr": "of another split",
        "g-psnr": "must",
        "h-psnr": "not run",
        "failed-psnr": "",
    }
    assert rows["b-psnr"][3:6] == ["**31.73**", "31.63 (X)", "31.73 (Y)"]
    assert rows["multiply-adds, in percent of the single tasks'"][3:7] == ["**30.0**", "40.00 at most", "-", "must"]


def test_failures_stay_and_every_row_has_its_command(page):
    rows, text = page
    assert rows["failed-psnr"][3] == "**12.34**"
    for name in VALUES:
        assert re.search(
            rf"`{name}-psnr`.*: `densectx fit -c {name}\.yaml` \(seed 3, commit 0123456, an abacus\)", text
        )
    assert rows["`older.json`"][1] == "`densectx fit -c older.yaml`"


def test_peers_stand_beside_ours(tools, tmp_path):
    net = {"miou": 44.064, "steps": 100, "parameters": 1_781_659}
    arm = {"median_s": 0.02, "macs": 6_423_352_320}
    result = {
        "command": "python benchmarks/peers.py WORK",
        "config": "configs/recipes/some.yaml",
        "commit": "0123456789",
        "smp": "1",
        "seed": 0,
        "minutes": 5.0,
        "encoder": "resnet18",
        "machine": {"processor": "Z80", "threads": 2},
        "nets": {"densectx": net, "Unet": {**net, "miou": 50.0}},
        "inference": {"what": "inference, 32x16, bf16", "arms": {"densectx": arm, "Unet": {**arm, "median_s": 0.05}}},
    }
    (tmp_path / "peers.json").write_text(json.dumps(result))
    (tmp_path / "targets.yaml").write_text("[]")
    tools["result_table"].write_readme(tmp_path, tmp_path / "targets.yaml", tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert "| `densectx` | **44.06** | 100 | 1782 K | 6.4 | 20.0 | 1.00 |" in text
    assert "| `Unet` | **50.00** | 100 | 1782 K | 6.4 | 50.0 | 2.50 |" in text
    assert text.count("python benchmarks/peers.py WORK") == 1
    assert "configs/recipes/some.yaml as it was at commit 0123456" in " ".join(text.split())


def test_the_committed_page_is_that_of_the_committed_files(tools, tmp_path):
    tools["result_table"].write_readme(readme=tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == (ROOT / "benchmarks" / "README.md").read_text()


def test_committed_curves_rise_in_steps(tools):
    found = {path.name: json.loads(path.read_text()) for path in tools["results"].RESULTS.glob("*.json")}
    curves = {name: content["curve"] for name, content in found.items() if "curve" in content}
    assert len(curves) > 50
    for name, curve in curves.items():
        assert all(one < other for (one, _), (other, _) in pairwise(curve)), name


def test_the_readme_quotes_the_committed_files(tools, tmp_path):
    copy = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", copy)
    tools["result_table"].write_summary(readme=copy)
    assert copy.read_text() == (ROOT / "README.md").read_text()


def test_the_quotation_is_of_rows_that_have_something_to_reach(tools, page, tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text("before\n<!-- published -->\nold\n<!-- end of published -->\nafter\n")
    tools["result_table"].write_summary(tmp_path, tmp_path / "targets.yaml", copy)
    text = copy.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"`{name}-psnr`" for name in "abcdfgh"]  # e has no result
    assert rows[1] == ["`b-psnr`", "", "**31.73**", "31.63 (X)", "31.73 (Y)", "must and aim", "2 K", "2"]
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


# the zoo -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    """A copy of the package without weights."""
    copy = tmp_path / "densectx-zoo"
    shutil.copytree(
        ROOT / "plugins" / "densectx-zoo", copy, ignore=shutil.ignore_patterns("weights", "cards", "*.egg-info")
    )
    return copy


def test_a_run_becomes_a_model_of_the_package(tools, run, recorded, package, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(recorded[0], results)
    first = json.loads((path := min(results.glob("tiny-*.json"))).read_text())
    older = {**first, "command": "densectx fit -c configs/recipes/sr_x2.yaml", "machine": {"device": "an abacus"}}
    first["machine"]["first"] = {
        **older,
        "command": "densectx fit --steps 1",
        "machine": {**first["machine"], "first": older},
    }
    path.write_text(json.dumps(first))
    other = json.loads((results / "tiny-set5-x2-psnr.json").read_text()) | {"value": 77.7}
    (results / "tiny-other-set5-x2-psnr.json").write_text(json.dumps(other))  # of "tiny-other"
    options = {"tolerance": 0.5, "package": package, "results": results, "note": "Seen by nobody."}
    said = tools["zoo"].add("multitask", run[2], "tiny", sets=["set5", "camvid0001tp"], **options)
    assert any(line.startswith("set5-x2-psnr: ") for line in said)
    file = package / "densectx_zoo" / "weights" / "multitask.safetensors"
    stored = load_file(file)
    assert {value.dtype for value in stored.values() if value.squeeze().ndim > 1 and value.is_floating_point()} == {
        torch.float16
    }
    assert {value.dtype for value in stored.values() if value.ndim == 1 and value.is_floating_point()} == {
        torch.float32
    }
    model, before = densectx.load(file), densectx.load(run[2])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    image = torch.rand(3, 21, 34)
    for key, answer in model.predict(image, options={"clean.sigma": 25.0}).items():
        assert torch.allclose(
            answer, before.predict(image, [key], {"clean.sigma": 25.0} if key == "clean" else None)[key], atol=0.01
        )
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["densectx.models"] == {"multitask": "densectx_zoo:multitask"}
    assert "| [`multitask`](densectx_zoo/cards/multitask.md) |" in (package / "README.md").read_text()
    card = (package / "densectx_zoo" / "cards" / "multitask.md").read_text()
    assert "CC BY-NC 4.0" in card
    assert "BSDS500 (Arbelaez" in card
    assert "T91 (Yang" in card, "of the run that the weights began with"
    assert "Seen by nobody." in card
    assert "77.7" not in card
    made = [card.index(command) for command in (f"densectx fit -c {run[1]}", "fit --steps 1", "sr_x2.yaml")]
    assert made == sorted(made), "the command, then those of the weights that it began with"
    assert "on an abacus" in card
    assert str(run[0]).encode() not in file.read_bytes()  # no folder of the machine that trained it


def test_the_terms_of_the_first_of_two_runs_stand_in_the_card(tools, recorded):
    one = recorded[1]["tiny-set5-x2-psnr"]
    first = {**one, "command": f"densectx fit -c configs/recipes/sr_x2.yaml && {one['command']}"}
    cards = [tools["zoo"].card_of("sr-x2", {"a": found}, 1, "float16", []) for found in (one, first)]
    assert ["T91 (Yang" in card for card in cards] == [False, True]


def test_a_model_whose_metrics_move_is_refused(tools, run, recorded, package, tmp_path):
    before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="half precision moves these"):
        tools["zoo"].add("multitask", run[2], "tiny", sets=["set5"], tolerance=-1, package=package, results=recorded[0])
    assert {path: path.read_bytes() for path in package.rglob("*") if path.is_file()} == before


def test_a_model_without_results_is_refused(tools, run, package, tmp_path):
    with pytest.raises(SystemExit, match="no results yet"):
        tools["zoo"].add("multitask", run[2], "tiny", package=package, results=tmp_path)


def test_large_files_and_weights_that_overflow_are_refused(tools, tmp_path):
    big, other = tmp_path / "big.safetensors", tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(1_000_001)}, big)
    with pytest.raises(SystemExit, match="at most 4:"):
        tools["zoo"].check_size(big, [])
    save_file({"w": torch.zeros(900_000)}, big)
    save_file({"w": torch.zeros(4_200_000)}, other)
    tools["zoo"].check_size(big, [])
    with pytest.raises(SystemExit, match="with the other models, at most 20"):
        tools["zoo"].check_size(big, [other])
    with pytest.raises(SystemExit, match="take bfloat16"):
        tools["zoo"].halved({"w": torch.full((2, 2), 1e5)}, torch.float16)


# arms of several runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["transfer", "context_ablation"])
def test_only_a_run_with_the_same_steps_and_flags_is_not_done_again(script, tools, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    train, commands = importlib.import_module(script).train, []

    def fit(command, **_):
        commands.append(command)
        (tmp_path / "runs" / command[command.index("--name") + 1] / "0").mkdir(parents=True)

    monkeypatch.setattr("subprocess.run", fit)
    asked = [(10, []), (20, []), (10, ["--model.norm", "group"]), (10, [])]
    runs = [train(tmp_path, "arm-0", 0, steps, flags) for steps, flags in asked]
    assert runs[0] == runs[3]
    assert len(set(runs)) == len(commands) == 3
