"""Samples a second from a folder and from its shards, side by side -> ``results/shards.json``.

    python benchmarks/shards.py [--samples 400] [--size 360 480] [--repeats 5]

Pictures of the ``mosaic`` data set (photographs of scikit-image, no download) are written as JPEG files with PNG
masks, then as shards by ``densectx shard``. Both are read in a random order, decoded to the same tensors, in turn,
``--repeats`` times, the files in the page cache: what is compared is our own work, not a disk or a file server, where
one read of a shard takes the place of several opens. Run on a clean checkout and an idle machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import RESULTS, commit, machine
from torch.utils.data import DataLoader

from densectx.data.mosaic import Mosaic
from densectx.registry import DATASETS

FILE = RESULTS / "shards.json"
PASSES = 3
CASES = [(0, 1), (2, 1), (0, 2), (2, 2)]  # (workers, ranks)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--size", type=int, nargs=2, default=[360, 480], metavar=("H", "W"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = written(folder, given.samples, given.size)
        start = time.perf_counter()
        arguments = ["shard", str(folder / "c.json"), "-o", str(folder / "out"), "--size", "16MB"]
        subprocess.run([sys.executable, "-m", "densectx", *arguments], check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        specs = {"folder": spec, "shards": {"name": "shards", "root": str(folder / "out" / "photos")}}
        found = {
            "name": "shards",
            "commit": commit(),
            "command": "python benchmarks/shards.py "
            f"--samples {given.samples} --size {given.size[0]} {given.size[1]} --repeats {given.repeats}",
            "machine": machine(),
            "writing_s": round(wall, 1),
            "disk": {"folder": disk(folder / "files"), "shards": disk(folder / "out")},
            "reading": [measured(specs, workers, ranks, given.repeats) for workers, ranks in CASES],
        }
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


def written(folder: Path, samples: int, size: list[int]) -> dict[str, Any]:
    """Files of pictures and masks, and a config of them; the spec of the data set."""
    mosaic = Mosaic(split="train", size=size, length=samples)
    for kind in ("images", "masks"):
        (folder / "files" / kind / "train").mkdir(parents=True)
    for index in range(samples):
        sample = mosaic[index]
        pixels = sample["image"].mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "files" / "images" / "train" / f"{index:05}.jpg", quality=90)
        mask = sample["mask"].to(torch.uint8).numpy()
        Image.fromarray(mask).save(folder / "files" / "masks" / "train" / f"{index:05}.png")
    spec = {
        "name": "image_mask",
        "root": str(folder / "files"),
        "images": "images/{subset}",
        "masks": "masks/{subset}",
        "classes": list(mosaic.info.classes),
        "splits": {"val": None, "test": None},
    }
    (folder / "c.json").write_text(json.dumps({"data": {"sources": {"photos": spec}}}))  # JSON is YAML
    return spec


def disk(folder: Path) -> dict[str, int]:
    """Files and bytes below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def measured(specs: dict[str, dict[str, Any]], workers: int, ranks: int, repeats: int) -> dict[str, Any]:
    """Samples a second of all ranks together, and how the shards compare: medians, over pairs measured in turn."""
    rates: dict[str, list[float]] = {name: [] for name in specs}
    for _ in range(repeats):
        for name, spec in specs.items():
            rates[name].append(rate(spec, workers, ranks))
    ratios = [b / a for a, b in zip(rates["folder"], rates["shards"], strict=True)]
    return {
        "workers": workers,
        "ranks": ranks,
        "samples_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "shards_over_folder": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def rate(spec: dict[str, Any], workers: int, ranks: int) -> float:
    """Some passes over all samples, shared by the ranks; processes are started before the clock."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(ranks + 1)
    processes = [context.Process(target=read, args=(spec, workers, rank, ranks, barrier)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        barrier.wait(120)
        start = time.perf_counter()
        barrier.wait(600)
        seconds = time.perf_counter() - start
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    return (len(DATASETS.build(spec, split="train")) * PASSES - ranks) / seconds


def read(spec: dict[str, Any], workers: int, rank: int, ranks: int, barrier: Barrier) -> None:
    """What a rank does: its samples in an order of the whole data set."""
    torch.set_num_threads(1)
    dataset = DATASETS.build(spec, split="train")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    loader = iter(DataLoader(dataset, batch_size=None, sampler=order[rank::ranks] * PASSES, num_workers=workers))
    next(loader)  # starts the workers
    barrier.wait(120)
    for _ in loader:
        pass
    barrier.wait(600)


if __name__ == "__main__":
    sys.exit(main())
