"""Put the best checkpoint of a run into plugins/densectx-zoo as one of its models.

    python benchmarks/zoo.py denoise-gray RUN [--results NAME] [--dtype float16] [--sets bsd68 set12] [--note TEXT]

Writes ``densectx_zoo/weights/NAME.safetensors`` with the weights of convolutions in half precision (biases, norm layers
and their statistics stay float32), ``densectx_zoo/cards/NAME.md``, the entry points in ``pyproject.toml`` and the table
in ``README.md``. Refused, and nothing changed: a file above 4 MB, all files above 20 MB, a metric of
``benchmarks/report_sets.yaml`` that moves by more than ``--tolerance`` against the checkpoint. The figures of the card
are those of ``benchmarks/results/``, which ``benchmarks/results.py`` writes first.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, ROOT
from results import figures, report_sets
from safetensors.torch import save_file
from torch import Tensor

from densectx.checkpoint import locate, read
from densectx.config import load_yaml
from densectx.model_names import ZOO_NAMES as NAMES

PACKAGE = ROOT / "plugins" / "densectx-zoo"
ONE, ALL = 4_000_000, 20_000_000  # bytes
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TERMS = {
    "bsds500": "BSDS500 (Arbelaez et al. 2011): for non-commercial research and education",
    "t91": "T91 (Yang et al. 2010): for research",
    "camvid": "CamVid in SegNet's edition (Brostow et al. 2009, Badrinarayanan et al. 2017): CC BY-NC 4.0",
}
MARKS = {
    "pyproject.toml": ("# entry points of the models that are here, written by benchmarks/zoo.py\n", "# end of them\n"),
    "README.md": ("<!-- models -->\n", "<!-- end of models -->\n"),
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("run", type=Path, help="a run folder or checkpoint")
    parser.add_argument("--results", help="what the run's results are called (NAME)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16")
    parser.add_argument("--sets", nargs="+", help="compare on these of report_sets.yaml only")
    parser.add_argument("--tolerance", type=float, default=0.005, help="dB or points (1/100 of that for SSIM)")
    parser.add_argument("--note", default="", help="stands in the card below the figures")
    given = parser.parse_args()
    called = given.results or given.name
    for line in add(given.name, given.run, called, given.dtype, given.sets, given.tolerance, note=given.note):
        print(line)  # noqa: T201
    return 0


def add(
    name: str,
    run: Path,
    called: str,
    dtype: str = "float16",
    sets: list[str] | None = None,
    tolerance: float = 0.005,
    package: Path = PACKAGE,
    results: Path = RESULTS,
    note: str = "",
) -> list[str]:
    """Add or replace a model; returns the comparison, a line a metric."""
    files = sorted(file for one in report_sets() for file in results.glob(f"{called}-{one}-*.json"))
    measured = {file.stem: json.loads(file.read_text()) for file in files}
    if not measured:
        raise SystemExit(f"{results}/{called}-*.json: no results yet; write them by benchmarks/results.py evaluate.")
    source = locate(run)
    weights, info = read(source)
    file = package / "densectx_zoo" / "weights" / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new.safetensors")
    try:
        # the config of the run names folders; what the model needs is in info["model"]
        save_file(halved(weights, DTYPES[dtype]), fresh, metadata={"densectx": json.dumps({**info, "config": {}})})
        check_size(fresh, [other for other in file.parent.glob("*.safetensors") if other not in (fresh, file)])
        said = compare(source, fresh, sets, tolerance)
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)
    card = package / "densectx_zoo" / "cards" / f"{name}.md"
    card.parent.mkdir(exist_ok=True)
    card.write_text(card_of(name, measured, file.stat().st_size, dtype, said, note), encoding="utf-8")
    write_lists(package)
    return [f"{file}: {file.stat().st_size / 1e6:.2f} MB", *said]


def halved(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of two dimensions and more in half precision: sums over many of them forgive rounding, a bias does not.

    Raises:
        SystemExit: a weight that the type cannot hold.
    """
    found = {}
    for key, value in weights.items():
        half = value.to(dtype) if value.is_floating_point() and value.squeeze().ndim > 1 else value
        if not bool(half.isfinite().all()):
            raise SystemExit(f"{key}: has weights beyond {dtype}; take bfloat16.")
        found[key] = half.contiguous()
    return found


def check_size(file: Path, others: list[Path]) -> None:
    """Refuse a file that is too large, alone or with the other ones."""
    size = file.stat().st_size
    if size > ONE:
        raise SystemExit(f"{size / 1e6:.2f} MB, at most {ONE / 1e6:g}: take a recipe with fewer parameters.")
    if (every := size + sum(other.stat().st_size for other in others)) > ALL:
        raise SystemExit(f"{every / 1e6:.2f} MB with the other models, at most {ALL / 1e6:g}.")


