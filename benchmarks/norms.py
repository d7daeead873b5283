"""What the normalisation of a shared trunk does to four tasks: short runs, one a kind -> ``results/norms.json``.

    python benchmarks/norms.py [--steps 200] [--seeds 0] [--norms batch group per_input] [-- flags of fit]

Runs ``configs/quickstart.yaml`` (photographs of scikit-image, no download) and keeps each task's metric on the
validation part. Runs that the file already has from this commit are not done again. Run on a clean checkout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, machine, measured

FILE = RESULTS / "norms.json"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--norms", nargs="+", default=["batch", "group", "per_input"])
    parser.add_argument("flags", nargs="*", help="of densectx fit, behind --")
    given = parser.parse_args()
    asked = {"name": "norms", "commit": commit(), "steps": given.steps, "flags": given.flags}
    found: dict[str, Any] = {
        **asked,
        "machine": machine(),
        "runs": {},
    }
    if FILE.exists():
        old = json.loads(FILE.read_text(encoding="utf-8"))
        if asked.items() <= old.items():
            found = old
    for seed in given.seeds:
        for norm in given.norms:
            key = f"{norm}/{seed}"
            if key not in found["runs"]:
                found["runs"][key] = run(norm, seed, given.steps, given.flags)
                FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(found["runs"]) + "\n")
    return 0


def run(norm: str, seed: int, steps: int, more: list[str]) -> dict[str, Any]:
    """One training and what it reached."""
    flags = {
        "seed_everything": seed,
        "model.norm": norm,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.enable_progress_bar": "false",
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "densectx", "fit", "-c", "configs/quickstart.yaml", "--name", "run"]
        command += more + [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        start = time.perf_counter()
        subprocess.run([*command, "--trainer.default_root_dir", folder], check=True, cwd=ROOT)
        wall = time.perf_counter() - start
        result = measured(Path(folder) / "run" / "0")
    tasks = {key: {k: task[k] for k in ("metric", "value", "trivial_value")} for key, task in result["tasks"].items()}
    return {"norm": norm, "seed": seed, "parameters": result["parameters"], "wall_s": round(wall), "tasks": tasks}


def table(runs: dict[str, Any]) -> str:
    """Markdown, a row a run."""
    tasks = list(next(iter(runs.values()))["tasks"].items())
    heads = ["norm", "seed", "parameters", *(f"{key} ({task['metric']})" for key, task in tasks)]
    rows = [
        [r["norm"], r["seed"], r["parameters"], *(f"{t['value']:.2f}" for t in r["tasks"].values())]
        for r in runs.values()
    ]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [heads, ["---"] * len(heads), *rows])


def commit() -> str:
    """Hash of the checkout, marked if the package differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], check=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "densectx") else "")


if __name__ == "__main__":
    sys.exit(main())
