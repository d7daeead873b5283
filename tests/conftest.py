"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import settings

# before torch is imported, here and in the processes that tests start: threads of several small processes on few cores
# spin against each other, which is many times slower than one thread each
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a shell without job control starts what it puts into the background with SIGINT ignored, nohup with SIGHUP; the
# processes that tests signal would inherit that
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(number, usual)

# how long an example takes depends on what else the machine does
settings.register_profile("densectx", deadline=None)
settings.load_profile("densectx")

MODULE = '''
class Task:
    """A task of a plugin."""

    def __init__(self, features, weight: float = 1.0, mode="a"):
        self.given = (features, weight, mode)
'''


@pytest.fixture(scope="session")
def free_port():
    """Function that finds a TCP port that nothing listens at."""

    def free_port():
        with socket.create_server(("127.0.0.1", 0)) as server:
            return server.getsockname()[1]

    return free_port


@pytest.fixture
def distribute(tmp_path, monkeypatch):
    """Put a fake distribution on ``sys.path``: a ``.dist-info`` folder and a module, as pip would leave them.

    Args of the function: the name (its module has the same with underscores), kind -> {name: attribute of the module
    or "module:attribute"}, source of the module (None for none), version, ``Requires-Dist`` lines.
    Returns its folder.
    """
    modules = set(sys.modules)

    def distribute(name, entries, module=MODULE, *, version="1.0", requires=()):
        package = name.replace("-", "_")
        folder = tmp_path / f"site-{name}"
        info = folder / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")
        points = []
        for kind, names in entries.items():
            points.append(f"[densectx.{kind}]")
            points += [f"{key} = {value if ':' in value else f'{package}:{value}'}" for key, value in names.items()]
        (info / "entry_points.txt").write_text("\n".join(points) + "\n")
        if module is not None:
            (folder / f"{package}.py").write_text(module)
        monkeypatch.syspath_prepend(folder)
        return folder

    yield distribute
    for name in set(sys.modules) - modules:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def data_root():
    """Folder of the research data that some tests measure on."""
    folder = os.environ.get("DENSECTX_DATA")
    if not folder:
        pytest.skip("needs real data: set DENSECTX_DATA to its folder")
    return Path(folder)


def _varint(value):
    """A number as protocol buffers write it; negative ones as 64 bits of two's complement."""
    value, out = value % 2**64, bytearray()
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def _message(*fields):
    """A message of (number, bytes) and (number, int) fields."""
    parts = [
        _varint(number * 8) + _varint(value)
        if isinstance(value, int)
        else _varint(number * 8 + 2) + _varint(len(value)) + value
        for number, value in fields
    ]
    return b"".join(parts)


def _blob(array, packed, legacy, double):
    import numpy as np

    data, number = (array.astype("<f8" if double else "<f4"), 8 if double else 5)
    if packed:
        values = _message((number, data.tobytes()))
    else:
        tag, width = _varint(number * 8 + (1 if double else 5)), data.itemsize
        rows = np.empty((data.size, width + 1), np.uint8)
        rows[:, 0], rows[:, 1:] = tag[0], np.frombuffer(data.tobytes(), np.uint8).reshape(-1, width)
        values = rows.tobytes()
    if legacy:
        return _message(*enumerate((1,) * (4 - array.ndim) + array.shape, 1)) + values
    dims = _message((1, b"".join(map(_varint, array.shape)))) if packed else _message(*((1, d) for d in array.shape))
    return _message((7, dims)) + values


@pytest.fixture(scope="session")
def caffemodel():
    """The bytes of a ``.caffemodel`` of {layer: arrays}, written from caffe.proto's field numbers.

    Args of the function: the layers; ``old`` for the older message of layers, ``packed`` or one field a number,
    ``legacy`` for four dimensions instead of a shape, ``double`` for numbers of 64 bits.
    """

    def write(layers, *, old=False, packed=True, legacy=False, double=False):
        name, blobs, layer = (4, 6, 2) if old else (1, 7, 100)
        found = [_message((1, b"a net"), (3, b"data"))]  # the net's name and the name of its input
        for key, arrays in layers.items():
            kind = (5, 4) if old else (2, b"Convolution")
            parts = [(blobs, _blob(a, packed, legacy, double)) for a in arrays]
            found.append(_message((layer, _message((name, key.encode()), kind, *parts))))
        return b"".join(found)

    return write


