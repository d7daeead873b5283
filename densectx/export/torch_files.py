"""Files that torch runs: a recorded graph, native code, and the weights of the model itself."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx.experimental import _config as experimental

from densectx.checkpoint import load, save_safetensors
from densectx.errors import ConfigError
from densectx.export.graph import Graph, record
from densectx.export.package import Package
from densectx.export.parity import Answer


def write_pt2(graph: Graph, path: Path, about: Mapping[str, Any]) -> Answer:
    """Write a graph as ``torch.export`` does, for ``torch.export.load``; what is said about it is ``densectx.json``."""
    content = io.BytesIO()  # of a full disk torch's own writer would raise a RuntimeError without a number
    torch.export.save(record(graph), content, extra_files={"densectx.json": json.dumps(about)})
    path.write_bytes(content.getbuffer())
    return _called(torch.export.load(path).module())


def write_aoti(graph: Graph, path: Path, about: Mapping[str, Any]) -> Answer:
    """Compile a graph to native code for this kind of CPU, for :class:`densectx.export.package.Package`.

    Raises:
        ConfigError: there is no C++ compiler.
    """
    configs = {"aot_inductor.metadata": {"densectx": json.dumps(about)}, "aot_inductor.check_lowerbound": False}
    try:
        with torch.no_grad(), experimental.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # made at run time
            torch._inductor.aoti_compile_and_package(record(graph), package_path=str(path), inductor_configs=configs)
    except InvalidCxxCompiler as error:
        raise ConfigError("-f aoti: compiling needs a C++ compiler, such as g++ (or name one in CXX).") from error
    package = Package(path)
    return lambda arguments: package(arguments[0], dict(zip(graph.options, arguments[1:], strict=True)))


def write_safetensors(graph: Graph, path: Path, about: Mapping[str, Any]) -> Answer:
    """Write the weights and the config of the whole model, for :func:`densectx.checkpoint.load`."""
    save_safetensors(graph.model, path)
    return _called(Graph(load(path), graph.tasks))


def _called(module: torch.nn.Module) -> Answer:
    def answer(arguments: Sequence[Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = module(*arguments)
        return found

    return answer
