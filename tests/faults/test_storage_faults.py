"""Disks that fill up, fail, lie or are read-only, and kills while a checkpoint is written or removed."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import densectx
from densectx.archive import damage, load_archive
from densectx.checkpoint_files import StepFiles, newest_first, steps
from densectx.checkpoint_io import AtomicCheckpointIO
from densectx.cli import main
from densectx.errors import CheckpointError, StorageError
from densectx.resuming import newest_whole

CONFIG = """
model:
  backbone: {name: plain, width: 3}
  projection: {channels: 3}
  context: context7
  tasks:
    segmentation: {name: segmentation, source: mosaic, head: linear}
    denoising: {name: denoising, source: mosaic, sigma: 25, head: linear}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  sources:
    mosaic: {name: mosaic, size: 16, length: 8, val_length: 2, batch_size: 4}
  num_workers: 0
trainer:
  accelerator: cpu
  max_steps: 8
  val_check_interval: 2
  check_val_every_n_epoch: null
  enable_progress_bar: false
  enable_model_summary: false
"""

RANDOM = random.Random(0)


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """``densectx fit`` of the config above in a process of its own, forked: returns its exit status, -N for a signal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DENSECTX_RUN", raising=False)
    (tmp_path / "small.yaml").write_text(CONFIG)

    def fit(name, *flags, **environment):
        def action():
            os.environ.update(environment)
            sys.stdout = sys.stderr = open(f"{name}.log", "a", buffering=1)  # noqa: SIM115 - until the process ends
            return main(["fit", "-c", "small.yaml", "--name", name, "--no-report", *flags])

        return action

    return fit


def forked(action, *, mounts=False, timeout=120):
    """What an action returns (as JSON) in a forked process, -N if signal N ended it; ``mounts``: of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException):
            try:
                os.setpgid(0, 0)
                if mounts:
                    call("unshare", 0x00020000)
                    call("mount", None, b"/", None, 0x44000, None)  # recursively private
                os.write(writer, json.dumps(action()).encode())
                os._exit(0)
            except BaseException:
                traceback.print_exc()
        os._exit(99)
    os.close(writer)
    try:
        text, deadline = b"", time.monotonic() + timeout
        while select.select([reader], [], [], max(0, deadline - time.monotonic()))[0]:
            part = os.read(reader, 1 << 16)
            if not part:
                break
            text += part
        else:
            pytest.fail(f"not done after {timeout} s")
        _, status = os.waitpid(child, 0)
        child = 0
    finally:
        os.close(reader)
        if child:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return -os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "the forked process failed; its traceback is above"
    return json.loads(text)


def call(name, *arguments):
    """A call of the C library that fails as the system says."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def tmpfs(folder, size):
    folder.mkdir(exist_ok=True)
    call("mount", b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode())


@pytest.fixture(scope="module")
def mounts():
    """Skips where a process may not mount."""

    def action():
        try:
            call("mount", b"tmpfs", b"/mnt", b"tmpfs", 0, None)
        except OSError as error:
            return str(error)
        return ""

    try:
        refused = forked(action, mounts=True)
    except (AssertionError, OSError):
        refused = "no mounts of its own"
    if refused:
        pytest.skip(f"needs root to mount a small file system: {refused}")


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content(step, numbers=20_000):
    """Of a checkpoint that tells its step in every number."""
    return {"step": step, "weights": torch.full((numbers,), float(step)), "nested": [{"a": torch.arange(9)}] * 20}


def saved(folder, step=1, numbers=20_000):
    file = folder / f"step-{step}.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(step, numbers), file)
    return file


