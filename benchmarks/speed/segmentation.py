"""A ResNet-34 trunk at stride 8 with our context against the same trunk with other decoders."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from speed import networks
from speed.timing import Arm, Plan, compare

CLASSES = 11


def section(plan: Plan) -> dict[str, Any]:
    """Inference of one picture, a training step of two: batch norm behind a global pool needs two."""
    rows = []
    for height, width in [(32, 48)] if plan.quick else [(352, 480), (1024, 2048)]:
        for dtype in plan.dtypes:
            about = {"size": [height, width], "dtype": dtype, "memory_format": "channels_last"}
            where = f"{width}x{height}, {dtype}"
            nets = [networks.ours(plan.configs["segmentation"], {}), networks.deeplab(CLASSES), networks.fcn(CLASSES)]
            x = networks.picture(1, 3, (height, width))
            arms = [Arm(n.name, networks.inference(n, x, dtype), n.facts(x)) for n in nets]
            rows.append(compare(f"inference, {where}", arms, plan, batch=1, **about))
            x = networks.picture(2, 3, (height, width))
            target = torch.randint(CLASSES, (2, height, width), generator=torch.Generator().manual_seed(0))
            step = partial(networks.training, x=x, target=target, loss=F.cross_entropy, dtype=dtype)
            arms = [Arm(n.name, step(n), n.facts(x, training=True)) for n in nets]
            rows.append(compare(f"training step, {where}", arms, plan, batch=2, **about))
            del arms, step, nets
            gc.collect()
    return {
        "comparisons": rows,
        "aim": "time / multiply-adds <= 1: as fast as the multiply-add ratio allows, or faster",
        "config": plan.configs["segmentation"],
    }
