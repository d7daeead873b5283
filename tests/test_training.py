"""Training as users run it: resume, start from other weights, frozen parts, averages, Python without YAML."""

import csv
import errno
import logging
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.accelerators import MPSAccelerator
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, OneCycleLR
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader

import densectx
from densectx.averaging import EMAWeightAveraging, _unless_equal, lag
from densectx.building import instantiate
from densectx.cli import main
from densectx.config import compose
from densectx.data.workers import innermost
from densectx.errors import CheckpointError, ConfigError, DataError, NumericError, StorageError
from densectx.loggers import MetricsFile
from densectx.optimizing import make_scheduler
from densectx.resilience.guards import FiniteGuard
from densectx.resilience.preemption import Preemption
from densectx.schedules import WarmupCosine, WarmupPoly
from densectx.strategies import Replicated, ddp_options
from densectx.trainer_checks import avoid_mps
from densectx.training import _write_config

CONFIG = """
model:
  backbone: {name: plain, width: 6}
  projection: {channels: 6}
  context: context7
  tasks:
    segmentation: {name: segmentation, source: mosaic, head: {name: linear, dropout: 0.5}}
    denoising: {name: denoising, source: mosaic, sigma: [0, 50]}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
  lr_scheduler: {class_path: densectx.schedules.WarmupPoly, init_args: {total_steps: 50, warmup_steps: 2}}
data:
  sources:
    mosaic: {name: mosaic, size: 24, length: 10, val_length: 3, batch_size: 4, augment: {flip: true, crop: 16}}
  num_workers: 0
trainer:
  accelerator: cpu
  max_steps: 8
  val_check_interval: 2
  check_val_every_n_epoch: null
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Run ``densectx fit`` with the config above; returns the run folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")  # restored afterwards; set by a run for the ranks it starts
    (tmp_path / "small.yaml").write_text(CONFIG)

    def fit(name, *arguments, status=0):
        assert main(["fit", "-c", "small.yaml", "--name", name, *arguments]) == status
        return tmp_path / "runs" / name / "0"

    return fit


class OfAPlugin(DataError):
    """A plug-in may have errors of its own."""


class Broken:
    """A data set whose every sample raises an error that comes of another one."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error from DataError("the one before")


@pytest.mark.parametrize("kind", [DataError, OfAPlugin, ConfigError, StorageError])
def test_an_error_of_a_loader_process_is_its_own_message(kind, monkeypatch, capsys):
    said = "/d/x.mat: no BSDS500 ground truth (ValueError: ends too early)."

    def run(arguments):
        list(DataLoader(Broken(kind(said)), num_workers=1))

    with pytest.raises(kind) as caught:
        run(())
    assert "Traceback" in str(caught.value)
    assert innermost(caught.value) == innermost(kind(said)) == said
    monkeypatch.setattr("densectx.cli._run", run)
    assert main(["lint"]) == kind.status
    assert capsys.readouterr().err == f"densectx: error: {said}\n"


def weights(run, name="last.ckpt"):
    return torch.load(run / "checkpoints" / name, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_that_ends_before_its_first_validation_says_so(fit, caplog):
    caplog.set_level(logging.INFO)
    fit("short", "--trainer.max_steps=1", "--no-report")
    assert "Nothing was validated" in caplog.text
    caplog.clear()
    fit("none", "--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--no-report")
    fit("long", "--trainer.max_steps=2", "--no-report")
    assert "Nothing was validated" not in caplog.text


def test_a_split_that_no_source_has_is_told(fit, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)
    (tmp_path / "d" / "train").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "d" / "train" / "0.png")
    run = fit(
        "run",
        "--data.sources.mosaic=null",
        "--data.sources.mine={name: folder, root: d, splits: {val: null, test: null}, batch_size: 1}",
        "--model.tasks.segmentation=null",
        "--model.tasks.denoising.source=mine",
        "--trainer.max_steps=1",
        "--no-report",
    )
    assert "Nothing will be validated: no source has a val split" in caplog.text
    assert "Nothing was validated: no source has a val split" in caplog.text
    for command, split in (("validate", "val"), ("test", "test")):
        assert main([command, "--ckpt_path", str(run)]) == 2
        assert f"no source has a {split} split; set data.sources.NAME.splits.{split}" in capsys.readouterr().err


def test_a_full_disk_does_not_cut_the_config_of_a_run(tmp_path, monkeypatch):
    def full(path, content):
        with path.open("wb") as file:
            file.write(content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    _write_config(tmp_path, "a: 1\n")
    monkeypatch.setattr(Path, "write_bytes", full)
    _write_config(tmp_path, "a: 1\n")  # nothing to write
    with pytest.raises(OSError, match="No space"):
        _write_config(tmp_path, "b: 2\n")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("config.yaml", "a: 1\n")]


@pytest.mark.parametrize("name", ["../up", "a/../../up", "{tmp_path}"])
def test_a_name_does_not_lead_out_of_the_runs_folder(fit, tmp_path, capsys, name):
    fit(name.format(tmp_path=tmp_path / "up"), status=2)
    assert "trainer.default_root_dir" in capsys.readouterr().err
    assert not (tmp_path / "up").exists()
    assert not (tmp_path / "runs").exists()
    assert (fit("a/b", "--trainer.max_steps=1", "--no-report") / "config.yaml").is_file()