@pytest.fixture
def thin():
    """A published network by name with few channels and random weights, in evaluation mode."""
    import torch

    from densectx.model import DenseModel
    from densectx.registry import MODELS
    from densectx.types import SourceInfo

    def thin(name, *, width=4, fc=8, device="cpu", **backbone):
        config = MODELS.get(name)()
        config["backbone"] |= {"width": width, "fc": fc, **backbone}
        sources = {key: SourceInfo.from_config(value) for key, value in config.pop("sources").items()}
        with torch.device(device):
            return DenseModel.from_config(config, sources).eval()

    return thin


@pytest.fixture(scope="session")
def browser():
    """A real browser without a window, that finds no host but this machine; a page is ``browser.new_page()``."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[test]'")
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        pytest.skip("needs a browser: apt-get install chromium")
    quiet = ("background-networking", "component-update", "default-apps", "domain-reliability", "sync")
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    arguments.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=executable, args=arguments)
        yield found
        found.close()


@pytest.fixture(scope="session")
def every_output(tmp_path_factory):
    """File of a small untrained model with a task of each kind of output."""
    import torch

    from densectx.checkpoint import save_safetensors
    from densectx.model import DenseModel
    from densectx.types import SourceInfo

    names, palette = ("sky", "road", "tree"), ((70, 130, 180), (128, 64, 128), (107, 142, 35))
    sources = {
        "masks": SourceInfo(classes=names, palette=palette, keys=("image", "mask")),
        "tags": SourceInfo(classes=names, palette=palette, keys=("image", "target"), target="labels"),
        "depths": SourceInfo(keys=("image", "target"), target="map"),
    }
    head = {"name": "decoder", "width": 8, "depth": 1}
    tasks = {
        "segmentation": {"name": "segmentation", "source": "masks"},
        "tags": {"name": "segmentation", "source": "tags", "mode": "multilabel"},
        "denoising": {"name": "denoising", "source": "masks", "sigma": [0, 50], "head": head},
        "depth": {"name": "regression", "source": "depths", "low": 0.5, "high": 10.0, "head": head},
        "super_resolution": {"name": "super_resolution", "source": "masks", "scale": 2, "head": head},
        "colorization": {"name": "colorization", "source": "masks", "head": head},
    }
    config = {"backbone": {"name": "plain", "width": 8}, "projection": {"channels": 8}, "context": "context7"}
    model = DenseModel.from_config({**config, "tasks": tasks}, sources)
    torch.manual_seed(0)
    for parameter in model.parameters():  # residual heads start at zero: their answer would be the input
        torch.nn.init.normal_(parameter, std=0.15) if parameter.ndim > 1 else torch.nn.init.zeros_(parameter)
    path = tmp_path_factory.mktemp("every_output") / "every.safetensors"
    save_safetensors(model, path)
    return path


@pytest.fixture(scope="module")
def demo():
    """``densectx demo`` in a thread: of a model file, and limits by name, to the server; its ``port`` answers."""
    import asyncio
    import socket
    import threading

    from densectx.demo.build import Limits, build

    running = []

    def demo(model, tasks=None, **limits):
        server, listening = build(model, tasks, "cpu", Limits(**limits)), threading.Event()
        ends = []

        async def serve():
            await server.start(socket.create_server(("127.0.0.1", 0)))
            ends.extend((asyncio.get_running_loop(), asyncio.Event()))
            listening.set()
            await ends[1].wait()

        # not in this thread: playwright's loop may be running in it
        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        assert listening.wait(10)
        running.append((server, thread, *ends))
        return server

    yield demo
    for server, thread, loop, end in running:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        server.queue.close(10)
