"""Damaged files by the hundred thousand: pictures and checkpoints, read as the commands read them.

    python benchmarks/fuzz.py [--count 100000] [--seed 0]
    python benchmarks/fuzz.py --replay TARGET NUMBER

Each input is a small good file of some kind, changed by a few mutations (bits, bytes, numbers that formats have trouble
with, cuts, repeats, parts of other files; below a checkpoint's container also the pickle, the JSON of its header and
the tensors' table), a function of (seed, target, number). A forked worker reads one after the other under the eye of
its parent. An input must be read, or be refused by one of our errors in a short text that names the file. Everything
else counts against us: another exception, a crash, more than 10 s, more than 512 MB above idle. Writes
``benchmarks/results/fuzz.json``, status 1 if there was any; ``--replay`` leaves one input as a file and reads it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import select
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import RESULTS, commit, machine
from tifffile import imwrite

import densectx
from densectx.checkpoint import header, save_safetensors
from densectx.data.reader import read_image
from densectx.data.windowed import WindowedFile, needs_windows
from densectx.errors import DensectxError
from densectx.inference.files import fingerprint
from densectx.inference.reading import Reading
from densectx.model import DenseModel
from densectx.types import SourceInfo

SECONDS, MEGABYTES = 10.0, 512
SHARES = {"reader": 0.3, "predict": 0.3, "safetensors": 0.2, "ckpt": 0.2}
Seeds = dict[str, bytes]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "NUMBER"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    targets = make_targets()
    if given.replay:
        return replay(targets[given.replay[0]], given.replay[0], given.seed, int(given.replay[1]))
    start, found = time.perf_counter(), {}
    for name, share in SHARES.items():
        found[name] = fuzz(targets[name], name, given.seed, round(given.count * share))
        sys.stdout.write(f"{name}: {found[name]['outcomes']}\n")
        sys.stdout.flush()
    wrong = sum(len(each["wrong"]) for each in found.values())
    result = {
        "name": "fuzz",
        "command": f"python benchmarks/fuzz.py {shlex.join(sys.argv[1:])}".strip(),
        "commit": commit(),
        "machine": machine(),
        "seed": given.seed,
        "inputs": sum(sum(each["outcomes"].values()) for each in found.values()),
        "wrong": wrong,
        "wall_s": round(time.perf_counter() - start, 1),
        "limits": {"seconds": SECONDS, "megabytes_above_idle": MEGABYTES},
        "targets": found,
    }
    (RESULTS / "fuzz.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{result['inputs']} inputs, {wrong} wrong, {result['wall_s']} s\n")
    return 1 if wrong else 0


# -- good files


def pictures() -> Seeds:
    """{name: content} of every kind of picture file that is read."""
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (6, 5, 3), np.uint8), np.ones((5, 5, 1), np.uint8))
    found: Seeds = {}

    def pillow(name: str, mode: str = "RGB", **options: Any) -> None:
        image = Image.fromarray(smooth)
        if mode in ("RGBA", "LA"):
            image.putalpha(image.convert("L"))
        file = io.BytesIO()
        image.convert(mode).save(file, Image.registered_extensions()[Path(name).suffix], **options)
        found[name] = file.getvalue()

    def tiff(name: str, values: Any, **options: Any) -> None:
        file = io.BytesIO()
        imwrite(file, values, **options)
        found[name] = file.getvalue()

    exif = Image.Exif()
    exif[274] = 6
    pillow("colour.png")
    for mode in ("L", "P", "RGBA", "LA", "1"):
        pillow(f"{mode.lower()}.png", mode)
    pillow("baseline.jpg", quality=80, exif=exif)
    pillow("progressive.jpg", progressive=True)
    pillow("gray.jpg", "L")
    pillow("cmyk.jpg", "CMYK")
    pillow("lossy.webp")
    pillow("lossless.webp", "RGBA", lossless=True)
    pillow("colour.bmp")
    pillow("palette.bmp", "P")
    pillow("colour.ppm")
    pillow("gray.pgm", "L")
    file = io.BytesIO()
    Image.fromarray(smooth[..., 0].astype(np.uint16) * 257).save(file, "PNG")
    found["deep.png"] = file.getvalue()
    tiff("raw.tif", smooth, photometric="rgb")
    tiff("deflate.tif", smooth, photometric="rgb", compression="zlib", predictor=True)
    tiff("tiled.tif", smooth[..., 0], tile=(16, 16))
    tiff("deep.tif", smooth.astype(np.uint16) * 257, photometric="rgb", rowsperstrip=7)
    tiff("float.tif", (smooth[..., 0] / 255).astype(np.float32), bigtiff=True)
    tiff("planes.tif", np.moveaxis(smooth, 2, 0), photometric="rgb", planarconfig="separate", byteorder=">")
    for name, mode in (("lzw.tif", "RGB"), ("jpeg.tif", "RGB"), ("fax.tif", "1")):
        pillow(name, mode, compression={"lzw.tif": "tiff_lzw", "jpeg.tif": "jpeg", "fax.tif": "group4"}[name])
    for name, values in (("bytes.npy", smooth), ("floats.npy", (smooth / 255).astype(np.float32))):
        file = io.BytesIO()
        np.save(file, values)
        found[name] = file.getvalue()
    return found


def small_model() -> DenseModel:
    """A model of two tasks that is built in a few milliseconds."""
    torch.manual_seed(0)
    config = {
        "backbone": {"name": "plain", "width": 2},
        "projection": None,
        "context": {"name": "basic", "dilations": [1, 2]},
        "tasks": {
            "segmentation": {"name": "segmentation", "source": "x", "head": "linear"},
            "denoising": {"name": "denoising", "source": "x", "sigma": 25, "head": "linear"},
        },
    }
    return DenseModel.from_config(config, {"x": SourceInfo(classes=("a", "b"), keys=("image", "mask"))})


def checkpoints(model: DenseModel) -> dict[str, Seeds]:
    """{target: {name: content}}."""
    content = {
        "densectx": header(model, {"model": {}}),
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
        "global_step": 1,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}],
    }
    found: dict[str, Seeds] = {"safetensors": {}, "ckpt": {}}
    with tempfile.TemporaryDirectory() as folder:
        save_safetensors(model, Path(folder) / "m.safetensors")
        found["safetensors"]["m.safetensors"] = (Path(folder) / "m.safetensors").read_bytes()
    for name, new in (("zip.ckpt", True), ("legacy.ckpt", False)):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=new)
        found["ckpt"][name] = file.getvalue()
    return found


# -- mutations

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A few changes anywhere, more often where files say what they are."""
    changed = bytearray(data)
    for _ in range(1 << rng.randrange(3)):
        if not changed:
            break
        at = rng.randrange(min(len(changed), 256) if rng.random() < 0.5 else len(changed))
        match rng.randrange(9):
            case 0 | 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at] = rng.randrange(256)
            case 3:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice(NUMBERS) & (256**size - 1)
                changed[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
            case 4:
                del changed[at : None if rng.random() < 0.3 else at + rng.randrange(1, 64)]
            case 5:
                part = changed[at : at + rng.randrange(1, 64)]
                changed[at:at] = part * rng.randrange(1, 8)
            case 6:
                changed[at:at] = rng.randbytes(rng.randrange(1, 16))
            case 7:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                part = other[start : start + rng.randrange(1, 256)]
                changed[at : at + len(part)] = part
            case 8:
                changed[at : at + rng.randrange(1, 4096)] = bytes(rng.randrange(1, 64))
    return bytes(changed)


WORDS = ["null", "true", "-1", "0", "1e999", "1e5", "[]", "{}", '""', '"plain"', '"x:y"', '"\\u0000"', "4096", '"../x"']


def mutated_json(text: str, rng: random.Random) -> str:
    """Another value, key or bracket."""
    for _ in range(1 << rng.randrange(3)):
        tokens = list(re.finditer(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null|[\[\]{}:,]', text))
        if not tokens:
            break
        token = rng.choice(tokens)
        new = rng.choice([*WORDS, "", token.group() * 2, rng.choice(tokens).group(), "[" * rng.choice((1, 5000))])
        text = text[: token.start()] + new + text[token.end() :]
    return text


def damaged(seeds: Seeds, target: str, seed: int, number: int) -> tuple[str, bytes]:
    """The name and content of one input."""
    rng = random.Random(f"{seed} {target} {number}")
    name = rng.choice(list(seeds))
    data, others = seeds[name], list(seeds.values())
    inner = rng.random() < 0.6
    if target == "safetensors" and inner:
        size = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + size])
        if rng.random() < 0.6:  # what the model is
            table["__metadata__"]["densectx"] = mutated_json(table["__metadata__"]["densectx"], rng)
            text = json.dumps(table)
        else:  # where its tensors lie
            text = mutated_json(json.dumps(table), rng)
        return name, len(text.encode()).to_bytes(8, "little") + text.encode() + data[8 + size :]
    if name == "zip.ckpt" and inner:
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
            for member in old.infolist():
                content = old.read(member)
                if member.filename.endswith("data.pkl") or (rng.random() < 0.1 and content):
                    content = mutated(content, others, rng)
                new.writestr(member.filename, content)
        return name, file.getvalue()
    return name, mutated(data, others, rng)


# -- what reads them

Target = tuple[Seeds, Callable[[Path], None]]


def make_targets() -> dict[str, Target]:
    """{name: good files and what reads a file}."""
    model = small_model()
    kept = checkpoints(model)
    reading = Reading.of(model, list(model.tasks))

    def image(path: Path) -> None:
        pixels, _ = read_image(path, 3)
        if pixels.dtype != torch.float32 or pixels.shape[0] != 3 or not 0 <= pixels.min() <= pixels.max() <= 1:
            raise AssertionError(f"an image of {pixels.dtype}, {tuple(pixels.shape)}, {pixels.min()}..{pixels.max()}")

    def predict(path: Path) -> None:
        """As densectx.inference.work and .large read."""
        reading.real(path)
        fingerprint(path)
        if not needs_windows(path):
            reading.image(path)
        if path.suffix in (".tif", ".npy"):
            source = WindowedFile(path, reading.channels, reading.value_range)
            _, height, width = source.shape
            source.read(slice(height // 2, min(height // 2 + 9, height)), slice(0, min(width, 9)))

    def checkpoint(path: Path) -> None:
        densectx.load(path)

    images = pictures()
    return {
        "reader": (images, image),
        "predict": (images, predict),
        "safetensors": (kept["safetensors"], checkpoint),
        "ckpt": (kept["ckpt"], checkpoint),
    }


def outcome(read: Callable[[Path], None], path: Path) -> str:
    """``read``, ``refused``, or what is wrong."""
    try:
        read(path)
    except DensectxError as error:
        text = str(error)
        if str(path) not in text:
            return f"unclear: the file is not named: {text[:200]}"
        short = len(text) < 2000 and text.count("\n") < 20
        return "refused" if short else f"unclear: {len(text)} characters: {text[:300]}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"exception: {type(error).__name__}: {str(error)[:150]} ({Path(place.filename).name}:{place.lineno})"
    return "read"


def resident(key: str) -> float:
    """VmHWM or VmRSS of this process, in megabytes."""
    return int(Path("/proc/self/status").read_text(encoding="ascii").partition(key + ":")[2].split()[0]) / 1024


def work(target: Target, name: str, seed: int, numbers: range, pipe: int) -> None:
    """The forked worker: a line with the number before an input, a line with the outcome after it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders in C complain there
    seeds, read = target
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    idle = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            kind, data = damaged(seeds, name, seed, number)
            path = Path(folder) / kind
            path.write_bytes(data)
            os.write(pipe, f"{number}\n".encode())
            said = outcome(read, path)
            if resident("VmHWM") > idle + MEGABYTES:
                said = f"memory: {resident('VmHWM') - idle:.0f} MB above idle, then {said}"
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            os.write(pipe, (json.dumps(said) + "\n").encode())


def fuzz(target: Target, name: str, seed: int, count: int) -> dict[str, Any]:
    """Outcomes of so many inputs, and what was wrong."""
    outcomes: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []

    def note(number: int, said: str) -> None:
        outcomes[said.partition(":")[0]] += 1
        if said not in ("read", "refused"):
            wrong.append({"number": number, "said": said})
            sys.stdout.write(f"{name} {number}: {said}\n")

    following = 0
    while following < count:
        lines = started(target, name, seed, range(following, count))
        current = following
        for number, said in lines:
            current = number
            if said is not None:
                note(number, said)
                following = number + 1
        if following < count:  # ended in the middle of an input
            status = lines.status
            note(current, "hang" if lines.hung else f"crash: status {status}")
            following = current + 1
    return {"outcomes": dict(sorted(outcomes.items())), "wrong": wrong}


class Lines:
    """What a worker says, as (number, None) and (number, outcome); killed where it says nothing for too long."""

    def __init__(self, process: int, pipe: int) -> None:
        self.process, self.pipe, self.hung, self.status = process, pipe, False, 0

    def __iter__(self) -> Any:
        """Until it ends."""
        number, rest = -1, b""
        try:
            while True:
                if not select.select([self.pipe], [], [], SECONDS)[0]:
                    self.hung = True
                    return
                got = os.read(self.pipe, 1 << 16)
                if not got:
                    return
                *lines, rest = (rest + got).split(b"\n")
                for line in lines:
                    if line.isdigit():
                        number = int(line)
                        yield number, None
                    else:
                        yield number, json.loads(line)
        finally:
            if self.hung:
                os.kill(self.process, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
            os.close(self.pipe)


def started(target: Target, name: str, seed: int, numbers: range) -> Lines:
    """A forked worker."""
    sys.stdout.flush()
    here, there = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(here)
        try:
            work(target, name, seed, numbers, there)
        finally:
            os._exit(0)
    os.close(there)
    return Lines(process, here)


def replay(target: Target, name: str, seed: int, number: int) -> int:
    """One input, as a file here."""
    kind, data = damaged(target[0], name, seed, number)
    path = Path(f"fuzz-{name}-{number}{Path(kind).suffix}")
    path.write_bytes(data)
    sys.stdout.write(f"{path}: {len(data)} bytes, made of {kind}\n")
    target[1](path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