EMA = "[{class_path: pytorch_lightning.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}]"


@pytest.mark.parametrize(
    ("decay", "steps", "said"),
    [
        (0.9997, 14000, "over about 3333 steps, and the run has 14000: .* Decay 0.999 covers a tenth"),
        (0.9997, 48000, ""),
        (0.9, 8, "over about 10 steps, and the run has 8"),
        (None, 4000, "decay 0.999 averages over about 1000 steps"),  # Lightning's default
        (0.999, -1, ""),  # epochs; their length is not known yet
    ],
)
def test_an_average_that_comes_too_late_is_told(decay, steps, said):
    options = {} if decay is None else {"decay": decay}
    callback = {"class_path": "pytorch_lightning.callbacks.EMAWeightAveraging", "init_args": options}
    forms = [[callback], callback, ["LearningRateMonitor", callback], *([] if options else ["EMAWeightAveraging"])]
    for callbacks in forms:
        told = lag({"trainer": {"max_steps": steps, "callbacks": callbacks}})
        assert re.search(said, told) if said else not told
    assert not lag({"trainer": {"max_steps": steps, "callbacks": None}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"update_starting_at_step": 2000}, "first update at step 2000, and the run has 2000: nothing is averaged"),
        ({"update_starting_at_step": 1991, "update_every_n_steps": 10}, "first update at step 2000"),
        ({"update_starting_at_step": 2000, "update_starting_at_epoch": 1}, ""),
        ({"update_starting_at_step": 1700}, ""),  # it covers the last 300
        ({"update_starting_at_step": 1500}, "averages over about 1000 steps"),
    ],
)
def test_where_an_average_begins_counts(options, said):
    callback = {"class_path": "EMAWeightAveraging", "init_args": options}
    told = lag({"trainer": {"max_steps": 2000, "callbacks": [callback]}})
    assert said in told if said else not told


def test_an_average_without_an_update_is_what_is_trained(fit):
    """In what is validated and in what is saved."""
    late = EMA.replace("decay: 0.9", "decay: 0.9, update_starting_at_step: 6")
    plain, averaged = fit("plain", "--no-report"), fit("late", f"--trainer.callbacks={late}", "--no-report")
    for step in (6, 8):
        expected, found = (weights(run, f"step-{step}.ckpt") for run in (plain, averaged))
        assert same(found["current_model_state"], expected["state_dict"])
        assert same(found["state_dict"], expected["state_dict"]) == (step == 6)
    rows = [[*csv.DictReader((run / "metrics.csv").open())] for run in (plain, averaged)]
    validated = [[row["val/denoising/psnr"] for row in run][:3] for run in rows]
    assert validated[0] == validated[1]
    assert all(validated[0])


def test_a_run_that_averages_no_more_goes_on_from_the_trained_weights(fit, caplog):
    caplog.set_level(logging.INFO)
    run = fit("averaged", f"--trainer.callbacks={EMA}", "--no-report")
    expected = weights(run)["current_model_state"]
    before = run / "checkpoints/step-6.ckpt"
    fit(
        "averaged", "--trainer.callbacks=null", f"--resume={before}", "--allow-changed=trainer.callbacks", "--no-report"
    )
    assert "averages no weights any more" in caplog.text
    assert same(weights(run)["state_dict"], expected)


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_an_average_that_is_not_finite_is_not_saved(name):
    module = torch.nn.BatchNorm2d(2)
    averages = {key: value.clone() for key, value in module.state_dict().items()}
    trainer, guard = SimpleNamespace(global_step=3), FiniteGuard()
    file = {"state_dict": averages, "current_model_state": module.state_dict()}
    guard.on_save_checkpoint(trainer, module, file)
    averages[name][1] = float("inf")
    with pytest.raises(NumericError, match=f"^the average of {name} is not finite after step 3; it is not saved"):
        guard.on_save_checkpoint(trainer, module, file)


def test_an_average_lies_where_the_model_will():
    module = pl.LightningModule()
    module.weight = torch.nn.Parameter(torch.zeros(2))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    for device, expected in ((None, "meta"), ("cpu", "cpu")):
        average = EMAWeightAveraging(device)
        average.setup(trainer, module, "fit")
        assert average._average_model.module.weight.device.type == expected


@pytest.mark.parametrize("form", ["EMAWeightAveraging", EMA])
def test_averages_of_what_is_frozen_are_what_it_is(fit, form):
    backbone = "{name: frontend_vgg16, width: 2, fc: 6, padding: each, norm: batch}"
    frozen = ["--model.freeze=[backbone, projection]", "--model.backbone", backbone]
    content = weights(fit("run", *frozen, "--no-report", "--trainer.callbacks", form))
    average, trained = content["state_dict"], content["current_model_state"]
    held = {key for key in trained if key.startswith(("model.backbone", "model.projection"))}
    assert all(torch.equal(average[key], trained[key]) for key in held)
    assert not all(torch.equal(average[key], trained[key]) for key in trained.keys() - held)


