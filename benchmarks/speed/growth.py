"""How time grows with pixels, tasks and ranks; linear is the aim."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import scaling
import torch

from densectx.inspection.cost import cost
from densectx.model import DenseModel
from speed import networks, steps
from speed.timing import Arm, Plan, measure


def section(plan: Plan) -> dict[str, Any]:
    """Segmentation of the config for pixels and tasks (each task a decoder head); scaling.py's model for ranks."""
    curves = [pixels(plan), *tasks(plan)]
    found: dict[str, Any] = {"curves": curves, "config": plan.configs["segmentation"], "aim": "linear"}
    if not plan.quick:
        with tempfile.TemporaryDirectory() as folder:
            found["ranks"] = ranks(scaling.measured(max(10, 2 * plan.repeats), Path(folder)))
    return found


def pixels(plan: Plan) -> dict[str, Any]:
    """One picture of x1 to x64 pixels."""
    net = networks.ours(plan.configs["segmentation"], {})
    height, width = (16, 16) if plan.quick else (96, 128)
    factors = [1, 4] if plan.quick else [1, 2, 4, 8, 16, 32, 64]
    arms = []
    for factor in factors:
        tall = 2 ** (int(math.log2(factor)) // 2)
        size = (height * tall, width * factor // tall)
        x = networks.picture(1, networks.channels(net), size)
        arms.append(Arm(str(factor), networks.inference(net, x, plan.native), {"pixels": size[0] * size[1]}))
    what = f"inference, pixels from {width}x{height}, {plan.native}"
    return curve(what, "pixels", factors, measure(arms, plan, warm=2))


def tasks(plan: Plan) -> list[dict[str, Any]]:
    """One trunk with 1 to 8 heads on the same picture, answering and training."""
    counts = [1, 2] if plan.quick else list(range(1, 9))
    size = (32, 32) if plan.quick else (176, 240)
    model, infos = networks.model_config(plan.configs["segmentation"], {})
    spec = {**next(iter(model["tasks"].values())), "head": "decoder"}
    nets = [networks.build({**model, "tasks": {f"t{i}": spec for i in range(count)}}, infos) for count in counts]
    found = []
    for kind in ("inference", "training step"):
        count = 1 if kind == "inference" else 2
        arms = [
            Arm(str(len(net.tasks)), _call(net, kind, count, size, plan.native), _macs(net, kind, count, size))
            for net in nets
        ]
        what = f"{kind}, tasks, {size[1]}x{size[0]}, {plan.native}"
        found.append(curve(what, "tasks", counts, measure(arms, plan)))
    return found


def _macs(net: DenseModel, kind: str, count: int, size: tuple[int, int]) -> dict[str, int]:
    return {"macs": count * cost(net, size).total.macs} if kind == "inference" else {}


def _call(net: DenseModel, kind: str, count: int, size: tuple[int, int], dtype: str) -> Callable[[], None]:
    image = networks.picture(count, 3, size)
    if kind == "training step":
        sample = {"image": image, "mask": torch.zeros(count, *size, dtype=torch.int64)}
        sample |= {"gray": torch.zeros(count, dtype=torch.bool), "key": torch.tensor([[0, i] for i in range(count)])}
        step = steps.stepper(net, dtype)
        return partial(step, {net.task("t0").source: sample})
    net.eval()

    def run() -> None:
        with torch.inference_mode(), networks.autocast(dtype):
            net(dict.fromkeys(net.tasks, image))

    return run


def curve(what: str, over: str, xs: Sequence[int], arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians over x with the straight line t = a + b x that is nearest in relative terms, and the exponent."""
    medians = [arm["median_s"] for arm in arms.values()]
    offset, slope = line(xs, medians)
    return {
        "what": what,
        "over": over,
        "x": list(xs),
        "arms": arms,
        "offset_s": offset,
        "slope_s": slope,
        "worst": max(abs(t / (offset + slope * x) - 1) for x, t in zip(xs, medians, strict=True)),
        "exponent": exponent(xs, medians),
    }


def line(xs: Sequence[float], ts: Sequence[float]) -> tuple[float, float]:
    """a, b of t = a + b x by least squares of relative errors."""
    t = torch.tensor(ts, dtype=torch.float64)
    rows = torch.stack([1 / t, torch.tensor(xs, dtype=torch.float64) / t], 1)
    a, b = torch.linalg.lstsq(rows, torch.ones(len(ts), 1, dtype=torch.float64)).solution.flatten().tolist()
    return a, b


def exponent(xs: Sequence[float], ts: Sequence[float]) -> float:
    """The p of t = c x^p, by least squares of logarithms; 1 is linear."""
    x, t = ([math.log(v) for v in values] for values in (xs, ts))
    mean_x, mean_t = sum(x) / len(x), sum(t) / len(t)
    over = sum((a - mean_x) * (b - mean_t) for a, b in zip(x, t, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


def ranks(found: dict[str, Any]) -> dict[str, Any]:
    """Steps of one and two ranks, a thread each, the same batch a rank: two do twice the work."""
    alone, ddp = found["one_rank_step_s"], found["ddp_step_by_bucket_mib"]
    best = min(row["measured_s"] for row in ddp.values())
    beside = found["two_ranks_without_exchange_step_s"]
    return {
        "one_rank_step_s": alone,
        "two_ranks_without_exchange_step_s": beside,
        "two_ranks_step_s": best,
        "images_per_s_ratio": 2 * alone / best,
        "images_per_s_ratio_without_exchange": 2 * alone / beside,
        "threads_of_a_rank": 1,
    }
