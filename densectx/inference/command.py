"""The command ``densectx predict``: its arguments, its progress, its exit status."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, final

from densectx.errors import ConfigError, unknown
from densectx.imports import allow_import

_SHOWN_EVERY = 0.2  # seconds


@final
class _Parser(argparse.ArgumentParser):
    """Usage errors are config errors: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ConfigError(f"predict: {message}. `densectx predict --help` describes it.")


def main(argv: Sequence[str]) -> int:
    """Run a model on image files.

    Args:
        argv: the arguments behind ``predict``.

    Returns:
        The exit status: 0, or 3 if an input was bad (the others are done then).

    Raises:
        ConfigError, CheckpointError, PluginError, StorageError: as :func:`densectx.inference.loop.run`.
    """
    given = _parsed(argv)
    for package in given.allow_import:
        allow_import(package)
    from densectx.inference.loop import Request, run  # torch only now: --help and usage errors are quick

    request = Request(
        model=given.model,
        inputs=given.inputs,
        out=Path(given.out),
        tasks=None if given.tasks is None else _tasks(given.tasks),
        options=_options(given.set),
        tile=given.tile,
        raw=given.raw,
        device=given.device,
        precision=given.precision,
        overwrite=given.overwrite,
    )
    progress = _Progress()
    summary = run(request, progress.say, progress)
    statuses = [entry["status"] for entry in summary["inputs"]]
    if given.json:
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        counts = ", ".join(f"{statuses.count(s)} {s}" for s in ("done", "skipped", "failed") if s in statuses)
        sys.stdout.write(f"{Path(given.out) / 'summary.json'}: {counts or 'no image'}\n")
    return 3 if "failed" in statuses else 0


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="densectx predict",
        allow_abbrev=False,
        description="Answer for images and write the answers to DIR/<task>/<folder>/<stem>.png, with a summary.json.",
        epilog="Exit status: 0 done, 2 usage, 3 some inputs are bad and the rest is done, 4 model, 8 storage.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint, .safetensors file, run folder or model name")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="images, folders (recursive), globs, or - for a list on stdin"
    )
    options = [
        parser.add_argument("-o", "--out", required=True, metavar="DIR", help="folder of the answers"),
        parser.add_argument("--tasks", metavar="A,B", help="tasks to answer (default: all of the model)"),
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="TASK.OPTION=NUMBER",
            help="e.g. denoising.sigma=25; negative: estimated",
        ),
        parser.add_argument(
            "--tile",
            choices=("whole", "paper"),
            help="how large images are taken: whole, or paper: in tiles of the size that a published network had"
            " (default: paper for those networks, else whole)",
        ),
        parser.add_argument("--raw", action="store_true", help="add <stem>.npy, the model's answer as float32"),
        parser.add_argument("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, ..."),
        parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="bf16: autocast (default: 32)"),
        parser.add_argument("--overwrite", action="store_true", help="replace existing outputs; skip none"),
        parser.add_argument("--json", action="store_true", help="print the summary as one object"),
        parser.add_argument(
            "--allow-import", action="append", default=[], metavar="PKG", help="let the model name PKG.module:Attr"
        ),
    ]
    known = ["--help", *(name for action in options for name in action.option_strings)]
    given, extra = parser.parse_known_intermixed_args(list(argv))
    if extra:
        wrong = next((text for text in extra if text.startswith("-")), extra[0])
        parser.error(unknown("option", wrong.partition("=")[0], known).removesuffix("."))
    return given


def _tasks(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"--tasks {text!r}: expected names with commas between them, such as segmentation,denoising.")
    return names


def _options(texts: Sequence[str]) -> dict[str, float]:
    options: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not name or name in options:
            raise ConfigError(f"--set {text!r}: expected TASK.OPTION=NUMBER, each once, such as denoising.sigma=25.")
        options[name] = value
    return options


@final
class _Progress:
    """A line on stderr while the work goes on, if somebody looks; messages go above it."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.began: float | None = None
        self.shown = 0.0

    def say(self, line: str) -> None:
        """Print a line at once."""
        sys.stderr.write(("\r\x1b[K" if self.live else "") + line + "\n")
        sys.stderr.flush()

    def __call__(self, finished: int, total: int) -> None:
        """Show how far the work is."""
        now = time.monotonic()
        self.began = now if self.began is None else self.began
        if not self.live or (now - self.shown < _SHOWN_EVERY and finished < total):
            return
        self.shown = now
        sys.stderr.write("\r\x1b[K" + progress_line(finished, total, now - self.began))
        sys.stderr.write("\n" if finished == total else "")
        sys.stderr.flush()


def progress_line(finished: int, total: int, seconds: float) -> str:
    """``12/100 images, 3.4 images/s, 26 s left``."""
    rate = finished / seconds if seconds > 0 else 0.0
    left = f", {rate:.1f} images/s, {(total - finished) / rate:.0f} s left" if rate else ""
    return f"{finished}/{total} images{left}"
