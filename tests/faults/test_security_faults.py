"""Attacks by files: pickles that run code, names of code in metadata, bombs, malicious YAML, ways out of a folder."""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import pickle
import resource
import runpy
import struct
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
import zlib
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from densectx import cli
from densectx.checkpoint import header, load
from densectx.errors import CheckpointError

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured, and names are written, as on Linux")
MEGABYTES, SECONDS = 300, 10  # what a refusal may take; the machine may be busy
CONFIG = {
    "model": {
        "backbone": {"name": "plain", "width": 6},
        "projection": None,
        "context": "context7",
        "tasks": {"denoising": {"name": "denoising", "source": "mosaic", "sigma": 25}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    },
    "data": {
        "sources": {"mosaic": {"name": "mosaic", "size": 24, "length": 4, "val_length": 1, "batch_size": 4}},
        "num_workers": 0,
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 1,
        "val_check_interval": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with ``config.yaml``, ``a.png`` and a run of one step, ``runs/good/0``."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(folder / "a.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DENSECTX_RUN", "")
        assert cli.main(["fit", "-c", "config.yaml", "--name", "good", "--no-report"]) == 0
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A working folder of the test's own, with what ``trained`` has but the checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    for name in ("config.yaml", "a.png"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "runs/bad/0/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/bad/0/config.yaml").write_bytes((trained / "runs/good/0/config.yaml").read_bytes())
    return tmp_path


def content_of(trained):
    return torch.load(trained / "runs/good/0/checkpoints/last.ckpt", weights_only=True)


def in_run(command):
    """The file as the newest checkpoint of a run, which the command is given."""

    def arguments(file):
        path = Path("runs/bad/0/checkpoints/step-1.ckpt").absolute()
        path.unlink(missing_ok=True)
        path.hardlink_to(file)
        for link in ("last.ckpt", "best.ckpt"):
            path.with_name(link).unlink(missing_ok=True)
            path.with_name(link).symlink_to(path.name)
        return command(path)

    return arguments


FIT = ["fit", "-c", "config.yaml", "--no-report"]
COMMANDS = {
    "predict": lambda file: ["predict", str(file), "a.png", "-o", "out", "--overwrite"],
    "export": lambda file: ["export", str(file), "-f", "safetensors", "-o", "out.safetensors", "--overwrite"],
    "inspect": lambda file: ["inspect", str(file)],
    "demo": lambda file: ["demo", str(file), "--port", "0"],
    "validate": lambda file: ["validate", "-c", "config.yaml", "--ckpt_path", str(file)],
    "test": lambda file: ["test", "-c", "config.yaml", "--ckpt_path", str(file)],
    "init_from": lambda file: [*FIT, "--init_from", str(file)],
    "resume": in_run(lambda path: ["fit", "--resume", str(path)]),
    "report": in_run(lambda path: ["report", str(path.parents[1]), "-o", "report.html"]),
    "predict of a run": in_run(lambda path: ["predict", str(path.parents[1]), "a.png", "-o", "out", "--overwrite"]),
    "vgg weights": lambda file: [*FIT, "--model.backbone", f"{{name: dilated_vgg16, weights: {file}}}"],
    "drn weights": lambda file: [*FIT, "--model.backbone", f"{{name: drn_d_22, weights: {file}}}"],
    "timm weights": lambda file: [*FIT, "--model.backbone", f"{{name: timm, model: resnet18, weights: {file}}}"],
    "convert vgg": lambda file: ["convert", "vgg", str(file), "-o", "out.safetensors", "--overwrite"],
    "convert drn": lambda file: ["convert", "drn", str(file), "-o", "out.safetensors", "--overwrite"],
    "convert caffe": lambda file: [
        *("convert", "caffe", str(file), "--net", "dilation8_camvid", "-o", "out.safetensors", "--overwrite")
    ],
}


def refused(command, file, capsys):
    """Run a command on a file that it must refuse with status 4 and its name, leaving no output."""
    status = cli.main(COMMANDS[command](file))
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert "Traceback" not in said, said
    if command == "report":  # of a run, what can be had is told; the page says what could not
        assert status in (0, 4), said
        said += Path("report.html").read_text() if status == 0 else ""
    else:
        assert status == 4, said
    assert any(name in said for name in (file.name, "step-1.ckpt", "last.ckpt", "best.ckpt")), said
    assert not Path("out.safetensors").exists()
    assert not Path("out").exists()
    return said


# -- A01: pickles that run code


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Built:
    """Pickled as an object whose state calls a function while it is built."""

    def __init__(self, inner):
        self.inner = inner

    def __reduce__(self):
        return dict, (), None, None, iter([("x", self.inner)])


def payloads(marker, folder):
    """{name: an object that leaves the marker when it is unpickled}."""
    (folder / "hubconf.py").write_text(f"def go(**k):\n    open({str(marker)!r}, 'w')\n")
    write = f"open({str(marker)!r}, 'w').close()"
    (folder / "script.py").write_text(write)
    inner = io.BytesIO()
    torch.save(Call(eval, write), inner)
    array = io.BytesIO()
    np.save(array, np.array([Call(eval, write)], object), allow_pickle=True)
    (folder / "inner.npy").write_bytes(array.getvalue())
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "subprocess": Call(subprocess.check_call, ["touch", str(marker)]),
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "os.link": Call(os.link, str(folder / "script.py"), str(marker)),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(eval, write))),
        "nested _load_from_bytes": Call(torch.storage._load_from_bytes, inner.getvalue()),
        "torch.load": Call(functools.partial(torch.load, weights_only=False), io.BytesIO(inner.getvalue())),
        "torch.hub": Call(functools.partial(torch.hub.load, str(folder), "go", source="local")),
        "runpy": Call(runpy.run_path, str(folder / "script.py")),
        "numpy": Call(functools.partial(np.load, allow_pickle=True), str(folder / "inner.npy")),
        "while built": Built(Call(eval, write)),
    }


