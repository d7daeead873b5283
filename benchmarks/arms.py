"""Short runs of one config that differ in a few flags: ``arms/NAME.yaml`` -> ``results/NAME.json``.

    [DENSECTX_DATA=DATA] python benchmarks/arms.py NAME [--arms ARM ...] [--seeds 0 1]

The file says ``config``, ``flags`` of all arms, ``arms`` with the flags of each, and why. Every arm sees the same
samples; each task's metric on the validation part is kept. Runs that the result has already, from the same commit and
flags, are not done again. Run on a clean checkout: the commit is recorded.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from record import RESULTS, ROOT, commit, machine, measured

ARMS = Path(__file__).parent / "arms"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=sorted(file.stem for file in ARMS.glob("*.yaml")))
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    plan: Any = OmegaConf.to_container(OmegaConf.load(ARMS / f"{given.name}.yaml"))  # ${...} is for fit
    asked = {
        "name": given.name,
        "command": f"python benchmarks/arms.py {shlex.join(sys.argv[1:])}",
        "commit": commit(),
        "config": plan["config"],
        "flags": plan["flags"],
    }
    file = RESULTS / f"{given.name}.json"
    found: dict[str, Any] = {**asked, "machine": machine(), "runs": {}}
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        if all(old.get(key) == asked[key] for key in ("commit", "config", "flags")):
            found = {**old, **asked}
    for seed in given.seeds:
        for arm in given.arms or plan["arms"]:
            key = f"{arm}/{seed}"
            if found["runs"].get(key, {}).get("flags") != plan["arms"][arm]:
                flags = {**plan["flags"], **plan["arms"][arm], "seed_everything": seed}
                found["runs"][key] = {"flags": plan["arms"][arm], "seed": seed, **run(plan["config"], flags)}
                file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(found["runs"]) + "\n")
    return 0


def run(config: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """One training and what it reached."""
    command = [sys.executable, "-m", "densectx", "fit", "-c", config, "--name", "run", "--no-report"]
    command += [word for name, value in flags.items() for word in (f"--{name}", _text(value))]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([*command, "--trainer.default_root_dir", folder], check=True, cwd=ROOT)
        wall = time.perf_counter() - start
        result = measured(Path(folder) / "run" / "0")
    tasks = {key: {k: task[k] for k in ("metric", "value", "curve")} for key, task in result["tasks"].items()}
    return {"steps": result["steps"], "parameters": result["parameters"], "wall_s": round(wall), "tasks": tasks}


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, a row a run."""
    tasks = list(next(iter(runs.values()))["tasks"].items())
    heads = ["arm / seed", "parameters", "seconds", *(f"{key} ({task['metric']})" for key, task in tasks)]
    rows = [
        [key, r["parameters"], r["wall_s"], *(f"{t['value']:.2f}" for t in r["tasks"].values())]
        for key, r in runs.items()
    ]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [heads, ["---"] * len(heads), *rows])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
