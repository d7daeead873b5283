"""Checkpoint files: what is in them, which are kept, what every loader refuses."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import densectx
from densectx.archive import DIRECTORY, check_header, load_archive
from densectx.checkpoint import read, save_safetensors
from densectx.checkpoint_files import link, newest_first, sweep
from densectx.checkpoint_io import AtomicCheckpointIO
from densectx.checkpointing import Checkpoints
from densectx.cli import main
from densectx.errors import CheckpointError, ConfigError
from densectx.loggers import MetricsFile
from densectx.types import Score

CONFIG = """
model:
  backbone: {name: plain, width: 3}
  projection: {channels: 3}
  context: context7
  tasks:
    segmentation: {name: segmentation, source: mosaic, head: linear}
    denoising: {name: denoising, source: mosaic, sigma: 25, head: linear}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01, momentum: 0.9}}
data:
  sources:
    mosaic: {name: mosaic, size: 16, length: 8, val_length: 2, batch_size: 4}
  num_workers: 0
trainer:
  accelerator: cpu
  max_steps: 4
  val_check_interval: 2
  check_val_every_n_epoch: null
  enable_progress_bar: false
  enable_model_summary: false
"""
FIXTURE = Path(__file__).parent / "fixtures" / "format-1-without-digest.ckpt"


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Run ``densectx fit`` with the config above; returns the run folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "small.yaml").write_text(CONFIG)

    def fit(name, *arguments, status=0):
        assert main(["fit", "-c", "small.yaml", "--name", name, "--no-report", *arguments]) == status
        return tmp_path / "runs" / name / "0"

    return fit


@pytest.fixture
def old():
    """What the fixture holds, which densectx 0.1.0 wrote before there were digests."""
    return torch.load(FIXTURE, weights_only=True)


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint with a digest; returns its path."""

    def write(content, name="step-1.ckpt"):
        AtomicCheckpointIO().save_checkpoint(content, tmp_path / name)
        return tmp_path / name

    return write


def flip(file):
    text = bytearray(file.read_bytes())
    text[len(text) // 3] ^= 1
    file.write_bytes(text)


def state(run, name="last.ckpt"):
    return torch.load(run / "checkpoints" / name, weights_only=True)


def test_a_file_with_a_digest_is_one_of_torch_for_everybody_else(write):
    weights = torch.rand(300, 70)
    file = write({"weights": weights, "empty": torch.empty(0), "half": torch.ones(3, dtype=torch.bfloat16)})
    for mapped in (False, True):
        assert torch.equal(torch.load(file, weights_only=True, mmap=mapped)["weights"], weights)
    archive = zipfile.ZipFile(file)
    assert archive.testzip() is None
    found = subprocess.run(["sha256sum"], input=file.read_bytes()[:-80], capture_output=True, check=True).stdout
    assert archive.comment == b"densectx-sha256:" + found.split()[0], "sha256sum of everything before the comment"
    assert torch.equal(load_archive(file)["weights"], weights)


@pytest.mark.fault("S15")
def test_a_file_without_a_digest_still_loads_and_goes_on(tmp_path, old):
    with pytest.warns(UserWarning, match="no digest"):
        model = densectx.load(FIXTURE)
    image = torch.linspace(0, 1, 3 * 8 * 8).reshape(3, 8, 8)
    answer = model.predict(image)
    expected = {"segmentation": [0.039473, 0.064029, 0.111787], "denoising": [0.141282, 0.476755, 0.811391]}
    for task, values in expected.items():
        assert torch.allclose(answer[task][:3, 3, 3], torch.tensor(values), atol=1e-4), (task, answer[task][:3, 3, 3])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        densectx.load(FIXTURE)
        densectx.load(FIXTURE)
    assert len([w for w in found if "no digest" in str(w.message)]) <= 1, "said once"
    run = tmp_path / "runs" / "old" / "0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-2.ckpt").write_bytes(FIXTURE.read_bytes())
    (run / "config.yaml").write_text(yaml.safe_dump(old["densectx"]["config"], sort_keys=False))
    assert main(["fit", "--resume", str(run), "--no-report"]) == 0
    assert state(run)["global_step"] == 4
    read(run / "checkpoints" / "last.ckpt")


