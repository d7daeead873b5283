"""``benchmarks/README.md`` from the files of ``benchmarks/results`` and the tables of ``benchmarks/targets.yaml``.

Every figure in the layout of ``benchmarks/results.py`` is printed: those that a table names there, all others below,
so that what was tried and did not help stays. Numbers that are held against each other are rounded to two decimals,
as published ones are. README.md quotes the rows that have something to reach.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from omegaconf import OmegaConf
from record import RESULTS, ROOT, replace_marked

README = Path(__file__).parent / "README.md"
TARGETS = Path(__file__).parent / "targets.yaml"
HEAD = ("result", "data", "metric", "value", "must", "aim", "reached", "parameters", "MAC / pixel", "steps", "minutes")
QUOTED = ("data", "value", "must", "aim", "reached", "parameters", "minutes")

Results = Mapping[str, Mapping[str, Any]]

INTRO = """# Results

Written by `python benchmarks/results.py readme` from `benchmarks/results/*.json`, not by hand. A row's file also has
its config, seed, commit, machine, learning curve and, for segmentation, the IoU of each class. `must` and `aim` are
what was to be reached (`benchmarks/targets.yaml`); `not run` means that there is no result yet. A value is that of the
run's best checkpoint by validation, whose steps are told. Parameters are those of the whole model, multiply-adds (MAC)
those of one task for a pixel of its input image, minutes those of the whole training with its validations (where a GPU
did all or a part of it they say so). Of two commands the second one takes its weights from the run folder of the
first, `RUN`; steps and minutes are those of both. One with `--init_from` a file of `plugins/densectx-zoo` goes on from
what the zoo had at that commit; steps and minutes count what made that too (`machine.first` in the file). A recipe is
that of the commit which is named: some have changed since. VDSR, IMDN and FFDNet were measured on these very files by
the same protocol (VDSR's paper has 37.53 for x2); the figures of others are of their papers. The runs on a GPU went
beside each other, eleven at a time on one card and 16 cores: their minutes are no measure of speed. The data are for
research use; no picture of them is in this repository.
"""


def write_readme(results: Path = RESULTS, targets: Path = TARGETS, readme: Path = README) -> None:
    """Write the page."""
    found, others = _read(results)
    beside = sorted(name for name in others if name.startswith("peers"))  # these have their own tables
    others = {name: told for name, told in others.items() if name not in beside}
    page, named = [INTRO], set()
    for table in _tables(targets):
        rows = [shared(row, found) if "share" in row else compared(row, found) for row in table["rows"]]
        names = [row["result"] for row in table["rows"] if "result" in row]
        named |= set(names)
        page += [
            f"## {table['title']}\n",
            f"{fill(table['note'].strip(), 120)}\n",
            *lines(HEAD, rows),
            "",
            *commands(names, found),
        ]
    if beside:
        page.append("## Beside networks of segmentation-models-pytorch\n")
    for name in beside:
        page += peers(json.loads((results / f"{name}.json").read_text(encoding="utf-8")))
    if rest := [name for name in found if name not in named]:
        page += ["## Everything else that was measured\n", *lines(HEAD, [compared({"result": n}, found) for n in rest])]
        page += ["", *commands(rest, found)]
    if others:
        page += [
            "## Other measurements\n",
            *lines(("file", "commands"), [(f"`{name}.json`", several(told)) for name, told in others.items()]),
        ]
    readme.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")


def write_summary(results: Path = RESULTS, targets: Path = TARGETS, readme: Path = ROOT / "README.md") -> None:
    """Quote what has been measured of the rows that something is to be reached in, between README.md's markers.

    Without those that stand aside.
    """
    found, _ = _read(results)
    rows = []
    for row in (row for table in _tables(targets) for row in table["rows"]):
        if row.get("result") in found and {"must", "must_from"} & row.keys() and not row.get("aside"):
            cells = dict(zip(HEAD, compared(row, found), strict=True))
            rows.append([f"`{cells['result']}`", *(cells[column] for column in QUOTED)])
    replace_marked("published", lines(("result", *QUOTED), rows), readme)


def compared(row: Mapping[str, Any], results: Results) -> list[str]:
    """A result beside its targets."""
    result = results.get(row["result"])
    must, aim = _bounds(row, results)
    names = [name and f" ({name})" for name in row.get("of", ["", ""])]
    told = ["-" if bound is None else f"{bound:.2f}{name}" for bound, name in zip((must, aim), names, strict=True)]
    if result is None:
        return [row["result"], "", "", "not run", *told, "not run", "", "", "", ""]
    sizes = [f"{result['parameters'] / 1000:.0f} K", f"{result['macs_per_pixel'] / 1000:.0f} K"]
    spent = [str(result["steps"]), f"{result['wall_s'] / 60:.0f}{_on_gpu(result)}"]
    data = [result["data"], result["metric"], f"**{result['value']:.{_digits(result)}f}**"]
    return [row["result"], *data, *told, reached(row, result, must, aim), *sizes, *spent]


def reached(row: Mapping[str, Any], result: Mapping[str, Any], must: float | None, aim: float | None) -> str:
    """What a result has reached, in words; empty where nothing was to be."""
    if row.get("elsewhere"):
        return "of another split"
    if must is None:
        return "" if "must_from" not in row else "not run"  # what it is held against
    over = [f"{key} above {most}" for key, most in row.get("within", {}).items() if result[key] > most]
    if over:
        return f"no: {', '.join(over)}"
    value = round(result["value"], 2)
    if value < round(must, 2):
        return f"no, {value - must:+.2f}"
    return "must and aim" if aim is not None and value >= round(aim, 2) else "must"


def shared(row: Mapping[str, Any], results: Results) -> list[str]:
    """Multiply-adds of some results in percent of those of others."""
    name, bound = "multiply-adds, in percent of the single tasks'", f"{row['must']:.2f} at most"
    if any(one not in results for one in (*row["share"], *row["of"])):
        return [name, "", "", "not run", bound, "-", "not run", "", "", "", ""]
    ours, theirs = (sum(results[one]["macs_per_pixel"] for one in row[key]) for key in ("share", "of"))
    share = 100 * ours / theirs
    return [name, "", "", f"**{share:.1f}**", bound, "-", "must" if share <= row["must"] else "no", "", "", "", ""]


def peers(result: Mapping[str, Any]) -> list[str]:
    """Our network and the peers that ``benchmarks/peers.py`` trained for the same time."""
    arms, machine = result["inference"]["arms"], result["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    ours = arms[next(iter(result["nets"]))]["median_s"]
    rows = [
        [
            f"`{name}`",
            f"**{net['miou']:.2f}**",
            str(net["steps"]),
            f"{net['parameters'] / 1000:.0f} K",
            f"{arms[name]['macs'] / 1e9:.1f}",
            f"{1000 * arms[name]['median_s']:.1f}",
            f"{arms[name]['median_s'] / ours:.2f}",
        ]
        for name, net in result["nets"].items()
    ]
    note = (
        f"{result['minutes']:g} minutes of training each on {threads} from random weights by {result['config']} as it"
        f" was at commit {result['commit'][:7]}, whose network is the one of the row `densectx`; the encoder of the"
        f" peers is a {result['encoder']}. One run of each (seed {result['seed']}), mean IoU of its last weights on the"
        f" 62 frames of 0001TP. Multiply-adds and time are those of an answer ({result['inference']['what']}); `times`"
        f" is how often the first row's fits into it. {result.get('note', '')}"
    )
    head = ("network", "miou", "steps", "parameters", "GMAC", "ms", "times")
    told = f"(commit {result['commit'][:7]}, {machine['processor']}, {threads}, smp {result['smp']})"
    return [
        f"{fill(note, 120)}\n",
        *lines(head, rows),
        f"\n`{result['command']}` {told}\n",
    ]


def commands(names: Sequence[str], results: Results) -> list[str]:
    """A list of which command gave which results."""
    by_command: dict[str, list[str]] = {}
    for name in names:
        if name in results:
            result = results[name]
            told = f"`{result['command']}` (seed {result['seed']}, commit {result['commit'][:7]}, {_device(result)})"
            by_command.setdefault(told, []).append(name)
    listed = [f"- {', '.join(f'`{name}`' for name in some)}: {told}" for told, some in by_command.items()]
    return [*listed, ""] if listed else []


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def several(told: Sequence[str]) -> str:
    """Commands in a cell of a table; of very many the first."""
    few = 8
    if len(told) > few:
        return f"`{told[0]}`, and {len(told) - 1} like it: each entry has its own"
    return "; ".join(f"`{command}`" for command in told)


def _commands(content: Any) -> list[str]:
    """The distinct commands in a file, wherever they stand."""
    if isinstance(content, dict):
        own = [content["command"]] if isinstance(content.get("command"), str) else []
        parts = [own, *(_commands(value) for value in content.values())]
    else:
        parts = [_commands(value) for value in content] if isinstance(content, list) else []
    return list(dict.fromkeys(command for part in parts for command in part))


def _read(results: Path) -> tuple[dict[str, Mapping[str, Any]], dict[str, list[str]]]:
    """The figures in the layout of ``benchmarks/results.py``, and the commands of all other files."""
    found: dict[str, Mapping[str, Any]] = {}
    others: dict[str, list[str]] = {}
    for file in sorted(results.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"metric", "value", "macs_per_pixel"} <= content.keys():
            found[file.stem] = content
        elif told := _commands(content):
            others[file.stem] = told
    return found, others


def _tables(targets: Path) -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = OmegaConf.to_container(OmegaConf.load(targets))  # type: ignore[assignment]  # a list of mappings
    return tables


def _bounds(row: Mapping[str, Any], results: Results) -> tuple[float | None, float | None]:
    """Must and aim of a row, None where there is none, or no result yet that it is taken from."""
    if "must_from" not in row:
        return row.get("must"), row.get("aim")
    sources = row["must_from"]["results"]
    if any(one not in results for one in sources):
        return None, None
    return max(results[one]["value"] for one in sources) + row["must_from"]["plus"], None


def _digits(result: Mapping[str, Any]) -> int:
    return 4 if result["metric"] == "ssim" else 2


def _device(result: Mapping[str, Any]) -> str:
    """The machines of a training in their order, those of what it went on from first."""
    return ", then ".join(_devices(result["machine"]))


def _on_gpu(result: Mapping[str, Any]) -> str:
    """What is said behind minutes that are, whole or in part, those of a GPU."""
    kinds = ["NVIDIA" in device for device in _devices(result["machine"])] if result["steps"] else [False]
    return " (GPU)" if all(kinds) else " (partly GPU)" if any(kinds) else ""


def _devices(machine: Mapping[str, Any]) -> list[str]:
    own = (machine.get("device") or "unknown machine").split(", then ")  # of a run and the one that it began with
    earlier = machine.get("first", {}).get("machine")  # of a model of the zoo
    return [*(_devices(earlier) if earlier else []), *own]
