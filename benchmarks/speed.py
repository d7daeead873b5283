"""How fast densectx is, as ratios in one run -> ``results/speed.json``, ``speed.md``, ``speed.svg``.

    python benchmarks/speed.py [SECTION ...] [--threads N] [--repeats 7] [--quick]

Sections, all by default, each saved as soon as it is done:

- ``segmentation``: inference and a training step of a ResNet-34 trunk at stride 8 with our context, smp's DeepLabV3 and
  torchvision's FCN head, beside the ratio of their multiply-adds;
- ``arithmetic``: multiply-adds a second beside those of the best matrix product of the same run, plain and compiled;
  where the share is low, a profile;
- ``sharing``: several tasks from one trunk against a model each: time, multiply-adds, memory;
- ``restoration``: denoiser and x2 network against DnCNN and VDSR, for each megapixel;
- ``optimizers``: an update by AdaMuon beside timm's, AdamW's and the passes before it;
- ``loader``: decoding alone, the step, and what of the step is waiting (pictures of DENSECTX_DATA where it is set);
- ``growth``: with pixels, tasks and ranks;
- ``startup``: import, ``--help``, ``list`` and the first training step in fresh processes, against smp and timm.

Whatever is compared runs in turns in one process (start-up: in fresh ones, in turns) with the same threads, type of
numbers and channels-last memory; medians count, and all times are in the file. A section that the file has from this
commit with the same options is not run again without ``--again``. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, commit, machine
from speed.plot import plot
from speed.tables import TITLES, tables
from speed.timing import Plan

CONFIGS = {
    "segmentation": "configs/segmentation_camvid.yaml",
    "denoiser": "configs/denoising_bsds500.yaml",
    "x2": "configs/super_resolution_bsds500.yaml",
    "multitask": "configs/multitask_bsds500_camvid.yaml",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(TITLES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: does it work?")
    parser.add_argument("--repeats", type=int, help="rounds of a comparison (7, quick 2)")
    parser.add_argument("--budget", type=float, default=180.0, help="seconds of a comparison; 3 rounds at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(torch's own choice)")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--again", action="store_true", help="sections too that the file has")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the three files")
    for part in (*CONFIGS, "loader"):
        parser.add_argument(
            f"--{part}",
            metavar="CONFIG",
            help="YAML file" + ", checkpoint or model name" * (part in ("denoiser", "x2")),
        )
    parser.add_argument("--singles", nargs="+", default=[], metavar="CONFIG", help="single-task networks for `sharing`")
    given = parser.parse_args(arguments)
    if unknown := set(given.sections) - set(TITLES):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(TITLES)}.")
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # of processes that are started
    torch.set_num_threads(given.threads)
    configs = CONFIGS | {part: getattr(given, part) for part in (*CONFIGS, "loader") if getattr(given, part)}
    repeats = given.repeats or (2 if given.quick else 7)
    plan = Plan(given.quick, repeats, given.budget, given.threads, tuple(given.dtypes), configs, tuple(given.singles))
    file = given.out / "speed.json"
    found: dict[str, Any] = {"name": "speed", "sections": {}}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
    for name in given.sections or TITLES:
        asked = {"commit": commit(), "quick": plan.quick, "repeats": repeats, "threads": plan.threads}
        asked |= {"dtypes": list(plan.dtypes), "configs": configs, "singles": given.singles}
        if not given.again and asked.items() <= found["sections"].get(name, {}).items():
            sys.stderr.write(f"{name}: in {file} already (--again runs it again)\n")
            continue
        sys.stderr.write(f"{name} ...\n")
        load, began = os.getloadavg()[0], time.perf_counter()
        result = importlib.import_module(f"speed.{name}").section(plan)
        about = {
            "command": shlex.join(["python", "benchmarks/speed.py", *arguments]),
            "machine": machine(),
            "load_average_before": round(load, 2),
            "wall_s": round(time.perf_counter() - began, 1),
        }
        found["sections"][name] = {**asked, **about, **result}
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(tables(found), encoding="utf-8")
        file.with_suffix(".svg").write_text(plot(found), encoding="utf-8")
    sys.stdout.write(tables(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