def test_averages_of_what_changes_are_lightnings():
    theirs, ours = get_ema_avg_fn(0.9), _unless_equal(0.9)
    a, b = torch.rand(2, 1000)
    b[:10] = a[:10]
    assert torch.equal(ours(a, b, 1)[10:], theirs(a, b, 1)[10:])
    assert torch.equal(ours(a, b, 1)[:10], a[:10])
    assert not torch.equal(theirs(a, b, 1)[:10], a[:10])


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=3"],
        ["--trainer.callbacks", EMA],
        ["--model.optimizer", "{class_path: timm.optim.Muon, init_args: {lr: 0.01}}"],
        ["--model.optimizer", "{class_path: densectx.optimizers.AdaMuon, init_args: {lr: 0.01}}"],
    ],
)
def test_resumed_run_ends_with_the_same_weights(fit, more):
    whole = fit("whole", *more)
    part = fit("part", *more, "--trainer.max_steps", "5")
    arguments = [*more, "--resume", str(part), "--allow-changed", "trainer.max_steps"]
    assert fit("part", *arguments) == part
    assert sorted(f.name for f in part.parent.iterdir()) == ["0"], "resuming goes on in the same folder"
    a, b = weights(whole), weights(part)
    assert same(a["state_dict"], b["state_dict"])
    assert a["global_step"] == b["global_step"] == 8


def test_resume_refuses_a_changed_config(fit, capsys):
    run = fit("run", "--trainer.max_steps", "2")
    fit("run", "--trainer.max_steps", "2", "--resume", str(run), "--model.tasks.denoising.weight", "2", status=2)
    assert "model.tasks.denoising.weight" in capsys.readouterr().err


def test_resume_auto_starts_fresh_then_goes_on(fit):
    run = fit("run", "--resume", "auto", "--trainer.max_steps", "2")
    assert fit("run", "--resume", "auto", "--allow-changed", "trainer", "--trainer.max_steps", "4") == run
    assert weights(run)["global_step"] == 4


@pytest.mark.fault("N10")
def test_checkpoint_rebuilds_the_model_alone(fit, tmp_path):
    run = fit("run", "--trainer.max_steps", "6")
    folder = run / "checkpoints"
    content = weights(run)
    assert "hyper_parameters" not in content
    assert content["densectx"]["format"] == 1
    assert content["densectx"]["config"]["trainer"]["max_steps"] == 6
    assert {f.name for f in folder.glob("*.ckpt") if f.is_symlink()} == {"last.ckpt", "best.ckpt"}
    assert not (folder / "last.ckpt").readlink().is_absolute()
    assert len(list(folder.glob("step-*.ckpt"))) in (2, 3)
    model = densectx.load(folder / "last.ckpt")
    answer = model.predict(torch.rand(3, 10, 10), options={"denoising.sigma": 10})
    assert {k: tuple(v.shape) for k, v in answer.items()} == {"segmentation": (10, 10, 10), "denoising": (3, 10, 10)}
    densectx.checkpoint.save_safetensors(model, tmp_path / "m.safetensors")
    assert same(densectx.load(tmp_path / "m.safetensors").state_dict(), model.state_dict())


def test_validation_measures_what_the_fit_measured(fit, capsys):
    run = fit("run", "--trainer.max_steps", "2")
    table = capsys.readouterr().out.strip().splitlines()[-3:]
    assert table[0].split() == ["task", "metric", "value", "trivial", "answer", "its", "value"]
    assert main(["validate", "-c", "small.yaml", "--trainer.max_steps", "2", "--ckpt_path", str(run)]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-3:] == table


@pytest.mark.fault("N11")
def test_a_task_is_added_to_a_trained_model(fit, capsys):
    first = fit("first", "--trainer.max_steps", "2")
    second = fit(
        "second",
        "--trainer.max_steps=2",
        "--model.tasks.colorization={name: colorization, source: mosaic}",
        f"--init_from={first}",
        "--model.freeze=[backbone, context]",
        "--model.param_groups=[{match: tasks.segmentation.*, lr: 0.0, weight_decay: 0.0}]",
    )
    old, new = weights(first)["state_dict"], weights(second)["state_dict"]
    for key, value in new.items():
        if key.startswith(("model.backbone", "model.context", "model.tasks.segmentation")):
            assert torch.equal(value, weights(first, "best.ckpt")["state_dict"][key]), key
    assert any(key.startswith("model.tasks.colorization") for key in new.keys() - old.keys())
    assert not torch.equal(new["model.projection.0.weight"], old["model.projection.0.weight"])


@pytest.mark.parametrize("frozen", ["tasks.denoising", "tasks"])
def test_a_frozen_task_still_makes_the_samples_of_training(frozen):
    """The trunk goes on seeing every level of noise, not the one that is evaluated."""
    data = densectx.DataModule({"mosaic": {"name": "mosaic", "size": 16, "length": 4, "val_length": 1}})
    head = {"name": "linear", "dropout": 0.5}
    tasks = {
        "denoising": {"name": "denoising", "source": "mosaic", "sigma": [0, 50], "blind": True, "head": head},
        "super_resolution": {"name": "super_resolution", "source": "mosaic", "scale": 2},
    }
    model = densectx.DenseModel.from_config({"backbone": "plain", "projection": None, "tasks": tasks}, data.info())
    module = densectx.DenseModule(model, torch.optim.SGD, freeze=[frozen])
    pl.Trainer(
        max_steps=1, limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False
    ).fit(module, data)
    task = model.task("denoising")
    assert task.training
    assert not any(part.training for part in task.head.modules())
    sample = next(iter(data.train_dataloader()))["mosaic"]
    rngs = [torch.Generator().manual_seed(index) for index in range(4)]
    x, target = task.prepare(sample, rngs)
    assert len({float(level) for level in (x - target["image"]).std((1, 2, 3))}) == 4


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.freeze=[backbon]", "did you mean 'backbone'"),
        ("--model.param_groups=[{match: nothing.*, lr: 1}]", "matches no trained parameter"),
        ("--model.balancing=uncertainy", "did you mean 'uncertainty'"),
        ("--model.optimizer.class_path=os.system", "os.system"),
        ("--model.optimizer.init_args.lrr=1", "lrr"),
        ("--trainer.max_step=3", "did you mean 'max_steps'"),
        ("--data.sources.mosaic.batch_size=0", "batch_size"),
        ("--requires=[nowhere-edges]", "pip install nowhere-edges"),
        ("--init_from=nowhere.ckpt", "nowhere.ckpt"),
    ],
)
def test_what_cannot_work_is_refused(fit, capsys, flag, message):
    status = 5 if "requires" in flag else 4 if "init_from" in flag else 2
    fit("bad", flag, status=status)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.fault("N08")