@pytest.mark.fault("S15")
def test_damage_is_found_in_a_file_without_a_digest(tmp_path):
    whole = FIXTURE.read_bytes()
    names = zipfile.ZipFile(FIXTURE).infolist()
    weights = next(i for i in names if i.file_size > 300 and "/data/" in i.filename)
    cut = bytearray(whole)
    cut[weights.header_offset + 200 + weights.file_size // 2] ^= 8
    file = tmp_path / "f.ckpt"
    file.write_bytes(cut)
    with pytest.raises(CheckpointError, match="checksum"):
        densectx.load(file)


@pytest.mark.fault("S16")
def test_a_newer_format_names_the_version_that_reads_it(write, old, capsys, tmp_path):
    old["densectx"] |= {"format": 99, "version": "7.3.0"}
    file = write(old)
    for command in (["inspect", str(file)], ["predict", str(file), str(tmp_path), "-o", str(tmp_path / "out")]):
        assert main(command) == 4
        said = capsys.readouterr().err
        assert "format 99, written by densectx 7.3.0" in said
        assert "reads formats up to 1: update densectx" in said
        assert "Traceback" not in said


def test_every_command_refuses_a_damaged_file_with_4_and_names_the_whole_one(fit, tmp_path, capsys):
    run = fit("run")
    folder = run / "checkpoints"
    best = folder / "step-4.ckpt"
    link(folder / "best.ckpt", best.name)
    flip(best)
    from torchvision.utils import save_image

    save_image(torch.rand(3, 12, 12), tmp_path / "picture.png")
    commands = {
        "validate": ["validate", "-c", "small.yaml", "--ckpt_path", str(run)],
        "test": ["test", "-c", "small.yaml", "--ckpt_path", str(best)],
        "predict": ["predict", str(run), "picture.png", "-o", "out"],
        "export": ["export", str(run), "-f", "safetensors", "-o", "m.safetensors"],
        "inspect": ["inspect", str(run)],
        "report": ["report", str(run)],
        "demo": ["demo", str(run), "--port", "0"],
        "resume": ["fit", "-c", "small.yaml", "--resume", str(best), "--no-report"],
        "init_from": ["fit", "-c", "small.yaml", "--init_from", str(best), "--name", "other", "--no-report"],
    }
    capsys.readouterr()
    for name, command in commands.items():
        assert main(command) == 4, name
        said = capsys.readouterr().err
        assert "SHA-256 is not the one it was written with" in said, name
        assert f"{folder / 'step-2.ckpt'}" in said, name
        assert "Traceback" not in said, name
    with pytest.raises(CheckpointError, match="SHA-256"):
        AtomicCheckpointIO().load_checkpoint(best)  # what Lightning calls when it resumes
    with pytest.raises(CheckpointError, match="SHA-256"):
        densectx.load(best)


@pytest.mark.fault("S14")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.context=basic", "--model.backbone.width=5"], ["missing", "of another shape", "in the file, "]),
        (["--model.tasks.denoising=null"], ["unexpected", "tasks.denoising"]),
        (["--model.tasks.colorization={name: colorization, source: mosaic}"], ["missing", "tasks.colorization"]),
        ([], ["of another shape", "tasks.segmentation.head.conv.weight: (4, 3, 1, 1) in the file, (10, 3, 1, 1)"]),
        (["--model.backbone={name: drn_c_26}"], ["missing", "unexpected", "backbone ("]),
        (["--model.context=large", "--model.norm=group"], ["of another shape", "and 1"]),
    ],
)
def test_weights_of_another_model_are_refused_on_one_screen(tmp_path, monkeypatch, capsys, old, write, flags, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(CONFIG)
    if not flags:  # other classes
        for key, value in old["state_dict"].items():
            if key.startswith("model.tasks.segmentation.head") and len(value) == 10:
                old["state_dict"][key] = value[:4].clone()
    status = main(["validate", "-c", "small.yaml", "--ckpt_path", str(write(old)), *flags])
    said = capsys.readouterr().err
    lines = said[said.index("densectx: error") :].strip().splitlines()
    assert status == 4
    assert len(lines) <= 20, said
    assert "the weights do not fit the model" in lines[0]
    for text in expected:
        assert text in said, text
    assert "Traceback" not in said


@pytest.mark.fault("T20")
def test_a_changed_config_is_refused_with_old_and_new_values(fit, capsys):
    run = fit("run")
    changes = {
        "model.optimizer.init_args.lr": ("0.01", "0.5"),
        "data.sources.mosaic.augment": ("(not there)", "{'crop': 8}"),
        "model.tasks.denoising.sigma": ("25", "50"),
        "trainer.max_steps": ("4", "9"),
    }
    given = ["--model.optimizer.init_args.lr=0.5", "--data.sources.mosaic.augment={crop: 8}"]
    given += ["--model.tasks.denoising.sigma=50", "--trainer.max_steps=9"]
    capsys.readouterr()
    fit("run", "--resume", str(run), *given, status=2)
    said = capsys.readouterr().err
    for key, (before, now) in changes.items():
        assert f"  {key}: {before} -> {now}" in said, said
        assert f" --allow-changed {key} " in said, said
    turned = yaml.safe_load(CONFIG)
    turned["model"]["tasks"] = dict(reversed(turned["model"]["tasks"].items()))
    (run / "turned.yaml").write_text(yaml.safe_dump(turned, sort_keys=False))
    assert main(["fit", "-c", str(run / "turned.yaml"), "--resume", str(run), "--no-report"]) == 2
    said = capsys.readouterr().err
    assert "  model.tasks: segmentation, denoising -> denoising, segmentation" in said, (
        "the optimizer's state has no names"
    )
    more = [f"--model.tasks.t{i}={{name: denoising, source: mosaic, sigma: {i}}}" for i in range(30)]
    fit("run", "--resume", str(run), *more, status=2)
    said = capsys.readouterr().err
    assert len(said[said.index("densectx: error") :].strip().splitlines()) <= 20
    assert "and 14 more" in said
    assert "or say --allow-changed model if" in said, "30 keys do not fit on a screen"
    allowed = ["--allow-changed", "model.optimizer", "--allow-changed", "model.tasks.denoising"]
    fit("run", "--resume", str(run), *allowed, "--model.tasks.denoising_too=null", status=2)
    other = "--model.tasks.denoising_too={name: denoising, source: mosaic, sigma: 5}"
    fit("run", "--resume", str(run), *allowed, other, status=2)
    assert "model.tasks.denoising_too: (not there) ->" in capsys.readouterr().err, "another key with the same beginning"


def test_a_run_is_measured_by_its_own_config(fit, tmp_path, capsys):
    run = fit("run", "--model.backbone.width=4")
    assert main(["validate", "--ckpt_path", str(run)]) == 0
    assert main(["test", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    assert main(["validate", "-c", "small.yaml", "--ckpt_path", str(run)]) == 4
    assert f"-c {run / 'config.yaml'}" in capsys.readouterr().err
    fit("run", "--resume", str(run.parent), status=4)
    assert f"its newest run is {run}." in capsys.readouterr().err
    fit("run", "--resume", str(tmp_path / "runs" / "rum"), status=4)
    said = capsys.readouterr().err
    assert f"no such run folder or checkpoint; did you mean '{run.parent}'?" in said
    assert "model name" not in said


def test_a_misspelt_key_that_may_change_is_refused(fit, capsys):
    run = fit("run")
    words = ["--resume", str(run), "--model.optimizer.init_args.lr=0.5", "--trainer.max_steps=6"]
    fit("run", *words, "--allow-changed=trainer", "--allow-changed=model.optimiser", status=2)
    assert "--allow-changed model.optimiser" in (said := capsys.readouterr().err)
    assert "did you mean 'model.optimizer'?" in said
    fit("run", *words, *(f"--allow-changed={key}" for key in ("trainer", "model.optimizer", "trainer.max_time")))


def test_the_order_of_sources_is_a_change(fit, tmp_path, capsys):
    second = "--data.sources.other={name: mosaic, size: 16, length: 8, val_length: 2, batch_size: 4}"
    run = fit("run", second, "--data.sampling=alternate")
    turned = yaml.safe_load((run / "config.yaml").read_text())
    turned["model"]["tasks"] = dict(reversed(turned["model"]["tasks"].items()))
    (tmp_path / "turned.yaml").write_text(yaml.safe_dump(turned, sort_keys=False))
    allowed = ["--allow-changed", "model.tasks", "--no-report"]
    assert main(["fit", "-c", "turned.yaml", "--resume", str(run), *allowed]) == 2
    assert "cannot change in a run that goes on" in capsys.readouterr().err, "a task would get another one's momentum"
    turned = yaml.safe_load((run / "config.yaml").read_text())
    turned["data"]["sources"] = dict(reversed(turned["data"]["sources"].items()))
    (tmp_path / "turned.yaml").write_text(yaml.safe_dump(turned, sort_keys=False))
    assert main(["fit", "-c", "turned.yaml", "--resume", str(run), "--no-report"]) == 2
    assert "  data.sources: mosaic, other -> other, mosaic" in capsys.readouterr().err


def test_options_of_optimizer_and_schedule_that_change_on_resume_count(fit):
    schedule = "{class_path: torch.optim.lr_scheduler.PolynomialLR, init_args: {total_iters: '${trainer.max_steps}'}}"
    words = [f"--model.lr_scheduler={schedule}", "--trainer.log_every_n_steps=1"]
    run = fit("run", *words)
    before = torch.load(run / "checkpoints" / "step-4.ckpt", weights_only=True)["optimizer_states"][0]
    words += ["--trainer.max_steps=8", "--model.optimizer.init_args.lr=0.5"]
    words += ["--model.optimizer.init_args.weight_decay=0.25"]
    allowed = [
        word for key in ("model.optimizer", "model.lr_scheduler", "trainer") for word in ("--allow-changed", key)
    ]
    fit("run", *words, "--resume", str(run), *allowed)
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    rates = {int(row["step"]): float(row["lr-SGD"]) for row in rows if row.get("lr-SGD")}
    expected = [0.01 * (1 - step / 4) for step in range(4)] + [0.5 * (1 - step / 8) for step in range(4, 8)]
    assert [rates[step] for step in range(8)] == pytest.approx(expected)
    after = torch.load(run / "checkpoints" / "step-8.ckpt", weights_only=True)["optimizer_states"][0]
    assert after["param_groups"][0]["weight_decay"] == 0.25
    assert before["param_groups"][0]["weight_decay"] == 0
    again = fit("again", *words, "--trainer.max_steps=4")  # the momentum went on: a fresh one moves otherwise
    weights = [state(one)["state_dict"]["model.backbone.layers.0.weight"] for one in (run, again)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    "change",
    [
        "model.optimizer={class_path: torch.optim.AdamW, init_args: {lr: 0.01}}",
        "model.lr_scheduler={class_path: densectx.schedules.WarmupPoly, init_args: {total_steps: 4}}",
        "model.balancing=famo",
        "model.freeze=[backbone]",
        "model.param_groups=[{match: '*bias', weight_decay: 0.1}]",
    ],
)
def test_what_the_states_belong_to_cannot_change(fit, capsys, change):
    run = fit("run")
    fit("run", "--resume", str(run), f"--{change}", "--allow-changed=model", "--trainer.max_steps=6", status=2)
    fit("run", "--resume", str(run), f"--{change}", "--allow-changed=model", "--allow-changed=trainer", status=2)
    said = capsys.readouterr().err
    assert f"{change.partition('=')[0]}" in said
    assert "cannot change in a run that goes on" in said
    assert "--init_from RUN" in said


def test_balancing_may_be_watched_from_a_resume_on(fit):
    run = fit("run")
    more = ["--model.balancing={name: fixed, watch: true}", "--trainer.max_steps=6", "--trainer.log_every_n_steps=1"]
    fit("run", "--resume", str(run), *more, "--allow-changed=model.balancing", "--allow-changed=trainer")
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    cosines = [float(row["balance/cos/segmentation/denoising"] or "nan") for row in rows]
    assert any(abs(cosine) <= 1 + 1e-6 for cosine in cosines)


def test_a_misspelt_metric_to_monitor_is_refused_before_the_first_step(fit, tmp_path, capsys):
    callback = "{class_path: densectx.checkpointing.Checkpoints, init_args: {monitor: val/segmentation/mIoU}}"
    fit("run", f"--trainer.callbacks=[{callback}]", status=2)
    assert "did you mean 'val/segmentation/miou'" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_a_score_that_names_no_metric_is_refused_before_the_first_step(fit, tmp_path, capsys, monkeypatch):
    for score, said in ((Score("psnrr", "input"), "'psnrr'; did you mean 'psnr'"), (Score("psnr", "x"), "'psnr_x'")):
        monkeypatch.setattr("densectx.tasks.denoising.Denoising.score", score)
        fit("run", status=5)
        error = capsys.readouterr().err
        assert "task 'denoising': the metrics of Denoising do not compute what its score names" in error
        assert f"unknown metric {said}" in error
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_training_is_kept_where_nothing_logs_what_is_monitored(fit, tmp_path):
    callback = "{class_path: densectx.checkpointing.Checkpoints, init_args: {monitor: mine/score}}"
    fit("run", f"--trainer.callbacks=[{callback}]", status=2)
    assert [file.name for file in (tmp_path / "runs").rglob("step-*.ckpt")] == ["step-2.ckpt"]


def test_a_first_score_of_zero_is_no_unit_of_change():
    model = densectx.load(FIXTURE)
    callback, module = Checkpoints(), densectx.DenseModule(model, torch.optim.SGD)
    key, other = list(model.tasks)[:2]
    names = [f"val/{task}/{model.task(task).score.metric}" for task in (key, other)]

    def value(*scores):
        return callback.value(dict(zip(names, scores, strict=True)), module)

    assert value(0.0, 20.0) == 0
    assert value(5.0, 20.0) == 0  # the first that can be one
    assert value(10.0, 20.0) == pytest.approx(0.5)
    assert value(10.0, 30.0) == pytest.approx(0.75)


def archive(file, parts, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as out:
        for name, text in parts.items():
            out.writestr(name, text)
    return file


def test_what_is_small_as_a_file_and_large_once_read_is_refused(tmp_path, write):
    torch.save({"state_dict": {"w": torch.zeros(5_000_000)}}, tmp_path / "plain.pt")
    whole = zipfile.ZipFile(tmp_path / "plain.pt")
    parts = {info.filename: whole.read(info) for info in whole.infolist()}
    bombs = {
        "compressed": archive(tmp_path / "deflated.ckpt", parts, zipfile.ZIP_DEFLATED),
        "larger than what the file has": write({"w": torch.zeros(1).expand(10**9)}, "view.ckpt"),
        "16 MiB": tmp_path / "contents.ckpt",
    }
    assert bombs["compressed"].stat().st_size < 100_000
    end = FIXTURE.read_bytes()[-98:]
    bombs["16 MiB"].write_bytes(b"PK\3\4" + end[:40] + (DIRECTORY + 1).to_bytes(8, "little") + end[48:])
    for said, file in bombs.items():
        with pytest.raises(CheckpointError, match=said):
            densectx.load(file)
    for text in (b"", b"PK", b"no archive at all" * 100, FIXTURE.read_bytes()[:-22] + bytes(22)):
        (tmp_path / "other.ckpt").write_bytes(text)
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            densectx.load(tmp_path / "other.ckpt")


def test_headers_of_safetensors_are_limited(tmp_path):
    model = densectx.load(FIXTURE)
    save_safetensors(model, tmp_path / "m.safetensors")
    check_header(tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    for length in (len(whole), 1 << 30, (1 << 64) - 1):
        (tmp_path / "m.safetensors").write_bytes(length.to_bytes(8, "little") + whole[8:])
        with pytest.raises(CheckpointError, match="header"):
            densectx.load(tmp_path / "m.safetensors")


def test_best_of_each_task_has_a_link_that_pruning_keeps(fit):
    callback = "{class_path: densectx.checkpointing.Checkpoints, init_args: {best_of_tasks: true}}"
    words = [
        "--trainer.callbacks",
        f"[{callback}]",
        "--trainer.val_check_interval=1",
        "--model.optimizer.init_args.lr=3",
    ]
    run = fit("run", *words, "--trainer.max_steps=6")
    folder = run / "checkpoints"
    links = {file.name: file.readlink() for file in folder.glob("*.ckpt") if file.is_symlink()}
    assert links.keys() == {"last.ckpt", "best.ckpt", "best-segmentation.ckpt", "best-denoising.ckpt"}
    assert not any(target.is_absolute() for target in links.values())
    rows = [row for row in csv.DictReader((run / "metrics.csv").open()) if row.get("val/denoising/psnr")]
    for task, metric in (("segmentation", "miou"), ("denoising", "psnr")):
        values = [float(row[f"val/{task}/{metric}"]) for row in rows]
        best = values.index(max(values)) + 1  # the first of equal ones; one validation a step
        assert links[f"best-{task}.ckpt"] == Path(f"step-{best}.ckpt")
        densectx.load(folder / f"best-{task}.ckpt")
    (folder / "best-denoising.ckpt").unlink()  # as if killed before the link
    fit("run", *words, "--trainer.max_steps=7", "--resume", str(run), "--allow-changed=trainer")
    assert (folder / "best-denoising.ckpt").exists()


@pytest.mark.parametrize("ema", ["{decay: 0.9}", "{decay: 0.9, update_every_n_steps: 2}"])
def test_averages_are_those_of_the_step_that_is_saved(fit, ema):
    """A bare loop over the saved trained weights gives the saved average, and resuming gives both."""
    callbacks = [
        f"{{class_path: pytorch_lightning.callbacks.EMAWeightAveraging, init_args: {ema}}}",
        "{class_path: densectx.checkpointing.Checkpoints, init_args: {every_n_steps: 1, keep: 20}}",
    ]
    words = ["--trainer.val_check_interval=4", "--trainer.max_steps=6"]
    key = "model.backbone.layers.0.weight"
    for order in (callbacks, callbacks[::-1]):  # as listed in the config: the update still comes first
        name = f"order{callbacks.index(order[0])}"
        run = fit(name, *words, "--trainer.callbacks", f"[{', '.join(order)}]")
        every = 2 if "every" in ema else 1
        average = None
        for step in range(1, 7):
            content = state(run, f"step-{step}.ckpt")
            now = content["current_model_state"][key]
            if (step - 1) % every == 0:
                average = now if average is None else average * 0.9 + now * 0.1
            assert torch.allclose(content["state_dict"][key], average, atol=1e-6), step
        whole = state(run)
        again = ["--trainer.callbacks", f"[{', '.join(order)}]", "--resume", str(run / "checkpoints" / "step-3.ckpt")]
        fit(name, *words, *again)
        for part in ("state_dict", "current_model_state"):
            assert all(torch.equal(state(run)[part][k], v) for k, v in whole[part].items()), part


def test_leftovers_of_dead_processes_are_swept(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = socket.gethostname()
    names = {
        f"step-1.ckpt.tmp.{host}.{gone.pid}": False,
        f"last.ckpt.tmp.{gone.pid}": False,  # as 0.1.0 named them
        f"step-2.ckpt.tmp.{host}.{os.getpid()}": True,
        f"step-3.ckpt.tmp.elsewhere.{gone.pid}": True,
        "step-4.ckpt": True,
        "notes.tmp.1": True,
    }
    for name in names:
        (tmp_path / name).touch()
    old = tmp_path / f"step-5.ckpt.tmp.elsewhere.{os.getpid()}"
    old.touch()
    os.utime(old, (0, 0))
    assert sweep(tmp_path) == 3
    assert {file.name for file in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}


def test_the_order_in_which_to_go_on(tmp_path):
    for number, step in enumerate((2, 4, 6, 3, 5)):  # went on from 2 again, then was killed before last led to 5
        (tmp_path / f"step-{step}.ckpt").touch()
        os.utime(tmp_path / f"step-{step}.ckpt", (number, number))
    link(tmp_path / "last.ckpt", "step-3.ckpt")
    assert [file.stem for file in newest_first(tmp_path)] == [f"step-{n}" for n in (5, 3, 2, 6, 4)]
    (tmp_path / "last.ckpt").unlink()
    assert [file.stem for file in newest_first(tmp_path)] == [f"step-{n}" for n in (6, 5, 4, 3, 2)]
    assert newest_first(tmp_path / "nowhere") == []


@pytest.mark.parametrize("options", [{"keep": 1}, {"on_error": "ignore"}, {"every_n_steps": 0}, {"mode": "up"}])
def test_options_that_cannot_work(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Checkpoints(**options)


@pytest.mark.parametrize("tail", ["12", "120,7", "\0" * 300, "12,\0\0\r\n", "x,1,2\r\n"])
def test_the_half_row_of_a_process_that_was_killed_is_left_out(tmp_path, capsys, tail):
    file = tmp_path / "metrics.csv"
    log = MetricsFile(file)
    for step in range(12):
        log.log_metrics({"a": step, "b": 1}, step)
    whole = file.read_text()
    file.write_text(whole + tail)
    again = MetricsFile(file)
    again.log_metrics({"a": 12, "b": 1}, 12)
    assert [row["a"] for row in csv.DictReader(file.open())] == [str(step) for step in range(13)]
    assert capsys.readouterr().err.count("damaged rows are left out") == 1


def test_a_validation_that_is_done_again_leaves_the_losses_of_its_step(tmp_path, capsys):
    log = MetricsFile(tmp_path / "metrics.csv")
    for values, step in (({"loss": 0.5}, 8), ({"loss": 0.4}, 9), ({"val/a": 1}, 9), ({"loss": 0.3}, 10)):
        log.log_metrics(values, step)
    again = MetricsFile(tmp_path / "metrics.csv")
    again.log_metrics({"val/a": 2}, 9)  # a run that was left in its validation goes on with it
    again.log_metrics({"loss": 0.2}, 10)
    rows = [(row["step"], row["loss"], row["val/a"]) for row in csv.DictReader((tmp_path / "metrics.csv").open())]
    assert rows == [("8", "0.5", ""), ("9", "0.4", "2"), ("10", "0.2", "")]
    assert not capsys.readouterr().err


def test_metrics_that_the_disk_did_not_take_are_written_later(tmp_path, capsys):
    file = tmp_path / "run" / "metrics.csv"
    log = MetricsFile(file)
    log.log_metrics({"a": 1.0}, 1)
    log.log_metrics({"a": 2.0}, 2)
    said = capsys.readouterr().err
    assert said.count("metrics.csv: cannot be written: No such file") == 1
    file.parent.mkdir()
    log.log_metrics({"a": 3.0}, 3)
    log.log_metrics({"a": 4.0}, 4)
    assert [row["a"] for row in csv.DictReader(file.open())] == ["1", "2", "3", "4"]


EARLY = (
    "{class_path: pytorch_lightning.callbacks.EarlyStopping, init_args: {monitor: val/denoising/psnr, mode: max,"
    " patience: 1, min_delta: 1000}}"
)


def test_a_run_that_early_stopping_ended_goes_on_as_far_and_no_further(fit, caplog):
    """At the end of an epoch, where Lightning passes over the validation of a file and calls without its metrics."""
    words = ["--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=1", "--trainer.max_steps=20"]
    words += ["--trainer.callbacks", f"[{EARLY}]"]
    run = fit("run", *words)
    whole = state(run)
    assert whole["global_step"] == 4
    fit("run", *words, "--resume", "auto")
    assert "Nothing was trained: a callback (EarlyStopping, say) ended it" in caplog.text
    assert state(run)["global_step"] == 4
    fit("run", *words, "--resume", str(run / "checkpoints" / "step-2.ckpt"))
    again = state(run)
    assert again["global_step"] == 4
    assert all(torch.equal(again["state_dict"][key], value) for key, value in whole["state_dict"].items())
    other = ["--trainer.callbacks", "null", "--allow-changed=trainer"]
    fit("run", *words[:-2], "--trainer.max_steps=6", *other, "--resume", "auto")
    assert state(run)["global_step"] == 6


def test_a_run_whose_checkpoints_lie_elsewhere_goes_on(fit, tmp_path, capsys):
    callback = f"{{class_path: densectx.checkpointing.Checkpoints, init_args: {{folder: {tmp_path / 'elsewhere'}}}}}"
    words = ["--trainer.callbacks", f"[{callback}]"]
    run = fit("run", *words, "--trainer.max_steps=2")
    assert (run / "checkpoints").resolve() == tmp_path / "elsewhere"
    assert fit("run", *words, "--resume", "auto", "--allow-changed=trainer.max_steps") == run
    assert state(run)["global_step"] == 4
    assert [folder.name for folder in run.parent.iterdir()] == ["0"]
    densectx.load(run)
    fit("other", *words, status=8)
    assert "has checkpoints of another run" in capsys.readouterr().err


def test_what_no_loader_takes_is_not_written(tmp_path):
    """numpy's float64 is a float, and its pickle names a function of numpy."""
    good = {"callbacks": {"Mine": {"best": 1.0, "seen": torch.ones(2), "rows": [(1, "a")]}}, "state_dict": {}}
    AtomicCheckpointIO().save_checkpoint(good, tmp_path / "step-1.ckpt")
    assert load_archive(tmp_path / "step-1.ckpt")["callbacks"]["Mine"]["rows"] == [(1, "a")]
    bad = {"callbacks": {**good["callbacks"], "Theirs": {"best": np.float64(1)}}, "state_dict": {}}
    with pytest.raises(ConfigError, match=r"the state of the callback Theirs .* it holds numpy"):
        AtomicCheckpointIO().save_checkpoint(bad, tmp_path / "step-2.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["step-1.ckpt"]
