"""`densectx predict` in several processes: `--devices N` and torchrun."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import densectx
from densectx.cli import main
from densectx.inference import launch as launching
from densectx.inference.record import JOURNAL

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(densectx.__file__).parents[1])}


def pictures(folder, count, side=9):
    folder.mkdir(parents=True)
    for number in range(count):
        data = np.random.default_rng(number).integers(0, 256, (side, side + 2, 3), dtype=np.uint8)
        Image.fromarray(data).save(folder / f"{number:02}.png")


def run(*arguments, stdin=None, before=(sys.executable, "-m", "densectx")):
    command = [*before, "predict", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, input=stdin, capture_output=True, text=True, timeout=120)


def files(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.suffix not in ("", ".json")}


def test_two_processes_do_what_one_does(tmp_path, every_output):
    pictures(tmp_path / "in", 7)
    (tmp_path / "in/03.png").write_bytes(b"no picture")
    tasks = ("--tasks", "segmentation,denoising")
    assert main(["predict", str(every_output), str(tmp_path / "in"), "-o", str(tmp_path / "one"), *tasks]) == 3
    names = "".join(f"{path}\n" for path in [tmp_path / "gone.png", tmp_path / "in"])
    done = run(every_output, "-", "-o", tmp_path / "two", *tasks, "--devices", 2, "--json", stdin=names)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("03.png") == 1
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert not (tmp_path / "two" / JOURNAL).exists()
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert json.loads(done.stdout) == two
    gone = [entry for entry in two["inputs"] if "gone" in entry["path"]]
    assert [entry["status"] for entry in gone] == ["failed"]
    assert [entry for entry in two["inputs"] if entry not in gone] == one["inputs"]

    (tmp_path / "two/denoising/05.png").unlink()  # made again, the others skipped
    done = run(every_output, tmp_path / "in", "-o", tmp_path / "two", *tasks, "--devices", 2)
    assert done.returncode == 3, done.stderr
    found = [entry["status"] for entry in json.loads((tmp_path / "two/summary.json").read_text())["inputs"]]
    assert found == ["skipped"] * 3 + ["failed", "skipped", "done", "skipped"]


def test_processes_run_nothing_of_the_working_directory(tmp_path, every_output, monkeypatch):
    pictures(tmp_path / "in", 2)
    (tmp_path / "difflib.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    arguments = (every_output, "in", "-o", "out", "--tasks", "denoising", "--devices", 2)
    done = run(*arguments, before=(sys.executable, "-P", "-m", "densectx"))  # as the script densectx does
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_the_processes_of_torchrun(tmp_path, every_output):
    pictures(tmp_path / "in", 5)
    arguments = (every_output, tmp_path / "in", "-o", tmp_path / "out", "--tasks", "denoising")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(*arguments, before=(*torchrun, "-m", "densectx"))
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "out/summary.json").read_text())["inputs"]
    assert [(Path(entry["path"]).name, entry["status"]) for entry in entries] == [
        (f"{number:02}.png", "done") for number in range(5)
    ]
    assert len(files(tmp_path / "out")) == 5


def test_what_cannot_work_is_said_once(tmp_path, every_output):
    pictures(tmp_path / "in", 2)
    done = run(every_output, tmp_path / "in", "-o", tmp_path / "out", "--tasks", "denoisng", "--devices", 3)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean 'denoising'" in done.stderr
    assert not (tmp_path / "out").exists()


def children_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_no_process_is_left_where_the_first_is_told_to_end(tmp_path, every_output, number, status):
    pictures(tmp_path / "in", 100, 60)
    command = [sys.executable, "-m", "densectx", "predict", every_output, tmp_path / "in", "-o", tmp_path / "out"]
    process = subprocess.Popen([*command, "--tta", "--devices", "2"], env=ENVIRONMENT, stderr=subprocess.PIPE)
    until = time.monotonic() + 100
    while len(children := children_of(process)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    try:
        _, error = process.communicate(timeout=100)
        assert process.returncode == status, error
        assert len(children) == 2
        assert not any(Path(f"/proc/{child}").exists() for child in children)
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_a_signal_before_anything_runs(monkeypatch):
    """Told while the processes are started: all are stopped, the handlers are those from before."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    started = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(["sleep", "60"], **options))
        os.kill(os.getpid(), signal.SIGHUP)  # ignored, as nohup has it
        if len(started) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    try:
        assert launching.launch([], 3) == 143
        assert len(started) == 3
        assert all(child.returncode == -signal.SIGINT for child in started)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("how", ["interrupted", "told to end", "one is killed"])
@pytest.mark.fault("F02")
def test_the_summary_is_whole_after(tmp_path, every_output, how):
    pictures(tmp_path / "in", 60, 60)
    arguments = ["predict", str(every_output), str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--tta"]
    command = [sys.executable, "-m", "densectx", *arguments, "--devices", "2"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list((tmp_path / "out").glob("denoising/03.png")) and time.monotonic() < until:
        time.sleep(0.01)
    children = children_of(process)
    signals = {"interrupted": (signal.SIGINT, 130), "told to end": (signal.SIGTERM, 143)}
    number, status = signals.get(how, (None, 7))
    if number is not None:
        process.send_signal(number)
    else:
        os.kill(children[1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    entries = {e["path"]: e for e in json.loads((tmp_path / "out/summary.json").read_text())["inputs"]}
    assert 0 < len(entries) < 60
    written = set(files(tmp_path / "out"))
    listed = {name for entry in entries.values() for name in entry["outputs"]}
    assert written - {name for name in written if name.endswith(".part")} <= listed
    for entry in entries.values():
        assert entry["status"] == "started" or set(entry["outputs"]) <= written
    assert main(arguments) == 0
    statuses = [e["status"] for e in json.loads((tmp_path / "out/summary.json").read_text())["inputs"]]
    assert len(statuses) == 60
    assert "skipped" in statuses
