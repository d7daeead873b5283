"""Run ``densectx fit`` and keep what it reached: ``benchmarks/results/NAME.json``.

    python benchmarks/record.py NAME [--picture TASK ...] -- -c configs/quickstart.yaml [flags]
    python benchmarks/record.py --readme

The second form rewrites the table in README.md from the result files. Run on a clean checkout: the commit is recorded.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's table from the result files")
    parser.add_argument("--picture", nargs="*", default=[], metavar="TASK", help="keep the last sheets of these tasks")
    own, _, fit = " ".join(map(shlex.quote, sys.argv[1:])).partition(" -- ")
    given = parser.parse_args(shlex.split(own))
    if given.name:
        record(given.name, shlex.split(fit), given.picture)
    if given.readme:
        write_readme()
    return 0


def record(name: str, fit: list[str], pictures: list[str]) -> None:
    """Run and write one result."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "densectx", "fit", *fit, "--name", "run", "--trainer.default_root_dir", folder]
        subprocess.run(command, check=True, cwd=ROOT)
        wall = time.perf_counter() - start
        run = Path(folder) / "run" / "0"
        result = {
            "name": name,
            "command": "densectx fit " + shlex.join(fit),
            "commit": commit(),
            "machine": machine(),
            "wall_s": round(wall),
            **measured(run),
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if pictures:
            gallery([newest(run / "pictures" / task) for task in pictures]).save(RESULTS / f"{name}.png", optimize=True)


def measured(run: Path) -> dict[str, Any]:
    """Metrics, curves and sizes of a run folder."""
    import torch

    import densectx

    model = densectx.load(run / "checkpoints" / "last.ckpt")
    info = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tasks = {}
    for key in model.tasks:
        score = model.task(key).score
        name = f"val/{key}/{score.metric}"
        curve = [[int(row["step"]) + 1, float(row[name])] for row in rows if row.get(name)]
        last = next(row for row in reversed(rows) if row.get(name))
        values = {k.removeprefix(f"val/{key}/"): float(v) for k, v in last.items() if k and k.startswith(f"val/{key}/")}
        other = f"{score.metric}_{score.baseline}"
        tasks[key] = {"metric": score.metric, "value": values[score.metric], "trivial": score.baseline}
        tasks[key] |= {"trivial_value": values[other], "all": values, "curve": curve}
    config = info["densectx"]["config"]
    return {
        "seed": config.get("seed_everything", 0),
        "steps": int(info["global_step"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tasks": tasks,
    }


def run_name(name: str, config: str, words: Sequence[str]) -> str:
    """A name for a run that other words (flags, steps) and another content of the config do not share."""
    asked = (ROOT / config).read_text(encoding="utf-8") + shlex.join(words)
    return f"{name}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def machine() -> dict[str, Any]:
    """Processor, cores and library versions."""
    import torch

    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def newest(folder: Path) -> Path:
    """The sheet of the last step."""
    return max(folder.glob("step-*.png"), key=lambda f: int(f.stem.partition("-")[2]))


def gallery(files: list[Path], rows: int = 2) -> Image.Image:
    """The first rows of several sheets side by side."""
    sheets = [Image.open(file).convert("RGB") for file in files]
    height = min(sheet.height for sheet in sheets) * rows // 4
    parts = [sheet.crop((0, 0, sheet.width, height)) for sheet in sheets]
    canvas = Image.new("RGB", (sum(p.width for p in parts) + 12 * (len(parts) - 1), height), "white")
    left = 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + 12
    return canvas


def write_readme() -> None:
    """Replace the text between the README's result markers."""
    from densectx.callbacks import number

    lines = ["| run | task | metric | value | trivial answer | its value | minutes |", "|---|---|---|---|---|---|---|"]
    commands = []
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if "tasks" not in result or "command" not in result:
            continue
        for key, task in result["tasks"].items():
            minutes = f"{result['wall_s'] / 60:.1f}"
            cells = [result["name"], key, task["metric"], f"**{number(task['value'])}**", task["trivial"]]
            lines.append("| " + " | ".join([*cells, number(task["trivial_value"]), minutes]) + " |")
        cores, processor = result["machine"]["cores"], result["machine"]["processor"]
        commands.append(
            f"- `{result['name']}`: `{result['command']}` (seed {result['seed']}, {result['steps']} steps, commit"
            f" {result['commit'][:7]}, {cores} cores of {processor})"
        )
    replace_marked("results", [*lines, "", *commands])


def replace_marked(name: str, lines: Sequence[str], readme: Path = ROOT / "README.md") -> None:
    """Put lines in the place of what stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Raises:
        SystemExit: the two markers do not stand in the file once.
    """
    text = "\n".join(["", *lines, ""])
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    replaced, count = pattern.subn(lambda m: m.group(1) + text + "\n" + m.group(2), readme.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{readme.name}: expected the markers <!-- {name} --> and <!-- end of {name} --> once.")
    readme.write_text(replaced, encoding="utf-8")


def commit() -> str:
    """Hash of the checkout, marked if the package differs from it."""
    return _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain", "densectx") else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
