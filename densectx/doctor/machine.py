"""The machine: packages, devices, cores, memory, disks, limits."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Final

import torch
from packaging.requirements import Requirement

from densectx.distributions import how_to_install
from densectx.doctor.findings import Finding
from densectx.listing import listed
from densectx.memory import free_memory
from densectx.precision import native_precision
from densectx.registry import REGISTRIES
from densectx.report.environment import device_name

_GIB: Final = 2**30
_SHARED_MEMORY: Final = 1 * _GIB  # containers give 64 MiB; a worker's batch of large pictures does not fit
_DISK: Final = 2 * _GIB
_FILES: Final = 4096  # a file descriptor for every tensor that loader workers pass on: 64 batches of 4 sources and more


def machine(folder: Path) -> Iterator[Finding]:
    """Everything that needs no other process.

    Args:
        folder: where runs are going to be written.
    """
    yield packages()
    yield plugins()
    yield from devices()
    yield threads()
    free = free_memory()
    yield Finding("memory", f"{free / _GIB:.1f} GiB free")
    yield disk(folder)
    yield from shared_memory(Path("/dev/shm"))
    yield files()


def packages() -> Finding:
    """Whether what densectx needs is installed, in the releases that it needs."""
    try:
        wanted = requires("densectx") or []
    except PackageNotFoundError:
        text = "not looked at: densectx is imported from a folder of its source, without being installed"
        return Finding("packages", text, "warning", how_to_install("densectx"))
    wrong = []
    for text in wanted:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{needed.name} {found} is not {needed.specifier}")
    if wrong:
        return Finding("packages", "; ".join(wrong), "problem", how_to_install("densectx"), 5)
    return Finding("packages", f"torch {version('torch')}, pytorch-lightning {version('pytorch-lightning')}; all there")


def plugins() -> Finding:
    """Whether the metadata of extension packages is in order."""
    entries = [line for line in listed(list(REGISTRIES)) if line.entry.entry_point is not None]
    wrong = [line for line in entries if line.status != "ok"]
    names = ", ".join(sorted({f"{line.entry.distribution} {line.entry.version}" for line in entries})) or "none"
    if wrong:
        text = "; ".join(f"{line.entry.kind} {line.entry.name}: {line.status}" for line in wrong)
        return Finding("plug-ins", text, "warning", "densectx list --check says why")
    return Finding("plug-ins", names)


def devices() -> Iterator[Finding]:
    """Processor and GPUs, and the precision that they are made for."""
    precision = native_precision()
    yield Finding("processor", f"{device_name(torch.device('cpu'))}; trainer.precision: auto is {precision}")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield Finding("GPUs", "none" + (f" (torch is built for CUDA {built})" if built else ""))
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        text = f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
        used = free < total / 2
        fix = "another process holds the rest: nvidia-smi" if used else ""
        yield Finding(f"GPU {index}", text, "warning" if used else "ok", fix)


def threads() -> Finding:
    """Whether the processes of this machine have cores of their own: spinning threads slow each other many times."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = _whole("LOCAL_WORLD_SIZE") or _whole("SLURM_NTASKS_PER_NODE") or 1
    each = torch.get_num_threads()
    text = f"{each} for each of {local} process{'es' * (local != 1)} on {cores} cores"
    if each * local > cores:
        return Finding("threads", text, "warning", f"export OMP_NUM_THREADS={max(cores // local, 1)}")
    return Finding("threads", text)


def _whole(name: str) -> int:
    """A number of the environment; 0 where there is none: what is no number is told with the launcher's variables."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def disk(folder: Path) -> Finding:
    """Whether runs can be written, and how much."""
    there = folder
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        fix = "name another folder: trainer.default_root_dir"
        return Finding("run folder", f"{there}: cannot be written: {error.strerror}", "problem", fix, 8)
    text = f"{there}: {free / _GIB:.1f} GiB free"
    if free < _DISK:
        return Finding("run folder", text, "warning", "checkpoints may not fit: trainer.default_root_dir")
    return Finding("run folder", text)


def shared_memory(folder: Path) -> Iterator[Finding]:
    """Through which loader workers pass their batches; nothing where a system has no such folder."""
    if not folder.is_dir():
        return
    total = shutil.disk_usage(folder).total
    text = f"{total / _GIB:.2f} GiB"
    if total < _SHARED_MEMORY:
        yield Finding(
            "shared memory", text, "warning", "start the container with --shm-size=8g, or data.num_workers: 0"
        )
    else:
        yield Finding("shared memory", text)


def files() -> Finding:
    """How many files a process may hold open: the hard limit, towards which ``fit`` raises its own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return Finding("open files", "any number allowed")
    if hard < _FILES:
        fix = f"raise the hard limit: ulimit -Hn {_FILES} by root, or docker run --ulimit nofile={_FILES}"
        return Finding("open files", f"{hard} allowed", "warning", fix)
    return Finding("open files", f"{hard} allowed")
