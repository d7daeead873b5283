"""ONNX: one file that onnxruntime and others run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.export.graph import Graph, record
from densectx.export.parity import Answer

OPSET: Final = 18
"""What torch's exporter writes by itself; 18 is the first in which Resize antialiases, which bicubic needs."""

LIMIT: Final = 2**31 - 2**24
"""Bytes of weights that fit into one file: protocol buffers end at 2 GiB, and data in other files is not written."""


def write(graph: Graph, path: Path, about: Mapping[str, Any]) -> Answer:
    """Write a graph as one ONNX file, checked by onnx's checker, with what is said about it in its metadata.

    Returns:
        The file, run by onnxruntime on the CPU.

    Raises:
        ConfigError: more weights than fit into one file.
    """
    import onnx
    import onnxruntime

    size = sum(tensor.nbytes for tensor in graph.state_dict().values())
    if size > LIMIT:
        raise ConfigError(
            f"-f onnx: the model has {size / 2**30:.1f} GiB of weights, one ONNX file holds 2; take -f pt2 or aoti."
        )
    program = torch.onnx.export(
        record(graph),
        dynamo=True,
        input_names=["image", *graph.options],
        output_names=list(graph.tasks),
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    _name_sizes(proto, graph)
    _forget_places(proto)
    proto.producer_name, proto.producer_version = "densectx", str(about["densectx"])
    onnx.helper.set_model_props(proto, {"densectx": json.dumps(about)})
    onnx.checker.check_model(proto, full_check=True)
    onnx.save_model(proto, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def answer(arguments: Sequence[Tensor]) -> dict[str, Tensor]:
        names = ("image", *graph.options)
        feed = {name: value.numpy() for name, value in zip(names, arguments, strict=True)}
        found = session.run(list(graph.tasks), feed)
        return {key: torch.from_numpy(value) for key, value in zip(graph.tasks, found, strict=True)}

    return answer


def _name_sizes(proto: Any, graph: Graph) -> None:
    """``batch``, ``height`` and ``width`` in place of the exporter's names of sizes."""
    sizes = [proto.graph.input[0].type.tensor_type.shape.dim[axis] for axis in (0, 2, 3)]
    names = {size.dim_param: name for size, name in zip(sizes, ("batch", "height", "width"), strict=True)}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_param"):
                size.dim_param = re.sub(r"\w+", lambda match: names.get(match.group(), match.group()), size.dim_param)
    for key, value in zip(graph.tasks, proto.graph.output, strict=True):
        scale = graph.model.task(key).scale
        for axis, name in ((2, "height"), (3, "width")):
            value.type.tensor_type.shape.dim[axis].dim_param = name if scale == 1 else f"{scale}*{name}"


def _forget_places(proto: Any) -> None:
    """Leave out what the exporter notes of each node, such as lines of source."""
    for holder in (proto.graph, *proto.functions):
        holder.ClearField("metadata_props")
        for part in (*holder.node, *holder.value_info, *getattr(holder, "initializer", ())):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")
