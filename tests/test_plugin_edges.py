"""A task from another package: installed it trains without a change to densectx, uninstalled it is asked for by name.

``plugins/densectx-edges`` is made visible the way pip would: a ``.dist-info`` folder and the module on the path of a
process of its own.
"""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import densectx
from densectx.errors import PluginError

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "plugins" / "densectx-edges"
PROJECT = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]

CONFIG = """
requires: [densectx-edges]
model:
  backbone: {name: plain, width: 8}
  projection: null
  context: {name: basic, dilations: [1, 2, 1]}
  tasks:
    edges: {name: edges, source: photos, head: {name: decoder, width: 8}}
    segmentation: {name: segmentation, source: mosaic}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}
data:
  sources:
    photos: {name: image_mask, preset: bsds500, root: PHOTOS, batch_size: 2}
    mosaic: {name: mosaic, size: 32, val_length: 2, batch_size: 2}
  num_workers: 0
trainer:
  accelerator: cpu
  max_steps: 2
  val_check_interval: 2
  check_val_every_n_epoch: null
  enable_progress_bar: false
"""


@pytest.fixture(scope="module", autouse=True)
def _uninstalled_here():
    try:
        distribution("densectx-edges")
    except PackageNotFoundError:
        return
    pytest.skip("densectx-edges is installed here, so its absence cannot be tested")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Config and two pictures in BSDS500's layout."""
    folder = tmp_path_factory.mktemp("edges")
    rng = np.random.default_rng(0)
    for subset in ("train", "val", "test"):
        images, truth = (folder / name / subset for name in ("images", "groundTruth"))
        images.mkdir(parents=True)
        truth.mkdir(parents=True)
        for number in range(2):
            Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(images / f"{number}.png")
            cells = np.empty((1, 1), object)
            cells[0, 0] = {"Boundaries": rng.integers(0, 2, (24, 32), np.uint8)}
            savemat(truth / f"{number}.mat", {"groundTruth": cells})
    (folder / "both.yaml").write_text(CONFIG.replace("PHOTOS", str(folder)))
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What pip would have written into site-packages, the module aside."""
    info = tmp_path_factory.mktemp("site") / f"densectx_edges-{PROJECT['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {PROJECT['name']}\nVersion: {PROJECT['version']}\n")
    groups = PROJECT["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups]
    (info / "entry_points.txt").write_text("".join(lines))
    return info.parent


def command(*arguments, path=()):
    """Run densectx in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
    environment.pop("DENSECTX_RUN", None)
    line = [sys.executable, "-m", "densectx", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def run(folder, site):
    """The run folder of a fit with the package installed."""
    done = command(
        "fit", "-c", folder / "both.yaml", "--trainer.default_root_dir", folder / "runs", path=(site, PACKAGE)
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "both" / "0"


def test_installed_it_trains_beside_a_task_of_the_core(run):
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert checkpoint["densectx"]["plugins"] == {PROJECT["name"]: PROJECT["version"]}
    columns = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/edges/ap", "val/edges/ap_constant", "val/segmentation/miou"} <= set(columns)
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["edges", "segmentation"]


def test_a_checkpoint_names_the_package_it_needs(run):
    with pytest.raises(PluginError) as error:
        densectx.load(run)
    assert error.value.status == 5
    assert f"needs densectx-edges {PROJECT['version']}" in str(error.value)
    assert "pip install ./plugins/densectx-edges in a checkout" in str(error.value)


def test_a_config_names_the_package_it_needs(folder):
    done = command("fit", "-c", folder / "both.yaml", "--trainer.default_root_dir", folder / "none")
    assert done.returncode == 5
    assert "pip install ./plugins/densectx-edges in a checkout" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "none").exists()


def test_without_requires_the_unknown_task_is_named(folder):
    done = command("fit", "-c", folder / "both.yaml", "--requires", "null", "--trainer.default_root_dir", folder / "x")
    assert done.returncode == 2
    assert "unknown task 'edges'" in done.stderr