def torchscript(marker, path):
    """An archive whose module writes a file while it is loaded."""
    source = f"""
import torch
class Module(torch.nn.Module):
    def forward(self, x):
        return x
    @torch.jit.export
    def __getstate__(self):
        return (self.training,)
    @torch.jit.export
    def __setstate__(self, state: tuple[bool]) -> None:
        self.training = state[0]
        torch.save(torch.ones(1), {str(marker)!r})
"""
    module = path.with_name("scripted.py")
    module.write_text(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(runpy.run_path(str(module), run_name="scripted")["Module"]()).save(str(path))


def tarred(payload, path):
    """As torch wrote files before version 0.2."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(payload if name == "storages" else 0)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def malicious(folder, content):
    """Files that leave the marker where they are unpickled: alone, and inside a checkpoint that is good otherwise."""
    marker = folder / "marker"
    suffixes = [".ckpt", ".pt", ".pth", ".pkl"]
    for number, (name, payload) in enumerate(payloads(marker, folder).items()):
        stem = folder / f"evil-{name.replace(' ', '-').replace('.', '-')}"
        alone = stem.with_suffix(suffixes[number % 4])
        torch.save(payload, alone, _use_new_zipfile_serialization=number % 2 == 0)
        yield name, alone
        inside = stem.with_name(stem.name + "-inside").with_suffix(suffixes[(number + 1) % 4])
        torch.save({**content, "callbacks": {"x": payload}}, inside)
        yield f"{name}, inside", inside
    one = payloads(marker, folder)["os.system"]
    (folder / "evil-plain.pkl").write_bytes(pickle.dumps(one))
    yield "plain pickle", folder / "evil-plain.pkl"
    (folder / "evil.safetensors").write_bytes(pickle.dumps(one))
    yield "named safetensors", folder / "evil.safetensors"
    tarred(one, folder / "evil-tar.pt")
    yield "legacy tar", folder / "evil-tar.pt"
    torchscript(marker, folder / "evil-script.pt")
    yield "TorchScript", folder / "evil-script.pt"


def unsafely(name, path):
    """Load a file as a careless program does."""
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "TorchScript":
            torch.jit.load(str(path))
        elif name in ("plain pickle", "named safetensors"):
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)


@pytest.mark.fault("A01")
def test_the_attacks_work_on_careless_programs(trained, tmp_path):
    for name, path in malicious(tmp_path, content_of(trained)):
        unsafely(name, path)
        assert (tmp_path / "marker").exists(), name
        (tmp_path / "marker").unlink()


def nothing_runs(command, trained, place, capsys, record_property, *, every=1):
    """All malicious files into a command, or every third of them: each third another one's."""
    count = 0
    for number, (_, path) in enumerate(malicious(place, content_of(trained))):
        if (number + list(COMMANDS).index(command)) % every == 0:
            refused(command, path, capsys)
            assert not (place / "marker").exists(), path
            count += 1
    record_property("count", count)
    record_property("evidence", f"{command}: {count} files, all refused")


@pytest.mark.fault("A01")
@pytest.mark.parametrize("command", COMMANDS)
def test_malicious_pickles_run_nothing(trained, place, capsys, command, record_property):
    nothing_runs(command, trained, place, capsys, record_property, every=3)


@pytest.mark.slow
@pytest.mark.fault("A01")
@pytest.mark.parametrize("command", COMMANDS)
def test_all_malicious_pickles_run_nothing(trained, place, capsys, command, record_property):
    nothing_runs(command, trained, place, capsys, record_property)


# -- A03: names of code in metadata


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module on the path that leaves a marker when it is imported."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "evil_module.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w').close()\nmake = Evil = type('Evil', (), {{}})\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    yield tmp_path / "marker"
    sys.modules.pop("evil_module", None)


EVIL = "evil_module:Evil"


@pytest.mark.fault("A03")
def test_names_of_code_beside_the_model_are_not_followed(trained, place, evil, capsys, record_property):
    content = content_of(trained)
    content["hyper_parameters"] = {
        "_instantiator": "evil_module.make",
        "_class_path": "evil_module.Evil",
        "class_path": "evil_module.Evil",
        "model": {"class_path": "evil_module.Evil"},
    }
    content["hparams_name"] = content["hparams_type"] = "evil_module.Evil"
    content["datamodule_hyper_parameters"] = {"_instantiator": "evil_module.make"}
    content["callbacks"] = {**content["callbacks"], "evil_module.Evil": {"a": 1}}
    content["densectx"]["config"] |= {"trainer": {"callbacks": [{"class_path": "evil_module.Evil"}]}}
    torch.save(content, place / "beside.ckpt")
    weights = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    more = {"_instantiator": "evil_module.make", "class_path": "evil_module.Evil"}
    save_file(weights, place / "beside.safetensors", {"densectx": json.dumps(content["densectx"]), **more})
    ran = 0
    for name in ("beside.ckpt", "beside.safetensors"):
        for command in ("predict", "export", "inspect", "init_from", "validate"):
            if command == "validate" and name.endswith(".safetensors"):
                continue
            status = cli.main(COMMANDS[command](place / name))
            assert status in (0, 4), capsys.readouterr()  # whether or not the file counts as changed
            ran += 1
        assert "evil_module" not in sys.modules
        assert not evil.exists()
    record_property("count", ran)


PLACES = {
    "backbone": lambda model: model.update(backbone=EVIL),
    "backbone name": lambda model: model.update(backbone={"name": EVIL}),
    "backbone class_path": lambda model: model.update(backbone={"class_path": "evil_module.Evil"}),
    "context": lambda model: model.update(context={"name": EVIL}),
    "task": lambda model: model["tasks"]["denoising"].update(name=EVIL),
    "head": lambda model: model["tasks"]["denoising"].update(head={"name": EVIL}),
    "loss": lambda model: model["tasks"]["denoising"].update(loss=EVIL),
    "losses": lambda model: model["tasks"]["denoising"].update(loss=["l1", {"name": EVIL}]),
    "os": lambda model: model.update(backbone="os:system"),
    "ours": lambda model: model.update(backbone="densectx.imports:import_module"),
}


def with_model(trained, path, change):
    """A good checkpoint, or safetensors file, with another model in its header."""
    content = content_of(trained)
    info = json.loads(json.dumps(content["densectx"]))
    change(info["model"])
    if path.suffix == ".safetensors":
        weights = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
        save_file(weights, path, {"densectx": json.dumps(info)})
    else:
        torch.save({**content, "densectx": info}, path)
    return path


@pytest.mark.fault("A03")
@pytest.mark.parametrize("where", PLACES)
def test_a_model_of_foreign_code_is_not_imported(trained, place, evil, capsys, where, record_property):
    count = 0
    for name in ("evil.ckpt", "evil.safetensors"):
        path = with_model(trained, place / name, PLACES[where])
        for command in ("predict", "export", "inspect", "report"):
            status = cli.main(COMMANDS[command](path))
            said = capsys.readouterr()
            assert status in (4, 5), said
            assert "Traceback" not in said.err
            assert "evil_module" not in sys.modules
            assert not evil.exists()
            count += 1
    record_property("count", count)


@pytest.mark.fault("A03")
def test_it_would_be_imported_if_that_was_allowed(trained, place, evil):
    path = with_model(trained, place / "evil.ckpt", PLACES["backbone"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("densectx.imports._allowed", set(), raising=False)
        cli.main([*COMMANDS["inspect"](path)])
        assert not evil.exists()
        cli.main(["predict", str(path), "a.png", "-o", "out", "--allow-import", "evil_module"])
    assert evil.exists()


# -- A05: bombs


class Measured:
    """Peak memory above that before, and time, of a block; this process's, so that imports do not count."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self.before, self.start = self._now("VmHWM"), time.monotonic()
        self.limits = resource.getrlimit(resource.RLIMIT_AS)  # a net for this machine, not what is measured
        resource.setrlimit(resource.RLIMIT_AS, ((int(self._now("VmSize")) + 3072) << 20, self.limits[1]))
        return self

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_AS, self.limits)
        self.megabytes, self.seconds = self._now("VmHWM") - self.before, time.monotonic() - self.start

    @staticmethod
    def _now(key):
        return int(Path("/proc/self/status").read_text().partition(key + ":")[2].split()[0]) / 1024


def zipped(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression, compresslevel=9) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def claimed(data, sizes):
    """An archive whose stored parts are said to be deflated, with these sizes: {name: bytes once unpacked}."""
    changed = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        at = archive.start_dir
        for part in archive.infolist():
            if (size := sizes.get(part.filename.partition("/")[2])) is not None:
                for start in (part.header_offset + 8, at + 10):
                    struct.pack_into("<H", changed, start, zipfile.ZIP_DEFLATED)
                    struct.pack_into("<I", changed, start + 14, size)
            at += 46 + sum(struct.unpack_from("<HHH", data, at + 28))
    return bytes(changed)


def members_of(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def weights_bomb(content, megabytes):
    """A checkpoint whose first tensors' numbers unpack to so much each."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    members = members_of(content)
    first = [name for name in members if name.startswith("data/")][:4]
    archive = zipped({**members, **dict.fromkeys(first, block * megabytes + b"\3\0")})
    return claimed(archive, dict.fromkeys(first, megabytes << 20))


def bombs(trained):
    """{name: a small file that unpacks to, or asks for, much}."""
    content = content_of(trained)
    tensor = {**content, "state_dict": {**content["state_dict"], "model.more": torch.zeros(50_000_000)}}
    yield "200 kB that unpack to 190 MB", zipped(members_of(tensor), zipfile.ZIP_DEFLATED)
    yield "10 MB that unpack to 10000 MB", weights_bomb(content, 2_560)
    pickled = {**members_of(content), "data.pkl": b"\x80\x02X" + (400 << 20).to_bytes(4, "little") + bytes(400 << 20)}
    yield "a pickle of 400 MB", zipped(pickled, zipfile.ZIP_DEFLATED)
    made = b"\x80\x02cbuiltins\nbytearray\nJ" + (1 << 30).to_bytes(4, "little") + b"\x85R."
    yield "a pickle that makes 1 GB", zipped({**members_of(content), "data.pkl": made})
    grown = {**content["state_dict"], "model.more": torch.zeros(1).expand(100_000, 100_000)}
    yield "a tensor of 40 GB in 4 bytes", saved({**content, "state_dict": grown})
    model = json.loads(json.dumps(content["densectx"]))
    model["model"]["backbone"] = {"name": "plain", "width": 20_000}
    yield "a model of 14 GB in its header", saved({**content, "densectx": model})


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


BOMBS = [
    "200 kB that unpack to 190 MB",
    "10 MB that unpack to 10000 MB",
    "a pickle of 400 MB",
    "a pickle that makes 1 GB",
    "a tensor of 40 GB in 4 bytes",
    "a model of 14 GB in its header",
]


@pytest.fixture(scope="module")
def bomb_files(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bombs")
    found = {}
    for number, (name, data) in enumerate(bombs(trained)):
        found[name] = folder / f"bomb{number}.ckpt"
        found[name].write_bytes(data)
        assert len(data) < 12 << 20, name
        if "unpack" in name:
            with zipfile.ZipFile(found[name]) as archive:
                assert sum(part.file_size for part in archive.infolist()) > int(name.split()[-2]) << 20
    return found


@linux
@pytest.mark.fault("A05")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_unpack(bomb_files, place, capsys, name, record_property):
    worst = 0.0
    for command in ("export", "predict" if "header" in name else "init_from"):  # which reads no model
        with Measured() as measured:
            said = refused(command, bomb_files[name], capsys)
        assert measured.megabytes < MEGABYTES, said
        assert measured.seconds < SECONDS
        worst = max(worst, measured.megabytes)
    record_property("count", 2)
    record_property("evidence", f"{name}: {bomb_files[name].stat().st_size} bytes, peak {worst:.0f} MB above idle")


@linux
@pytest.mark.fault("A05")
@pytest.mark.parametrize("command", ["drn weights", "convert drn", "convert vgg"])
def test_bombs_as_weights_of_a_backbone(bomb_files, place, capsys, command):
    for name in BOMBS[:4]:
        with Measured() as measured:
            refused(command, bomb_files[name], capsys)
        assert measured.megabytes < MEGABYTES, name


@linux
@pytest.mark.fault("A05")
def test_what_is_no_regular_file_is_refused(place):
    os.mkfifo(place / "pipe.ckpt")
    for path in (place / "pipe.ckpt", Path("/dev/zero"), Path("/dev/null")):
        with Measured() as measured, pytest.raises(CheckpointError, match=path.name):
            load(path)
        assert measured.megabytes < MEGABYTES
    depth = 100_000
    metadata = {"densectx": "[" * depth + "]" * depth}
    save_file({"a": torch.zeros(1)}, place / "deep.safetensors", metadata)
    with pytest.raises(CheckpointError, match="deep"):
        load(place / "deep.safetensors")


# -- A06: malicious YAML


def levels(count, width):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, count)]
    return "\n".join(lines) + "\n"


def quadratic():
    return "a: &a " + "x" * 500_000 + "\nb: [" + "*a," * 99 + "]\n"


WHOLE = yaml.safe_dump(CONFIG)
TEXTS = {
    "a billion laughs": levels(9, 9),
    "one long string a hundred times": quadratic(),
    "an alias of itself": "model: &a {x: *a}",
    "an endless merge": "model: &a {<<: *a}",
    "object/apply": "model: !!python/object/apply:os.system ['touch marker']",
    "object/new": "model: !!python/object/new:subprocess.Popen [['touch', 'marker']]",
    "module": "model: !!python/module:evil_module",
    "name": "model: !!python/name:evil_module.Evil",
    "own tag": "model: !evil_module.Evil {a: 1}",
    "directive": "%TAG ! tag:yaml.org,2002:python/\n---\nmodel: !object/apply:os.system ['touch marker']",
    "deep lists": "model: " + "[" * 100_000,
    "deep mappings": "model: " + "{a: " * 100_000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(1_000)),
    "deep sequences": "- " * 100_000 + "a",
    "many keys": "\n".join(f"a{i}: 1" for i in range(60_000)),
    "a long key": "a" * 900_000 + ": 1",
    "a long number": WHOLE + "seed_everything: " + "9" * 900_000,
    "a long hexadecimal number": WHOLE + "seed_everything: 0x" + "f" * 900_000,
    "digits that are no number": WHOLE + "seed_everything: " + "1_" * 400_000 + "x",
    "digits that are no float": WHOLE + "seed_everything: " + "1" * 900_000 + "e",
    "spaces": "model: [" + " " * 900_000,
    "quotes": "model: '" + "''" * 400_000,
    "escapes": 'model: "' + "\\x41" * 200_000,
    "documents": "---\n" * 200_000,
    "anchors": "\n".join(f"a{i}: &a{i} 1" for i in range(60_000)),
}


def long_commands(config):
    yield [*FIT[:1], "-c", config]
    yield ["lint", config]
    yield ["inspect", config]


@linux
@pytest.mark.fault("A06")
@pytest.mark.parametrize("name", TEXTS)
def test_malicious_yaml(place, evil, capsys, name, record_property):
    Path("evil.yaml").write_text(TEXTS[name])
    commands = list(long_commands("evil.yaml"))
    for arguments in (commands[0], commands[1 + list(TEXTS).index(name) % 2]):
        with Measured() as measured:
            status = cli.main(arguments)
        said = capsys.readouterr().err
        if arguments[0] == "fit" or not TEXTS[name].startswith(WHOLE):  # others may not need the number
            assert status == 2, said[-2000:]
            assert "evil.yaml" in said or "this config" in said
        assert status in (0, 2, 3), said[-2000:]
        assert len(said) < 10_000, "a message is for people"
        assert measured.megabytes < MEGABYTES
        assert measured.seconds < SECONDS
        assert not evil.exists()
        assert "evil_module" not in sys.modules
    record_property("count", 2)


@linux
@pytest.mark.fault("A06")
def test_huge_and_endless_config_files(place, capsys):
    with open("huge.yaml", "wb") as file:
        file.truncate(4 << 30)
    for name in ("huge.yaml", "/dev/zero"):
        for arguments in long_commands(name) if name == "huge.yaml" else [["fit", "-c", name]]:
            with Measured() as measured:
                assert cli.main(arguments) == 2
            assert "larger than 1 MiB" in capsys.readouterr().err
            assert measured.megabytes < MEGABYTES


@linux
@pytest.mark.fault("A06")
def test_malicious_yaml_in_flags(place, evil, capsys):
    for text in ("!!python/name:evil_module.Evil", "[" * 100_000, "&a [*a]", "0x" + "f" * 90_000, levels(9, 9)):
        with Measured() as measured:
            assert cli.main(["fit", "-c", "config.yaml", "--model.backbone", text]) == 2
        assert measured.megabytes < MEGABYTES
        assert measured.seconds < SECONDS
        assert len(capsys.readouterr().err) < 10_000
    assert not evil.exists()


# -- A07: ways out of the output folder


@pytest.fixture(scope="module")
def model(trained):
    return trained / "runs/good/0/checkpoints/last.ckpt"


def tree(folder):
    """{path: content} of everything below a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def picture(path, value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path, "PNG")
    return path


def outside(folder):
    return {name: content for name, content in tree(folder).items() if not name.startswith("work/out")}


@linux
@pytest.mark.fault("A07")
def test_names_that_point_elsewhere(model, tmp_path, monkeypatch, capsys, record_property):
    work = tmp_path / "work"
    names = [
        *("CON.png", "nul.png", "a:b.png", "..\\..\\x.png", "C:\\x.png", "~root.png", "$HOME.png", "%2e%2e%2fx.png"),
        *("...png", "-o.png", "a\nb.png", "\u202egnp.a.png", "x" * 250 + ".png", "summary.json.png", "*.png"),
        *("sub/..x/a.png", "sub/...png", "denoising/a.png", "summary.json/a.png"),
    ]
    for name in names:
        picture(work / "in" / name)
    picture(tmp_path / "x.png")
    picture(tmp_path / "other" / "y.png")
    (work / "in" / "link").symlink_to(tmp_path / "other")
    (work / "in" / "up").symlink_to("..")
    monkeypatch.chdir(work)
    before = outside(tmp_path)
    lines = [
        "../x.png",
        "../work/../x.png",
        str(tmp_path / "other" / "y.png"),
        "a\0b.png",
        "../../x.png",
        "in/../../x.png",
    ]
    for arguments in (["in"], ["in/**/*.png"], ["../x.png"], [str(tmp_path / "x.png"), "in/../../other/*.png"], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
        assert cli.main(["predict", str(model), *arguments, "-o", "out", "--overwrite"]) in (0, 2, 3)
        assert "Traceback" not in capsys.readouterr().err
        assert outside(tmp_path) == before
    assert len(list((work / "out").rglob("*.png"))) > len(names) - 3
    record_property("count", len(names) + len(lines))


@linux
@pytest.mark.fault("A07")
def test_links_in_the_output_folder(model, tmp_path, monkeypatch, capsys, record_property):
    work = tmp_path / "work"
    picture(work / "in/sub/a.png")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(work)
    links = {
        "denoising": "../../elsewhere",
        "denoising/sub": str(tmp_path / "elsewhere"),
        "denoising/sub/a.png": "../../../../secret",
        "summary.json": "../../secret",
        "summary.partial.jsonl": "../../secret",
        "denoising/sub/b": "../../../../elsewhere",
    }
    for link, target in links.items():
        (work / "out" / link).parent.mkdir(parents=True, exist_ok=True)
        (work / "out" / link).symlink_to(target)
        before = outside(tmp_path)
        for more in ([], ["--overwrite"]):
            status = cli.main(["predict", str(model), "in", "-o", "out", *more])
            assert status == (0 if link.endswith("/b") else 2)
            assert outside(tmp_path) == before
        if not link.endswith("/b"):
            assert "link" in capsys.readouterr().err
        (work / "out" / link).unlink()
    record_property("count", len(links) * 2)


@linux
@pytest.mark.fault("A07")
def test_a_folder_that_turns_into_a_link_and_back(model, tmp_path, monkeypatch, record_property):
    """While pictures are written, somebody else swaps their folder for a link out of the output folder, and back."""
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    for number in range(150):
        picture(work / f"in/{number:03}.png", number)
    elsewhere.mkdir()
    (work / "out").mkdir()
    monkeypatch.chdir(work)
    real, link = work / "out/denoising", work / "out/link"
    link.symlink_to(elsewhere)
    ended, swaps = threading.Event(), 0

    def attack():
        nonlocal swaps
        while not (ended.is_set() or (real / "000.png").exists()):
            time.sleep(0)
        for number in count():
            if ended.is_set():
                break
            kept = work / f"out/kept-{number}"  # the last one may be left, where predict was first with a new folder
            with suppress(OSError):
                real.rename(kept)
                link.rename(real)
                time.sleep(0)
                real.rename(link)
                kept.rename(real)
                swaps += 1

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        status = cli.main(["predict", str(model), "in", "-o", "out"])
    finally:
        ended.set()
        thread.join()
    statuses = [entry["status"] for entry in json.loads((work / "out/summary.json").read_text())["inputs"]]
    assert swaps, "it has happened"
    # a folder that is gone between two looks is an error of storage, which ends the run
    assert set(statuses) <= {"done", "failed", *(["started"] if status == 8 else [])}
    assert status == 8 or status == (3 if "failed" in statuses else 0)
    assert list(elsewhere.iterdir()) == []
    record_property("count", swaps)
    record_property("evidence", f"{swaps} swaps, {statuses.count('failed')} of {len(statuses)} pictures refused")


@pytest.mark.fault("A07")
@pytest.mark.parametrize("key", ["../x", "/tmp/x", "a/b", "..", "", "a\0b", "CON ", "a\\b", "a.b"])
def test_tasks_of_a_model_are_no_paths(trained, place, capsys, key):
    before = {name for name in tree(place) if not name.startswith("out")}
    path = with_model(trained, place / "evil.ckpt", lambda m: m.update(tasks={key: m["tasks"]["denoising"]}))
    assert cli.main(["predict", str(path), "a.png", "-o", "out"]) == 4
    assert "Traceback" not in capsys.readouterr().err
    assert {name for name in tree(place) if not name.startswith("out")} - before == {"evil.ckpt"}
    assert header(load(trained / "runs/good/0"))["model"]["tasks"].keys() == {"denoising"}
