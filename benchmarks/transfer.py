"""What do four tasks give each other? Boundaries, denoising, enlargement, colour of BSDS500 by every balancing method.

    DENSECTX_DATA=DATA python benchmarks/transfer.py WORK [--seeds 0 1] [--steps 400] [--methods fixed pcgrad ...]

DATA holds ``bsds500``, WORK is a folder for runs; what is done there is not done again (the commit of the file is that
of the last call). Needs the plug-in (``pip install ./plugins/densectx-edges``).

Arms, for every seed: each task alone; all four by each method; all four with a trunk that answers zeros
(``model.ablate: trunk_zero``: what the heads reach without it). Every arm has the same number of steps, batch size and
samples. Writes ``benchmarks/results/transfer.json``: the score of every task, its change against the task alone with
the same seed, and Delta-m, the mean over tasks of the relative change in percent, positive = better (Maninis et al.
2019; PSNR is taken in dB as it is, of which a percent is much).
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, commit, machine, run_name

CONFIG = "benchmarks/transfer.yaml"
SCORES = {"edges": "ap", "denoising": "psnr", "super_resolution": "psnr", "colorization": "ab_psnr"}  # higher is better
METHODS = ["fixed", "uncertainty", "dwa", "famo", "gradnorm", "pcgrad", "mgda", "imtl_g", "upgrad", "nash_mtl"]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, default=RESULTS / "transfer.json")
    parser.add_argument("--flags", default="", help="more flags of densectx fit, one text")
    given = parser.parse_args()
    arms = {f"{task} alone": [f"--model.tasks.{other}=null" for other in SCORES if other != task] for task in SCORES}
    arms |= {method: balanced(method, given.steps) for method in given.methods}
    arms["trunk zeroed"] = ["--model.ablate=trunk_zero"]
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        for arm, flags in arms.items():
            name = f"{arm.replace(' ', '-')}-{seed}"
            run = train(given.work, name, seed, given.steps, [*flags, *shlex.split(given.flags)])
            rows.append({"arm": arm, "seed": seed, **measured(run)})
    result = {
        "name": "transfer",
        "command": f"DENSECTX_DATA=DATA python benchmarks/transfer.py WORK {shlex.join(sys.argv[2:])}".strip(),
        "config": CONFIG,
        "steps": given.steps,
        "seeds": given.seeds,
        "commit": commit(),
        "machine": machine(),
        "metric": "18 images of BSDS500's train and test whose number begins with 6: "
        + ", ".join(f"{task} {score}" for task, score in SCORES.items()),
        "summary": summary(rows, [*given.methods, "trunk zeroed"]),
        "runs": rows,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def balanced(method: str, steps: int) -> list[str]:
    """Flags of a method; those without a Gram matrix are watched, so that every report has the panel of conflicts."""
    options = "" if method in ("pcgrad", "mgda", "imtl_g", "upgrad", "nash_mtl", "gradnorm") else ", watch: true"
    if method == "dwa":  # two means must be known before it does anything
        options += f", every: {max(1, min(100, steps // 10))}"
    return [f"--model.balancing={{name: {method}{options}}}"]


def train(work: Path, name: str, seed: int, steps: int, flags: list[str]) -> Path:
    """Run ``densectx fit`` unless it has been run with this recipe, steps and flags; returns the run folder."""
    name = run_name(name, CONFIG, [str(seed), str(steps), *flags])
    folder = work / "runs" / name
    done = next((run for run in sorted(folder.glob("*")) if (run / "seconds").exists()), None)
    if done is not None:
        return done
    command = [sys.executable, "-m", "densectx", "fit", "-c", CONFIG, "--seed_everything", str(seed), "--name", name]
    command += ["--trainer.default_root_dir", str(work / "runs"), "--trainer.max_steps", str(steps)]
    command += ["--trainer.val_check_interval", str(steps), "--trainer.enable_progress_bar", "false", "--no-report"]
    began = time.perf_counter()
    subprocess.run([*command, *flags], check=True, cwd=ROOT)
    run = max(folder.glob("*"), key=lambda path: int(path.name))  # one that was cut off before has a number below
    (run / "seconds").write_text(f"{time.perf_counter() - began:.0f}\n", encoding="utf-8")
    return run


def measured(run: Path) -> dict[str, Any]:
    """The last validation of a run, and the mean cosine of every two tasks where it was logged."""
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = {task: f"val/{task}/{score}" for task, score in SCORES.items()}
    scores = {
        task: float(next(row[key] for row in reversed(rows) if row.get(key)))
        for task, key in keys.items()
        if key in rows[0]
    }
    found: dict[str, Any] = {"scores": scores}
    for kind in ("cos", "weight"):
        start = f"balance/{kind}/"
        logged = {key: [float(row[key]) for row in rows if row.get(key)] for key in rows[0] if key.startswith(start)}
        if logged:
            found[kind] = {key.removeprefix(start): mean(values) for key, values in logged.items()}
    return found | {"wall_s": int((run / "seconds").read_text())}


def summary(rows: list[dict[str, Any]], arms: list[str]) -> list[dict[str, Any]]:
    """Of each arm, means over seeds: scores, changes against the task alone, Delta-m, and its values by seed."""
    single = [row for row in rows if row["arm"].endswith(" alone")]
    alone = {(row["seed"], task): score for row in single for task, score in row["scores"].items()}
    lines = [{"arm": "alone", "scores": {t: mean([v for (_, k), v in alone.items() if k == t]) for t in SCORES}}]
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        changes = [{t: row["scores"][t] - alone[row["seed"], t] for t in SCORES} for row in own]
        relative = [
            mean([100 * change[t] / alone[row["seed"], t] for t in SCORES])
            for row, change in zip(own, changes, strict=True)
        ]
        lines.append(
            {
                "arm": arm,
                "scores": {t: mean([row["scores"][t] for row in own]) for t in SCORES},
                "change": {t: mean([change[t] for change in changes]) for t in SCORES},
                "delta_m_percent": mean(relative),
                "delta_m_by_seed": relative,
                "seconds": mean([row["wall_s"] for row in own]),
            }
        )
    return lines


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
