"""A model to a file that has been compared with it."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from sys import stderr
from typing import Any, Final, NamedTuple

from densectx import __version__
from densectx.checkpoint import load, locate, plugins
from densectx.distributions import how_to_install
from densectx.errors import ConfigError, DensectxError, PluginError, StorageError, brief, unknown
from densectx.export import parity
from densectx.export.graph import FORMAT, Graph, describe
from densectx.export.parity import SIZES, TOLERANCE, Answer
from densectx.imports import reason
from densectx.inference.files import storage_error
from densectx.model import DenseModel


class _Kind(NamedTuple):
    """A kind of file: what writes it, packages of the extra that it needs, how its name must end."""

    writer: str
    packages: tuple[str, ...] = ()
    suffix: str = ""


KINDS: Final[Mapping[str, _Kind]] = {
    "onnx": _Kind("densectx.export.onnx_file:write", ("onnx", "onnxscript", "onnxruntime")),
    "pt2": _Kind("densectx.export.torch_files:write_pt2"),
    "aoti": _Kind("densectx.export.torch_files:write_aoti", suffix=".pt2"),
    "safetensors": _Kind("densectx.export.torch_files:write_safetensors", suffix=".safetensors"),
}


def run(path: str, kind: str, out: Path, tasks: Sequence[str] | None = None, *, overwrite: bool) -> dict[str, Any]:
    """Write a model as a file, compare the two, and only then move the file to its place.

    Args:
        path: checkpoint, run folder or name of the model.
        kind: one of :data:`KINDS`.
        out: the file.
        tasks: keys, None for all; ``safetensors`` holds all of them.
        overwrite: whether ``out`` may exist.

    Returns:
        What ``--json`` prints.

    Raises:
        ConfigError: a missing package, an impossible name of the file, an unknown task, tasks of ``safetensors``.
        CheckpointError, PluginError: the model cannot be loaded, or a part that a package brought cannot be exported.
        NumericError: the file answers otherwise than the model.
        StorageError: the file system refuses.
    """
    began = time.monotonic()
    _check_packages(kind)
    if tasks is not None and kind == "safetensors":
        raise ConfigError("--tasks: -f safetensors writes the whole model with all of its tasks; leave --tasks away.")
    _check_name(kind, out, locate(path), overwrite=overwrite)
    model = load(path)
    graph = Graph(model, _keys(model, tasks))
    graph(*graph.example())  # options and channels that cannot work are refused here
    module, _, function = KINDS[kind].writer.partition(":")
    write = getattr(importlib.import_module(module), function)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:64]}.") as folder:
            part = Path(folder) / f"model{KINDS[kind].suffix or '.' + kind}"
            with redirect_stdout(stderr):  # exporters talk
                answer = _written(write, graph, part)
                found = parity.check(graph, answer)
            size = part.stat().st_size
            os.replace(part, out)
    except OSError as error:
        raise storage_error(out, error) from error
    except StorageError as error:  # names the part, which is gone
        why = getattr(error.__cause__, "strerror", None) or brief(error.__cause__ or error)
        raise StorageError(f"{out}: cannot be written: {why}; free space or choose another -o.") from error
    return {
        "format": FORMAT,
        "file": str(out),
        "kind": kind,
        "bytes": size,
        "tasks": list(graph.tasks),
        "options": list(graph.options),
        "sizes": [list(checked) for checked in SIZES],
        "inputs": found.inputs,
        "difference": found.difference,
        "tolerance": TOLERANCE,
        "opset": _opset(kind),
        "versions": {name: version(name) for name in ("torch", *KINDS[kind].packages)} | {"densectx": __version__},
        "seconds": round(time.monotonic() - began, 1),
    }


def _check_packages(kind: str) -> None:
    missing = [name for name in KINDS[kind].packages if find_spec(name) is None]
    if missing:
        raise ConfigError(f"-f {kind} needs {', '.join(missing)}: {how_to_install('densectx[export]')}.")


def _check_name(kind: str, out: Path, model: Path, *, overwrite: bool) -> None:
    suffix = KINDS[kind].suffix
    if not out.name.endswith(suffix):
        raise ConfigError(f"-o {out}: a file of -f {kind} is opened by its ending; name it {out.name}{suffix}.")
    if not out.parent.is_dir():
        raise ConfigError(f"-o {out}: there is no folder {out.parent}; make it, or name another file.")
    if out.is_dir():
        raise ConfigError(f"-o {out}: is a folder; name a file in it.")
    if os.path.realpath(out) == os.path.realpath(model):
        raise ConfigError(f"-o {out}: is the model itself; name another file.")
    if os.path.lexists(out) and not overwrite:
        raise ConfigError(f"-o {out}: exists already; --overwrite, or name another file.")


def _keys(model: DenseModel, tasks: Sequence[str] | None) -> list[str]:
    for key in tasks or ():
        if key not in model.tasks:
            raise ConfigError(f"--tasks: {unknown('task', key, model.tasks)}")
    return [key for key in model.tasks if tasks is None or key in tasks]


def _written(write: Callable[[Graph, Path, Mapping[str, Any]], Answer], graph: Graph, part: Path) -> Answer:
    try:
        return write(graph, part, describe(graph))
    except (DensectxError, OSError):
        raise
    except Exception as error:  # exporters raise many kinds
        foreign = plugins(graph.model.config)
        if not foreign:
            raise
        raise PluginError(
            f"a model with parts of {', '.join(foreign)} cannot be exported: {reason(error)}; parts must not branch on"
            " values, nor on sizes that may differ."
        ) from error


def _opset(kind: str) -> int | None:
    if kind != "onnx":
        return None
    from densectx.export.onnx_file import OPSET

    return OPSET
