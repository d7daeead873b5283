"""A model on image files: what is to do, the loop over them, and the record of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densectx.checkpoint import load, locate
from densectx.errors import ConfigError, DataError, DensectxError, StorageError
from densectx.inference.files import check_inside, fingerprint, replace
from densectx.inference.inputs import Found, Job, collect, plan
from densectx.inference.predictor import Predictor, device_of
from densectx.inference.reading import Reading
from densectx.inference.record import FORMAT, JOURNAL, SUMMARY, Record
from densectx.inference.tiler import Tile
from densectx.inference.writers import Answer, Encoder, encoders
from densectx.types import SourceInfo


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        model: checkpoint, run folder or name.
        inputs: files, folders, globs, ``-``.
        out: the output folder.
        tasks: keys, None for all.
        options: run-time options of the tasks.
        tile: how large images are taken; None for what the model is made for.
        raw: whether numbers are written too.
        device: ``"auto"`` or a device of torch.
        precision: ``"32"`` or ``"bf16"`` (autocast).
        overwrite: whether existing outputs are replaced.
    """

    model: str
    inputs: Sequence[str]
    out: Path
    tasks: Sequence[str] | None = None
    options: Mapping[str, float] | None = None
    tile: Tile | None = None
    raw: bool = False
    device: str = "auto"
    precision: str = "32"
    overwrite: bool = False


