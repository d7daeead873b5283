"""The command ``densectx export``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from densectx.parsing import Parser

KINDS = {
    "onnx": "for onnxruntime and others; one file, at most 2 GiB (pip install '.[export]' in a checkout of densectx)",
    "pt2": "for torch.export.load",
    "aoti": "native code for CPUs like this one, for densectx.export.package.Package; needs a C++ compiler; open such"
    " files only if you trust them as you trust a program",
    "safetensors": "weights and config of the whole model, for densectx; no code",
}


def main(argv: Sequence[str]) -> int:
    """Write a model as a file that answers as it does; the exit status, 0.

    Raises:
        ConfigError, CheckpointError, PluginError, NumericError, StorageError: as :func:`densectx.export.run.run`.
    """
    given = _parsed(argv)
    from densectx.export.run import run  # torch only now: --help and usage errors are quick

    tasks = None if given.tasks is None else [name.strip() for name in given.tasks.split(",")]
    found = run(given.model, given.format, Path(given.out), tasks, overwrite=given.overwrite)
    sys.stdout.write(json.dumps(found) + "\n" if given.json else _text(found))
    return 0


def _text(found: dict[str, Any]) -> str:
    opset = f", opset {found['opset']}" if found["opset"] else ""
    sizes = ", ".join("x".join(map(str, size)) for size in found["sizes"])
    return (
        f"{found['file']}: {found['kind']}{opset}, {found['bytes'] / 1e6:.1f} MB, tasks {', '.join(found['tasks'])}\n"
        f"largest difference to the model {found['difference']:.2g} (at most {found['tolerance']:g}) at {sizes}"
        f" (batch x height x width); {found['seconds']} s\n"
    )


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "export",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a model as a file whose answers are those of `densectx predict --tile whole`: input `image`"
        " (B, C, H, W)\nfloat32 sRGB 0..1, any B, H and W from 1 on; one number for each run-time option, such as"
        " `denoising.sigma`\n(negative: estimated in the image); one output a task. The file is compared with the model"
        " before it is kept.",
        epilog="formats:\n"
        + "\n".join(f"  {name:<12} {text}" for name, text in KINDS.items())
        + "\n\nExit status: 6 where the file answers otherwise (nothing is left of it); `densectx --help` lists all.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint, .safetensors file, run folder or model name")
    parser.add_argument("-f", "--format", required=True, choices=KINDS, help="see below")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--tasks", metavar="A,B", help="tasks to answer (default: all; safetensors has all)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--json", action="store_true", help='print one object with "format": 1')
    parser.add_allow_import("let the model name PKG.module:Attr")
    return parser.parse(argv)
