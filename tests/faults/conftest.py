"""What the rows about configs share: ``densectx fit`` up to the point where data would be read."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import pytorch_lightning as pl
import yaml

from densectx import training
from densectx.config import COLLECTIONS
from densectx.data import fingerprint

ROOT = Path(__file__).resolve().parents[2]
BASE = "(base)"  # where an overlay keeps the config that it is merged behind


class Started(Exception):
    """Training would have begun: the config was accepted."""


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """``densectx fit`` up to the point where data is read; every shipped plug-in is visible."""

    def start(*args, **kwargs):
        raise Started

    monkeypatch.setattr(pl.Trainer, "fit", start)
    monkeypatch.setattr(fingerprint, "take", start)  # lists the files of the data right before that
    for project in sorted((ROOT / "plugins").glob("*/pyproject.toml")):
        _install(tomllib.loads(project.read_text())["project"], project.parent, tmp_path / "site", monkeypatch)

    def fit(config, *flags):
        """An overlay is merged behind the config it is for."""
        files = []
        own = {key: value for key, value in config.items() if key != BASE}
        for number, layer in enumerate([*([config[BASE]] if BASE in config else []), own]):
            files.append(tmp_path / f"config{number}.yaml")
            files[-1].write_text(yaml.safe_dump(layer, sort_keys=False))
        arguments = [part for file in files for part in ("-c", str(file))]
        training.main("fit", [*arguments, "--trainer.default_root_dir", str(tmp_path / "runs"), *flags])

    return fit


def _install(project, folder, site, monkeypatch):
    """Make module and entry points visible, unless they are: no pip is needed."""
    try:
        distribution(project["name"])
    except PackageNotFoundError:
        info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        groups = project.get("entry-points", {}).items()
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups]
        (info / "entry_points.txt").write_text("".join(lines))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.syspath_prepend(site)


@pytest.fixture
def started():
    """The exception that says so."""
    return Started


def shipped():
    """Every config of the project: experiments and overlays, those of the plug-ins too."""
    return sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "plugins").glob("*/configs/*.yaml")])


@pytest.fixture
def configs():
    """{stem: config} of all shipped ones, with the smallest network of the same options: that only saves time."""
    found = {file.stem: yaml.safe_load(file.read_text()) for file in shipped()}
    whole = {s: _shrunk(config) for s, config in found.items() if {"backbone", "name"} & config.get("model", {}).keys()}
    base = {"test_nyud": "depth_motorcycle"}
    overlays = {
        stem: {BASE: whole[base.get(stem, "quickstart")], **config}
        for stem, config in found.items()
        if stem not in whole
    }
    return whole | overlays


def _shrunk(config):
    backbone = config["model"].get("backbone", {})
    if "name" in config["model"]:  # a published network
        config["model"]["backbone"] = {"width": 4, "fc": 8}
    if isinstance(backbone, dict) and backbone.get("name", "").startswith("dilated_resnet"):
        backbone["name"] = "dilated_resnet18"
    config.setdefault("trainer", {})["accelerator"] = "cpu"
    return config


@pytest.fixture
def paths():
    """Key paths of a config, those that a user chooses (of tasks, of sources) left out."""

    def paths(node, path=()):
        if isinstance(node, dict):
            for key, value in ((k, v) for k, v in node.items() if k != BASE):
                if ".".join(map(str, path)) not in COLLECTIONS:
                    yield (*path, key)
                yield from paths(value, (*path, key))
        elif isinstance(node, list):
            for index, value in enumerate(node):
                yield from paths(value, (*path, index))

    return paths


@pytest.fixture
def changed():
    """A copy of a config with the node that holds a key path changed in place by a function of (node, key)."""

    def changed(config, path, change):
        config = copy.deepcopy(config)
        node = config
        for step in path[:-1]:
            node = node[step]
        change(node, path[-1])
        return config

    return changed


class Run:
    """A run of ``densectx`` on one or several ranks: a process a rank."""

    def __init__(self, server, pids, logs):
        self.server, self.pids, self.logs = server, pids, logs

    def wait(self, seconds=60):
        """Exit statuses; negative: the signal that ended it."""
        until = time.monotonic() + seconds
        found = [self.server.ask(wait=pid, seconds=max(until - time.monotonic(), 0)) for pid in self.pids]
        assert None not in found, f"still running after {seconds} s: {found}\n{self.said()}"
        return found

    def said(self, rank=None):
        """What it wrote to stdout and stderr."""
        logs = self.logs if rank is None else self.logs[rank : rank + 1]
        return "".join(log.read_text() for log in logs if log.exists())

    def until(self, condition, seconds=60):
        """Wait for a condition on the file system, which the run is at work to fulfil."""
        end = time.monotonic() + seconds
        while not condition():
            ended = [pid for pid in self.pids if not alive(pid)]
            assert not ended or condition(), f"{ended} ended early\n{self.said()}"
            assert time.monotonic() < end, f"not within {seconds} s\n{self.said()}"
            time.sleep(0.01)

    def running(self):
        """The ranks that have not ended."""
        return [rank for rank, pid in enumerate(self.pids) if alive(pid)]

    def until_ended(self, rank, seconds):
        """Wait for the end of a rank."""
        end = time.monotonic() + seconds
        while alive(self.pids[rank]):
            assert time.monotonic() < end, f"rank {rank} still runs after {seconds} s\n{self.said()}"
            time.sleep(0.01)

    def signal(self, number, *ranks):
        """Send a signal to some ranks, default all."""
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], number)


WARM = """
model:
  backbone: {name: plain, width: 6}
  projection: {channels: 6}
  tasks:
    segmentation: {name: segmentation, source: mosaic}
    denoising: {name: denoising, source: mosaic, sigma: [0, 50]}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  sources:
    mosaic: {name: mosaic, size: 24, length: 10, val_length: 3, batch_size: 4}
  num_workers: 0
trainer: {accelerator: cpu, enable_progress_bar: false, logger: false}
"""  # built once before the others, which then take less time


class ForkServer:
    """Starts runs from one process that has imported everything (``fork_server.py``)."""

    def __init__(self, folder):
        environment = {k: v for k, v in os.environ.items() if k != "DENSECTX_RUN"} | {"OMP_NUM_THREADS": "1"}
        (folder / "warm.yaml").write_text(WARM)
        command = [sys.executable, Path(__file__).with_name("fork_server.py"), "warm.yaml"]
        pipe = subprocess.PIPE
        self.folder, self.pids, self.count = folder, [], 0
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=folder)
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder, *arguments, ranks=1, environment=None, of_rank=None):
        """Start ``densectx`` with arguments (and more of them, or environment, for some ranks: ``of_rank``)."""
        self.count += 1
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        pids, logs = [], [Path(folder, f"log-{self.count}-{rank}.txt") for rank in range(ranks)]
        for rank, log in enumerate(logs):
            more, others = (of_rank or {}).get(rank, ((), {}))
            own = {"DENSECTX_RUN": ""} | (environment or {}) | others
            if ranks > 1:  # as Lightning's launcher starts them
                own = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | own
            asked = [*map(str, arguments), *map(str, more)]
            pids.append(self.ask(start=asked, environment=own, folder=str(folder), log=str(log)))
        self.pids += pids
        return Run(self, pids, logs)

    def close(self):
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def alive(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """Runs without the seconds that imports take; a folder is given with each."""
    server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield server
    server.close()
