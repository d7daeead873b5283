"""What updates cost beside the forward and backward pass that they follow: AdaMuon here, timm's, AdamW."""

from __future__ import annotations

from typing import Any

import timm.optim
import torch
from torch.optim import Optimizer

from densectx.optimizers import AdaMuon
from speed import networks
from speed.timing import Arm, Plan, compare

CONFIG, BATCH, CLASSES = "configs/recipes/camvid_20min.yaml", 6, 11


def section(plan: Plan) -> dict[str, Any]:
    """The network, batch and crop of a recipe that trains with AdaMuon, in float32 master weights."""
    side = 64 if plan.quick else 256
    net = networks.ours(CONFIG, {})
    x = networks.picture(BATCH, 3, (side, side))
    target = torch.randint(CLASSES, (BATCH, side, side))
    weights = list(net.module.parameters())
    optimizers: dict[str, Optimizer] = {
        "AdaMuon": AdaMuon(weights),
        "timm AdaMuon": timm.optim.Muon(weights, algo="adamuon"),
        "AdamW": torch.optim.AdamW(weights),
    }

    def passes() -> None:
        with networks.autocast(plan.native):
            output = net.run(net.module.train(), x)
        for weight in weights:
            weight.grad = None
        torch.nn.functional.cross_entropy(output.float(), target).backward()

    passes()  # the first update needs gradients
    arms = [Arm(name, optimizer.step) for name, optimizer in optimizers.items()]
    what = f"an update of {networks.parameters(net.module) / 1e6:.1f} M parameters"
    return {
        "comparisons": [compare(what, [*arms, Arm(f"forward and backward, {plan.native}", passes)], plan)],
        "config": CONFIG,
        "batch": [BATCH, side, side],
        "aim": "no slower than timm's on any processor",
    }