def test_bf16_channels_last_and_compile_keep_clean_keys(fit):
    plain = fit("plain", "--trainer.max_steps", "1")
    more = ["--trainer.precision=bf16-mixed", "--model.channels_last=true", "--model.compile=true"]
    fast = fit("fast", "--trainer.max_steps", "1", *more)
    assert weights(plain)["state_dict"].keys() == weights(fast)["state_dict"].keys()
    assert densectx.load(fast).predict(torch.rand(3, 8, 8), ["segmentation"])["segmentation"].dtype == torch.float32


@pytest.mark.fault("N11")
def test_damaged_and_foreign_checkpoints_are_refused(fit, tmp_path):
    run = fit("run", "--trainer.max_steps", "1")
    file = run / "checkpoints" / "last.ckpt"
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(file.read_bytes()[:5000])
    content = weights(run)
    content["densectx"]["format"] = 99
    torch.save(content, tmp_path / "new.ckpt")
    content["densectx"]["format"] = 1
    content["state_dict"].pop("model.backbone.layers.0.weight")
    torch.save(content, tmp_path / "less.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for name, message in (
        ("cut.ckpt", "cannot be read"),
        ("new.ckpt", "format 99"),
        ("less.ckpt", "1 missing"),
        ("foreign.ckpt", "no checkpoint of densectx"),
        ("none.ckpt", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            densectx.load(tmp_path / name)


def test_interrupt_ends_with_130_and_leaves_whole_checkpoints(tmp_path):
    (tmp_path / "small.yaml").write_text(CONFIG)
    words = ["fit", "-c", "small.yaml", "--trainer.max_steps", "100000", "--model.lr_scheduler", "null"]
    environment = {**os.environ, "PYTHONPATH": str(Path(densectx.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment.pop("DENSECTX_RUN", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "densectx", *words],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    last = tmp_path / "runs" / "small" / "0" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 100
    while not last.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    densectx.load(last)


def test_python_without_yaml(tmp_path):
    data = densectx.DataModule({"m": {"name": "mosaic", "size": 16, "length": 8, "val_length": 2}}, num_workers=0)
    model = densectx.DenseModel.from_config(
        {"backbone": "plain", "tasks": {"denoising": {"name": "denoising", "source": "m"}}}, data.info()
    )
    module = densectx.DenseModule(model, lambda params: torch.optim.SGD(params, lr=0.01))
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(Path(tmp_path) / "m.ckpt")
    assert densectx.load(tmp_path / "m.ckpt").predict(torch.rand(3, 5, 5))["denoising"].shape == (3, 5, 5)


def test_schedules():
    def rates(schedule):
        out = []
        for _ in range(10):
            out.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return out

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    poly = rates(WarmupPoly(optimizer, total_steps=10, warmup_steps=0, power=2))
    assert poly == pytest.approx([(1 - i / 10) ** 2 for i in range(10)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = rates(WarmupCosine(optimizer, total_steps=10, warmup_steps=3, final=0.1))
    assert cosine[0] < cosine[1] < cosine[2] < cosine[3] > cosine[4]
    assert min(cosine[3:]) >= 0.1


def test_the_part_of_time_that_is_gone_counts_where_it_is_more():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupPoly(optimizer, total_steps=100, power=1, timed=True)
    found = []
    for gone in (0.0, 0.1, 0.5, 1.0):
        schedule.time_gone = gone
        optimizer.step()
        schedule.step()
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([0.99, 0.9, 0.5, 0.0])
    again = WarmupPoly(optimizer, timed=True)
    again.load_state_dict(schedule.state_dict())
    assert again.time_gone == 1.0


TIMED = [
    "--model.lr_scheduler",
    "{class_path: densectx.schedules.WarmupPoly, init_args: {total_steps: null, warmup_steps: 0, timed: true, power: 1}}",
]


def rows(run, column):
    """The steps that a column of metrics.csv has numbers of."""
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row[column]]


def test_a_timed_schedule_ends_with_the_time(fit):
    short = ["--trainer.max_steps", "-1", "--trainer.max_time", "00:00:00:04", "--trainer.log_every_n_steps", "1"]
    run = fit("run", *TIMED, *short, "--trainer.val_check_interval", "100000")
    with (run / "metrics.csv").open() as file:
        rates = [float(row["lr-AdamW"]) for row in csv.DictReader(file) if row["lr-AdamW"]]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.3 * rates[0]
    before = weights(run)["global_step"]
    validated = rows(run, "val/denoising/psnr")
    more = [*TIMED, *short, "--trainer.val_check_interval", "100000", "--trainer.max_time", "00:00:00:08"]
    fit("run", "--resume", str(run), "--allow-changed", "trainer.max_time", *more)
    after = weights(run)["global_step"]
    assert after > before
    assert rows(run, "lr-AdamW") == list(range(after)), "a row a step: none twice, none left out"
    assert rows(run, "val/denoising/psnr") == [*validated, after - 1], "what was measured before is kept"


def test_a_timed_run_goes_on_by_steps(fit):
    run = fit("run", *TIMED, "--trainer.max_time", "00:00:10:00", "--trainer.max_steps", "4")
    steps = ["--model.lr_scheduler.init_args", "{timed: false, total_steps: 8}", "--trainer.max_steps", "6"]
    more = [word for key in ("model.lr_scheduler", "trainer") for word in ("--allow-changed", key)]
    fit("run", "--resume", str(run), *TIMED, *steps, *more)
    content = weights(run)
    assert content["global_step"] == 6
    assert content["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.01 * 2 / 8)


def test_a_timed_schedule_without_a_limit_is_refused(fit, capsys):
    run = fit("run", *TIMED, status=2)
    assert not run.exists()
    assert "model.lr_scheduler: timed: true needs trainer.max_time" in capsys.readouterr().err
    fit("run", "--model.lr_scheduler", "{init_args: {total_steps: null}}", status=2)
    assert "model.lr_scheduler: total_steps is missing" in capsys.readouterr().err
    fit("run", "--model.optimizer", "{class_path: densectx.optimizers.AdaMuon, init_args: {lr: -1}}", status=2)
    assert "model.optimizer: lr -1.0 is not in [0, inf). (flag)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("schedule", "options"),
    [(WarmupPoly, {"power": -1.0}), (WarmupCosine, {"final": -1.0}), (WarmupCosine, {"final": 2.0})],
)
def test_a_schedule_that_would_go_up_or_below_0_is_refused(schedule, options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match=f"{next(iter(options))} "):
        schedule(optimizer, total_steps=10, **options)


def test_going_on_from_an_older_file_keeps_what_it_writes(fit):
    run = fit("run", "--trainer.max_steps", "6")
    old = run / "checkpoints" / "step-4.ckpt"
    fit("run", "--trainer.max_steps=6", "--trainer.val_check_interval=1", "--allow-changed=trainer", f"--resume={old}")
    assert weights(run)["global_step"] == 6
    assert (run / "checkpoints" / "step-5.ckpt").exists()


def test_a_resumed_run_needs_its_first_weights_no_more(fit):
    first = fit("first", "--trainer.max_steps", "2")
    second = fit("second", "--trainer.max_steps", "2", "--init_from", str(first))
    (first / "checkpoints").rename(first / "gone")
    more = ["--trainer.max_steps", "4", "--allow-changed", "trainer"]
    assert fit("second", "--init_from", str(first), "--resume", str(second), *more) == second


def test_a_loss_that_is_not_finite_stops_before_the_weights(fit, capsys):
    run = fit("bad", "--model.optimizer.init_args.lr=1e30", "--model.lr_scheduler=null", status=6)
    error = capsys.readouterr().err
    assert "not finite at step" in error
    assert "mosaic" in error
    assert run.exists()


def test_full_disk_is_named_with_status_8(fit, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "step-2.ckpt")

    monkeypatch.setattr(torch, "save", full)
    fit("full", status=8)
    assert "step-2.ckpt: cannot be written: No space left" in capsys.readouterr().err


ONE_CYCLE = (
    "--model.lr_scheduler={class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {max_lr: 0.01, total_steps: 50}}"
)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.optimizer.init_args.lr=-1"], "Invalid learning rate"),
        (["--model.lr_scheduler={class_path: torch.optim.lr_scheduler.ReduceLROnPlateau}"], "see no metric"),
        (["--trainer.precision=bf16-true"], "bf16-mixed"),
        (["--trainer.sync_batchnorm=true"], "norm group"),
        (["--trainer.accumulate_grad_batches=3"], "no multiple"),
        (["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=00:00:10:00"], "a number of batches"),
        (["--model.context.init_noise=-1"], "negative"),
        (["--model.context={name: aspp, rates: [0]}"], "positive"),
        (["--model.backbone={name: timm, model: resnet10t, levels: 9}"], "levels"),
        (["--model.tasks.keys={name: denoising, source: mosaic}"], "cannot be called 'keys'"),
        (["--model.param_groups=[{match: backbone.*, lrr: 1}]"], "did you mean 'lr'"),
        (["--requires=densectx-edges"], "expected a list"),
        (["--model.tasks.denoising.head=linear"], "model.backbone.in_channels to 4"),
        (["--model.tasks.denoising.weight=.inf"], "weight inf"),
        (["--model.tasks.denoising.test_sigma=-25"], "test_sigma -25"),
        (["--model.tasks.denoising.test_gain=0.1"], "poisson_gaussian has a gain"),
        (["--model.tasks.segmentation.loss={name: cross_entropy, class_weights: [-1, 1, 1]}"], "class_weights"),
        (["--model.param_groups=[{match: backbone.*, weight_decay: -5}]"], "weight_decay: expected a number from 0 up"),
        (["--model.param_groups=[{match: a.*, lr: 1}, {match: a.*, lr: 2}]"], "two groups match 'a.*'"),
        (["--trainer.overfit_batches=1"], "limit_train_batches"),
        (["--trainer.precision=64"], "inputs, losses and sums are float32"),
        (["--trainer.use_distributed_sampler=true"], "trainer.use_distributed_sampler: the data's own sampler"),
        (["--trainer.strategy=ddp_spawn", "--trainer.devices=2"], "trainer.strategy: 'ddp_spawn' would copy a run"),
        (["--trainer.strategy=fsdp"], "trainer.strategy: 'fsdp' is not possible: every process holds all weights"),
        (["--trainer.strategy=dpp"], "trainer.strategy: unknown strategy 'dpp'; did you mean 'ddp'?"),
        (["--trainer.strategy={class_path: ModelParallelStrategy}"], "'ModelParallelStrategy' is not possible"),
        (["--trainer.strategy={class_path: pytorch_lightning.strategies.DeepSpeedStrategy}"], "is not possible"),
        (["--trainer.strategy={class_path: pytorch_lightning.strategies.DDPStrateg}"], "did you mean 'DDPStrategy'?"),
        (["--trainer.accelerator=mps"], "trainer.accelerator: Apple's GPU (mps) has no float64"),
        (["--model.freeze=backbone"], "model.freeze: expected a list (a text each) or null, got 'backbone'"),
        (["--model.param_groups={match: a}"], "model.param_groups: expected a list"),
        (["--model.channels_last=maybe"], "model.channels_last: expected true or false, got 'maybe'"),
        (["--model.compile=3"], "model.compile: expected true or false, got 3"),
        (["--data.num_workers=two"], "data.num_workers: expected a whole number, got 'two'"),
        (
            ["--model.optimizer.class_path=torch.optim.Adamm"],
            "torch.optim has no class 'Adamm' (flag); did you mean 'Adam'?",
        ),
        (["--trainer.callbacks=[{class_path: densectx.callbacks.Pictures, init_args: {rows: 0}}]"], "rows 0"),
        ([f"--trainer.callbacks={EMA.replace('0.9', '99.9')}"], "decay 99.9 is not in [0, 1)"),
        ([f"--trainer.callbacks={EMA.replace('decay: 0.9', 'update_every_n_steps: 0')}"], "is not 1 or more"),
        (
            ["--model.param_groups=[{match: backbone.*, betas: [0.9]}]"],
            "betas: expected 2 numbers in [0, 1), got [0.9]",
        ),
        (["--model.param_groups=[{match: backbone.*, betas: [1.5, -2]}]"], "betas: expected 2 numbers in [0, 1)"),
        ([ONE_CYCLE, "--model.param_groups=[{match: backbone.*, lr: 0.1}]"], "give max_lr (and base_lr) as a list"),
        ([ONE_CYCLE, "--trainer.max_steps=51"], "OneCycleLR ends after 50 steps, and the run after 51"),
        (["--trainer.callbacks=[StochasticWeightAveraging]"], "take EMAWeightAveraging"),
    ],
)
def test_more_that_cannot_work(fit, capsys, flags, message):
    fit("bad", *flags, status=2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("schedule", "options", "fine"),
    [
        (OneCycleLR, {"max_lr": 1.0, "total_steps": 9}, False),
        (OneCycleLR, {"max_lr": [1.0, 0.2], "total_steps": 9}, True),
        (CyclicLR, {"base_lr": 0.1, "max_lr": 1.0}, False),
        (CyclicLR, {"base_lr": [0.1, 0.2], "max_lr": [1.0, 2.0]}, True),
        (CosineAnnealingLR, {"T_max": 9}, True),
        (WarmupPoly, {"total_steps": 9, "warmup_steps": 3}, True),
    ],
)
def test_rates_of_groups_are_not_overwritten(schedule, options, fine):
    one, other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [other], "lr": 0.01}], lr=0.1, momentum=0.9)
    with nullcontext() if fine else pytest.raises(ConfigError, match=r"rates \[0.1, 0.01\], .* in this order"):
        make_scheduler(partial(schedule, **options), optimizer)


def test_a_schedule_that_takes_no_step_behind_its_end(fit, capsys):
    short = ONE_CYCLE.replace("50", "3")
    fit("timed", short, "--trainer.max_steps=-1", "--trainer.max_time=00:00:10:00", status=2)  # its steps are not known
    assert "model.lr_scheduler: OneCycleLR: Tried to step 4 times" in capsys.readouterr().err
    run = fit("run", short, "--trainer.max_steps=3", "--no-report")
    more = ["--trainer.max_steps=5", f"--resume={run}", "--no-report", "--allow-changed=trainer"]
    fit("run", short, *more, status=2)
    assert "OneCycleLR ends after 3 steps, and the run after 5" in capsys.readouterr().err
    fit("run", ONE_CYCLE.replace("50", "2"), *more, "--allow-changed=model.lr_scheduler", status=2)
    assert "OneCycleLR: Tried to step 3 times" in capsys.readouterr().err
    fit("run", ONE_CYCLE.replace("50", "5"), *more, "--allow-changed=model.lr_scheduler")
    assert weights(run)["global_step"] == 5


def test_a_batch_norm_of_one_number_a_channel_is_told(fit, capsys):
    source = "--data.sources.mosaic="
    fit(
        "small",
        "--model.backbone={name: plain, width: 6, unshuffle: 8}",
        "--model.context.norm=batch",
        f"{source}{{name: mosaic, size: 24, length: 4, val_length: 1, batch_size: 1, augment: {{crop: 8}}}}",
        status=2,
    )
    assert "batch of [1, 6, 1, 1] (B, C, h, w). Take batches of 2 or more" in capsys.readouterr().err


def test_callbacks_and_plugins_in_lightnings_short_forms(fit):
    run = fit(
        "short",
        "--trainer.max_steps=2",
        "--trainer.callbacks=[LearningRateMonitor, {class_path: EarlyStopping, init_args: {monitor: val/denoising/psnr, mode: max}}]",
        "--trainer.plugins={class_path: pytorch_lightning.plugins.environments.LightningEnvironment}",
    )
    assert (run / "checkpoints" / "last.ckpt").is_symlink()


def test_groups_take_the_negative_numbers_of_their_optimizer(fit, capsys):
    """``beta2_decay`` of Adafactor is -0.8 where nothing is said."""
    given = "--model.optimizer={class_path: torch.optim.Adafactor, init_args: {lr: 0.01}}"
    given = [given, "--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--no-report"]
    run = fit("run", *given, "--model.param_groups=[{match: backbone.*, beta2_decay: -0.7}]")
    groups = weights(run)["optimizer_states"][0]["param_groups"]
    assert {group["beta2_decay"] for group in groups} == {-0.7, -0.8}
    fit("bad", *given, "--model.param_groups=[{match: backbone.*, beta2_decay: -.inf}]", status=2)
    assert "beta2_decay: expected a finite number, got -inf" in capsys.readouterr().err


@pytest.mark.usefixtures("fit")
def test_callbacks_by_their_short_names_are_not_doubled(tmp_path):
    short = "[{class_path: FiniteGuard, init_args: {skip: 3}}, Pictures, Checkpoints, Preemption, Replicas]"
    config = compose(["small.yaml"], [("trainer.callbacks", short)]).values
    trainer, _, _ = instantiate(config, tmp_path / "run", "fit")
    found = [type(callback).__name__ for callback in trainer.callbacks]
    assert len(set(found)) == len(found), found
    assert [callback.skip for callback in trainer.callbacks if isinstance(callback, FiniteGuard)] == [3]


def test_a_pre_release_that_is_installed_meets_a_requirement(fit, distribute, capsys):
    distribute("plug-early", {}, version="0.2.0.dev1")
    fit("early", "--requires=[plug-early>=0.1]", "--print_config")
    fit("early", "--requires=[plug-early>=0.2]", "--print_config", status=5)
    assert "the config needs plug-early>=0.2, installed is 0.2.0.dev1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--allow-changed", "trainer"], "--allow-changed is for a run that goes on"),
        (["validate", "--ckpt_path", "RUN", "--allow-changed=data"], "--allow-changed is for a run that goes on"),
        (["validate", "--ckpt_path", "RUN", "--name", "run"], "validate has no --name"),
        (["test", "--ckpt_path", "RUN", "--name=run"], "test has no --name"),
        (["fit", "--resume", "RUN", "--name", "other"], "--name other: --resume RUN goes on in RUN, whatever its name"),
        (["fit", "--resume", "RUN/checkpoints/last.ckpt", "--name", "n"], "goes on in RUN, whatever its name"),
    ],
)
def test_misplaced_options_are_refused(fit, capsys, words, message):
    (run := fit("run", "--help")).joinpath("checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").write_bytes(b"")
    words = [word.replace("RUN", "runs/run/0") for word in words]
    assert main([*words, "-c", "small.yaml"]) == 2
    assert message.replace("RUN", "runs/run/0") in capsys.readouterr().err


