"""What the rows about configs share: ``densectx fit`` up to the point where data would be read."""

from __future__ import annotations

import copy
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import pytorch_lightning as pl
import yaml

from densectx import training
from densectx.config import COLLECTIONS

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
