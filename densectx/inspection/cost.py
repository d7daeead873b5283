"""Parameters and multiply-adds of a model, part by part, on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from densectx.inspection.shell import shell_of
from densectx.model import DenseModel
from densectx.tasks.base import Task


class PartCost(NamedTuple):
    """What a part costs.

    Attributes:
        parameters: numbers that are trained; buffers such as running means are not counted.
        macs: multiply-adds of convolutions and matrix products. Pools, resampling, norms, activations and other work
            that only passes over maps is not counted.
    """

    parameters: int
    macs: int


class Cost(NamedTuple):
    """What a model costs for one picture.

    Attributes:
        parts: ``backbone``, ``projection``, ``context`` (all of them where each task has its own) and
            ``tasks.KEY`` for each task's head and what it makes of the head's output.
        size: (H, W) of the picture.
    """

    parts: dict[str, PartCost]
    size: tuple[int, int]

    @property
    def total(self) -> PartCost:
        """Of all parts."""
        return PartCost(sum(p.parameters for p in self.parts.values()), sum(p.macs for p in self.parts.values()))

    @property
    def macs_per_pixel(self) -> float:
        """Multiply-adds for each pixel of the picture, of all parts."""
        return self.total.macs / (self.size[0] * self.size[1])


def cost(model: DenseModel, size: tuple[int, int], tasks: Iterable[str] | None = None) -> Cost:
    """Count what a model does to answer tasks for one picture, passes that tasks share once.

    Args:
        model: on any device; unchanged, and nothing is computed.
        size: (H, W) of the picture.
        tasks: keys of the tasks that are answered, null for all. Parameters are always those of the whole model.
    """
    keys = list(model.tasks) if tasks is None else list(tasks)
    shell = cast("DenseModel", shell_of(model).module)
    counter = FlopCounterMode(display=False)
    inputs = {}
    images: dict[str, torch.Tensor] = {}
    for key in keys:
        task = shell.task(key)
        image = images.setdefault(task.source, torch.empty(1, model.channels(key), *size, device="meta"))
        inputs[key] = task.inputs(image, numbers(task))
    behind = {}
    with torch.no_grad():
        with counter:
            outputs = shell(inputs)
        for key, output in outputs.items():
            with FlopCounterMode(display=False) as own:
                shell.task(key).postprocess(output, inputs[key])
            behind[key] = own.get_total_flops() // 2
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    root = type(model).__name__

    def macs(prefix: str) -> int:
        """Of the outermost modules below a prefix; containers such as a ModuleDict never run themselves."""
        inside = [name for name in flops if name == prefix or name.startswith(f"{prefix}.")]
        outer = [n for n in inside if not any(n != other and n.startswith(f"{other}.") for other in inside)]
        return sum(flops[name] for name in outer) // 2

    heads = {key: macs(f"{root}.tasks.{key}") for key in model.tasks}
    parts = {
        "projection": PartCost(count(model.projection), macs(f"{root}.projection")),
        "context": PartCost(count(model.context), macs(f"{root}.context")),
        **{f"tasks.{k}": PartCost(count(model.task(k)), head + behind.get(k, 0)) for k, head in heads.items()},
    }
    rest = flops["Global"] // 2 + sum(behind.values()) - sum(part.macs for part in parts.values())
    return Cost({"backbone": PartCost(count(model.backbone), rest), **parts}, size)


def numbers(task: Task) -> dict[str, float]:
    """A number for each run-time option, for looks that depend on none: the default, or 1; nothing is estimated."""
    return {
        name: 1.0 if default is None or (name in task.estimators and default < 0) else float(default)
        for name, default in task.options.items()
    }


def count(module: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