def test_ablated_trunk_trains_and_gets_no_gradient(fit):
    run = fit("zero", "--trainer.max_steps=2", "--model.ablate=trunk_zero", "--model.context.init_noise=0.1")
    start = fit("start", "--trainer.max_steps=1", "--model.ablate=trunk_zero", "--model.optimizer.init_args.lr=0.0")
    a, b = weights(run)["state_dict"], weights(start)["state_dict"]
    assert a.keys() == b.keys()


def test_metrics_file_goes_on_where_a_run_goes_on(tmp_path):
    first = MetricsFile(tmp_path / "metrics.csv")
    first.log_metrics({"a": 1.0}, 1)
    first.log_metrics({"b": 2.0}, 1)
    for step in (2, 3, 4):
        first.log_metrics({"a": step}, step)
        first.log_metrics({"b": step}, step)
    second = MetricsFile(tmp_path / "metrics.csv")
    second.log_metrics({"a": 30.0}, 3)
    assert [row["step"] for row in csv.DictReader((tmp_path / "metrics.csv").open())] == ["1", "2", "3"]
    second.log_metrics({"c": 7.0}, 3)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(r["step"], r["a"], r["b"], r["c"]) for r in rows] == [
        ("1", "1", "2", ""),
        ("2", "2", "2", ""),
        ("3", "30", "", "7"),
    ]


