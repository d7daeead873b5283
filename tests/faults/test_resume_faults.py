"""A run that is stopped anywhere and goes on ends as if nothing had happened, bit for bit on CPU."""

import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch

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
    mosaic: {name: mosaic, size: 24, length: 40, val_length: 3, batch_size: 4, augment: {flip: true, crop: 16}}
  num_workers: 0
trainer:
  accelerator: cpu
  max_steps: 25
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
"""
CHECKPOINTS = "{class_path: densectx.checkpointing.Checkpoints, init_args: {every_n_steps: 1, keep: 40}}"
EMA = "{class_path: pytorch_lightning.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}"
SECONDS = 120


class Processes:
    """Runs forked from one process that has imported everything."""

    def __init__(self, folder):
        self.folder = folder
        self.running = set()
        environment = {k: v for k, v in os.environ.items() if k != "DENSECTX_RUN"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
        server = Path(__file__).with_name("fork_server.py")
        pipe = subprocess.PIPE
        self.server = subprocess.Popen(
            [sys.executable, server, "toy.yaml"], stdin=pipe, stdout=pipe, text=True, env=environment, cwd=folder
        )
        while (line := self.server.stdout.readline()) != "ready\n":
            assert line, "the server has ended"

    def _ask(self, **question):
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *arguments, ranks=1, log="log.txt"):
        """The numbers of the processes of one run, as Lightning's launcher would have started them."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        pids = []
        for rank in range(ranks):
            environment = {"DENSECTX_RUN": ""}
            if ranks > 1:
                environment |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log_of_rank = str(self.folder / (log if rank == 0 else f"{rank}-{log}"))
            asked = {"start": list(map(str, arguments)), "environment": environment, "log": log_of_rank}
            pids.append(self._ask(**asked, folder=str(self.folder)))
        self.running |= set(pids)
        return pids

    def wait(self, pid, seconds=SECONDS):
        status = self._ask(wait=pid, seconds=seconds)
        if status is not None:
            self.running.discard(pid)
        return status

    def run(self, *arguments, ranks=1):
        """To the end, which is a good one."""
        self.run_all([arguments], ranks=ranks)

    def run_all(self, commands, ranks=1):
        """Several at a time."""
        more = ["--trainer.devices", ranks, "--trainer.strategy", "ddp"] if ranks > 1 else []
        logs = [f"log-{number}.txt" for number in range(len(commands))]
        for log in logs:
            (self.folder / log).unlink(missing_ok=True)
        started = [self.start(*c, *more, ranks=ranks, log=log) for c, log in zip(commands, logs, strict=True)]
        for pids, log in zip(started, logs, strict=True):
            assert [self.wait(pid) for pid in pids] == [0] * ranks, (self.folder / log).read_text()[-3000:]

    def close(self):
        for pid in self.running:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.server.kill()
        self.server.wait()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "toy.yaml").write_text(CONFIG)
    started = Processes(folder)
    yield started
    started.close()


