"""The command ``densectx predict``: its arguments, its progress, its exit status."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import final

from densectx.errors import ConfigError
from densectx.inference.launch import LAUNCHED, launch
from densectx.parsing import Parser

_SHOWN_EVERY = 0.2  # seconds


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
    if given.devices > 1 and LAUNCHED not in os.environ:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise ConfigError("predict: --devices under torchrun, which has its processes already; leave it away.")
        return launch(argv, given.devices)
    from densectx.inference.loop import Request, assist, run  # torch only now: --help and usage errors are quick
    from densectx.inference.ranks import Ranks

    ranks = Ranks.joined()
    request = Request(
        model=given.model,
        inputs=given.inputs,
        out=Path(given.out),
        tasks=None if given.tasks is None else _tasks(given.tasks),
        options=_options(given.set),
        tile=given.tile,
        raw=given.raw,
        device=given.device if ranks is None else ranks.device(given.device),
        precision=given.precision,
        overwrite=given.overwrite,
        batch=given.batch,
        tta=given.tta,
    )
    progress = _Progress()
    if ranks is not None and ranks.rank > 0:
        assist(request, progress.say, ranks)
        return 0
    summary, status = run(request, progress.say, progress, ranks)
    statuses = [entry["status"] for entry in summary["inputs"]]
    if given.json:
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        counts = ", ".join(f"{statuses.count(s)} {s}" for s in ("done", "skipped", "failed") if s in statuses)
        sys.stdout.write(f"{Path(given.out) / 'summary.json'}: {counts or 'no image'}\n")
    return status


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "predict",
        description="Answer for images and write the answers to DIR/<task>/<folder>/<stem>.png, with a summary.json.",
        epilog="Images are taken upright: an EXIF orientation is applied and answers carry none. Colour profiles (ICC)"
        " are ignored: values are taken as sRGB, and answers carry no profile. Transparency is laid over white; answers"
        " are opaque. Exit status: 3 where some inputs are bad and the rest is done; `densectx --help` lists all.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint, .safetensors file, run folder or model name")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="images, folders (recursive), globs, or - for a list on stdin"
    )
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="folder of the answers")
    parser.add_argument("--tasks", metavar="A,B", help="tasks to answer (default: all of the model)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TASK.OPTION=NUMBER",
        help="e.g. denoising.sigma=25; negative: estimated",
    )
    parser.add_argument(
        "--tile",
        metavar="HOW",
        help="how large images are taken: whole; exact or exact:N, in tiles of N pixels that give the answer of the"
        " whole; N, in blended windows of N pixels, whose seam error is printed; paper, as the published networks"
        " were (default: paper for their classes in float32; else whole if it fits into memory, else exact, else"
        " blended)",
    )
    parser.add_argument(
        "--tta",
        action="store_true",
        help="average the answers to several views of each image: the 8 mirrored and turned ones where it is"
        " restored, the image and its mirror image where another picture or values are the answer; for classes and"
        " labels the probabilities of these two at 0.75, 1 and 1.25 times the size (resized bilinearly,"
        " antialiased, answers back again)",
    )
    parser.add_argument("--raw", action="store_true", help="add <stem>.npy, the model's answer as float32")
    parser.add_argument("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, ...")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="bf16: autocast (default: 32)")
    parser.add_argument(
        "--devices",
        type=_count,
        default=1,
        metavar="N",
        help="share the images among N processes, one a GPU or each with its part of the CPU's cores; the processes"
        " of torchrun share them too (default: 1)",
    )
    parser.add_argument(
        "--batch",
        type=_count,
        default=1,
        metavar="N",
        help="up to N images of one size, one behind the other, go through the model together if they are taken"
        " whole (default: 1)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs; skip none")
    parser.add_argument("--json", action="store_true", help="print the summary as one object")
    parser.add_allow_import("let the model name PKG.module:Attr")
    return parser.parse(argv, intermixed=True)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


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
