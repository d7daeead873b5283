"""What a save costs the training thread -> ``results/saving.json``.

    python benchmarks/saving.py [--repeats 7] [--folder DIR] [--interval 600]

The checkpoint is that of a ResNet-34 with the state of AdamW (three numbers of 32 bits a parameter). Training waits
for the whole of a save: tensors to file, SHA-256, fsync, rename, fsync of the folder, link, pruning. Beside it stand
Lightning's own ``TorchCheckpointIO``, which does not sync, in the same folder, and the digest alone. Each time is the
median; saves alternate, so that both see the same disk. Run on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from record import RESULTS, commit, machine
from torchvision.models import resnet34

from densectx.archive import load_archive
from densectx.checkpoint_files import StepFiles
from densectx.checkpoint_io import AtomicCheckpointIO


def main() -> int:
    """Command line; 1 if saving takes more than the share that is allowed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (a temporary one)")
    parser.add_argument("--interval", type=float, default=600, help="seconds between two saves")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        found = measure(folder, given.repeats)
    finally:
        shutil.rmtree(folder)
    share = found["save_s"]["median"] / given.interval
    result = {
        "name": "saving",
        "command": f"python benchmarks/saving.py --repeats {given.repeats} --interval {given.interval:g}",
        "commit": commit(),
        "machine": machine(),
        "repeats": given.repeats,
        "interval_s": given.interval,
        **found,
        "share_of_training_thread": round(share, 6),
        "allowed_share": 0.01,
    }
    (RESULTS / "saving.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return int(share > result["allowed_share"])


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of each part, least, median and most."""
    content = checkpoint()
    files = StepFiles(folder / "ours", 2)
    ours, theirs = AtomicCheckpointIO(), TorchCheckpointIO()
    times: dict[str, list[float]] = {}

    def take(name: str, action: Callable[..., Any], *arguments: Any) -> None:
        start = time.perf_counter()
        action(*arguments)
        times.setdefault(name, []).append(time.perf_counter() - start)

    def save(step: int) -> None:
        ours.save_checkpoint(content, files.path(step))
        files.written(step)

    for step in range(1, repeats + 2):  # the first is not counted: it makes folders and warms caches
        take("save_s", save, step)
        take("lightning_save_s", theirs.save_checkpoint, content, folder / "theirs.ckpt")
        text = files.path(step).read_bytes()
        take("sha256_s", hashlib.sha256, text)
        take("load_s", load_archive, files.path(step))
        take("torch_load_s", torch.load, files.path(step), "cpu")
    counted = {name: sorted(values[1:]) for name, values in times.items()}
    return {"bytes": len(text)} | {
        name: {
            "median": round(statistics.median(values), 4),
            "least": round(values[0], 4),
            "most": round(values[-1], 4),
        }
        for name, values in counted.items()
    }


def checkpoint() -> dict[str, Any]:
    """What a run of a ResNet-34 with AdamW saves, as far as its size goes."""
    model = resnet34()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": 1}


if __name__ == "__main__":
    sys.exit(main())
