"""How much of the processor's arithmetic a forward pass and a training step use, and what the rest is spent on."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from speed import networks
from speed.timing import Arm, Plan, measure

AIMS = {"forward": 0.60, "training": 0.45}
PREFIX = "matrix product "

KINDS = {  # the first that an operator's name contains; what the optimizer calls is told by who calls it
    "convolution": ("conv",),
    "norm": ("batch_norm", "group_norm", "batchnorm"),
    "pooling and resampling": ("pool", "upsample", "interpolate", "index", "pad", "gather", "shuffle"),
    "loss": ("nll", "log_softmax", "l1_loss", "mse"),
    "matrix product": ("mm", "matmul", "linear"),
    "element-wise": (
        "relu", "threshold", "add", "mul", "sub", "div", "copy_", "clamp", "fill_", "zero_", "sum", "neg", "sign",
        "abs", "cpp_fused",
    ),
}  # fmt: skip


def section(plan: Plan) -> dict[str, Any]:
    """Segmentation (ResNet-34, stride 8) and the denoiser, plain and compiled, beside matrix products."""
    groups, shares, profiles = [], [], {}
    for dtype in plan.dtypes:
        for name, net, x, target, loss in subjects(plan):
            arms = [*products(plan, dtype)]
            calls: dict[str, Callable[[], None]] = {}
            for how in ("plain",) if plan.quick else ("plain", "compiled"):
                for kind in AIMS:
                    own = replace(net, module=deepcopy(net.module))
                    if how == "compiled":
                        own.module.compile()
                    label = kind if how == "plain" else f"{kind}, compiled"
                    if kind == "forward":
                        calls[label] = networks.inference(own, x, dtype)
                    else:
                        calls[label] = networks.training(own, x, target, loss, dtype)
                    arms.append(Arm(label, calls[label], net.facts(x, training=kind == "training")))
            measured = measure(arms, plan, warm=2)
            for arm in measured.values():
                arm["macs_per_s"] = arm["macs"] / arm["median_s"]
            what = f"{name}, {dtype}"
            groups.append({"what": what, "dtype": dtype, "arms": measured})
            for label in calls:
                shares.append(share_of(what, label, measured))
                if not shares[-1]["reached"]:
                    profiles[f"{what}, {label}"] = profiled(calls[label])
            torch.compiler.reset()
    return {"measured": groups, "shares": shares, "profiles": profiles}


def subjects(plan: Plan) -> list[tuple[str, networks.Network, torch.Tensor, torch.Tensor, networks.Loss]]:
    """What is measured, with its batch."""
    seg = networks.ours(plan.configs["segmentation"], {})
    size = (32, 48) if plan.quick else (352, 480)
    x = networks.picture(2, networks.channels(seg), size)
    labels = torch.zeros(2, *size, dtype=torch.int64)
    noise = networks.ours(plan.configs["denoiser"], {})
    side = 16 if plan.quick else 64
    clean = networks.picture(4 if plan.quick else 32, networks.channels(noise), (side, side))
    noisy = networks.task_input(noise, clean)
    return [
        (f"segmentation, 2 of {size[1]}x{size[0]}", seg, x, labels, F.cross_entropy),
        (f"denoiser, {len(clean)} of {side}x{side}", noise, noisy, clean, F.l1_loss),
    ]


def products(plan: Plan, dtype: str) -> list[Arm]:
    """Square matrix products; the best rate among them is what there is to reach."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    arms = []
    for side in (128, 256) if plan.quick else (1024, 2048, 4096):
        a, b = (torch.rand(side, side).to(kind) for _ in range(2))
        arms.append(Arm(f"{PREFIX}{side}", partial(torch.mm, a, b), {"macs": side**3}))
    return arms


def share_of(what: str, label: str, arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Multiply-adds a second of an arm / those of the best matrix product beside it."""
    best = max((name for name in arms if name.startswith(PREFIX)), key=lambda name: arms[name]["macs_per_s"])
    share = arms[label]["macs_per_s"] / arms[best]["macs_per_s"]
    aim = AIMS[label.split(",")[0]]
    return {"what": what, "arm": label, "of": best, "share": share, "aim": aim, "reached": share >= aim}


def profiled(run: Callable[[], None], shown: int = 12) -> dict[str, Any]:
    """Where the time of one call goes: shares of operators' own time, by kind and by name."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    kinds: dict[str, float] = {}
    names: dict[str, float] = {}
    for event in found.events():
        spent = float(event.self_cpu_time_total)
        kind = _kind(event)
        kinds[kind] = kinds.get(kind, 0.0) + spent
        names[event.name] = names.get(event.name, 0.0) + spent
    total = sum(names.values()) or 1.0
    top = sorted(names, key=lambda name: -names[name])[:shown]
    return {
        "kinds": {kind: spent / total for kind, spent in sorted(kinds.items(), key=lambda item: -item[1])},
        "operators": {name: names[name] / total for name in top},
    }


def _kind(event: Any) -> str:
    above = event
    while above is not None:
        if above.name.startswith("Optimizer.step"):
            return "optimizer"
        above = above.cpu_parent
    name = event.name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
