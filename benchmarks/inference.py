"""How near ``densectx predict`` comes to its parts: the model's forward passes and the PNG encoder.

    python benchmarks/inference.py [--images 200] [--side 4096] [--huge] [--pairs 3]

- ``folder``: 200 photographs of 481x321 (BSDS500 under DENSECTX_DATA, else crops of the ``mosaic`` scenes) through the
  colour denoiser of configs/denoising_bsds500.yaml, untrained: the time of the command against the sum of the times of
  ``model.predict`` and of encoding the answers, in the same process on the same images, in turns.
- ``tiles``: one picture of 4096x4096 through a denoiser on the ``plain`` backbone: exact tiles, sized as ``predict``
  does it, against the whole picture in one pass.
- ``--huge``: a tiled TIFF of 30 000 x 30 000 gray pixels through a gray denoiser, in a process whose peak of resident
  memory is kept.

Writes ``benchmarks/results/inference.json``; parts that are left out stay as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tifffile
import torch
from PIL import Image
from record import RESULTS, commit, machine

from densectx import cli
from densectx.checkpoint import load, save_safetensors
from densectx.data.mosaic import Mosaic
from densectx.data.reader import read_image
from densectx.inference.memory import bytes_per_pixel
from densectx.inference.tiler import Setting
from densectx.inference.tiling import Tiling
from densectx.inference.writers import Answer, encoders
from densectx.model import DenseModel
from densectx.types import SourceInfo

T = TypeVar("T")
FILE = RESULTS / "inference.json"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=200, help="photographs; 0 leaves this part out")
    parser.add_argument("--side", type=int, default=4096, help="of the tiled picture; 0 leaves this part out")
    parser.add_argument("--width", type=int, help="of the network that takes it (the widest whose whole pass fits)")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each kind, in turns")
    parser.add_argument("--huge", action="store_true", help="the picture of 30 000 x 30 000 pixels too")
    parser.add_argument("--huge-side", type=int, default=30_000, help="its side")
    given = parser.parse_args()
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"name": "inference"}
    about = {
        "command": f"python benchmarks/inference.py {shlex.join(sys.argv[1:])}".strip(),
        "commit": commit(),
        "machine": machine() | {"threads": torch.get_num_threads()},
    }
    with tempfile.TemporaryDirectory() as folder:
        if given.images:
            found["folder"] = folder_of_photographs(Path(folder), given.images, given.pairs) | about
        if given.side:
            found["tiles"] = tiles(given.side, given.pairs, given.width) | about
        if given.huge:
            found["huge"] = huge(Path(folder), given.huge_side) | about
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({k: v.get("ratio", v.get("peak_mb")) for k, v in found.items() if k != "name"}) + "\n")
    return 0


def denoiser(width: int, channels: int) -> DenseModel:
    """The network of configs/denoising_bsds500.yaml at another width; what its weights are does not change the time."""
    torch.manual_seed(0)
    config = {
        "backbone": {"name": "plain", "width": width, "in_channels": channels},
        "projection": None,
        "context": {"name": "basic", "dilations": [1, 2, 3, 4, 3, 2, 1]},
        "tasks": {"denoising": {"name": "denoising", "source": "photos", "sigma": 25, "head": "linear"}},
    }
    return DenseModel.from_config(config, {"photos": SourceInfo(channels, keys=("image",))}).eval()


def photographs(folder: Path, count: int) -> str:
    """Fill a folder with pictures of 481x321; returns where they come from."""
    folder.mkdir()
    root = os.environ.get("DENSECTX_DATA")
    if root:
        files = sorted((Path(root) / "bsds500" / "images").rglob("*.jpg"))[:count]
        for file in files:
            (folder / file.name).symlink_to(file)
        return f"{len(files)} of BSDS500"
    scenes = Mosaic(split="train", size=481, length=count)
    for number in range(count):
        pixels = (scenes[number]["image"][:, :321] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:03}.jpg", quality=90)
    return f"{count} of the mosaic scenes"


def timed(action: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = action(*arguments)
    return time.perf_counter() - start, result


def folder_of_photographs(folder: Path, count: int, pairs: int) -> dict[str, Any]:
    """The command against its parts."""
    origin = photographs(folder / "in", count)
    save_safetensors(denoiser(64, 3), folder / "m.safetensors")
    model = load(folder / "m.safetensors")
    task = model.task("denoising")
    write = encoders(task, SourceInfo(keys=("image",)), (3, 16, 16), raw=False)[".png"]
    images = [read_image(file)[0] for file in sorted((folder / "in").iterdir())]
    answers: list[torch.Tensor] = []

    def forward(precision: str, count: int | None = None) -> None:
        answers.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            answers.extend(model.predict(image)["denoising"] for image in images[:count])

    def encode() -> None:
        for image, answer in zip(images, answers, strict=True):
            write(Answer(image, False, answer))

    def command(precision: str) -> None:
        arguments = ["predict", str(folder / "m.safetensors"), str(folder / "in"), "-o", str(folder / "out")]
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main([*arguments, "--overwrite", "--precision", precision]) == 0

    result: dict[str, Any] = {"images": origin, "model": "plain, 64 channels, 7 dilated layers", "by_precision": {}}
    for precision in ("32", "bf16"):
        forward(precision, 3)  # what is made once
        rows = [
            {
                "predict_s": timed(command, precision)[0],
                "forward_s": timed(forward, precision)[0],
                "encode_s": timed(encode)[0],
            }
            for _ in range(pairs)
        ]
        middle = {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
        ratio = statistics.median((row["forward_s"] + row["encode_s"]) / row["predict_s"] for row in rows)
        result["by_precision"][precision] = middle | {
            "images_per_s": round(len(images) / middle["predict_s"], 2),
            "ratio": round(ratio, 4),
        }
    result["ratio"] = min(each["ratio"] for each in result["by_precision"].values())
    result["meaning"] = "(forward + encode) / predict; 0.9 and more is the aim"
    return result


def tiles(side: int, pairs: int, given: int | None = None) -> dict[str, Any]:
    """Exact tiles against the whole."""
    device = torch.device("cpu")
    for width in (64, 48, 32, 24, 16, 8) if given is None else (given,):
        model = denoiser(width, 3)
        need = bytes_per_pixel(lambda image, model=model: model.predict(image), 3, device) * side**2
        if need < 0.8 * _memory():
            break
    picture = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    tiling = Tiling(model, ["denoising"], Setting("exact"), lambda image, options: model.predict(image))
    rows, worst = [], 0.0
    for _ in range(pairs):
        whole, expected = timed(model.predict, picture)
        exact, found = timed(tiling, picture, {})
        worst = max(worst, (found["denoising"] - expected["denoising"]).abs().max().item())
        rows.append({"whole_s": whole, "exact_s": exact})
        del expected, found
    return {
        "picture": f"{side}x{side}, colour",
        "model": f"plain, {width} channels, 7 dilated layers",
        "plan": str(tiling.plan(side, side)),
        "whole_mb": round(need / 2**20),
        "whole_s": round(statistics.median(row["whole_s"] for row in rows), 2),
        "exact_s": round(statistics.median(row["exact_s"] for row in rows), 2),
        "ratio": round(statistics.median(row["exact_s"] / row["whole_s"] for row in rows), 4),
        "largest_difference": worst,
        "meaning": "exact / whole; 1.15 and less is the aim",
    }


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def huge(folder: Path, side: int) -> dict[str, Any]:
    """A picture larger than memory, in a process of its own."""
    save_safetensors(denoiser(8, 1), folder / "gray.safetensors")
    rng, tile = np.random.default_rng(0), 512
    count = (-(-side // tile)) ** 2
    parts = (rng.integers(0, 256, (tile, tile), np.uint8) for _ in range(count))
    tifffile.imwrite(
        folder / "huge.tif", parts, shape=(side, side), dtype=np.uint8, tile=(tile, tile), photometric="minisblack"
    )
    arguments = ["predict", "gray.safetensors", "huge.tif", "-o", "out", "--json"]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "densectx", *arguments], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    with tifffile.TiffFile(folder / "out" / "denoising" / "huge.tif") as file:
        shape = file.pages[0].shape
    assert status == 0
    assert shape == (side, side)
    return {
        "picture": f"{side}x{side}, gray, TIFF in tiles of {tile}",
        "model": "plain, 8 channels, 7 dilated layers",
        "wall_s": round(wall, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
        "meaning": "peak resident memory of the process; 2048 and less is the aim",
    }


if __name__ == "__main__":
    sys.exit(main())