def run(request: Request, say: Callable[[str], None], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Answer for all inputs of a request and write the answers; bad files are told and left behind.

    Args:
        request: what is asked for.
        say: takes a line for the user, at once.
        progress: takes the number of inputs finished, and of all.

    Returns:
        The summary as it is in ``summary.json``: ``{format, model, options, device, inputs, earlier}``.

    Raises:
        ConfigError: impossible options, or outputs that must not be written; nothing has been written then.
        CheckpointError, PluginError: the model cannot be loaded.
        StorageError: the file system refuses.
    """
    model_file = locate(request.model)
    predictor = Predictor(
        load(request.model),
        request.tasks,
        request.options or {},
        device_of(request.device),
        request.precision,
        request.tile,
    )
    if predictor.tile != "whole":
        say(f"densectx: images are taken in tiles: {predictor.tile}.")
    reading = Reading.of(predictor.model, predictor.tasks)
    writers = {real: _writers(predictor, raw=request.raw, real=real) for real in (False, True)}
    out = Path(os.path.realpath(request.out))
    if out.exists() and not out.is_dir():
        raise ConfigError(f"-o {request.out}: is a file, not a folder.")
    found = collect(request.inputs, out, predictor.tasks, overwrite=request.overwrite, channels=reading.channels)
    if not found.images and not found.failures and not found.left_out:
        raise ConfigError("no input: the list on stdin is empty.")
    jobs = plan(found.images, lambda path: writers[reading.real(path)])
    _check(out, jobs)
    head = {
        "format": FORMAT,
        "model": {"path": request.model, "sha256": fingerprint(model_file)["sha256"]},
        "options": {
            "tasks": predictor.tasks,
            "set": predictor.options,
            "tile": predictor.tile,
            "raw": request.raw,
            "precision": request.precision,
        },
        "device": str(predictor.device),
    }
    record = Record(out, head, trusted=not request.overwrite)
    skipped = {} if request.overwrite else _skipped(out, jobs, record)
    record.start()
    try:
        _report(found, record, say)
        for number, job in enumerate(jobs):
            progress(number, len(jobs))
            if _key(job) in skipped:
                record.add(_key(job), skipped[_key(job)])
            else:
                _one(job, reading, predictor, writers[reading.real(job.path)], out, record, say)
        progress(len(jobs), len(jobs))
    finally:
        summary = record.finish()
    return summary


def _writers(predictor: Predictor, *, raw: bool, real: bool) -> dict[str, dict[str, Encoder]]:
    sources = predictor.model.config.get("sources", {})
    found = {}
    for key, shape in predictor.shapes.items():
        task = predictor.model.task(key)
        info = SourceInfo.from_config(sources.get(task.source, {}))
        found[key] = encoders(task, info, shape, raw=raw, real=real)
        if not found[key]:
            raise ConfigError(f"task {key!r} answers with {tuple(shape)} numbers, no picture; --raw writes them.")
    return found


def _check(out: Path, jobs: Sequence[Job]) -> None:
    """Refuse outputs behind links and outputs in the place of an input."""
    names = [SUMMARY, JOURNAL, *(name for job in jobs for name in job.outputs.values())]
    check_inside(out, names)
    inputs = {os.path.realpath(job.path) for job in jobs}
    for name in names:
        if str(out / name) in inputs:
            raise ConfigError(f"{out / name}: an input would be written over; name another -o.")


def _skipped(out: Path, jobs: Sequence[Job], record: Record) -> dict[str, dict[str, Any]]:
    """Entries of the jobs that were done before.

    Raises:
        ConfigError: outputs exist that were made of something else.
    """
    skipped, foreign = {}, []
    for job in jobs:
        exist = [name for name in job.outputs.values() if os.path.lexists(out / name)]
        if not exist:
            continue
        entry = record.carried.get(_key(job))
        if entry is None or entry["outputs"] != list(job.outputs.values()):
            foreign.append(exist[0])
        elif entry["status"] != "started":
            try:
                same = all(entry[key] == value for key, value in fingerprint(job.path).items())
            except DataError:
                continue  # reported when its turn comes; nothing is written for it
            if not same:
                foreign.append(exist[0])
            elif len(exist) == len(job.outputs):
                skipped[_key(job)] = {**entry, "path": str(job.path), "status": "skipped"}
    if foreign:
        more = f" and {len(foreign) - 1} more outputs" if foreign[1:] else ""
        why = f"without a {SUMMARY} that lists it"
        if record.existed:
            why = "made with another model or other options"
        if record.same:
            why = "made of another input, or of this one before it changed"
        raise ConfigError(f"{out / foreign[0]}{more}: exists already, {why}; --overwrite, or name another -o.")
    return skipped


def _report(found: Found, record: Record, say: Callable[[str], None]) -> None:
    if found.left_out:
        say(f"densectx: {found.left_out} images of the output folder inside an input folder are left out.")
    for argument, message in found.failures:
        say(f"densectx: {message}")
        record.add(f"\0{argument}", _entry(argument, "failed", error=message))


def _one(
    job: Job,
    reading: Reading,
    predictor: Predictor,
    writers: Mapping[str, Mapping[str, Encoder]],
    out: Path,
    record: Record,
    say: Callable[[str], None],
) -> None:
    """Answer for one image; all of its outputs are written, or none if it is bad."""
    names, mark = list(job.outputs.values()), {}
    try:
        mark = fingerprint(job.path)
        image, deep = reading.image(job.path)
        options = predictor.resolve(image)
        answers = predictor(image, options)
        contents = {
            name: writers[task][suffix](Answer(image, deep, answers[task]))
            for (task, suffix), name in job.outputs.items()
        }
        record.add(_key(job), _entry(str(job.path), "started", mark, names))
        for name, content in contents.items():
            replace(out, name, content)
    except StorageError:
        raise
    except (DensectxError, MemoryError, RuntimeError) as error:
        message = _message(job, error)
        say(f"densectx: {message}")
        record.add(_key(job), _entry(str(job.path), "failed", mark, error=message))
    else:
        entry = _entry(str(job.path), "done", mark, names)
        if estimated := {name: value.item() for name, value in options.items() if isinstance(value, Tensor)}:
            entry["estimated"] = estimated
            said = ", ".join(f"{name} {value:.4g}" for name, value in estimated.items())
            say(f"densectx: {job.path}: estimated {said}.")
        record.add(_key(job), entry)


def _message(job: Job, error: Exception) -> str:
    """One line that names the file; raises errors that are bugs."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        text = "the memory is too small for the image as a whole; cut it, or take another --device."
    elif not isinstance(error, DensectxError):
        raise error
    return text if str(job.path) in text else f"{job.path}: {text}"


def _entry(
    path: str, status: str, mark: Mapping[str, Any] | None = None, outputs: Sequence[str] = (), error: str | None = None
) -> dict[str, Any]:
    blank = {"size": None, "mtime_ns": None, "sha256": None}
    return {"path": path, **(mark or blank), "outputs": list(outputs), "status": status, "error": error}


def _key(job: Job) -> str:
    return next(iter(job.outputs.values()))