STOPPING = "{class_path: EarlyStopping, init_args: {monitor: METRIC, mode: max}}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--trainer.val_check_interval=00:00:10:00", "--trainer.devices=2", "--trainer.strategy=ddp"],
            "trainer.val_check_interval: '00:00:10:00' is a time: each of 2 ranks",
        ),
        (
            ["--trainer.val_check_interval=1000", "--trainer.check_val_every_n_epoch=1"],
            "trainer.val_check_interval: 1000 batches, and an epoch has 3",
        ),
        (
            ["--trainer.callbacks", f"[{STOPPING.replace('METRIC', 'val/denoising/psrn')}]"],
            "EarlyStopping: monitor: unknown metric 'val/denoising/psrn'; did you mean 'val/denoising/psnr'?",
        ),
        (
            ["--trainer.callbacks", f"[{STOPPING.replace('METRIC', 'val/denoisin/psnr')}]"],
            "EarlyStopping: monitor: unknown metric 'val/denoisin/psnr'; did you mean 'val/denoising/psnr'?",
        ),
    ],
)
def test_when_to_validate_and_what_to_watch_is_refused_with_a_fix(fit, capsys, words, message):
    fit("run", *words, status=2)
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_rate_that_is_0_before_the_end_is_told(fit, caplog):
    total = "--model.lr_scheduler.init_args.total_steps"
    run = fit("run", f"{total}=${{trainer.max_steps}}", "--trainer.max_steps=4")
    assert "train at rate 0" not in caplog.text
    words = ["--resume", str(run), "--trainer.max_steps=6", "--allow-changed=trainer.max_steps"]
    assert main(["fit", *words]) == 0
    assert "total_steps 4 is before trainer.max_steps 6: the last 2 steps train at rate 0" in caplog.text
    caplog.clear()
    words[2:] = ["--trainer.max_steps=8", "--allow-changed=trainer.max_steps", f"{total}=8"]
    assert main(["fit", *words, "--allow-changed=model.lr_scheduler"]) == 0
    assert "train at rate 0" not in caplog.text


