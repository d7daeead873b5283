"""``densectx shard CONFIG -o DIR``: the data of a config as tar shards with an index: few large files."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

from densectx.data.base import Dataset, FromFiles, MissingSplitError, Split
from densectx.data.module import RESERVED, whole
from densectx.data.shards_output import FORMAT, SUMMARY, is_there, write_all
from densectx.data_of_config import data_of_config
from densectx.errors import ConfigError, DataError
from densectx.parsing import FLAGS, Parser, take_flags

_UNITS: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_DESCRIPTION: Final = """\
Write every source and split of a config's data as tar files in WebDataset's layout, with an index:

  DIR/<source>/train-000000.tar ...  <key>.image.jpg <key>.mask.png <key>.json, a sample after the other
  DIR/<source>/train.npz             where each member lies, its CRC-32
  DIR/<source>/index.json            classes, palette, channels; size and SHA-256 of each shard
  DIR/shards.json                    a summary; there when all is done

Image, mask and target files are kept byte for byte where they alone give the sample; what the data set makes of
them (remapped or coloured masks, scaled maps, generated pictures) is kept without loss as PNG or .npy. Training from
shards is bit for bit the training from the original files, in a config with the same source names:

  data: {sources: {camvid: {name: shards, root: DIR/camvid, batch_size: 4, augment: ...}}}
"""
_EPILOG: Final = """\
A run that was stopped goes on behind its last finished shard. An output that is there already from the same data,
config and size is left as it is; any other is refused, unless --overwrite.

Exit status: 3 where a sample is bad (densectx lint names all); `densectx --help` lists all.
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status 0.

    Raises:
        ConfigError: a usage error, the config has no data, or the output belongs to something else.
        DataError: a sample cannot be read.
        StorageError: a file cannot be written.
    """
    words, flags = take_flags(arguments)
    given = _parser().parse(words)
    workers, size = whole(given.num_workers, "--num-workers", least=0), _bytes(given.size)
    sources, specs = _sources([given.config, *given.more], flags)
    out, said = Path(given.out), sys.stderr.write
    inputs = _inputs(sources, specs, size)
    status = "skipped" if is_there(out, inputs, sources, overwrite=given.overwrite) else "done"
    if status == "done":
        summary = write_all(out, sources, inputs, size, workers, _Progress)
        for name, splits in sources.items():
            for split in sorted(set(get_args(Split)) - set(splits)):
                said(f"densectx: shard: {name} has no {split} samples\n")
    else:
        summary = json.loads((out / SUMMARY).read_text(encoding="ascii"))
    if given.json:
        sys.stdout.write(json.dumps({**summary, "status": status}, indent=1) + "\n")
    else:
        sys.stdout.write(_text(out, summary, status))
    return 0


def _parser() -> Parser:
    parser = Parser(
        "shard", formatter_class=argparse.RawDescriptionHelpFormatter, description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument("config", metavar="CONFIG", help=f"the config whose data.sources are written; {FLAGS}")
    parser.add_argument("-c", dest="more", action="append", default=[], metavar="FILE", help="merged after it")
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--size", default="256MB", metavar="BYTES", help="of a shard, at most (default: 256MB)")
    parser.add_argument("--overwrite", action="store_true", help="replace other shards in DIR")
    parser.add_argument("--json", action="store_true", help='print the summary, one object with "format": 1')
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 0, metavar="N", help="reading processes")
    parser.add_allow_import()
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*((?:[KMG]I?)?B)?", text.upper())
    if match is None or int(match[1]) < 1:
        raise ConfigError(f"--size {text!r}: expected a size such as 256MB or 1GB.")
    return int(match[1]) * _UNITS[match[2] or "B"]


def _sources(
    files: Sequence[str], flags: Sequence[tuple[str, str]]
) -> tuple[dict[str, dict[str, Dataset]], dict[str, Any]]:
    """The splits of each source that have samples, and its options; a test split that is not there is left out."""
    options, data = data_of_config(files, flags, "shard writes")
    found: dict[str, dict[str, Dataset]] = {name: {} for name in data.datasets["train"]}
    for name in found:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(f"data.sources.{name}: is no name for a folder; use letters, digits, _ . and -.")
    for split in get_args(Split):
        for name, dataset in data.datasets[split].items():
            try:
                if len(dataset):
                    found[name][split] = dataset
            except MissingSplitError:
                if split != "test":
                    raise
    for name, splits in found.items():
        if not splits:
            raise DataError(f"data.sources.{name}: no samples in any split.")
    specs = {name: {"name": spec} if isinstance(spec, str) else spec for name, spec in options["sources"].items()}
    return found, {name: {k: v for k, v in spec.items() if k not in RESERVED} for name, spec in specs.items()}


def _inputs(sources: Mapping[str, Mapping[str, Dataset]], specs: Mapping[str, Any], size: int) -> str:
    """A hash of what the output depends on: options, names, files with size and time."""
    digest = hashlib.sha256(json.dumps([FORMAT, size, specs]).encode())
    for name, splits in sources.items():
        for split, dataset in splits.items():
            files = dataset.all_files() if isinstance(dataset, FromFiles) else ()
            digest.update(json.dumps([name, split, len(dataset), *_times(files)]).encode())
    return digest.hexdigest()


def _times(files: Any) -> Iterator[tuple[str, int, int]]:
    for name in files:
        try:
            status = os.stat(name)
        except OSError:  # told when the sample is read
            continue
        yield name, status.st_size, status.st_mtime_ns


class _Progress:
    """A line on stderr, if somebody looks."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._live = what, total, sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        """So many samples are written."""
        if self._live and (done % 16 == 0 or done == self._total):
            end = "\n" if done == self._total else ""
            sys.stderr.write(f"\r\x1b[K{self._what}: {done}/{self._total} samples{end}")
            sys.stderr.flush()


def _text(out: Path, summary: Mapping[str, Any], status: str) -> str:
    lines = [f"{out / SUMMARY}: {status}"]
    for name, splits in summary["sources"].items():
        for split, count in splits.items():
            made = f"{count['original_files']} files as they were, {count['encoded']} encoded without loss"
            place = f"{count['shards']} shards, {count['bytes'] / 1e6:.1f} MB"
            lines.append(f"{name} {split}: {count['samples']} samples in {place}; {made}")
    lines += ["in a config:", "data:", "  sources:"]
    lines += [f"    {name}: {{name: shards, root: {out / name}}}" for name in summary["sources"]]
    return "\n".join(lines) + "\n"