def weights(run, name="last.ckpt"):
    return torch.load(run / "checkpoints" / name, weights_only=True)["state_dict"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# kills


STAGES = {
    "before-temp:3": [4],
    "half-temp:3": [4],
    "before-fsync:3": [4],
    "before-replace:3": [4],
    "before-link:3": [6],
    "before-prune:1": [6, 8],  # when the third file that is not the best is there
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Weights at the end of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def action():
        os.chdir(folder)
        os.environ.pop("DENSECTX_RUN", None)
        Path("small.yaml").write_text(CONFIG)
        return main(["fit", "-c", "small.yaml", "--no-report"])

    assert forked(action) == 0
    return weights(folder / "runs" / "small" / "0")


@pytest.mark.fault("T09")
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_a_stage_of_saving_it_goes_on_from_the_newest_whole_file(fit, tmp_path, stage, undisturbed):
    assert forked(fit("run", DENSECTX_FAULT=f"save:{stage}")) == -signal.SIGKILL
    run = tmp_path / "runs" / "run" / "0"
    found = newest_whole(run)
    assert found.name in [f"step-{step}.ckpt" for step in STAGES[stage]]
    assert any((run / "checkpoints").glob("*.tmp.*")) == (
        stage.split(":")[0] in ("half-temp", "before-fsync", "before-replace")
    )
    assert forked(fit("run", "--resume", "auto")) == 0
    assert same(weights(run), undisturbed)
    assert not list((run / "checkpoints").glob("*.tmp.*")), "what the killed process left is swept"
    assert [f.name for f in run.parent.iterdir()] == ["0"]


@pytest.mark.fault("S13")
def test_killed_while_pruning_there_is_a_whole_file(tmp_path, record_property):
    def save_until(killed):
        os.environ["DENSECTX_FAULT"] = f"save:before-prune:{killed}"
        files = StepFiles(tmp_path, 2)
        for step in range(1, 30):
            saved(tmp_path, step, 100)
            files.written(step)

    for killed in range(1, 11):
        assert forked(lambda killed=killed: save_until(killed)) == -signal.SIGKILL
        assert [file.name for file in newest_first(tmp_path)[:2]] == [
            f"step-{killed + 2}.ckpt",
            f"step-{killed + 1}.ckpt",
        ]
        assert not any(damage(file) for file in steps(tmp_path).values())
        assert (tmp_path / "last.ckpt").resolve() == tmp_path / f"step-{killed + 2}.ckpt"
        for file in tmp_path.iterdir():
            file.unlink()
    record_property("count", 10)


def test_going_on_keeps_as_many_files_as_are_to_be_kept(tmp_path):
    before = StepFiles(tmp_path, 5)
    for step in range(1, 9):
        saved(tmp_path, step, 100)
        before.written(step)
    after = StepFiles(tmp_path, 5)  # of the process that goes on: it has looked at one file
    after.good.add(8)
    saved(tmp_path, 9, 100)
    after.written(9)
    assert sorted(steps(tmp_path)) == [5, 6, 7, 8, 9]


def kill_while_saving(folder, count, other):
    """Kill a process that saves without pause, again and again; after each kill look at every file."""
    other.mkdir(exist_ok=True)
    told, tell = os.pipe()
    done, first = 0, 1
    begun = time.perf_counter()
    saved(other, 1)
    takes = time.perf_counter() - begun  # what is fast on one machine would kill before the first save on another

    def save(start):
        os.environ["TMPDIR"] = str(other)
        files = StepFiles(folder, 2)
        files.good.add(start - 1)
        os.write(tell, (start - 1).to_bytes(8, "little"))
        for step in range(start, start + 100_000):
            saved(folder, step)
            files.written(step)
            files.point("best", step - step % 5)
            os.write(tell, step.to_bytes(8, "little"))

    for number in range(count):
        child = os.fork()
        if not child:
            try:
                save(first)
            finally:
                os._exit(1)
        os.set_blocking(told, True)
        done = int.from_bytes(os.read(told, 8), "little")  # it begins
        time.sleep(RANDOM.uniform(0, 6 * takes))  # the fault itself: a kill at a random time
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"kill {number}: the process ended by itself"
        os.set_blocking(told, False)
        with suppress(BlockingIOError):
            while text := os.read(told, 8):
                done = int.from_bytes(text, "little")
        found = newest_first(folder)
        assert len(found) >= min(done, 2), f"kill {number}: {done} were saved, there are {found}"
        for file in found:
            assert damage(file) == "", f"kill {number}: {file}"
        if found:
            newest = load_archive(found[0])
            assert newest["step"] >= done, f"kill {number}: step {done} was complete and is lost"
            assert torch.equal(newest["weights"], content(newest["step"])["weights"])
            first = newest["step"] + 1
        for name in ("last", "best"):
            link = folder / f"{name}.ckpt"
            assert not link.is_symlink() or damage(link) == "", f"kill {number}: {link}"
    os.close(told)
    os.close(tell)
    return done


@pytest.mark.fault("S06")
@pytest.mark.fault("T09")
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_kills_at_random_times_lose_nothing(tmp_path, record_property, count):
    other = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    done = kill_while_saving(folder, count, other / f"densectx-{os.getpid()}")
    shutil.rmtree(other / f"densectx-{os.getpid()}")
    assert done > count / 4, "most kills have to come while it saves"
    record_property("count", count)
    record_property("evidence", f"{count} kills, {done} saves, temporary folder on {other}, 0 lost")


# full and failing disks


@pytest.mark.fault("S01")
def test_full_disk_leaves_the_file_before_as_it_was(tmp_path, mounts, record_property):
    disk, other = tmp_path / "disk", tmp_path / "other"
    other.mkdir()

    def action():
        tmpfs(disk, "6m")
        said = []
        for number in range(20):
            os.environ["TMPDIR"] = str(other if number % 2 else disk)
            old = saved(disk, 1, 600_000)  # 2.4 MB of 6 MiB
            before = digest(old)
            try:
                saved(disk, 1 + number // 2 % 2, RANDOM.randrange(1_000_000, 3_000_000))  # over it, or beside it
            except StorageError as error:
                said.append(str(error))
            assert digest(old) == before
            assert damage(old) == ""
            assert [file.name for file in disk.iterdir()] == ["step-1.ckpt"], "the part that was written is gone"
        return said

    said = forked(action, mounts=True)
    assert len(said) == 20
    assert all("No space left on device" in text and "step-" in text for text in said)
    record_property("count", 20)


@pytest.mark.fault("S01")
@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_full_disk_ends_the_run_with_8_or_warns(fit, tmp_path, mounts, on_error):
    disk = tmp_path / "disk"
    callback = (
        f"{{class_path: densectx.checkpointing.Checkpoints, init_args: {{folder: {disk}, on_error: {on_error}}}}}"
    )
    run = fit("full", "--trainer.callbacks", f"[{callback}]")

    def action():
        tmpfs(disk, "80k")  # two files of the model fit in, not three
        status = run()
        return [status, *sorted(f.name for f in disk.iterdir()), *(damage(f) for f in steps(disk).values())]

    status, *found = forked(action, mounts=True)
    log = (tmp_path / "full.log").read_text()
    assert status == (8 if on_error == "stop" else 0), log[-2000:]
    assert found == ["best.ckpt", "last.ckpt", "step-2.ckpt", "step-4.ckpt", "", ""] or (len(found), found[-1]) == (
        4,
        "",
    )
    assert "No space left on device" in log
    assert ("densectx: error" in log) == (on_error == "stop")
    assert "Traceback" not in log


def ranks(run, before, port):
    """Statuses of two forked ranks of one job that run the same action; ``before`` is called in the second."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            status = 99
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                if rank:
                    before()
                status = run()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.fault("D16")
@pytest.mark.fault("S01")
def test_two_ranks_end_together_when_the_first_cannot_save(fit, tmp_path, mounts, free_port):
    disk = tmp_path / "disk"
    callback = f"{{class_path: densectx.checkpointing.Checkpoints, init_args: {{folder: {disk}}}}}"
    words = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.callbacks", f"[{callback}]"]
    run = fit("two", *words, "--data.sources.mosaic.batch_size=2")

    def read_only():
        call("unshare", 0x00020000)
        call("mount", b"none", str(disk).encode(), None, 0x1000 | 0x1 | 0x20, None)  # this mount, not the file system
        with pytest.raises(OSError, match="Read-only"):
            (disk / "x").touch()

    def action():
        tmpfs(disk, "80k")
        return [ranks(run, read_only, free_port()), sorted(f.name for f in disk.iterdir() if not f.is_symlink())]

    statuses, files = forked(action, mounts=True, timeout=100)
    log = (tmp_path / "two.log").read_text()
    assert statuses == [8, 8], log[-3000:]
    assert files == ["step-2.ckpt", "step-4.ckpt"] or len(files) == 1
    assert log.count("No space left on device") >= 2, "each rank says why it ends"


@pytest.mark.fault("S02")
def test_full_disk_for_logs_only_warns_once_and_trains_on(fit, tmp_path, mounts):
    disk, kept = tmp_path / "runs", tmp_path / "kept"
    callback = f"{{class_path: densectx.checkpointing.Checkpoints, init_args: {{folder: {kept}}}}}"
    run = fit("logs", "--trainer.callbacks", f"[{callback}]", "--trainer.log_every_n_steps=1")

    def action():
        tmpfs(disk, "64k")
        (disk / "logs").mkdir()
        (disk / "filler").write_bytes(bytes(32 << 10))
        status = run()
        return [status, sorted(f.name for f in kept.iterdir())]

    status, files = forked(action, mounts=True)
    log = (tmp_path / "logs.log").read_text()
    assert status == 0, log[-3000:]
    assert "step-8.ckpt" in files
    assert "Traceback" not in log
    for name in ("metrics.csv", "pictures"):
        assert log.count(f"{name}: cannot be written") <= 1
    assert "training goes on without what is logged there" in log


@pytest.mark.fault("S03")
def test_read_only_folder_is_refused_before_the_first_step(fit, tmp_path, mounts):
    first, second = fit("whole", "--trainer.max_steps=2"), fit("fresh")
    again = fit("whole", "--resume", "auto", "--allow-changed", "trainer")
    callback = f"{{class_path: densectx.checkpointing.Checkpoints, init_args: {{folder: {tmp_path / 'disk'}}}}}"
    elsewhere = fit("elsewhere", "--trainer.callbacks", f"[{callback}]")
    assert forked(first) == 0

    def read_only(folder):
        call("mount", str(folder).encode(), str(folder).encode(), None, 0x1000, None)  # bind
        call("mount", b"none", str(folder).encode(), None, 0x1000 | 0x1 | 0x20, None)  # bind, read-only, remount

    def action():
        (tmp_path / "disk").mkdir()
        read_only(tmp_path / "disk")
        found = [elsewhere()]
        read_only(tmp_path / "runs")
        return [*found, second(), again()]

    before = sorted(str(f) for f in (tmp_path / "runs" / "whole").rglob("*"))
    assert forked(action, mounts=True) == [8, 8, 8]
    assert sorted(str(f) for f in (tmp_path / "runs" / "whole").rglob("*")) == before
    for name in ("elsewhere", "fresh", "whole"):
        log = (tmp_path / f"{name}.log").read_text()
        assert "Read-only file system" in log, log
        assert "Traceback" not in log


@pytest.mark.fault("S18")
@pytest.mark.parametrize("which", [1, 2])
def test_a_failed_fsync_is_told_and_the_old_file_kept(tmp_path, which):
    """The kernel's own answer, by strace; the first fsync is that of the file, the second that of the folder."""
    if not shutil.which("strace"):
        pytest.skip("needs strace: apt-get install strace")
    old = saved(tmp_path)
    before = digest(old)
    go, wait = os.pipe()[::-1]

    def action():
        os.read(wait, 1)
        try:
            saved(tmp_path)
        except StorageError as error:
            return str(error)
        return ""

    tracer = None

    def attach(child):
        nonlocal tracer
        command = [
            "strace",
            "-f",
            "-qq",
            "-e",
            "trace=fsync",
            "-e",
            f"inject=fsync:error=EIO:when={which}",
            "-p",
            str(child),
        ]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and tracer.poll() is None:
            status = Path(f"/proc/{child}/status").read_text()
            if f"TracerPid:\t{tracer.pid}" in status:
                break
            time.sleep(0.01)
        os.write(go, b"x")

    pid_reader, pid_writer = os.pipe()

    def with_pid():
        os.write(pid_writer, os.getpid().to_bytes(8, "little"))
        return action()

    thread = threading.Thread(target=lambda: attach(int.from_bytes(os.read(pid_reader, 8), "little")))
    thread.start()
    try:
        said = forked(with_pid, timeout=60)
        thread.join(30)
    finally:
        os.write(go, b"x")
        if tracer:
            tracer.kill()
            _, complaint = tracer.communicate()
        for end in (go, wait, pid_reader, pid_writer):
            os.close(end)
    if "ptrace" in complaint or "not permitted" in complaint:
        pytest.skip(f"strace may not trace here: {complaint.strip()}")
    assert "Input/output error" in said, complaint
    assert "step-1.ckpt" in said
    assert damage(old) == ""
    if which == 1:
        assert digest(old) == before
    assert [f.name for f in tmp_path.iterdir()] == ["step-1.ckpt"]


# damaged files


@pytest.mark.fault("S07")
def test_every_truncation_is_found_and_the_older_file_named(tmp_path, record_property):
    shutil.copy(FIXTURE, tmp_path / "step-2.ckpt")
    whole = sealed(tmp_path / "step-4.ckpt").read_bytes()
    lengths = [
        *range(len(whole) - 120, len(whole), 5),
        0,
        1,
        21,
        22,
        *(RANDOM.randrange(len(whole)) for _ in range(72)),
    ]
    for length in lengths:
        (tmp_path / "step-4.ckpt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint.*whole one of this run is .*step-2"):
            densectx.load(tmp_path / "step-4.ckpt")
    record_property("count", len(lengths))


FIXTURE = Path(__file__).parents[1] / "fixtures" / "format-1-without-digest.ckpt"


def sealed(file):
    """The model of the fixture as a file with a digest."""
    AtomicCheckpointIO().save_checkpoint(torch.load(FIXTURE, weights_only=True), file)
    return file


@pytest.mark.fault("S08")
def test_every_flipped_bit_is_found(tmp_path, record_property):
    file = sealed(tmp_path / "step-1.ckpt")
    size, count = file.stat().st_size, 10_000
    found = []
    last = range((size - 110) * 8, size * 8)  # the digest and what says that there is one
    with file.open("r+b", buffering=0) as opened:
        for bit in [*last, *(RANDOM.randrange(size * 8) for _ in range(count - len(last)))]:
            opened.seek(bit // 8)
            byte = opened.read(1)[0]
            opened.seek(bit // 8)
            opened.write(bytes([byte ^ 1 << bit % 8]))
            with suppress(CheckpointError):
                load_archive(file)
                found.append(bit)
            opened.seek(bit // 8)
            opened.write(bytes([byte]))
    assert found == [], "loaded in spite of a flipped bit"
    assert damage(file) == ""
    record_property("count", count)


@pytest.mark.fault("S09")
def test_every_zeroed_block_is_found(tmp_path, record_property):
    file = saved(tmp_path)
    whole = file.read_bytes()
    starts = [*range(0, len(whole), 4096), *(RANDOM.randrange(len(whole)) for _ in range(200))]
    count = 0
    for start in starts:
        cut = whole[:start] + bytes(min(4096, len(whole) - start)) + whole[start + 4096 :]
        if cut == whole:
            continue
        count += 1
        file.write_bytes(cut)
        with pytest.raises(CheckpointError):
            load_archive(file)
    record_property("count", count)
    assert count > 100


@pytest.mark.fault("S07")
@pytest.mark.fault("S08")
def test_resume_passes_over_damaged_files_loudly_and_refuses_one_that_is_named(fit, tmp_path):
    run = tmp_path / "runs" / "run" / "0"
    assert forked(fit("run", "--trainer.max_steps=4")) == 0
    newest, older = run / "checkpoints" / "step-4.ckpt", run / "checkpoints" / "step-2.ckpt"
    text = bytearray(newest.read_bytes())
    text[len(text) // 2] ^= 4
    newest.write_bytes(text)
    more = ["--trainer.max_steps=6", "--allow-changed=trainer"]
    log = tmp_path / "run.log"
    for name in (newest, run / "checkpoints" / "last.ckpt"):
        log.unlink()
        assert forked(fit("run", "--resume", str(name), *more)) == 4
        assert f"The newest whole one of this run is {older}" in log.read_text()
    log.unlink()
    assert forked(fit("run", "--resume", str(run), *more)) == 0
    said = log.read_text()
    assert f"{newest} cannot be used: it is damaged: its SHA-256" in said
    assert f"going on from {older}, the newest that is whole: 2 optimizer steps are done again" in said
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert not any(map(damage, (run / "checkpoints").glob("*.ckpt")))
    for file in steps(run / "checkpoints").values():
        file.write_bytes(file.read_bytes()[:-1])
    log.unlink()
    assert forked(fit("run", "--resume", "auto", *more)) == 4
    assert "is whole, so there is nothing to go on from" in log.read_text()


def test_the_fault_hook_refuses_what_it_does_not_know(monkeypatch, tmp_path):
    monkeypatch.setenv("DENSECTX_FAULT", "save:before-tmp")
    with pytest.raises(densectx.errors.ConfigError, match="did you mean 'before-temp'"):
        saved(tmp_path)
    assert not list(tmp_path.glob("*.ckpt"))
