"""A run on one process that is signalled, starved, hung or asked for nonsense."""

import csv
import errno
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from densectx.checkpoint import read
from densectx.errors import ConfigError
from densectx.resilience.lock import locked, refuse_held

pytestmark = pytest.mark.xdist_group("processes")  # one at a time: they measure how long things take

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
    mosaic: {name: mosaic, size: 24, length: 48, val_length: 6, batch_size: 4, augment: {flip: true, crop: 16}}
  num_workers: 0
trainer:
  accelerator: cpu
  max_steps: 20
  val_check_interval: 12
  check_val_every_n_epoch: null
  log_every_n_steps: 1
  accumulate_grad_batches: 3
  enable_progress_bar: false
  enable_model_summary: false
"""
EMA = "{class_path: pytorch_lightning.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the config above."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")  # restored afterwards; set by a run for the ranks it starts
    (tmp_path / "small.yaml").write_text(CONFIG)
    return tmp_path


def start(server, folder, name, *arguments, **options):
    return server.start(folder, "fit", "-c", "small.yaml", "--name", name, "--no-report", *arguments, **options)


def logged(run):
    """The last optimizer step in metrics.csv."""
    try:
        lines = (run / "metrics.csv").read_text().splitlines()
    except OSError:
        return -1
    return int(lines[-1].partition(",")[0]) if len(lines) > 1 and lines[-1][:1].isdigit() else -1


def validations(run):
    """{step: what a validation measured}."""
    rows = csv.DictReader((run / "metrics.csv").open())
    found = {row["step"]: {k: v for k, v in row.items() if k.startswith("val/")} for row in rows}
    return {step: values for step, values in found.items() if any(values.values())}


def until_step(job, run, step):
    job.until(lambda: logged(run) >= step)


def until_said(job, text):
    job.until(lambda: text in job.said())


def alive(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def weights(run, name="last.ckpt"):
    return torch.load(run / "checkpoints" / name, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.fault("T05")
@pytest.mark.fault("T07")
def test_signals_save_and_the_run_goes_on_exactly(fork_server, folder, record_property):
    sent = {
        "training": [[signal.SIGUSR1, 2], [signal.SIGHUP, 4], [signal.SIGINT, 14]],
        "validation": [[signal.SIGTERM, 12]],
    }
    callback = f"{{class_path: faulty.Signals, init_args: {json.dumps(sent)}}}"
    more = ["--allow-import=faulty", f"--trainer.callbacks=[{EMA}, {callback}]"]
    (folder / "whole").mkdir()
    (folder / "whole" / "small.yaml").write_text(CONFIG)
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        (folder / "whole" / f"signal-{number}").touch()  # not again
    whole = start(fork_server, folder / "whole", "run", *more)
    run, seconds, resume = folder / "runs" / "run" / "0", [], []
    for number, step, status in ((signal.SIGHUP, 5, 143), (signal.SIGTERM, 12, 143), (signal.SIGINT, 15, 130)):
        job = start(fork_server, folder, "run", *more, *resume)
        job.until((folder / f"signal-{number}").exists)
        began = time.monotonic()
        assert job.wait() == [status], job.said()
        seconds.append(time.monotonic() - began)
        assert (run / "checkpoints" / f"step-{step}.ckpt").resolve() == (run / "checkpoints" / "last.ckpt").resolve()
        assert f"{number.name} at step {step}: saved" in job.said()
        assert resume or "SIGUSR1 at step 3: saved" in job.said()
        assert "Traceback" not in job.said()
        assert (run / "preempted").exists() == (status == 143)
        resume = ["--resume", run]
    job = start(fork_server, folder, "run", *more, *resume)
    assert (job.wait(), whole.wait()) == ([0], [0]), job.said()
    assert not (run / "preempted").exists()
    other = folder / "whole" / "runs" / "run" / "0"
    a, b = weights(other), weights(run)
    assert a["global_step"] == b["global_step"] == 20
    assert same(a["state_dict"], b["state_dict"]), "averaged weights and all"
    assert a["callbacks"].keys() == b["callbacks"].keys()
    assert validations(other) == validations(run)
    assert len(validations(run)) == 5
    assert max(seconds) < 15, "5 s and a step; the machine may be busy with other tests"
    record_property("count", 4)
    record_property("evidence", f"saved and left within {max(seconds):.1f} s of the signal")


@pytest.mark.fault("T05")
@pytest.mark.parametrize("limit", [["--trainer.max_steps=20"], ["--trainer.max_steps=-1", "--trainer.max_epochs=5"]])
def test_a_validation_that_a_kill_came_before_is_done_when_the_run_goes_on(fork_server, folder, limit):
    """Step 4 ends an epoch, 20 the run: every step is saved, and Lightning itself takes their validations for done."""
    run, whole = folder / "runs" / "run" / "0", folder / "runs" / "whole" / "0"
    checkpoints = "{class_path: densectx.checkpointing.Checkpoints, init_args: {every_n_steps: 1}}"
    resume = ["--allow-import=faulty", *limit, "--resume=auto", "--allow-changed=trainer.callbacks"]

    def job(name, training, validation):
        sent = json.dumps({"training": training, "validation": validation})
        callbacks = f"{EMA}, {{class_path: faulty.Signals, init_args: {sent}}}, {checkpoints}"
        return start(fork_server, folder, name, *resume, f"--trainer.callbacks=[{callbacks}]")

    undisturbed = job("whole", [], [])
    for training, validation, status in (([], [[9, 4]], -9), ([[15, 6]], [], 143), ([], [[9, 20]], -9)):
        (folder / "signal-9").unlink(missing_ok=True)
        assert job("run", training, validation).wait() == [status]
    steps = len(validations(run))
    last = start(fork_server, folder, "run", *resume, f"--trainer.callbacks=[{EMA}, {checkpoints}]")
    assert (last.wait(), undisturbed.wait()) == ([0], [0]), last.said()
    assert steps == 4
    assert "before the validation at step 20" in last.said()
    assert validations(run) == validations(whole)
    assert os.readlink(run / "checkpoints" / "best.ckpt") == os.readlink(whole / "checkpoints" / "best.ckpt")
    assert same(weights(run)["state_dict"], weights(whole)["state_dict"])
    again = start(fork_server, folder, "run", *resume, f"--trainer.callbacks=[{EMA}, {checkpoints}]")
    assert again.wait() == [0]
    assert "Nothing was trained: trainer.max_" in again.said()


@pytest.mark.fault("T07")
def test_changed_rates_are_in_the_file_of_a_validation_that_is_done_again(fork_server, folder):
    callback = "{class_path: faulty.Signals, init_args: {training: [[1, 13]], validation: [[15, 12]]}}"
    more = ["--allow-import=faulty", f"--trainer.callbacks=[{callback}]"]
    rates = []
    for lr in ("0.01", "0.001"):
        job = start(fork_server, folder, "run", *more, "--model.optimizer.init_args.lr", lr, "--resume=auto")
        assert job.wait() == [143], job.said()
        file = folder / "runs" / "run" / "0" / "checkpoints" / "step-12.ckpt"
        rates.append(torch.load(file, weights_only=True)["optimizer_states"][0]["param_groups"][0]["lr"])
        more += ["--allow-changed", "model.optimizer"] * (lr == "0.01")
    assert rates[1] == pytest.approx(rates[0] / 10)


@pytest.mark.fault("T05")
def test_a_signal_in_the_last_step_lets_the_run_end(fork_server, folder):
    callback = "{class_path: faulty.Signals, init_args: {training: [[15, 1]], validation: []}}"
    more = ["--allow-import=faulty", f"--trainer.callbacks=[{callback}]", "--trainer.max_steps=2"]
    job = start(fork_server, folder, "run", *more, "--trainer.val_check_interval=3")
    assert job.wait() == [0], job.said()
    run = folder / "runs" / "run" / "0"
    assert "SIGTERM at step 2: saved" in job.said()
    assert len(validations(run)) == 2
    assert not (run / "preempted").exists()


@pytest.mark.fault("T05")
def test_a_signal_in_the_validation_after_the_time_lets_the_run_end(fork_server, folder):
    callback = "{class_path: faulty.Signals, init_args: {training: [], validation: [[15, -1]]}}"
    more = ["--allow-import=faulty", f"--trainer.callbacks=[{callback}]", "--trainer.max_steps=-1"]
    more += ["--trainer.max_time=00:00:00:02", "--trainer.val_check_interval=30000"]
    job = start(fork_server, folder, "run", *more)
    assert job.wait() == [0], job.said()
    run = folder / "runs" / "run" / "0"
    assert (folder / "signal-15").exists()
    assert len(validations(run)) == 1
    assert (run / "checkpoints" / "best.ckpt").exists()
    assert not (run / "preempted").exists()
    job = start(fork_server, folder, "run", *more, "--resume", run)
    assert job.wait() == [0], job.said()
    assert "Nothing was trained: the time of trainer.max_time is gone already" in job.said()


def reader(how, **options):
    """Flags for the data set with one faulty index."""
    spec = {"name": "faulty:Reader", "how": how, "batch_size": 4, **options}
    return ["--allow-import=faulty", f"--data.sources={json.dumps({'mosaic': spec})}"]


@pytest.mark.fault("T07")
def test_a_second_interrupt_leaves_at_once(fork_server, folder):
    job = start(fork_server, folder, "run", *reader("sleep"))
    job.until((folder / "asleep").exists)  # in the step that never ends
    job.signal(signal.SIGINT)
    time.sleep(0.3)
    assert job.running()
    job.signal(signal.SIGINT)
    assert job.wait(5) == [130], job.said()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.fault("T05")
def test_fifty_preemptions_at_random_times(fork_server, folder, record_property):
    whole = start(fork_server, folder, "whole", "--trainer.max_steps=1500", "--data.num_workers=1")
    run, rng, resume, count = folder / "runs" / "part" / "0", random.Random(0), [], 0
    while count < 50:
        job = start(fork_server, folder, "part", "--trainer.max_steps=1500", "--data.num_workers=1", *resume)
        before = logged(run)
        until_step(job, run, before + 1)
        time.sleep(rng.random())
        job.signal(signal.SIGTERM)
        assert job.wait(60) == [143], job.said()
        resume, count = ["--resume", run], count + 1
    job = start(fork_server, folder, "part", "--trainer.max_steps=1500", "--data.num_workers=1", *resume)
    assert (job.wait(300), whole.wait(300)) == ([0], [0])
    assert same(weights(folder / "runs" / "whole" / "0")["state_dict"], weights(run)["state_dict"])
    record_property("count", count)


@pytest.mark.fault("T12")
def test_a_killed_loader_process_is_named_with_what_it_read(fork_server, folder):
    job = start(fork_server, folder, "run", *reader("kill"), "--data.num_workers=2")
    began = time.monotonic()
    assert job.wait(30) == [3], job.said()
    assert time.monotonic() - began < 10 + 10, "with the start"
    found = re.search(r"loader process (\d+) ended unexpectedly(?: \(Killed\))?\. It was reading: (.*)", job.said())
    assert re.search(rf"process {found[1]}: mosaic \(train\), index 5 in pass 0 \(faulty-5\)", found[2])
    assert job.said().count("densectx: error") == 1


@pytest.mark.fault("T13")
def test_a_hanging_loader_process_ends_the_run_in_time(fork_server, folder, record_property):
    job = start(fork_server, folder, "run", *reader("sleep"), "--data.num_workers=2", "--data.timeout=3")
    marker = folder / "asleep"
    until_said(job, "densectx: error")
    # what was read ahead is trained on first; only then the run waits
    waiting = max(path.stat().st_mtime for path in (marker, *folder.glob("runs/run/0/metrics.csv")))
    seconds = time.time() - waiting
    assert seconds < 3 + 2
    assert job.wait(30) == [7], job.said()
    assert "no loader process delivered a batch within 3 s (data.timeout)" in job.said()
    assert "index 5 in pass 0 (faulty-5)" in job.said()
    assert not alive(int(marker.read_text())), "the one that hung is left"
    record_property("evidence", f"ended {seconds:.1f} s after it began to hang, timeout 3 s")


@pytest.mark.fault("T15")
def test_memory_that_runs_out_ends_with_9(fork_server, folder):
    limit = "--trainer.callbacks=[{class_path: faulty.Limit, init_args: {step: 2, more: 16000000}},"
    limit += "{class_path: densectx.checkpointing.Checkpoints, init_args: {every_n_steps: 1}}]"
    more = [
        "--data.sources.mosaic.size=256",
        "--trainer.limit_val_batches=0",
        "--data.sources.mosaic.augment=null",
        "--allow-import=faulty",
        limit,
    ]
    job = start(fork_server, folder, "run", *more, "--trainer.accumulate_grad_batches=1")
    assert job.wait() == [9], job.said()
    assert re.search(r"error: out of memory for \d+ bytes more: batch sizes mosaic 4; at most [\d.]+ GiB", job.said())
    files = list((folder / "runs" / "run" / "0" / "checkpoints").glob("step-*.ckpt"))
    assert files
    for file in files:
        read(file)  # verifies the content


@pytest.mark.fault("T19")
def test_a_folder_takes_one_run_at_a_time(fork_server, folder, capsys):
    run = folder / "runs" / "run" / "0"
    job = start(fork_server, folder, "run", *reader("sleep"))
    job.until(lambda: (run / "config.yaml").exists())
    began = time.monotonic()
    command = [sys.executable, "-m", "densectx", "fit", "--resume", run]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    seconds = time.monotonic() - began
    assert second.returncode == 2
    assert f"{run}: another run writes to it: process {job.pids[0]} on {socket.gethostname()}" in second.stderr
    assert seconds < 6, "2 s; the machine may be busy with other tests"
    with pytest.raises(ConfigError, match="another run writes to it"), locked(run):
        pass
    job.signal(signal.SIGKILL)
    job.wait()
    with locked(run):
        assert f"the lock of process {job.pids[0]}" in capsys.readouterr().err
    (run / ".lock").write_text('{"pid": 1, "host": "elsewhere", "started": "yesterday"}')
    with locked(run):
        assert "process 1 on elsewhere, since yesterday, another host: taken over" in capsys.readouterr().err
    with locked(run):
        assert not capsys.readouterr().err, "given back"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, capsys, number):
    """NFS without its lock service, Lustre without flock: every run would be refused for ever."""

    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", none)
    with locked(tmp_path):
        assert f"{tmp_path} cannot be locked ({os.strerror(number)})" in capsys.readouterr().err
        refuse_held(["--resume", str(tmp_path)])


def test_a_run_that_cannot_be_written_is_not_held(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.open", refused)  # root may open anything
    refuse_held(["--resume", str(tmp_path)])


@pytest.mark.fault("T22")
def test_an_operation_that_is_not_deterministic_is_named(fork_server, folder):
    head = '--model.tasks.segmentation.head={"name": "faulty:Idle", "how": "put"}'
    job = start(fork_server, folder, "run", head, "--allow-import=faulty", "--trainer.deterministic=true")
    assert job.wait() == [2], job.said()
    assert "trainer.deterministic: put_ has no deterministic implementation" in job.said()


@pytest.mark.fault("T23")
def test_nothing_to_train_is_said(fork_server, folder):
    job = start(fork_server, folder, "run", "--trainer.max_steps=3", "--trainer.limit_val_batches=1")
    assert job.wait() == [0], job.said()
    run = folder / "runs" / "run" / "0"
    jobs = {
        "trainer.max_steps 3 is reached": (["--resume", run], 0),
        "trainer.max_epochs 0": (["--trainer.max_epochs=0", "--trainer.max_steps=-1"], 0),
        "trainer.limit_train_batches": (["--trainer.limit_train_batches=0"], 0),
        "no training samples": ([*reader("ok", length=0)], 3),
    }
    started = {}
    for said, (arguments, status) in jobs.items():
        files = [] if "--resume" in arguments else ["-c", "small.yaml", "--name", f"n{len(started)}"]
        started[said] = (fork_server.start(folder, "fit", *files, *arguments), status)
    for said, (job, status) in started.items():
        assert job.wait() == [status], job.said()
        assert said in job.said()
        assert "Traceback" not in job.said()
    assert weights(run)["global_step"] == 3


@pytest.mark.fault("N01")
def test_a_loss_that_is_not_finite_stops_before_the_weights_move(fork_server, folder):
    names = {"stop": (1, 0, 6), "skipped": (2, 2, 0), "too-many": (3, 2, 6)}
    jobs = {}
    for name, (times, skip, _) in names.items():
        (folder / name).mkdir()
        (folder / name / "small.yaml").write_text(CONFIG)
        jobs[name] = start(fork_server, folder / name, "run", *poison("loss", times, skip), "--trainer.max_steps=8")
    for name, (times, _, status) in names.items():
        job, run = jobs[name], folder / name / "runs" / "run" / "0"
        assert job.wait() == [status], job.said()
        found = json.loads((run / "bad_batch.json").read_text())
        assert (found["step"], found["seed"]) == (3 + max(times - 1, 0), 0)
        samples = [sample for batch in found["ranks"][0]["samples"] for sample in batch["mosaic"]]
        assert len(samples) == (4 if name == "stop" else 3 * 4), "of the window of accumulation, as far as it came"
        assert "the loss of segmentation (cross_entropy) is not finite" in found["what"]
        assert all(re.search(r"\d", str(sample["name"])) for sample in samples)
        if status:
            before, after = (torch.load(folder / name / f"loss-{when}-0.pt") for when in ("before", "after"))
            assert same(before, after)
            assert "not finite" in job.said()
        else:
            assert weights(run)["global_step"] == 8
            assert all(bool(w.isfinite().all()) for w in weights(run)["state_dict"].values())
            assert "skipped (2 in a row, 2 allowed)" in job.said()


@pytest.mark.fault("N02")
@pytest.mark.parametrize("what", ["gradient", "parameter", "statistics"])
def test_what_is_not_finite_is_named(fork_server, folder, what):
    more = ["--model.backbone={name: timm, model: resnet10t}"] if what == "statistics" else []
    job = start(fork_server, folder, "run", *poison(what), *more, "--trainer.limit_val_batches=0")
    assert job.wait() == [6], job.said()
    name = (
        r"model\.backbone\.\S*running_mean"
        if what == "statistics"
        else r"model\.tasks\.segmentation\.head\.conv\.weight"
    )
    found = re.search(
        rf"{name} is not finite (?:at|before) step (\d+)|{name} is not finite; .* at step (\d+)", job.said()
    )
    assert found, job.said()
    assert int(found[1] or found[2]) - 3 in (0, 1)
    for file in (folder / "runs" / "run" / "0" / "checkpoints").glob("step-*.ckpt"):
        assert all(bool(w.isfinite().all()) for w in weights(file.parent.parent, file.name)["state_dict"].values())


def poison(what, times=1, skip=0):
    """Flags for a value that is not finite from step 3 on."""
    bad = f"{{class_path: faulty.Poison, init_args: {{what: {what}, step: 3, times: {times}}}}}"
    guard = f"{{class_path: densectx.resilience.guards.FiniteGuard, init_args: {{skip: {skip}}}}}"
    return ["--allow-import=faulty", f"--trainer.callbacks=[{bad}, {guard}]"]
