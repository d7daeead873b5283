"""A small experiment that several launchers train, and what they must all end with."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24  # of the experiment
SAVED = 4  # every so many of them

# a step takes as long as with a network worth several machines, so that a run can be disturbed in its middle
PACE = """
import os, time
import pytorch_lightning as pl

class Pace(pl.Callback):
    def on_train_batch_start(self, trainer, *args) -> None:
        time.sleep(float(os.environ.get("PACE", 0)))
        go = os.environ.get("HOLD_FOR")  # in the middle the run waits for this file
        while go and trainer.global_step == 12 and not os.path.exists(go):
            time.sleep(0.01)
"""

# Runs code as several ranks of this machine. It imports once for all of them, and has used neither autograd nor threads
# when it forks. A line of JSON is answered by the exit statuses.
RANKS = """
import json, os, sys
import torch
import densectx.training, densectx.data.mosaic
import densectx.tasks.colorization, densectx.tasks.denoising, densectx.tasks.segmentation

def rank(number, asked):
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(asked["world"]), **asked["variables"]}
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.argv = ["densectx", *asked["words"]]
    scope = {"__name__": "rank", "number": number, "world": asked["world"], "words": asked["words"]}
    exec(compile(asked["code"], "rank", "exec"), scope)
    sys.exit(scope.get("status", 0))

torch.set_num_threads(1)
for line in sys.stdin:
    asked, pids = json.loads(line), []
    for number in range(asked["world"]):
        if not (pid := os.fork()):
            rank(number, asked)
        pids.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""

CONFIG = f"""
model:
  backbone: {{name: plain, width: 4}}
  projection: {{channels: 4}}
  context: {{name: context7, init_noise: 0.1}}
  norm: group
  tasks:
    segmentation: {{name: segmentation, source: mosaic}}
    denoising: {{name: denoising, source: mosaic, weight: 10}}
  optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.05, momentum: 0.9}}}}
  lr_scheduler:
    class_path: densectx.schedules.WarmupCosine
    init_args: {{total_steps: {STEPS}, warmup_steps: 4}}
data:
  sources:
    mosaic: {{name: mosaic, size: 24, length: 40, val_length: 3, batch_size: 2}}
  num_workers: 0
trainer:
  accelerator: cpu
  max_steps: {STEPS}
  val_check_interval: {STEPS // 2}
  check_val_every_n_epoch: null
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {{class_path: densectx.checkpointing.Checkpoints, init_args: {{every_n_steps: {SAVED}, keep: 4}}}}
    - {{class_path: pace.Pace}}
"""


class Experiment:
    """A run of two tasks, a schedule and validation, for two ranks of batch 2.

    Args:
        folder: where its files are; runs go to ``runs`` below.
    """

    def __init__(self, folder):
        self.folder, self.runs = folder, folder / "runs"
        (folder / "tiny.yaml").write_text(CONFIG)
        (folder / "pace.py").write_text(PACE)
        self.words = ["-c", str(folder / "tiny.yaml"), "--allow-import", "pace", "--no-report"]
        self.words += ["--trainer.default_root_dir", str(self.runs)]

    def environment(self, **more):
        """Of a process that trains: one thread, this very densectx, nothing of another launcher, time to start."""
        foreign = ("SLURM_", "TORCHELASTIC_", "DENSECTX_", "MASTER_", "RANK", "LOCAL_", "NODE_", "WORLD_SIZE")
        own = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        path = os.pathsep.join((str(Path(sys.executable).parent), own.get("PATH", "")))
        more = {key: str(value) for key, value in more.items()}
        return {
            **own,
            "PATH": path,
            "PYTHONPATH": f"{ROOT}:{self.folder}",
            "OMP_NUM_THREADS": "1",
            "DENSECTX_START_TIMEOUT": "90",
            **more,
        }

    @contextmanager
    def start(self, command, name, **options):
        """A process in a session of its own, killed with all of it at the end; ``name.log`` keeps what it says."""
        with self.log(name).open("ab") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **options)
        try:
            yield process
        finally:
            kill_session(process.pid)
            process.wait(30)

    def log(self, name):
        """What a process said."""
        return self.folder / f"{name}.log"

    def wait_for(self, condition, what, name, seconds=90.0):
        """The first true answer of a condition; the log of that name is shown if none comes."""
        until = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > until:
                said = self.log(name).read_text(errors="replace")[-4000:] if self.log(name).exists() else ""
                pytest.fail(f"no {what} within {seconds:g} s\n{said}")
            time.sleep(0.02)
        return found

    def workers(self, agent):
        """{rank: pid} of what torchrun started and still runs."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[1]) == agent and fields[0] not in "ZX":
                    variables = stat.with_name("environ").read_bytes().split(b"\0")
                    found |= {int(text[5:]): int(stat.parent.name) for text in variables if text.startswith(b"RANK=")}
            except OSError:  # it has just ended
                continue
        return found

    def checkpoints(self, name):
        """Steps of the files of a run's newest folder."""
        folders = sorted((self.runs / name).glob("[0-9]*"), key=lambda folder: int(folder.name))
        return (
            {int(f.stem.partition("-")[2]) for f in folders[-1].glob("checkpoints/step-*.ckpt")} if folders else set()
        )

    def end(self, name):
        """What a run ended with: weights, optimizer, schedule, counters; nothing of the clock."""
        (folder,) = (self.runs / name).iterdir()
        content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        assert content["global_step"] == STEPS
        return {
            key: content[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "loops")
        }


