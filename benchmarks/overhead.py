"""What does the machinery cost? A training step of ``Trainer.fit`` against a bare loop on the same model.

    python benchmarks/overhead.py [--block 20] [--blocks 12]

Two models: the quickstart's four tasks, and segmentation alone (the shorter step, so the larger share). Both arms have
the same weights at the start, optimizer, schedule, gradient clipping, precision, and the same batches, which lie in
memory. The bare loop is what one would write by hand: prepare, forward under autocast, losses, sum / weight, backward,
clip, step. One process, blocks of steps of the two arms in turn, the fit's generator waiting while the bare loop runs;
of each block the median step counts, and the ratio is that of the medians over all blocks. Writes
``benchmarks/results/overhead.json``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, ROOT, commit, machine

from densectx.building import instantiate
from densectx.config import compose
from densectx.nn.precision import full
from densectx.precision import native_precision
from densectx.rng import generator

ARMS = {
    "four tasks": [],
    "segmentation": [f"model.tasks.{key}=null" for key in ("denoising", "super_resolution", "colorization")],
}
WARM = 6  # steps of each arm before anything is measured


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--block", type=int, default=20, help="steps of an arm in a row")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.json")
    given = parser.parse_args()
    rows = {arm: compared(flags, given.block, given.blocks) for arm, flags in ARMS.items()}
    result = {
        "name": "overhead",
        "command": shlex.join(["python", "benchmarks/overhead.py", *sys.argv[1:]]),
        "config": "configs/quickstart.yaml",
        "commit": commit(),
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "precision": native_precision("cpu"),
        "block": given.block,
        "blocks": given.blocks,
        "seed": 0,
        "aim": "ratio <= 1.03",
        "rows": rows,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for arm, row in rows.items():
        sys.stdout.write(f"{arm}: fit {row['fit_ms']:.2f} ms, bare {row['bare_ms']:.2f} ms, ratio {row['ratio']:.4f}\n")
    return 0


def compared(flags: list[str], block: int, blocks: int) -> dict[str, Any]:
    """Steps of both arms in milliseconds, and their ratio."""
    steps = WARM + block * blocks
    # the fit asks for no batch after its last step, and the last block ends where another one is asked for
    overrides = [("trainer.max_steps", str(steps + 1)), ("trainer.enable_progress_bar", "false")]
    overrides += [("trainer.val_check_interval", str(10 * steps)), ("data.num_workers", "0")]
    overrides += [("trainer.precision", native_precision("cpu")), ("model.lr_scheduler.init_args.warmup_steps", "0")]
    pairs = [(key, value) for key, _, value in (flag.partition("=") for flag in flags)]
    config = compose([ROOT / "configs" / "quickstart.yaml"], [*overrides, *pairs]).values
    with tempfile.TemporaryDirectory() as folder:
        trainer, module, data = instantiate(config, Path(folder), "fit")
        batches = list(islice(data.train_dataloader(), 4))
        bare = bare_loop(deepcopy(module), batches, trainer.precision == "bf16-mixed", trainer.gradient_clip_val)
        for _ in range(WARM):
            bare()
        loader = Turns(batches, bare, steps, block)
        data.train_dataloader = lambda: loader
        trainer.fit(module, datamodule=data)
    fit, other = (statistics.median(statistics.median(part) for part in one) for one in (loader.fit, loader.bare))
    return {
        "fit_ms": 1000 * fit,
        "bare_ms": 1000 * other,
        "ratio": fit / other,
        "ratio_by_block": [
            statistics.median(a) / statistics.median(b) for a, b in zip(loader.fit, loader.bare, strict=True)
        ],
    }


class Turns:
    """A loader whose batches lie in memory, and which lets the bare loop run between blocks of the fit's steps.

    A step of the fit is the time from one batch that is asked for to the next: all that Lightning and callbacks do.
    """

    def __init__(self, batches: list[Any], bare: Callable[[], None], steps: int, block: int) -> None:
        self.batches, self.run_bare, self.steps, self.block = batches, bare, steps, block
        self.fit: list[list[float]] = []
        self.bare: list[list[float]] = []

    def __len__(self) -> int:
        return self.steps + 1

    def __iter__(self) -> Iterator[Any]:
        times: list[float] = []
        for step in range(self.steps + 1):
            if step > WARM and (step - WARM) % self.block == 0:
                self.fit.append(times[-self.block :])
                own = []
                for _ in range(self.block):
                    began = time.perf_counter()
                    self.run_bare()
                    own.append(time.perf_counter() - began)
                self.bare.append(own)
            began = time.perf_counter()
            yield dict(self.batches[step % len(self.batches)])
            times.append(time.perf_counter() - began)


def bare_loop(module: Any, batches: list[Any], bf16: bool, clip: float | None) -> Callable[[], None]:
    """One training step as written by hand, of a module that only lends its model and its optimizer."""
    model = module.model.train()
    optimizers = module.configure_optimizers()
    optimizer, scheduler = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
    parameters = list(model.parameters())
    count = 0

    def step() -> None:
        nonlocal count
        batch = batches[count % len(batches)]
        count += 1
        inputs, targets = {}, {}
        with torch.no_grad():
            for key in model.tasks:
                task = model.task(key)
                sample = batch[task.source]
                rngs = [generator(0, task.source, *k, key) for k in sample["key"].tolist()]
                inputs[key], targets[key] = task.prepare(sample, rngs)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(inputs)
        loss = 0.0
        for key, y in outputs.items():
            task = model.task(key)
            for term, (total, weight) in task.loss(full(y), targets[key]).items():
                loss = loss + task.weight * task.coefficients[term] * total / weight.clamp_min(1e-12)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        scheduler.step()

    return step


if __name__ == "__main__":
    sys.exit(main())
