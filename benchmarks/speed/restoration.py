"""Denoiser and x2 network against DnCNN and VDSR, for each megapixel of the answer."""

from __future__ import annotations

from typing import Any

from speed import networks
from speed.timing import Arm, Plan, compare

GRAY = {"model.backbone.in_channels": "1"}
SHIPPED = ("configs/denoising_bsds500.yaml", "configs/super_resolution_bsds500.yaml")


def section(plan: Plan) -> dict[str, Any]:
    """Inference only: what the weights are does not change the time, so none are loaded."""
    side = 64 if plan.quick else 1024
    rows = []
    for part, scale in (("denoiser", 1), ("x2", 2)):
        config = plan.configs[part]
        for dtype in plan.dtypes:
            source = "bsds500"  # of the shipped configs, which are for colours
            flags = {**GRAY, f"data.sources.{source}.channels": "1"} if config in SHIPPED else {}
            net = networks.ours(config, flags)
            count = networks.channels(net)
            peer = networks.dncnn(count) if scale == 1 else networks.vdsr(count, scale)
            image = networks.picture(1, count, (side // scale, side // scale))
            arms = [
                Arm(n.name, networks.inference(n, x, dtype), n.facts(x))
                for n, x in ((net, networks.task_input(net, image)), (peer, image))
            ]
            row = compare(f"{part}, {count} channel{'s'[: count > 1]}, {side}x{side} out, {dtype}", arms, plan)
            megapixels = side**2 / 1e6
            for arm in row["arms"].values():
                arm["s_per_megapixel"] = arm["median_s"] / megapixels
                arm["macs_per_pixel"] = arm["macs"] / side**2
            rows.append({**row, "dtype": dtype, "megapixels": megapixels, "config": config})
    return {"comparisons": rows, "aim": "time < 1 at equal or better PSNR, which benchmarks/results says elsewhere"}