def compare(before: Path, after: Path, sets: list[str] | None, tolerance: float) -> list[str]:
    """Each metric of two files of a model; refuses those that differ."""
    old, new = ([one for one in figures(file, sets) if not one.trivial] for file in (before, after))
    if not old:
        raise SystemExit("no set of report_sets.yaml is for this model: what storing it costs cannot be said.")
    said, bad = [], []
    for one, other in zip(old, new, strict=True):
        change = other.value - one.value
        said.append(f"{one.suffix}: {one.value:.4f} in the checkpoint, {other.value:.4f} stored, {change:+.4f}")
        if math.isnan(change) or abs(change) > tolerance * (0.01 if one.metric == "ssim" else 1):
            bad.append(said[-1])
    if bad:
        raise SystemExit("\n".join(["half precision moves these:", *bad, "take --dtype bfloat16 or train on."]))
    return said


def card_of(
    name: str, measured: Mapping[str, Mapping[str, Any]], size: int, dtype: str, said: list[str], note: str = ""
) -> str:
    """The model's card."""
    first = next(iter(measured.values()))
    earlier = list(_earlier(first["machine"]))
    stages = [*first["command"].split(" && ")[:-1], *(one["command"] for one in earlier)]
    roots = json.dumps([first["config"].get("data", {}), *map(_data, stages)])
    terms = [f"- {text}" for key, text in TERMS.items() if f"/{key}" in roots]
    tasks = ", ".join(dict.fromkeys(one["task"] for one in measured.values()))
    costs = ", ".join(dict.fromkeys(f"{one['macs_per_pixel'] / 1000:.0f} K" for one in measured.values()))
    stored = f"{size / 1e6:.2f} MB ({dtype})"
    spent = f"{first['steps']} steps, {first['wall_s'] / 60:.0f} minutes on {first['machine']['device']}"
    lines = [
        f"# {name}\n",
        f"Tasks: {tasks}. {first['parameters'] / 1000:.0f} K parameters, {costs} multiply-adds a pixel of the input.\n",
        f"{stored}, loaded into float32.\n",
        "```bash",
        f"densectx predict {name} INPUT -o OUT",
        "```\n",
        "## Figures\n",
        "| data | metric | value |",
        "|---|---|---|",
        *(f"| {one['data']} | {one['metric']} | {one['value']:.4g} |" for one in measured.values()),
        *([f"\n{note}"] if note else []),
        "\nMeasured on the checkpoint; what storing it in half precision changes:\n",
        *(f"- {line}" for line in said),
        "\n## Data and their terms\n",
        "The weights are for research use. They were trained on:\n",
        *terms,
        "\n## How it was made\n",
        "```bash",
        first["command"],
        "```\n",
        f"Seed {first['seed']}, {spent}, densectx at {first['commit'][:7]}.",
    ]
    for before in earlier:  # their weights are not in the repository any more
        spent = f"{before['steps']} of these steps and {before['wall_s'] / 60:.0f} of these minutes"
        where = f"on {before['machine']['device']}, densectx at {before['commit'][:7]}"
        lines += [f"\n{spent} made the weights that this began with, {where}:\n", "```bash", before["command"], "```"]
    return "\n".join(lines) + "\n"


def _earlier(machine: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The runs whose weights a run began with, the last one first."""
    while "command" in (before := machine.get("first", {})):
        yield before
        machine = before["machine"]


def _data(command: str) -> list[Any]:
    """The ``data`` of the configs that a command names: its weights have seen them too."""
    return [load_yaml(ROOT / name).get("data", {}) for name in re.findall(r"-c (\S+\.yaml)", command)]


def write_lists(package: Path = PACKAGE) -> None:
    """Entry points and the README's table, of the files that are there and no others."""
    here = [name for name in NAMES if (package / "densectx_zoo" / "weights" / f"{name}.safetensors").is_file()]
    points = [f'{name} = "densectx_zoo:{name.replace("-", "_")}"\n' for name in here]
    _replace(package / "pyproject.toml", ['[project.entry-points."densectx.models"]\n', *points] if points else [])
    rows = [f"| [`{name}`](densectx_zoo/cards/{name}.md) | {_megabytes(package, name)} |\n" for name in here]
    table = ["| model | MB |\n", "|---|---|\n", *rows]
    _replace(package / "README.md", table if rows else ["No weights are shipped yet.\n"])


def _megabytes(package: Path, name: str) -> str:
    return f"{(package / 'densectx_zoo' / 'weights' / f'{name}.safetensors').stat().st_size / 1e6:.2f}"


def _replace(file: Path, lines: list[str]) -> None:
    """Put lines between the marks of a file."""
    begin, end = MARKS[file.name]
    pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
    text, count = pattern.subn(lambda m: m[1] + "".join(lines) + m[2], file.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{file}: expected the marks {begin.strip()!r} and {end.strip()!r} once.")
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
