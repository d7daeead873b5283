"""A model on image files: what is to do, the loop over them, and the record of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from densectx.checkpoint import load, locate
from densectx.data.windowed import needs_windows
from densectx.errors import ConfigError, DataError, DensectxError
from densectx.inference.files import check_inside, fingerprint
from densectx.inference.inputs import Found, Job, collect, plan
from densectx.inference.large import suffixes
from densectx.inference.overlay import legible
from densectx.inference.predictor import Predictor, device_of
from densectx.inference.ranks import Ranks
from densectx.inference.reading import Reading
from densectx.inference.record import FORMAT, JOURNAL, SUMMARY, Entry, Record, entry_of
from densectx.inference.tiler import Setting
from densectx.inference.work import Work
from densectx.inference.writers import Encoder, encoders
from densectx.types import SourceInfo

_GRACE: Final = 10.0  # seconds that interrupted processes are waited for


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        model: checkpoint, run folder or name.
        inputs: files, folders, globs, ``-``.
        out: the output folder.
        tasks: keys, None for all.
        options: run-time options of the tasks.
        tile: how large images are taken, see :meth:`densectx.inference.tiler.Setting.parse`; None for automatic.
        raw: whether numbers are written too.
        device: ``"auto"`` or a device of torch.
        precision: ``"32"`` or ``"bf16"`` (autocast).
        overwrite: whether existing outputs are replaced.
        batch: pictures of one size that go through the model together.
        tta: whether answers are averaged over views, see :mod:`densectx.inference.tta`.
    """

    model: str
    inputs: Sequence[str]
    out: Path
    tasks: Sequence[str] | None = None
    options: Mapping[str, float] | None = None
    tile: str | None = None
    raw: bool = False
    device: str = "auto"
    precision: str = "32"
    overwrite: bool = False
    batch: int = 1
    tta: bool = False


@final
class _Made:
    """What a request is answered with.

    Args:
        request: what is asked for.
        say: takes a line for the user.
        ranks: the processes that share the work; another than the first one joins the record that this has started.

    Raises:
        ConfigError, CheckpointError, PluginError: as :func:`run`.
    """

    def __init__(self, request: Request, say: Callable[[str], None], ranks: Ranks | None = None) -> None:
        joined = ranks if ranks is not None and ranks.rank > 0 else None
        # the links of a run that goes on may lead elsewhere while this one answers
        self.file = joined.model() if joined else locate(request.model).resolve()
        self.request, self.say = request, say
        device = device_of(request.device)
        self.predictor = Predictor(
            load(self.file),
            request.tasks,
            request.options or {},
            device,
            request.precision,
            Setting.parse(request.tile),
            say,
            tta=request.tta,
            ids=not (request.raw or request.tta),
            sharing=1 if ranks is None else ranks.sharing(device),
        )
        self.reading = Reading.of(self.predictor.model, self.predictor.tasks)
        self.writers = {real: _writers(self.predictor, raw=request.raw, real=real) for real in (False, True)}
        self.out = Path(os.path.realpath(request.out))
        if os.path.exists(self.out) and not os.path.isdir(self.out):
            raise ConfigError(f"-o {request.out}: is a file, not a folder.")
        head = {
            "format": FORMAT,
            "model": {"path": request.model, "sha256": fingerprint(self.file)["sha256"]},
            "options": {
                "tasks": self.predictor.tasks,
                "set": self.predictor.options,
                "tile": request.tile or self.predictor.tiling.setting.mode or "auto",
                "raw": request.raw,
                "precision": request.precision,
                **({"tta": True} if request.tta else {}),
            },
            "device": str(self.predictor.device),
        }
        self.record = Record(self.out, head, trusted=not request.overwrite, join=joined is not None)

    def planned(self) -> tuple[Found, list[Job], dict[str, Entry]]:
        """What the inputs are, what is to do for them, and the entries of what was done before."""
        request, predictor, reading = self.request, self.predictor, self.reading
        found = collect(
            request.inputs, self.out, predictor.tasks, overwrite=request.overwrite, channels=reading.channels
        )
        if not found.images and not found.failures and not found.left_out:
            raise ConfigError("no input: the list on stdin is empty.")
        by_windows = suffixes(predictor, raw=request.raw)
        jobs = plan(found.images, lambda path: by_windows if needs_windows(path) else self.writers[reading.real(path)])
        jobs = _nameable(self.out, jobs, found)
        _check(self.out, jobs)
        return found, jobs, {} if request.overwrite else _skipped(self.out, jobs, self.record)

    def illegible(self) -> dict[str, int]:
        """Numbers of the classes that legends cannot name."""
        sources = self.predictor.model.config.get("sources", {})
        tasks = map(self.predictor.model.task, self.predictor.tasks)
        shown = [sources.get(task.source, {}) for task in tasks if task.output in ("classes", "labels")]
        classes = (enumerate(SourceInfo.from_config(info).classes) for info in shown)
        return {name: number for numbered in classes for number, name in numbered if not legible(name)}

    def work(self, jobs: Sequence[Job], skipped: Mapping[str, Entry], progress: Callable[[int, int], None]) -> None:
        """Do jobs."""
        writers = {key: self.writers[False][key] | self.writers[True][key] for key in self.predictor.tasks}
        work = Work(self.reading, self.predictor, writers, self.out, self.record, self.say, self.request.batch)
        work(jobs, skipped, progress)


