"""Several tasks from one trunk against as many models with a trunk each: time, multiply-adds, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from densectx.config import compose
from densectx.model import DenseModel
from densectx.types import Batch
from speed import networks, steps
from speed.networks import parameters
from speed.timing import Arm, Plan, compare

ONE, MANY, SINGLES = "one trunk", "a model each", "single-task configs"


def section(plan: Plan) -> dict[str, Any]:
    """``predict`` of one picture with every task, and a training step with the config's batches.

    A model each is the same network with one of the tasks; networks that were made for one task are compared too if
    they are given.
    """
    config = plan.configs["multitask"]
    height, width = size = (32, 48) if plan.quick else (352, 480)
    image = networks.picture(1, 3, size)
    batch = steps.batch_of(sources(config), 8 if plan.quick else 1)
    dtype = plan.native
    groups = {name: models(config, name, plan.singles) for name in (ONE, MANY, *(SINGLES,) * bool(plan.singles))}
    calls = {
        "predict": {name: steps.predictor(group, image, dtype) for name, group in groups.items()},
        "training step": {name: _each(groups[name], batch, dtype) for name in (ONE, MANY)},
    }
    rows = []
    for kind, runs in calls.items():
        arms = [
            Arm(name, run, {"parameters": parameters(*groups[name]), "macs": networks.counted(run)})
            for name, run in runs.items()
        ]
        what = f"predict, {width}x{height}" if kind == "predict" else "training step, the config's batches"
        row = compare(f"{what}, {dtype}", arms, plan, dtype=dtype)
        if not plan.quick or kind == "predict":  # a quick run starts two processes less
            for name, arm in row["arms"].items():
                arm["peak_mb"] = peak(config, name, kind, dtype, plan)
                arm["weights_mb"] = 4 * arm["parameters"] / 2**20
                row["ratios"].get(name, {})["memory"] = row["arms"][ONE]["peak_mb"] / arm["peak_mb"]
        rows.append(row)
    tasks = list(groups[ONE][0].tasks)
    return {
        "comparisons": rows,
        "config": config,
        "tasks": tasks,
        "singles": list(plan.singles),
        "aim": "time < 0.40, multiply-adds < 0.40. Tasks share a pass where they are fed the same picture, as `predict`"
        " does it; in training each has an input of its own (noisy, small, gray)",
        "memory_is": "greatest resident memory of a process that holds the models, above that after its imports",
    }


def sources(config: str) -> dict[str, Any]:
    """``data.sources`` of a config."""
    found: dict[str, Any] = compose([networks.found(config)]).values["data"]["sources"]
    return found


def models(config: str, name: str, singles: Sequence[str]) -> list[DenseModel]:
    """The config's model, one for each of its tasks, or those of the single-task configs."""
    if name == SINGLES:
        return [cast("DenseModel", networks.ours(single, {}).module) for single in singles]
    model, infos = networks.model_config(config, {})
    return [
        networks.build(model, infos, keys) for keys in ([[key] for key in model["tasks"]] if name == MANY else [None])
    ]


def _each(group: list[DenseModel], batch: Batch, dtype: str) -> Callable[[], None]:
    runs = [steps.stepper(model, dtype) for model in group]

    def run() -> None:
        for step in runs:
            step(batch)

    return run


def peak(config: str, name: str, kind: str, dtype: str, plan: Plan) -> float:
    """MiB, in a process of its own: memory that is freed does not always go back to the system."""
    config, *singles = (_absolute(each) for each in (config, *plan.singles))
    asked = {"config": config, "name": name, "singles": singles, "kind": kind, "dtype": dtype}
    asked |= {"quick": plan.quick, "threads": plan.threads}
    command = [sys.executable, "-m", "speed.sharing", json.dumps(asked)]
    done = subprocess.run(command, check=True, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def _absolute(config: str) -> str:
    file = networks.found(config)
    return str(file.resolve()) if file.exists() else config


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024


def _measure_peak(asked: dict[str, Any]) -> float:
    import timm  # noqa: F401 - now, not while models are built
    import torch

    torch.set_num_threads(asked["threads"])
    torch.rand(64, 64) @ torch.rand(64, 64)  # what is made once
    before = _resident("VmRSS")
    group = models(asked["config"], asked["name"], asked["singles"])
    if asked["kind"] == "predict":
        image = networks.picture(1, 3, (32, 48) if asked["quick"] else (352, 480))
        run = steps.predictor(group, image, asked["dtype"])
    else:
        batch = steps.batch_of(sources(asked["config"]), 8 if asked["quick"] else 1)
        run = _each(group, batch, asked["dtype"])
    for _ in range(2):
        run()
    return _resident("VmHWM") - before


if __name__ == "__main__":
    print(_measure_peak(json.loads(sys.argv[1])))  # noqa: T201