def differences(a, b, path=""):
    """Where two states differ; times of day do not count."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: {set(a) ^ set(b)}"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return []
    return [] if a == b else [f"{path}: {a!r} {b!r}"]


def state(run, step):
    return torch.load(run / "checkpoints" / f"step-{step}.ckpt", weights_only=True)


def flags(workers=0, precision="32-true", ema=False, window=1):
    callbacks = ", ".join([CHECKPOINTS, *([EMA] if ema else [])])
    return [
        *("--data.num_workers", workers, "--trainer.precision", precision, "--trainer.callbacks", f"[{callbacks}]"),
        *("--trainer.accumulate_grad_batches", window),
    ]


def stopped_after(whole, step, run):
    """A run as a kill after a step leaves it."""
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "config.yaml", run)
    shutil.copy(whole / "checkpoints" / f"step-{step}.ckpt", run / "checkpoints")
    (run / "checkpoints" / "last.ckpt").symlink_to(f"step-{step}.ckpt")


def resumes_exactly(processes, steps, ranks=1, **options):
    """Stop after each of the steps, go on, and compare everything that a checkpoint holds; returns how often."""
    name = "-".join(map(str, (ranks, *options.values())))
    processes.run("fit", "-c", "toy.yaml", "--name", f"whole-{name}", "--no-report", *flags(**options), ranks=ranks)
    whole = processes.folder / "runs" / f"whole-{name}" / "0"
    end = state(whole, 25)
    together = 2 // ranks  # processes at a time
    for some in (steps[i : i + together] for i in range(0, len(steps), together)):
        runs = {step: processes.folder / "runs" / f"part-{name}" / str(step) for step in some}
        for step, run in runs.items():
            stopped_after(whole, step, run)
        processes.run_all([("fit", "--resume", run, "--no-report") for run in runs.values()], ranks=ranks)
        for step, run in runs.items():
            assert differences(end, state(run, 25)) == [], (name, step)
            shutil.rmtree(run)
    shutil.rmtree(whole)
    return len(steps)


@pytest.mark.fault("T01")
@pytest.mark.parametrize(
    ("steps", "options"),
    [
        ([1, 10, 25], {}),  # an epoch has 10 steps
        ([4, 7], {"workers": 2, "precision": "bf16-mixed", "ema": True, "window": 3}),  # 4 steps, the last is short
        ([10], {"ranks": 2, "ema": True}),
    ],
)
def test_going_on_after_a_step_is_exact(processes, steps, options, record_property):
    record_property("count", resumes_exactly(processes, steps, **options))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault("T01")
@pytest.mark.parametrize(
    ("workers", "precision", "ema", "window", "ranks"),
    list(product((0, 2), ("32-true", "bf16-mixed"), (False, True), (1, 3), (1, 2))),
)
def test_going_on_after_every_step_is_exact(processes, workers, precision, ema, window, ranks, record_property):
    options = {"workers": workers, "precision": precision, "ema": ema, "window": window}
    record_property("count", resumes_exactly(processes, list(range(1, 26)), ranks, **options))


@pytest.mark.fault("T02")
def test_another_process_with_other_seeds_goes_on_exactly(processes, record_property):
    processes.run("fit", "-c", "toy.yaml", "--name", "seeds", "--no-report", *flags())
    whole = processes.folder / "runs" / "seeds" / "0"
    run = processes.folder / "runs" / "other-seeds" / "0"
    stopped_after(whole, 13, run)
    environment = {**os.environ, "PYTHONHASHSEED": "2", "PL_GLOBAL_SEED": "99", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "densectx", "fit", "--resume", run, "--no-report"]
    subprocess.run(command, check=True, env=environment, cwd=processes.folder, timeout=SECONDS, capture_output=True)
    assert differences(state(whole, 25), state(run, 25)) == []


@pytest.mark.fault("T03")
def test_other_numbers_of_workers_go_on_exactly(processes, record_property):
    processes.run("fit", "-c", "toy.yaml", "--name", "workers", "--no-report", *flags())
    whole = processes.folder / "runs" / "workers" / "0"
    run = processes.folder / "runs" / "other-workers" / "0"
    stopped_after(whole, 7, run)
    allowed = ["--allow-changed", "data.num_workers", "--allow-changed", "trainer.max_steps", "--no-report"]
    processes.run("fit", "--resume", run, "--data.num_workers", 2, "--trainer.max_steps", 14, *allowed)
    processes.run("fit", "--resume", run, "--data.num_workers", 1, "--trainer.max_steps", 25, *allowed)
    a, b = state(whole, 25), state(run, 25)
    assert b["densectx"]["config"].pop("data") != a["densectx"]["config"].pop("data")
    assert differences(a, b) == []


def killed_until_done(processes, name, steps, kills, seed, ranks):
    """A supervisor: starts the run again and again, kills a random rank at a random time; returns (kills, starts)."""
    rng = random.Random(seed)
    callbacks = "[{class_path: densectx.checkpointing.Checkpoints, init_args: {every_n_steps: 5}}]"
    command = ["fit", "-c", "toy.yaml", "--name", name, "--resume", "auto", "--no-report"]
    command += ["--trainer.callbacks", callbacks, "--trainer.max_steps", steps]
    command += ["--trainer.devices", ranks, "--trainer.strategy", "ddp"] if ranks > 1 else []
    done = starts = 0
    while True:
        pids = processes.start(*command, ranks=ranks, log=f"{name}.txt")
        starts += 1
        victim = rng.choice(pids) if done < kills else None
        status = processes.wait(victim, rng.uniform(0, 4)) if victim is not None else None
        if victim is not None and status is None:
            os.kill(victim, signal.SIGKILL)
            done += 1
        # a rank whose other is killed before they have met waits for it for DENSECTX_START_TIMEOUT, here 20 s
        ended = [processes.wait(pid, 60 if victim is None else 40) if pid in processes.running else 0 for pid in pids]
        assert None not in ended, (
            f"an orphan after {done} kills: {(processes.folder / f'{name}.txt').read_text()[-2000:]}"
        )
        if victim is None or status is not None:
            log = (processes.folder / f"{name}.txt").read_text()[-2000:]
            assert set(ended) | {status or 0} == {0}, log
            return done, starts


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.fault("T08")
@pytest.mark.fault("D08")
@pytest.mark.fault("D01")
@pytest.mark.fault("D02")
def test_a_run_that_is_killed_again_and_again_ends_as_if_undisturbed(processes, record_property):
    ranks, steps, wanted = 2, 400, 200
    callbacks = "[{class_path: densectx.checkpointing.Checkpoints, init_args: {every_n_steps: 5}}]"
    more = ["--trainer.callbacks", callbacks, "--trainer.max_steps", steps, "--no-report"]
    processes.run("fit", "-c", "toy.yaml", "--name", "undisturbed", *more, ranks=ranks)
    undisturbed = state(processes.folder / "runs" / "undisturbed" / "0", steps)
    start, kills, starts, runs = time.monotonic(), 0, 0, 0
    while kills < wanted:
        done, started = killed_until_done(processes, f"killed-{runs}", steps, wanted - kills, runs, ranks)
        last = max((processes.folder / "runs" / f"killed-{runs}").iterdir(), key=lambda f: int(f.name))
        assert differences(undisturbed["state_dict"], state(last, steps)["state_dict"]) == [], runs
        assert differences(undisturbed["optimizer_states"], state(last, steps)["optimizer_states"]) == [], runs
        kills, starts, runs = kills + done, starts + started, runs + 1
    record_property("count", kills)
    minutes = (time.monotonic() - start) / 60
    record_property("evidence", f"{runs} runs of {steps} steps, {starts} starts, {kills} kills, {minutes:.0f} minutes")