def free_port():
    """A TCP port that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def kill_session(leader):
    """SIGKILL to every process of a session: torchrun gives each worker a process group of its own."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) == leader:
                os.kill(int(stat.parent.name), signal.SIGKILL)
        except OSError:  # it has just ended
            continue


def same(one, other):
    """Whether two nested values are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="session")
def experiment(tmp_path_factory):
    """The experiment, and a folder that its runs share."""
    return Experiment(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="session")
def ranks(experiment):
    """Run code as several ranks of this machine; returns what they said.

    Args of the function: how many; code that knows ``number``, ``world`` and ``words`` and may set ``status``; a name
    for the log; the words; the exit statuses that are expected, 0 for all by default; seconds.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RANKS]
    with experiment.log("ranks").open("ab") as log:
        server = subprocess.Popen(command, env=experiment.environment(), stderr=log, start_new_session=True, **pipes)

    def ranks(world, code, name, words=(), expected=None, seconds=100):
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        asked = {"world": world, "code": code, "words": list(words), "log": str(experiment.log(name))}
        server.stdin.write(json.dumps({**asked, "variables": variables}) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], seconds)[0]:
            kill_session(server.pid)
        answer = server.stdout.readline()
        said = experiment.log(name).read_text()
        assert answer, f"no end within {seconds} s\n{said[-4000:]}"
        assert json.loads(answer) == (expected or [0] * world), said[-4000:]
        return said

    yield ranks
    kill_session(server.pid)
    server.wait(10)


@pytest.fixture(scope="session")
def fit(experiment, ranks):
    """``densectx fit`` of the experiment by a number of ranks; what they said."""

    def fit(world, name, *words, first="", **options):
        command = ["fit", *experiment.words, "--name", name, "--trainer.devices", str(world), *words]
        command += ["--trainer.strategy", "ddp"] if world > 1 else []
        return ranks(world, f"{first}\nfrom densectx.cli import main\nstatus = main(words)", name, command, **options)

    return fit


@pytest.fixture(scope="session")
def undisturbed(experiment, fit):
    """What two ranks end with when nothing happens to them."""
    fit(2, "undisturbed")
    return experiment.end("undisturbed")


@pytest.fixture(scope="session")
def alone(experiment):
    """``densectx fit`` of the experiment by this process, with the global batch of two ranks."""

    def alone(name, *words):
        from densectx.cli import main

        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(experiment.folder)
            patch.setenv("DENSECTX_RUN", "")  # which the run sets, and nobody after it may see
            arguments = [*experiment.words, "--name", name, "--data.sources.mosaic.batch_size", "4", *words]
            assert main(["fit", *arguments]) == 0

    return alone


@pytest.fixture(scope="session")
def single(experiment, alone):
    """What one process ends with."""
    alone("single")
    return experiment.end("single")


@pytest.fixture(scope="session")
def equal():
    """The function that says whether two ends are the same bits."""
    return same