@pytest.mark.parametrize(
    ("trainer", "unused"),
    [
        ({"strategy": "ddp", "devices": 2}, False),
        ({"strategy": "ddp_find_unused_parameters_true", "devices": 2}, True),
        ({"devices": "0,1", "accelerator": "gpu"}, False),
        ({"devices": "0,", "accelerator": "gpu"}, None),
        ({"strategy": "ddp_spawn", "devices": 2}, None),
    ],
)
def test_ranks_wait_as_long_as_they_are_told_to(trainer, unused):
    options = ddp_options(trainer)
    assert options is None if unused is None else options.get("find_unused_parameters", False) == unused


@pytest.mark.parametrize(
    "flags",
    [
        [("trainer.strategy", "ddp_find_unused_parameters_true")],
        [
            ("trainer.strategy.class_path", "pytorch_lightning.strategies.DDPStrategy"),
            ("trainer.strategy.init_args.find_unused_parameters", "true"),
        ],
    ],
)
def test_the_strategy_of_a_config_has_the_limit_of_the_environment(tmp_path, monkeypatch, flags):
    monkeypatch.setenv("DENSECTX_TIMEOUT", "77")
    (tmp_path / "small.yaml").write_text(CONFIG)
    values = compose([tmp_path / "small.yaml"], [*flags, ("trainer.devices", "2")]).values
    trainer, _, _ = instantiate(values, tmp_path, "fit")
    assert trainer.strategy._timeout.total_seconds() == 77
    assert trainer.strategy._ddp_kwargs["find_unused_parameters"] is True
    trainer.strategy.parallel_devices = [torch.device("cuda", 0)] * 2
    assert trainer.strategy.determine_ddp_device_ids() is None, "DDP moves no part of a batch"


