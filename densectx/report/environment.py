"""What a run ran on: versions and devices, no names of people, machines or folders."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

import densectx
from densectx.report.markup import Html, tag
from densectx.report.page import Section, note, scrolled

FILE: Final = "environment.json"
_PACKAGES: Final = (
    *("torch", "torchvision", "pytorch-lightning", "torchmetrics", "timm", "kornia"),
    *("numpy", "scipy", "pillow", "safetensors"),
)


def environment(device: torch.device | str = "cpu", processes: int = 1) -> dict[str, Any]:
    """Of this process: ``{format, time, densectx, python, system, device, processes, threads, packages}``."""
    return {
        "format": 1,
        "time": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "densectx": densectx.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(torch.device(device)),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def record(folder: Path, device: torch.device | str, processes: int) -> None:
    """Write what this process runs on into a run folder, in the place of what an earlier start wrote."""
    content = json.dumps(environment(device, processes), indent=1)
    (folder / FILE).write_text(content + "\n", encoding="utf-8")


def device_name(device: torch.device) -> str:
    """``NVIDIA H100``, or the processor's name and how many cores there are."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{name}, {cores} core{'s' * (cores != 1)}"


def section(folder: Path, info: Mapping[str, Any]) -> Section:
    """What the run recorded, else what this page was written on; and what its checkpoint says.

    Args:
        folder: of the run.
        info: header of the checkpoint, empty without one.
    """
    try:
        recorded = json.loads((folder / FILE).read_text(encoding="utf-8"))
        recorded = recorded if isinstance(recorded, dict) else {}
    except (OSError, ValueError):
        recorded = {}
    if recorded:
        said = note("Of the run's last start.")
    else:
        said = note("The run did not record what it ran on; this is what the page was written on.", kind="warning")
    shown = recorded or environment()
    rows = [_row(key, value) for key, value in shown.items() if key not in ("format", "packages")]
    packages = shown.get("packages")
    rows += [_row(key, value) for key, value in packages.items()] if isinstance(packages, Mapping) else []
    if info.get("version"):
        rows.append(_row("checkpoint written by densectx", info["version"]))
    plugins = info.get("plugins")
    rows += [_row(f"plug-in {key}", value) for key, value in plugins.items()] if isinstance(plugins, Mapping) else []
    table = tag("table", tag("tbody", rows), class_="facts")
    return Section("environment", "Environment", [said, scrolled(table, "Environment")])


def _row(key: str, value: Any) -> Html:
    return tag("tr", tag("th", str(key), scope="row"), tag("td", str(value)))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
