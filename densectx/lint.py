"""``densectx lint CONFIG``: the data of a config looked over before hours of training. Status 3 if it would break."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, get_args

from densectx.data.base import MissingSplitError, Split
from densectx.data.causes import Expected
from densectx.data.findings import Problem, Surveys, problems, summarised
from densectx.data.module import whole
from densectx.data.presets import PRESETS
from densectx.data.survey import Survey, class_weights, look
from densectx.data_of_config import data_of_config
from densectx.errors import DataError
from densectx.parsing import FLAGS, Parser, take_flags
from densectx.types import SourceInfo

FORMAT: Final = 1
_SHOWN: Final = 20  # problems of one kind that the text names; --json has all


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, or 3 where training or evaluation would break.

    Raises:
        ConfigError: a usage error, or the config cannot be read or has no data.
    """
    words, flags = take_flags(arguments)
    given = _parser().parse(words)
    workers = whole(given.num_workers, "--num-workers", least=0)
    surveys, infos, expected = survey([given.config, *given.more], flags, workers)
    found = [*problems(surveys, infos, expected)]
    if given.json:
        sys.stdout.write(json.dumps(_as_json(surveys, infos, found), indent=1) + "\n")
    else:
        sys.stdout.write(_as_text(surveys, infos, found))
    return 3 if any(problem.severity == "error" for problem in found) else 0


def _parser() -> Parser:
    parser = Parser(
        "lint",
        description="Read every sample of a config's data once: what would break training (status 3), and what would"
        " spoil it: missing classes, palettes that disagree, pairs and masks that do not lie on each other, repeated"
        " pictures, training pictures (and copies of them) in the validation.",
    )
    parser.add_argument("config", metavar="CONFIG", help=f"the config whose data.sources are read; {FLAGS}")
    parser.add_argument("-c", dest="more", action="append", default=[], metavar="FILE", help="merged after it")
    parser.add_argument("--json", action="store_true", help='print one object with "format": 1')
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 0, metavar="N", help="loader processes")
    parser.add_allow_import()
    return parser


def survey(
    files: Sequence[str], flags: Sequence[tuple[str, str]], workers: int
) -> tuple[Surveys, dict[str, SourceInfo], dict[str, Expected]]:
    """Read every sample of every split: {source: {split: what was found}}, what each source is, and is said to be.

    A split that cannot be listed has one error and no samples; a test split that is not there at all is not asked for
    until ``densectx test``, so it is left out.
    """
    options, data = data_of_config(files, flags, "lint looks at")
    surveys: Surveys = {name: {} for name in data.datasets["train"]}
    expected = {name: _expected(spec) for name, spec in options["sources"].items()}
    for split in get_args(Split):
        for name, dataset in data.datasets[split].items():
            found = Survey(skips=split == "train" and data.on_corrupt == "skip")
            try:
                augment = data.augments[name] if split == "train" else None
                for seen in look(dataset, augment, workers, expected[name]):
                    found.add(seen)
            except DataError as error:
                if split == "test" and isinstance(error, MissingSplitError):
                    continue
                found.errors.append(str(error))
            surveys[name][split] = found
    return surveys, data.info(), expected


def _expected(spec: Any) -> Expected:
    """What a config says of the files of a source."""
    given: Mapping[str, Any] = spec if isinstance(spec, Mapping) else {}
    preset = PRESETS.get(str(given.get("name")), {}).get(str(given.get("preset")), {})
    augment = given.get("augment") or {}
    colours = bool(given.get("colors"))
    own = "classes" in given  # the preset's palette and remap do not hold for them
    remap = given.get("remap")
    if remap is None and not own:
        remap = preset.get("remap")
    return Expected(
        colours=colours,
        direct=given.get("name") in ("image_mask", "manifest") and not colours and not remap,
        palette=given.get("palette") is not None or ("palette" in preset and not own),
        batch=given.get("batch_size", 4),
        eval_batch=given.get("eval_batch_size", 1),
        fixed=bool(augment.get("crop") or augment.get("pad")),
    )


def _as_json(surveys: Surveys, infos: Mapping[str, SourceInfo], problems: Sequence[Problem]) -> dict[str, Any]:
    sources = {}
    for source, splits in surveys.items():
        pixels = splits["train"].pixels if "train" in splits else []
        sources[source] = {
            "classes": list(infos[source].classes),
            "suggested_class_weights": class_weights(pixels) if pixels else None,
            "splits": {split: found.to_json() for split, found in splits.items()},
        }
    return {"format": FORMAT, "sources": sources, "problems": [problem._asdict() for problem in problems]}


def _as_text(surveys: Surveys, infos: Mapping[str, SourceInfo], problems: Sequence[Problem]) -> str:
    lines = []
    for source, splits in surveys.items():
        for split, found in splits.items():
            sizes = ""
            if found.sizes:
                (h, w), (high, wide) = found.sizes
                sizes = f", {h}x{w}" if (h, w) == (high, wide) else f", {h}x{w} to {high}x{wide}"
            values = "" if found.low is None else f", target {found.low:.4g} to {found.high:.4g}"
            lines.append(f"{source} {split}: {found.samples} samples{sizes}, {found.gray} gray{values}")
        pixels = splits["train"].pixels if "train" in splits else []
        if pixels:
            lines.append(f"{source} train, class: share of pixels, images, suggested weight")
            rows = zip(infos[source].classes, pixels, splits["train"].images, class_weights(pixels), strict=True)
            total = max(sum(pixels), 1)
            lines += [f"  {name:<16} {count / total:9.4%} {images:7} {w:8.3f}" for name, count, images, w in rows]
            lines.append(f"  loss: {{name: cross_entropy, class_weights: {class_weights(pixels)}}}")
    told = {message for splits in surveys.values() for found in splits.values() for message in summarised(found)}
    for severity in ("error", "warning"):
        found_here = [p for p in problems if p.severity == severity]
        shown = [p for p in found_here if p.kind != "unusable" or p.message not in told][:_SHOWN]
        lines += [f"{severity}: {p.source} {p.split}: {p.message}" for p in shown]
        if len(found_here) > len(shown):
            lines.append(f"{severity}: and {len(found_here) - len(shown)} more (--json prints all)")
    errors = sum(problem.severity == "error" for problem in problems)
    lines.append(f"{errors} errors, {len(problems) - errors} warnings.")
    return "\n".join(lines) + "\n"
