"""The command ``densectx report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from densectx.parsing import Parser


def main(argv: Sequence[str]) -> int:
    """Write the page of a run.

    Args:
        argv: the arguments behind ``report``.

    Returns:
        The exit status: 0, or that of the first thing that the page has to do without (3 data, 4 checkpoint).

    Raises:
        ConfigError: usage, or no such run.
        StorageError: the file cannot be written.
    """
    given = _parsed(argv)
    from densectx.inference.predictor import device_of  # torch only now: --help and usage errors are quick
    from densectx.report.build import write_report

    path, missing = write_report(
        given.run, given.out, split=given.split, limit=given.limit, device=device_of(given.device)
    )
    for error in missing:
        sys.stderr.write(f"densectx: report: left out: {error}\n")
    sys.stdout.write(f"{path}\n")
    return missing[0].status if missing else 0


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "report",
        description="Write a run as one static HTML file: curves, scores beside trivial answers, classes, best and"
        " worst pictures, receptive field, config, environment. It asks no other machine for anything.",
        epilog="What cannot be had (data that is not there) is left out and said; the exit status is 3 or 4 then, else"
        " one that `densectx --help` lists.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder (its best checkpoint), or a checkpoint in it")
    parser.add_argument("-o", "--out", metavar="FILE", help="the file to write (RUN/report.html)")
    parser.add_argument(
        "--split", choices=("val", "test"), default="val", help="samples that the model is looked at with"
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="samples of each source at most, spread evenly (all)"
    )
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, ...")
    parser.add_allow_import()
    given = parser.parse(argv)
    if given.limit < 0:
        parser.error(f"--limit {given.limit}: expected a number of at least 0")
    return given
