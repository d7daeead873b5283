"""Faults in configs: typos, wrong values, names that do not exist, code that must not run, conflicts."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from densectx.errors import ConfigError, DensectxError
from densectx.registry import REGISTRIES

ROOT = Path(__file__).resolve().parents[2]
STEMS = sorted(f.stem for f in [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "plugins").glob("*/configs/*.yaml")])
LETTERS = "abcdefghijklmnopqrstuvwxyz_"
KINDS = ("delete", "swap", "insert")


def typo(word, kind, rng):
    """One letter deleted, swapped with its neighbour, or inserted."""
    at = rng.randrange(len(word))
    if kind == "delete":
        return word[:at] + word[at + 1 :]
    if kind == "insert":
        return word[:at] + rng.choice(LETTERS) + word[at:]
    at = rng.randrange(max(len(word) - 1, 1))
    return word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :]


def misspell(kind, rng, done):
    """A change for ``changed``: misspells a key in its place, or leaves it if no typo makes another word."""

    def change(node, key):
        new = next((t for t in (typo(key, kind, rng) for _ in range(20)) if t and t != key and t not in node), None)
        if new is not None:
            items = [(new if k == key else k, v) for k, v in node.items()]
            node.clear()
            node.update(items)
            done.append(new)

    return change


@pytest.mark.fault("C01")
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("most", [3, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_typos_in_keys(stem, most, fit, started, configs, paths, changed, record_property):
    config, rng = configs[stem], random.Random(stem)
    with pytest.raises(started):
        fit(config)
    typos = [(path, kind) for path in paths(config) for kind in KINDS]
    cases, missed = 0, []
    for path, kind in typos if most is None else rng.sample(typos, min(most, len(typos))):
        new = []
        wrong = changed(config, path, misspell(kind, rng, new))
        cases += len(new)
        what = f"{'.'.join(map(str, path))} as {new}"
        try:
            if new:
                fit(wrong)
        except ConfigError as error:
            if not re.search(rf"did you mean '{re.escape(str(path[-1]))}'", str(error)):
                missed.append(f"{what}: {error}")
        except started:
            pytest.fail(f"{what} was accepted")
    record_property("count", cases)
    record_property("evidence", f"{stem}: {cases} refused, {cases - len(missed)} with the right suggestion")
    assert len(missed) <= 0.05 * cases, "\n".join(missed)


@pytest.mark.fault("C02")
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("most", [2, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_values_of_a_wrong_type(stem, most, fit, started, configs, paths, changed, record_property):
    config, rng = configs[stem], random.Random(stem)
    every = list(paths(config))
    accepted, unnamed, cases = [], [], 0
    for path in every if most is None else rng.sample(every, min(most, len(every))):
        for value in ({"wrong": [1]}, [[None]], float("nan")):
            cases += 1
            what = f"{'.'.join(map(str, path))}: {value}"
            try:
                fit(changed(config, path, lambda node, key, value=value: node.update({key: value})))
            except DensectxError as error:
                steps = [str(step) for step in path if isinstance(step, str)]
                if error.status != 2 or not any(step in str(error) for step in steps[-2:]):
                    unnamed.append(f"{what}: {error}")
            except started:
                accepted.append(what)
    record_property("count", cases)
    assert (accepted, unnamed) == ([], [])


def names():
    for kind, registry in REGISTRIES.items():
        for entry in registry.entries():
            if entry.distribution == "densectx" and len(entry.name) > 2:
                yield kind, entry.name


@pytest.mark.fault("C03")
def test_typos_in_names(record_property):
    rng, cases, missed = random.Random(0), 0, []
    for kind, name in names():
        for how in KINDS:
            for slips in (1, 2):
                word = name
                for _ in range(slips):
                    word = typo(word, how, rng)
                if word in REGISTRIES[kind].names():
                    continue
                cases += 1
                with pytest.raises(ConfigError) as refused:
                    REGISTRIES[kind].get(word)
                assert f"`densectx list {kind}`" in str(refused.value)
                missed += (
                    [f"{word} for {name}: {refused.value}"]
                    if f"did you mean {name!r}" not in str(refused.value)
                    else []
                )
    record_property("count", cases)
    record_property("evidence", f"{cases - len(missed)} of {cases} suggested rightly")
    assert len(missed) <= 0.1 * cases, "\n".join(missed)


@pytest.mark.fault("C04")
@pytest.mark.parametrize(
    "flag", ["--trainer.max_epoch", "--trainer.max_step", "--model.optim", "--resum", "--data.num_work"]
)
def test_flags_are_not_abbreviated(flag, fit, configs):
    with pytest.raises(ConfigError, match="did you mean"):
        fit(configs["quickstart"], flag, "3")


DANGEROUS = [
    "os.system",
    "os.popen",
    "os.execv",
    "os.remove",
    "os.putenv",
    "subprocess.Popen",
    "subprocess.run",
    "subprocess.call",
    "subprocess.check_output",
    "builtins.eval",
    "builtins.exec",
    "builtins.compile",
    "builtins.__import__",
    "builtins.open",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
    "shelve.open",
    "runpy.run_path",
    "runpy.run_module",
    "importlib.import_module",
    "code.InteractiveConsole",
    "ctypes.CDLL",
    "shutil.rmtree",
    "tempfile.mkdtemp",
    "webbrowser.open",
    "urllib.request.urlopen",
    "http.server.HTTPServer",
    "socket.socket",
    "multiprocessing.Process",
    "threading.Thread",
    "asyncio.create_subprocess_shell",
    "platform.popen",
    "pty.spawn",
    "timeit.timeit",
    "torch.load",
    "torch.hub.load",
    "torch.utils.cpp_extension.load",
    "evil_module.Evil",
]
FIELDS = [
    "model.optimizer",
    "model.lr_scheduler",
    "trainer.callbacks",
    "trainer.logger",
    "trainer.strategy",
    "trainer.plugins",
    "trainer.profiler",
    "model.backbone",
    "model.context",
    "model.tasks.denoising",
    "model.tasks.denoising.head",
    "model.tasks.denoising.loss",
    "data.sources.mosaic",
]


@pytest.mark.fault("C08")
def test_nothing_outside_the_allowed_packages_is_imported(
    tmp_path, fit, started, configs, monkeypatch, record_property
):
    marker = tmp_path / "ran"
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    cases = 0
    for target in DANGEROUS:
        module, _, name = target.rpartition(".")
        rng = random.Random(target)
        for field in FIELDS if target in ("os.system", "evil_module.Evil") else rng.sample(FIELDS, 3):
            node = {"class_path": target, "init_args": {"command": f"touch {marker}"}}
            if field.split(".")[0] != "trainer" and field not in ("model.optimizer", "model.lr_scheduler"):
                node = {"name": f"{module}:{name}"}
            config = configs["quickstart"]
            *parents, leaf = field.split(".")
            where = config
            for step in parents:
                where = where[step]
            before = where.get(leaf)
            where[leaf] = [node] if leaf in ("callbacks", "plugins") else node
            cases += 1
            with pytest.raises(ConfigError):
                fit(config)
            where[leaf] = before
            if before is None:
                del where[leaf]
    assert not marker.exists()
    assert "evil_module" not in sys.modules
    record_property("count", cases)


CONFLICTS = [
    ({"data.sources.mosaic.augment": {"crop": 4096}}, "crop"),
    ({"trainer.precision": "16-true"}, "precision"),
    ({"trainer.precision": "half"}, "precision"),
    ({"model.tasks.segmentation.classes": 99}, "classes"),
    ({"model.tasks.segmentation.source": "camvid"}, "source"),
    ({"model.tasks.super_resolution.scale": 7}, "scale"),
    ({"trainer.accumulate_grad_batches": 7}, "accumulate_grad_batches"),
    ({"trainer.accelerator": "gpu", "trainer.devices": 64}, ""),
    ({"data.sources.mosaic.batch_size": 0}, "batch_size"),
    ({"model.backbone": {"name": "timm", "model": "vgg16"}}, "vgg16"),
    ({"model.backbone": {"name": "plain", "in_channels": 7}}, "in_channels"),
    ({"model.freeze": ["bakbone"]}, "backbone"),
]


@pytest.mark.fault("C11")
@pytest.mark.parametrize(("wrong", "part"), CONFLICTS, ids=["+".join(wrong) for wrong, _ in CONFLICTS])
def test_conflicts_are_refused_before_data_is_read(wrong, part, fit, configs):
    config = configs["quickstart"]
    for path, value in wrong.items():
        node = config
        *parents, leaf = path.split(".")
        for step in parents:
            node = node[step]
        node[leaf] = value
    with pytest.raises(ConfigError) as refused:
        fit(config)
    assert part in str(refused.value)


@pytest.mark.fault("C13")
def test_the_saved_config_reproduces_the_run(tmp_path):
    import torch

    flags = ["--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--trainer.enable_progress_bar", "false"]
    flags += ["--model.lr_scheduler", "null", "--data.num_workers", "0", "--trainer.precision", "32-true"]
    flags += [
        "--trainer.limit_val_batches",
        "2",
        "--model.backbone.levels",
        "2",
        "--data.sources.mosaic.batch_size",
        "2",
    ]

    def fit(name, *arguments):
        command = [sys.executable, "-m", "densectx", "fit", *arguments, "--name", name]
        root = ["--trainer.default_root_dir", str(tmp_path / "runs")]
        subprocess.run([*command, *root], check=True, cwd=ROOT, capture_output=True)
        run = tmp_path / "runs" / name / "0"
        return run, torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    run, first = fit("first", "-c", str(ROOT / "configs" / "quickstart.yaml"), *flags)
    _, second = fit("second", "-c", str(run / "config.yaml"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
