"""``DenseModel.predict`` as a graph of tensors, for every size at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as experimental

from densectx import __version__
from densectx.model import DenseModel
from densectx.palette import voc_palette
from densectx.types import SourceInfo

FORMAT = 1
TRACED = (2, 43, 57)
"""Batch, height and width of the input that the graph is recorded with; no multiple of anything."""


@final
class Graph(nn.Module):
    """Image and run-time options to the answers: (B, C, H, W) float32 sRGB 0..1, one () float32 an option.

    Args:
        model: in evaluation mode, on the CPU.
        tasks: keys of the tasks to answer.

    Attributes:
        options: names of the options in the order of the arguments, as ``denoising.sigma``; a negative number is
            estimated in the image where the task can.
        unasked: a number for each that nobody has an opinion on: negative where the task estimates it, else its
            default, or 1 without one.
        channels: C.
    """

    def __init__(self, model: DenseModel, tasks: Sequence[str]) -> None:
        super().__init__()
        self.model, self.tasks = model, tuple(tasks)
        self.options = tuple(f"{key}.{option}" for key in tasks for option in model.task(key).options)
        self.unasked = [
            -1.0 if option in task.estimators else 1.0 if default is None else float(default)
            for task in map(model.task, tasks)
            for option, default in task.options.items()
        ]
        self.channels = max(model.channels(key) for key in tasks)

    def forward(self, image: Tensor, *options: Tensor) -> dict[str, Tensor]:
        """Answers by task, see :meth:`densectx.model.DenseModel.predict`."""
        return self.model.predict(image, self.tasks, dict(zip(self.options, options, strict=True)))

    def example(self) -> tuple[Tensor, ...]:
        """Arguments of the recorded sizes."""
        batch, height, width = TRACED
        return torch.rand(batch, self.channels, height, width), *map(torch.tensor, self.unasked)


def record(graph: Graph) -> torch.export.ExportedProgram:
    """The graph for any batch, height and width from 1 on.

    Two things of torch's exporter are turned off, since they would tie the graph to sizes that it does not depend on:
    sizes of 0 and 1 as cases of their own (the ONNX exporter does the same), and assertions about the memory layout
    that the recorded sizes happened to have. What vouches for other sizes is :func:`densectx.export.parity.check`.
    Lines of source are left out: they name folders of this machine.
    """
    arguments = graph.example()
    dims = {axis: torch.export.Dim(name, min=1) for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    scalars = [tuple(None for _ in graph.options)] if graph.options else []
    with torch.no_grad(), experimental.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # made at run time
        program = torch.export.export(
            graph,
            arguments,
            dynamic_shapes=(dims, *scalars),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in list(module.graph.nodes):
                node.meta.pop("stack_trace", None)
                if node.target is torch.ops.aten._assert_scalar.default:
                    module.graph.erase_node(node)
            module.graph.eliminate_dead_code()
            module.recompile()
    return program


def describe(graph: Graph) -> dict[str, Any]:
    """What a user needs to feed the file and to draw its answers, in plain JSON types."""
    tasks = {}
    for key in graph.tasks:
        task, config = graph.model.task(key), graph.model.config
        info = SourceInfo.from_config(config.get("sources", {}).get(task.source, {}))
        count, first = len(info.classes), int(task.output == "labels")
        known = task.output in ("classes", "labels")
        palette = info.palette or voc_palette(first + count)[first:]
        tasks[key] = {
            "name": config.get("tasks", {}).get(key, {}).get("name"),
            "output": task.output,
            "scale": task.scale,
            "classes": list(info.classes) if known else [],
            "palette": [list(colour) for colour in palette] if known else [],
        }
    options = {}
    for name in graph.options:
        key, _, option = name.rpartition(".")
        task = graph.model.task(key)
        options[name] = {"default": task.options[option], "estimated": option in task.estimators}
    return {
        "format": FORMAT,
        "densectx": __version__,
        "image": {"channels": graph.channels, "layout": "BCHW", "values": "float32, sRGB 0..1"},
        "options": options,
        "tasks": tasks,
    }
