"""The command ``densectx inspect``: its arguments, its progress, its output."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from densectx.errors import ConfigError, unknown
from densectx.parsing import Parser

_DESCRIPTION: Final = """\
What a model sees and costs: parameters and multiply-adds by part, receptive field, stride and offset by layer, the
field as it is measured and as it is used, coverage and gridding of the context's dilations, and how far the model is
from commuting with shifts of its input, beside SegNet-like and U-Net-like networks.

The exact field (any graph of convolutions, pools, resampling and branches; "global" where a layer sees everything) and
the multiply-adds need no weights, and no data: data sets of a CONFIG may be absent. The effective field and the shifts
are computed with weights, fresh ones for a config, where that takes seconds; else they are left out, and it is said
which option computes them.
"""
_EPILOG: Final = """\
examples:
  densectx inspect runs/quickstart/0 -o report
  densectx inspect dilation8_pascal_voc
  densectx inspect configs/segmentation_camvid.yaml --field 129 --json

DIR gets inspect.json, figure1.png, growth.png, gallery.png and effective_field.png.
Exit status: `densectx --help` lists them.
"""


def main(argv: Sequence[str]) -> int:
    """Inspect a model.

    Args:
        argv: the arguments behind ``inspect``.

    Returns:
        The exit status 0.

    Raises:
        ConfigError: usage, a config that cannot be read or built, an operation that cannot be followed.
        CheckpointError, PluginError, StorageError: the model cannot be loaded, the folder cannot be written.
    """
    given = _parsed(argv)
    from densectx.inspection.report import Wishes, inspect  # torch only now: --help and usage errors are quick
    from densectx.inspection.subject import subject_of
    from densectx.inspection.text import text_of

    subject = subject_of(given.model, given.more)
    tasks = None if given.tasks is None else [key.strip() for key in given.tasks.split(",")]
    for key in tasks or ():
        if key not in subject.shell.tasks:
            raise ConfigError(unknown("task", key, subject.shell.tasks))
    wishes = Wishes(tasks, given.size, given.shifts, given.effective, given.field, given.thorough)
    report = inspect(subject, wishes, _say)
    if given.out is not None:
        from densectx.inspection.drawing import write

        files = write(report, Path(given.out))
    sys.stdout.write(json.dumps(report.content) + "\n" if given.json else text_of(report.content))
    if given.out is not None and not given.json:
        sys.stdout.write(f"\n{given.out}: {', '.join(file.name for file in files)}\n")
    return 0


def _say(line: str) -> None:
    """What is being done, if somebody looks."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}" if line else "\r\x1b[K")
        sys.stderr.flush()


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "inspect",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "model",
        metavar="MODEL|CONFIG",
        help="checkpoint, run folder, .safetensors file, name of `densectx list models`, or a .yaml config",
    )
    parser.add_argument("-o", "--out", metavar="DIR", help="write pictures and inspect.json there")
    parser.add_argument("--json", action="store_true", help='print one object with "format": 1')
    parser.add_argument("-c", dest="more", action="append", default=[], metavar="FILE", help="merged after CONFIG")
    parser.add_argument("--tasks", metavar="A,B", help="tasks to look at (default: all of the model)")
    parser.add_argument(
        "--size", type=_size, default=(512, 512), metavar="HxW", help="picture for the multiply-adds (512x512)"
    )
    parser.add_argument("--field", type=_count, metavar="CELLS", help="suggest dilations for this field")
    parser.add_argument("--shifts", type=_none_or_more, default=16, metavar="N", help="shifts 1 to N; 0 for none (16)")
    parser.add_argument(
        "--effective",
        type=_none_or_more,
        metavar="PIXELS",
        help="side of the inputs for the effective field; 0 for none (default: what takes seconds)",
    )
    parser.add_argument("--thorough", action="store_true", help="shifts of tasks however long they take")
    parser.add_allow_import()
    return parser.parse(argv)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 480x640")
    return int(height), int(width)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _none_or_more(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)
