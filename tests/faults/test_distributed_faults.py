"""Two ranks of one run (gloo) that are signalled, killed, stopped, started differently or not at all."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from densectx.data.fingerprint import Listing, fingerprint
from densectx.module import DenseModule
from densectx.resilience import heartbeat, replicas
from densectx.resilience.replicas import Replicas, checksum, expect_data

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
data:
  sources:
    mosaic: {name: mosaic, size: 24, length: 40, val_length: 5, batch_size: 2, augment: {flip: true, crop: 16}}
  num_workers: 0
trainer:
  accelerator: cpu
  devices: 2
  strategy: ddp
  max_steps: 40
  val_check_interval: 5
  check_val_every_n_epoch: null
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""
FOREVER = ("--trainer.max_steps=1000000",)


@pytest.fixture
def folder(tmp_path):
    """A working folder with the config above."""
    (tmp_path / "small.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def start(fork_server, folder):
    """``densectx fit`` on two ranks; its run folder is ``runs/NAME/0``."""

    def start(name, *arguments, ranks=2, **options):
        return fork_server.start(
            folder, "fit", "-c", "small.yaml", "--name", name, "--no-report", *arguments, ranks=ranks, **options
        )

    return start


def logged(run):
    """The last optimizer step in metrics.csv."""
    try:
        lines = (run / "metrics.csv").read_text().splitlines()
    except OSError:
        return -1
    return int(lines[-1].partition(",")[0]) if len(lines) > 1 and lines[-1][:1].isdigit() else -1


def alive(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until_step(job, run, step):
    job.until(lambda: logged(run) >= step)


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def callbacks(**init):
    """Flags for a faulty callback, and comparisons of the ranks at every step."""
    bad = f"{{class_path: faulty.Poison, init_args: {json.dumps(init)}}}"
    guard = f"{{class_path: densectx.resilience.guards.FiniteGuard, init_args: {{skip: {init.get('times', 2) - 1}}}}}"
    compare = "{class_path: densectx.resilience.replicas.Replicas, init_args: {every_n_steps: 1}}"
    return ["--allow-import=faulty", f"--trainer.callbacks=[{bad}, {guard}, {compare}]"]


ELASTIC = {
    rank: (
        (),
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        | {"TORCHELASTIC_RUN_ID": "test"},
    )
    for rank in (0, 1)
}


@pytest.mark.fault("D06")
def test_a_signal_to_any_rank_stops_all_at_one_step(start, folder, record_property):
    assert start("whole").wait() == [0, 0]  # beside nothing that is timed
    run, seconds, resume = folder / "runs" / "part" / "0", [], []
    for ranks, after, of_rank, statuses in (
        ((1,), 2, None, [143, 0]),  # Lightning's launcher started the second
        ((0,), 12, ELASTIC, [0, 0]),
        ((0, 1), 22, None, [143, 0]),
    ):
        job = start("part", *resume, of_rank=of_rank)
        until_step(job, run, after)
        began = time.monotonic()
        job.signal(signal.SIGTERM, *ranks)
        assert job.wait(30) == statuses, job.said()
        seconds.append(time.monotonic() - began)
        step = weights(run)["global_step"]
        assert f"at step {step}: saved" in job.said(0)
        assert (run / "preempted").read_text().endswith(f"at step {step}\n")
        assert "Traceback" not in job.said()
        resume = ["--resume", run]
    job = start("part", *resume)
    assert job.wait() == [0, 0], job.said()
    assert not (run / "preempted").exists()
    a, b = weights(folder / "runs" / "whole" / "0"), weights(run)
    assert a["global_step"] == b["global_step"] == 40
    assert same(a["state_dict"], b["state_dict"])
    assert max(seconds) < 10
    record_property("count", 3)
    record_property("evidence", f"all left within {max(seconds):.1f} s")


@pytest.mark.fault("D01")
@pytest.mark.fault("D02")
@pytest.mark.fault("D03")
def test_a_rank_that_is_gone_or_stopped_is_named(start, folder, record_property):
    limit = 10
    faults = {"killed": (1, signal.SIGKILL), "first": (0, signal.SIGKILL), "stopped": (1, signal.SIGSTOP)}
    jobs = {name: start(name, *FOREVER, environment={"DENSECTX_TIMEOUT": str(limit)}) for name in faults}
    began = {}
    for name, job in jobs.items():
        until_step(job, folder / "runs" / name / "0", 3)
    for name, (rank, number) in faults.items():
        jobs[name].signal(number, rank)
        began[name] = time.monotonic()
    for name, (rank, number) in faults.items():
        job, other = jobs[name], 1 - rank
        job.until_ended(other, limit + 5)
        seconds = time.monotonic() - began[name]
        if number == signal.SIGSTOP:
            assert job.running() == [rank]
            job.signal(signal.SIGKILL, rank)
        else:
            assert seconds < 10, "5 s; the machine may be busy with other tests"
        statuses = job.wait(5)
        assert (statuses[other], statuses[rank]) == (7, -signal.SIGKILL), job.said()
        how = "stopped" if number == signal.SIGSTOP else "gone"
        said = [line for line in job.said(other).splitlines() if line.startswith("densectx: error")]
        assert len(said) == 1
        assert f"rank {other} of 2" in said[0]
        assert f"rank {rank} (process {job.pids[rank]} on {socket.gethostname()}) is {how}, last heard" in said[0]
        assert "waited in " in said[0]
        assert "at step " in said[0]
        stacks = (folder / "runs" / name / "0" / f"hang-rank-{other}.txt").read_text()
        assert "most recent call first" in stacks
        record_property("evidence", f"{name}: the other ended after {seconds:.1f} s: {said[0]}")


def test_a_rank_of_another_host_whose_clock_is_off_is_not_silent(tmp_path, monkeypatch):
    clocks = {"here": 50.0, "there": 9000.0}
    monkeypatch.setattr(heartbeat, "socket", SimpleNamespace(gethostname=lambda: host))
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: clocks[host]))
    beats, found = {}, []
    for host in clocks:
        beats[host] = heartbeat.Heartbeat(tmp_path / "beats", len(beats), 5.0)
    for seconds in (0, 5, 5, 17):
        clocks = {name: clock + seconds for name, clock in clocks.items()}
        host = "there"
        if seconds < 17:
            beats[host].beat(3, "training batch")
        host = "here"
        said = beats[host].others()[1]
        found.append((said["ago"], heartbeat.condition(said)))
    assert found == [(0, "alive"), (0, "alive"), (0, "alive"), (17, "silent")]


@pytest.mark.slow
@pytest.mark.fault("D01")
@pytest.mark.fault("D06")
@pytest.mark.parametrize(("number", "child", "status"), [("TERM", False, 143), ("TERM", True, 143), ("KILL", True, 7)])
def test_ranks_that_lightning_starts_end_together(folder, number, child, status):
    run = folder / "runs" / "run" / "0"
    command = [sys.executable, "-m", "densectx", "fit", "-c", "small.yaml", "--name", "run", "--no-report", *FOREVER]
    environment = {k: v for k, v in os.environ.items() if k != "DENSECTX_RUN"} | {"OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("w") as log:
        job = subprocess.Popen(command, cwd=folder, env=environment, stderr=log, stdout=log, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while logged(run) < 3:
            assert job.poll() is None, (folder / "log.txt").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        second = int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[0])
        os.kill(second if child else job.pid, getattr(signal, f"SIG{number}"))
        assert job.wait(10) == status, (folder / "log.txt").read_text()
        end = time.monotonic() + 10
        while alive(second):
            assert time.monotonic() < end, "an orphan"
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.fault("D01")
@pytest.mark.fault("D02")
def test_a_hundred_kills_leave_no_orphan(start, folder, record_property):
    rng, run, resume, slowest = random.Random(0), folder / "runs" / "part" / "0", [], 0.0
    whole = start("whole", "--trainer.max_steps=1000")
    for count in range(100):
        rank = count % 2
        job = start("part", "--trainer.max_steps=1000", *resume)
        before = logged(run)
        until_step(job, run, max(before, 5) + 1)
        time.sleep(rng.random() / 4)
        job.signal(signal.SIGKILL, rank)
        began = time.monotonic()
        job.until_ended(1 - rank, 10)
        slowest = max(slowest, time.monotonic() - began)
        assert job.wait(5)[1 - rank] == 7, job.said()
        resume = ["--resume", run]
    job = start("part", "--trainer.max_steps=1000", *resume)
    assert (job.wait(300), whole.wait(300)) == ([0, 0], [0, 0])
    assert same(weights(folder / "runs" / "whole" / "0")["state_dict"], weights(run)["state_dict"])
    assert slowest < 5
    record_property("count", 100)
    record_property("evidence", f"the other rank ended within {slowest:.1f} s")


@pytest.mark.fault("D13")
@pytest.mark.fault("D14")
def test_ranks_that_are_started_differently_are_refused(start, folder):
    data = json.dumps({"mosaic": {"name": "faulty:Reader", "how": "ok", "batch_size": 2}})
    more = ["--allow-import=faulty", f"--data.sources={data}"]
    jobs = {
        "its config differs in model.tasks.denoising.weight": start(
            "config", of_rank={1: (["--model.tasks.denoising.weight=2"], {})}
        ),
        "its config differs in seed_everything": start("seed", of_rank={1: (["--seed_everything=7"], {})}),
        "its data are others": start("data", *more, of_rank={1: ((), {"FAULTY_LENGTH": "44"})}),
    }
    for said, job in jobs.items():
        assert job.wait() == [2, 2], job.said()
        assert f"rank 1 was not started like rank 0: {said}" in job.said(0)
        assert f"rank 1 was not started like rank 0: {said}" in job.said(1)
    assert not list(folder.glob("runs/*/0/metrics.csv")), "before step 0"


@pytest.mark.fault("D14")
def test_ranks_have_the_same_weights_from_step_0_on_or_end(start, folder):
    jobs = {what: start(what, *callbacks(what=what, step=step, rank=1)) for what, step in (("init", 0), ("diverge", 3))}
    assert jobs["diverge"].wait() == [7, 7], jobs["diverge"].said()
    assert "the weights of rank 1 are not those of rank 0 at step 4: model.backbone" in jobs["diverge"].said(0)
    assert jobs["init"].wait() == [0, 0], jobs["init"].said()
    first, second = (torch.load(folder / f"init-{rank}.pt") for rank in (0, 1))
    assert not same(first, second), "the fault: what the ranks began with"
    assert same(*(torch.load(folder / f"init-before-{rank}.pt") for rank in (0, 1))), "step 0"


def test_a_checksum_sees_a_bit_and_an_exchange():
    a = torch.arange(6.0)
    b = a.clone()
    b[3] = b[3].nextafter(torch.tensor(9.0))
    assert checksum(a) == checksum(a.clone())
    assert checksum(a) != checksum(b)
    assert checksum(a) != checksum(a.flip(0))
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0])), "bits, not numbers"


class Widest(TorchDispatchMode):
    """Keeps the largest number of elements of any int64 result."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.int64:
            self.most = max(self.most, result.numel())
        return result


