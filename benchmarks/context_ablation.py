"""Does the context module earn its place? Front end alone, + Basic, + Large, each started in three ways, on CamVid.

    python benchmarks/context_ablation.py CAMVID WORK [--seeds 0 1] [--front 1500] [--joint 300]

CAMVID is the folder of SegNet's edition, WORK one for runs and the half-resolution copy; what is done there is not done
again. Per seed the front end is trained once, then every arm goes on from it for the same number of joint steps, the
front end alone included. Writes ``benchmarks/results/context-ablation.json``. The paper (table 3, VOC 2012 val): Basic
+1.5, Large +2.3 mIoU, and no gain from a random start.
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

from PIL import Image
from record import RESULTS, ROOT, commit, machine, run_name

CONFIG = "benchmarks/context_ablation.yaml"
ARMS = {
    "front end": "none",
    "basic, identity": "{name: basic}",
    "basic, residual": "{name: basic, residual: true}",
    "basic, random": "{name: basic, init: random}",
    "large, identity": "{name: large}",
    "large, residual": "{name: large, residual: true}",
    "large, random": "{name: large, init: random}",
}
JOINT = ["--model.optimizer.init_args.lr", "5.0e-4"]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--front", type=int, default=1500, metavar="STEPS")
    parser.add_argument("--joint", type=int, default=300, metavar="STEPS")
    given = parser.parse_args()
    half(given.camvid, given.work / "camvid_half")
    rows, fronts = [], []
    for seed in given.seeds:
        front = train(given.work, f"front-{seed}", seed, given.front, [])
        fronts.append({"seed": seed, **measured(front)})
        start = ["--init_from", str(front / "checkpoints" / "last.ckpt"), *JOINT]
        for arm, context in ARMS.items():
            name = f"{arm.replace(', ', '-').replace(' ', '')}-{seed}"
            run = train(given.work, name, seed, given.joint, [*start, "--model.context", context])
            rows.append({"arm": arm, "seed": seed, **measured(run)})
    result = {
        "name": "context-ablation",
        "command": f"python benchmarks/context_ablation.py CAMVID WORK {shlex.join(sys.argv[3:])}".strip(),
        "config": CONFIG,
        "front_steps": given.front,
        "joint_steps": given.joint,
        "commit": commit(),
        "machine": machine(),
        "metric": "miou on 62 frames of 0001TP at 240x180, percent",
        "front_ends": fronts,
        "summary": summary(rows),
        "runs": rows,
    }
    (RESULTS / "context-ablation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def half(camvid: Path, out: Path) -> None:
    """A copy of the training split at half resolution: images by averages, labels by nearest neighbour."""
    for folder in ("train", "trainannot"):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for file in sorted((camvid / folder).iterdir()):
            small = out / folder / f"{file.stem}.png"
            if small.exists():
                continue
            with Image.open(file) as image:
                size = (image.width // 2, image.height // 2)
                (image.reduce(2) if folder == "train" else image.resize(size, Image.Resampling.NEAREST)).save(small)


def train(work: Path, name: str, seed: int, steps: int, flags: list[str]) -> Path:
    """Run ``densectx fit`` unless it has been run with this recipe, steps and flags; returns the run folder."""
    name = run_name(name, CONFIG, [str(seed), str(steps), *flags])
    folder = work / "runs" / name
    done = next((run for run in sorted(folder.glob("*")) if (run / "seconds").exists()), None)
    if done is not None:
        return done
    command = [sys.executable, "-m", "densectx", "fit", "-c", CONFIG, "--seed_everything", str(seed)]
    command += ["--data.sources.camvid.root", str(work / "camvid_half"), "--name", name]
    command += ["--trainer.default_root_dir", str(work / "runs"), "--trainer.max_steps", str(steps)]
    command += ["--trainer.val_check_interval", str(min(steps, 100)), "--trainer.enable_progress_bar", "false", *flags]
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT)
    run = max(folder.glob("*"), key=lambda path: int(path.name))  # one that was cut off before has a number below
    (run / "seconds").write_text(f"{time.perf_counter() - began:.0f}\n", encoding="utf-8")
    return run


def measured(run: Path) -> dict[str, Any]:
    """The last validation of a run, and its curve."""
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/segmentation/miou")]
    curve = [[int(row["step"]) + 1, float(row["val/segmentation/miou"])] for row in rows]
    return {"miou": curve[-1][1], "curve": curve, "wall_s": int((run / "seconds").read_text())}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of each arm, and its gain over the front end of the same seed and number of steps."""
    base = {row["seed"]: row["miou"] for row in rows if row["arm"] == "front end"}
    lines = []
    for arm in ARMS:
        values = {row["seed"]: row["miou"] for row in rows if row["arm"] == arm}
        gains = [value - base[seed] for seed, value in values.items()]
        lines.append({"arm": arm, "miou": mean(list(values.values())), "gain": mean(gains), "gains": gains})
    return lines


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