def run(
    request: Request, say: Callable[[str], None], progress: Callable[[int, int], None], ranks: Ranks | None = None
) -> tuple[dict[str, Any], int]:
    """Answer for all inputs of a request and write the answers; bad files are told and left behind.

    Args:
        request: what is asked for.
        say: takes a line for the user, at once.
        progress: takes the number of inputs finished, and of all.
        ranks: the processes that share the work, this one the first of them; None for this one alone.

    Returns:
        The summary as it is in ``summary.json``: ``{format, model, options, device, inputs, earlier}``. And the worst
        exit status: 0, 3 if an input was bad, or that of another process.

    Raises:
        ConfigError: impossible options, or outputs that must not be written; nothing has been written then.
        CheckpointError, PluginError: the model cannot be loaded.
        StorageError: the file system refuses.
    """
    try:
        made = _Made(request, say, ranks)
        if request.tile is None and made.predictor.tiling.setting.mode == "paper":
            say("densectx: images are taken in the tiles of the published network (--tile paper).")
        if lacking := made.illegible():
            told = ", ".join(f"{number} {name}" for name, number in lacking.items())
            say(f"densectx: the font of the legends lacks letters of classes, whose numbers stand there: {told}.")
        found, jobs, skipped = made.planned()
        made.record.start()
    except BaseException as error:
        if ranks is not None:
            ranks.share(None)
            ranks.ended(None if isinstance(error, Exception) else _GRACE)  # they must have heard of it
        raise
    status = 0
    try:
        _report(found, made.record, say)
        if ranks is None:
            made.work(jobs, skipped, progress)
        else:
            status = _together(made, ranks, jobs, skipped, progress)
    finally:
        if ranks is not None:
            made.record.take_in(job.key for job in jobs)
        summary = made.record.finish()
    bad = any(entry["status"] == "failed" for entry in summary["inputs"])
    return summary, max(status, 3 if bad else 0)


def _together(
    made: _Made,
    ranks: Ranks,
    jobs: Sequence[Job],
    skipped: Mapping[str, Entry],
    progress: Callable[[int, int], None],
) -> int:
    """The first process's part of the work, and until the others are through; the worst of their statuses."""
    for key, entry in skipped.items():
        made.record.add(key, entry)
    left = [job for job in jobs if job.key not in skipped]
    mine = ranks.share(left, made.file)
    try:
        made.work(mine, {}, ranks.counted(progress, len(left)))
        status = ranks.ended()
    except KeyboardInterrupt:  # the others are interrupted too
        ranks.ended(_GRACE)
        raise
    except Exception:
        ranks.ended()
        raise
    progress(len(left), len(left))
    return status


def assist(request: Request, say: Callable[[str], None], ranks: Ranks) -> None:
    """Do the share of another process than the first, which hears how it ended.

    Args:
        request: as the first one's.
        say: takes a line for the user, at once.
        ranks: this process among the others.
    """
    jobs = ranks.shared()
    if jobs is None:
        ranks.end(0)
        return
    status = 1
    try:
        made = _Made(request, say, ranks)
        made.work(jobs, {}, ranks.counted(lambda finished, total: None, len(jobs)))
        status = 0
    except DensectxError as error:
        say(f"densectx: error: {error}")
        status = error.status
    except KeyboardInterrupt:
        status = 130
    finally:
        ranks.end(status)


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


def _nameable(out: Path, jobs: Sequence[Job], found: Found) -> list[Job]:
    """The jobs whose outputs the file system has names for; the others are failures before anything is written."""
    place = next(folder for folder in (out, *out.parents) if folder.is_dir())
    kept = []
    for job in jobs:
        parts = {part for name in job.outputs.values() for part in name.split("/")}
        if any(_too_long(place / part) for part in parts):
            told = f"{job.path}: the name of its output is too long for the file system; rename it."
            found.failures.append((str(job.path), told))
        else:
            kept.append(job)
    return kept


def _too_long(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


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
        entry = record.carried.get(job.key)
        if entry is None or entry["outputs"] != list(job.outputs.values()):
            foreign.append(exist[0])
        elif entry["status"] != "started":
            try:
                mark = fingerprint(job.path)
            except DataError:
                continue  # reported when its turn comes; nothing is written for it
            if entry["sha256"] != mark["sha256"]:  # a copy, or a file that was only touched, is the same input
                foreign.append(exist[0])
            elif len(exist) == len(job.outputs):
                skipped[job.key] = {**entry, **mark, "path": str(job.path), "status": "skipped"}
    if foreign:
        more = f" and {len(foreign) - 1} more outputs" if foreign[1:] else ""
        why = f"without a {SUMMARY} that lists it"
        if record.existed:
            why = "made with another model or other options"
        if record.same:
            why = "made of another input, or of this one before it changed"
        raise ConfigError(
            f"{out / foreign[0]}{more}: exists already, {why}; name another -o, --overwrite to make all anew, or delete"
            " what that input has there to make only that."
        )
    return skipped


def _report(found: Found, record: Record, say: Callable[[str], None]) -> None:
    if found.left_out:
        say(f"densectx: {found.left_out} images of the output folder inside an input folder are left out.")
    if found.unread:
        kinds = ", ".join(sorted(suffix or "none" for suffix in found.unread))
        say(f"densectx: {found.unread.total()} files with other extensions are left out ({kinds}).")
    for argument, message in found.failures:
        say(f"densectx: {message}")
        record.add(f"\0{argument}", entry_of(argument, "failed", error=message))