def test_a_checksum_takes_little_memory(monkeypatch):
    monkeypatch.setattr(replicas, "_CHUNK", 8)
    weights = torch.randn(5, 7)
    with Widest() as seen:
        own = checksum(weights)
    bits = weights.flatten().view(torch.int32).to(torch.int64)
    assert own == sum((2 * place + 3) * number for place, number in enumerate(bits.tolist()))
    assert seen.most <= 8
    assert checksum(torch.empty(0)) == 0


def test_the_listing_that_a_start_made_is_what_ranks_compare(monkeypatch):
    def gather(found, own):
        seen.append(own["data"])
        found[:] = [own, own]

    seen, listed = [], {"a train": Listing(3, {})}
    callback = Replicas()
    trainer = SimpleNamespace(world_size=2, callbacks=[callback], datamodule=None)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    expect_data(trainer, listed)
    callback.setup(trainer, Mock(spec=DenseModule, config={}), "fit")
    assert seen == [fingerprint(listed)]


@pytest.mark.fault("D15")
def test_a_parameter_that_a_rank_does_not_use_is_named(start):
    head = '--model.tasks.segmentation.head={"name": "faulty:Idle", "how": "idle"}'
    job = start("idle", head, "--allow-import=faulty")
    assert job.wait(30) == [7, 7], job.said()
    assert "rank 1: the loss of step 0 does not depend on model.tasks.segmentation.head.extra" in job.said(1)
    assert "rank 1 ended at step 0 with: rank 1: the loss of step 0 does not depend on" in job.said(0)


