"""Whether reading pictures hides behind the step."""

from __future__ import annotations

import os
import statistics
import time
from itertools import islice
from typing import Any

from densectx.data.module import DataModule
from speed import networks, steps
from speed.sharing import sources
from speed.timing import Plan, compared, told

AIM = 0.05


def section(plan: Plan) -> dict[str, Any]:
    """Decoding alone, the loader alone, then steps with batches from memory and from the loader, in turns."""
    config = plan.configs["loader"] if "loader" in plan.configs else default()
    specs = sources(config)
    if plan.quick:
        small = {"batch_size": 1, "augment": {"crop": 32}}
        specs = {name: {**spec, **small} for name, spec in specs.items()}
    model, infos = networks.model_config(config, {})
    step = steps.stepper(networks.build(model, infos), plan.native)
    workers = 1 if plan.quick else max(1, (os.cpu_count() or 2) - 1)
    data = DataModule(specs, num_workers=workers)
    count, blocks = (4, 2) if plan.quick else (30, max(3, plan.repeats // 2))
    images = sum(data.batch_sizes.values())
    batches = list(islice(DataModule(specs, num_workers=0).train_dataloader(), 4))
    kept: dict[str, list[float]] = {"step": [], "step with loader": [], "loader alone": [], "decoding alone": []}
    waits: list[float] = []
    for batch in batches[:2]:
        step(batch)
    for block in range(blocks):
        kept["decoding alone"] += decode(data, specs, 2 * count, block)
        for index in range(count):
            kept["step"].append(_timed(step, batches[index % len(batches)]))
        waited, fed = feed(data, step, count, 2 * workers + 1)
        waits += waited
        kept["step with loader"] += fed
        kept["loader alone"] += feed(data, None, count, 2 * workers + 1)[0]
    arms = {name: told(times) for name, times in kept.items()}
    stall = sum(waits) / sum(kept["step with loader"])
    for name, arm in arms.items():
        arm["images_per_s"] = (1 if name == "decoding alone" else images) / statistics.mean(kept[name])
    return {
        "config": config,
        "dtype": plan.native,
        "fed": compared({name: arms[name] for name in ("step with loader", "step")}),
        "apart": {name: arms[name] for name in ("loader alone", "decoding alone")},
        "workers": workers,
        "images_a_step": images,
        "waits_s": [round(seconds, 6) for seconds in waits],
        "stall": stall,
        "aim": AIM,
        "reached": stall < AIM,
        "stall_is": "time that steps wait for a batch / time of the steps with it, without those batches that the"
        " loader had ready before the first step",
    }


def default() -> str:
    """Files where there are some, else pictures that are made from a few photographs."""
    root = os.environ.get("DENSECTX_DATA")
    return "configs/segmentation_camvid.yaml" if root else "configs/quickstart.yaml"


def decode(data: DataModule, specs: dict[str, Any], count: int, block: int) -> list[float]:
    """Seconds of each sample as the data set reads it, in this process."""
    sets = [data.datasets["train"][name] for name in specs]
    numbers = range(block * count, (block + 1) * count)
    return [_timed(dataset.__getitem__, number % len(dataset)) for number in numbers for dataset in sets]


def feed(data: DataModule, step: Any, count: int, ready: int) -> tuple[list[float], list[float]]:
    """Seconds waited for each batch and seconds from batch to batch, behind the first ``ready`` ones."""
    waited, whole = [], []
    batches = iter(data.train_dataloader())
    for index in range(count + ready):
        start = time.perf_counter()
        batch = next(batches)
        got = time.perf_counter()
        if step is not None:
            step(batch)
        if index >= ready:
            waited.append(got - start)
            whole.append(time.perf_counter() - start)
    del batches
    return waited, whole


def _timed(call: Any, argument: Any) -> float:
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start