def test_a_limit_of_ones_own_counts(tmp_path):
    (tmp_path / "small.yaml").write_text(CONFIG)
    own = "{class_path: DDPStrategy, init_args: {timeout: '0:00:33'}}"
    values = compose([tmp_path / "small.yaml"], [("trainer.strategy", own), ("trainer.devices", "2")]).values
    trainer, _, _ = instantiate(values, tmp_path, "fit")
    assert trainer.strategy._timeout.total_seconds() == 33


@pytest.mark.parametrize(("has_gpu", "seconds"), [(False, 77), (True, 137)])
def test_nccl_waits_longer_than_the_watchdog(has_gpu, seconds, monkeypatch):
    monkeypatch.setenv("DENSECTX_TIMEOUT", "77")
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    assert Replicated()._timeout.total_seconds() == seconds


def test_the_cpu_is_taken_where_lightning_would_take_apples_gpu(monkeypatch, caplog):
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    trainer = {}
    avoid_mps(trainer)
    assert trainer == {"accelerator": "cpu"}
    assert "trainer.accelerator: auto is cpu" in caplog.text
    with pytest.raises(ConfigError, match=r"trainer.accelerator: Apple's GPU"):
        avoid_mps({"accelerator": "gpu"})


def test_ranks_that_agree_about_signals_wait_as_long_as_they_are_told_to(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSECTX_TIMEOUT", "77")
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, barebones=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        agreeing = Preemption()
        agreeing.setup(trainer, pl.LightningModule(), "fit")
        backend = agreeing._group._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == 77
    finally:
        torch.distributed.destroy_process_group()
