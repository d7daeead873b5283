"""Until something happens: import, ``--help``, ``list``, the first training step; each in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from record import ROOT

from speed.timing import Arm, Plan, compare, measure

_STEP = """
import torch
torch.manual_seed(0)
{make}
x = torch.rand(2, 3, 64, 64)
loss = torch.nn.functional.cross_entropy(run(x), torch.zeros(2, 64, 64, dtype=torch.int64))
loss.backward()
torch.optim.AdamW(net.parameters()).step()
"""
_OURS = """
from densectx import DenseModel
from densectx.types import SourceInfo
net = DenseModel.from_config(
    {"backbone": "dilated_resnet34", "tasks": {"a": {"name": "segmentation", "source": "s"}}},
    {"s": SourceInfo(classes=tuple(map(str, range(11))), keys=("image", "mask"))},
)
run = lambda x: net({"a": x})["a"]
"""
_SMP = """
import segmentation_models_pytorch as smp
run = net = smp.DeepLabV3("resnet34", encoder_weights=None, encoder_output_stride=8, classes=11)
"""
_TIMM = """
import timm
net = timm.create_model("resnet34", features_only=True, output_stride=8)
run = lambda x: torch.nn.functional.interpolate(net(x)[-1][:, :11], size=x.shape[-2:])
"""


def section(plan: Plan) -> dict[str, Any]:
    """Medians; the first run of each is not counted, since it reads files from the disk."""
    plan = replace(plan, budget=3 * plan.budget)
    python = partial(arm, plan)
    commands = [
        python("python -c pass", ["-c", "pass"]),
        python("import densectx", ["-c", "import densectx"]),
        python("densectx --help", ["-m", "densectx", "--help"]),
        python("densectx list", ["-m", "densectx", "list"]),
    ]
    if plan.quick:
        return {"measured": [{"what": "commands", "arms": measure(commands, plan)}]}
    commands += [
        python("densectx fit --help", ["-m", "densectx", "fit", "--help"]),
        python("import torch", ["-c", "import torch"]),
    ]
    imports = [
        python("from densectx import DenseModel", ["-c", "from densectx import DenseModel"]),
        python("import segmentation_models_pytorch", ["-c", "import segmentation_models_pytorch"]),
        python("import timm", ["-c", "import timm"]),
    ]
    first = [
        python("densectx, ResNet-34 + context", ["-c", _STEP.format(make=_OURS)]),
        python("smp DeepLabV3, ResNet-34", ["-c", _STEP.format(make=_SMP)]),
        python("timm, ResNet-34 alone", ["-c", _STEP.format(make=_TIMM)]),
    ]
    return {
        "measured": [{"what": "commands", "arms": measure(commands, plan)}],
        "comparisons": [
            compare("import of what builds a model", imports, plan),
            compare("fresh process to the end of the first training step", first, plan),
        ],
    }


def arm(plan: Plan, name: str, arguments: Sequence[str]) -> Arm:
    """A run of python in the checkout, with the plan's threads."""
    environment = os.environ | {"OMP_NUM_THREADS": str(plan.threads)}

    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    return Arm(name, run)