@pytest.mark.fault("N01")
def test_a_loss_that_is_not_finite_on_one_rank_is_agreed(start, folder):
    job = start("stop", *callbacks(what="loss", step=3, rank=1, times=1))
    assert job.wait() == [6, 6], job.said()
    for rank in (0, 1):
        assert same(*(torch.load(folder / f"loss-{when}-{rank}.pt") for when in ("before", "after")))
    found = json.loads((folder / "runs" / "stop" / "0" / "bad_batch.json").read_text())
    assert [len(rank["samples"][0]["mosaic"]) for rank in found["ranks"]] == [2, 2]
    job = start("skip", *callbacks(what="loss", step=3, rank=1, times=2), "--trainer.max_steps=6")
    assert job.wait() == [6, 6], "one may be skipped, the second ends the run"
    assert "skipped (1 in a row, 1 allowed)" in job.said(0)


@pytest.mark.fault("D17")
@pytest.mark.parametrize("limit", [5, pytest.param(None, marks=pytest.mark.slow)], ids=["short", "usual"])
def test_ranks_that_do_not_meet_end_with_the_address(start, record_property, limit):
    more = {"DENSECTX_START_TIMEOUT": str(limit)} if limit else {}
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        used, port = str(taken.getsockname()[1]), str(free.getsockname()[1])
        free.close()
        began = time.monotonic()
        elsewhere = {1: ((), {"MASTER_ADDR": "192.0.2.1"})}  # nobody's (RFC 5737)
        jobs = {
            "port in use": (start("port", environment={"MASTER_PORT": used, **more}), f"127.0.0.1:{used}"),
            "wrong address": (
                start("address", environment={"MASTER_PORT": port, **more}, of_rank=elsewhere),
                "192.0.2.1:",
            ),
            "missing rank": (start("missing", ranks=1, environment={"LOCAL_RANK": "0", **more}), "127.0.0.1:"),
        }
        for name, (job, address) in jobs.items():
            statuses = job.wait(40)
            seconds = time.monotonic() - began
            assert set(statuses) == {7}, (name, statuses, job.said())
            assert seconds < (limit + 20 if limit else 30)
            for rank in range(len(job.pids)):
                lines = [line for line in job.said(rank).splitlines() if line.startswith("densectx: error")]
                assert len(lines) == 1, job.said(rank)
                assert f"rank {rank} of 2" in lines[0]
            assert address in job.said(len(job.pids) - 1)
            record_property("evidence", f"{name}: ended {seconds:.1f} s after the start")
        record_property("count", 3)
