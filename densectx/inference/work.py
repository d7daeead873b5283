"""The work on the images of a run: the next ones are read, and the last answers written, while the model works."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from densectx.data.windowed import WindowedFile, needs_windows
from densectx.errors import DensectxError, StorageError
from densectx.inference.files import fingerprint, replace
from densectx.inference.inputs import Job
from densectx.inference.large import answer, options_of
from densectx.inference.memory import out_of_memory
from densectx.inference.predictor import Predictor
from densectx.inference.reading import Reading
from densectx.inference.record import Entry, Record, entry_of
from densectx.inference.writers import Answer, Encoder
from densectx.tasks.base import Options
from densectx.tasks.options import one_of

_AHEAD: Final = 2  # pictures that are read before the model is through with the one in hand
_BAD: Final = (DensectxError, MemoryError, RuntimeError)  # what may be wrong with one picture


@final
@dataclass
class _Item:
    """A picture on its way.

    Attributes:
        job: what is to do.
        before: its entry, where it was done by an earlier run.
        mark: size, time and hash of its file, as far as it got.
        image: (C, H, W); None for what is not read as a whole.
        deep: whether the file has more than 8 bits a channel.
        options: run-time options, as the model took them.
        answers: by task.
        error: what is wrong with it.
    """

    job: Job
    before: Entry | None = None
    mark: dict[str, Any] = field(default_factory=dict)
    image: Tensor | None = None
    deep: bool = False
    options: Options = field(default_factory=dict)
    answers: Mapping[str, Tensor] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def by_windows(self) -> bool:
        """Whether it is read and written in parts."""
        return self.image is None and self.error is None and self.before is None


@final
class Work:
    """Everything between a list of jobs and their files: read in one thread, answered in the caller's, written in one.

    Files and entries of the record appear in the order of the jobs. At most two pictures are read ahead (or as many
    as go through the model together), and the answers of one group wait while those of the one before are written.

    Args:
        reading: how files are read.
        predictor: the model.
        writers: encoders of answers by task, by what follows the stem.
        out: the output folder, resolved.
        record: of what is done.
        say: takes a line for the user.
        batch: pictures of one size that go through the model together.
    """

    def __init__(
        self,
        reading: Reading,
        predictor: Predictor,
        writers: Mapping[str, Mapping[str, Encoder]],
        out: Path,
        record: Record,
        say: Callable[[str], None],
        batch: int = 1,
    ) -> None:
        self.reading, self.predictor, self.writers, self.out = reading, predictor, writers, out
        self.record, self.say, self.batch = record, say, batch

    def __call__(self, jobs: Sequence[Job], skipped: Mapping[str, Entry], progress: Callable[[int, int], None]) -> None:
        """Do the jobs, those that were done before apart; bad files are told and left behind.

        Args:
            jobs: in order.
            skipped: entries of what was done before, by key.
            progress: takes the number of jobs that are through the model, and of all.

        Raises:
            StorageError: the file system refuses; nothing is written behind that.
        """
        finished, last = 0, None
        with ThreadPoolExecutor(1, "densectx-write") as writer, closing(self._read_ahead(jobs, skipped)) as items:
            for group in self._groups(items):
                progress(finished, len(jobs))
                by_windows = len(group) == 1 and group[0].by_windows
                if not by_windows:
                    self._answer(group)
                if last is not None:
                    last.result()  # raises what stopped it: nothing is written behind that
                last = None
                if by_windows:
                    self._large(group[0])
                else:
                    last = writer.submit(self._settle, group)
                finished += len(group)
            if last is not None:
                last.result()
        progress(len(jobs), len(jobs))

    def _read_ahead(self, jobs: Sequence[Job], skipped: Mapping[str, Entry]) -> Generator[_Item, None, None]:
        """Every job with its picture, in order; some wait in memory."""
        coming: deque[Future[_Item]] = deque()
        with ThreadPoolExecutor(1, "densectx-read") as reader:
            try:
                for job in jobs:
                    coming.append(reader.submit(self._read, _Item(job, skipped.get(job.key))))
                    if len(coming) > max(_AHEAD, self.batch):
                        yield coming.popleft().result()
                while coming:
                    yield coming.popleft().result()
            finally:
                for future in coming:
                    future.cancel()

    def _read(self, item: _Item) -> _Item:
        if item.before is not None:
            return item
        path = item.job.path
        try:
            item.mark = fingerprint(path)
            if not needs_windows(path):
                item.image, item.deep = self.reading.image(path)
        except _BAD as error:
            item.error = error
        return item

    def _groups(self, items: Iterable[_Item]) -> Iterator[list[_Item]]:
        """What goes through the model together: neighbours of one size, as many as are allowed."""
        group: list[_Item] = []
        for item in items:
            if group and _shape(group[0]) != _shape(item):
                yield group
                group = []
            group.append(item)
            if len(group) == self.batch or item.image is None:
                yield group
                group = []
        if group:
            yield group

    def _answer(self, group: Sequence[_Item]) -> None:
        """Fill in options and answers, or errors."""
        images = [item.image for item in group if item.image is not None]
        if len(images) > 1:
            try:
                batch = torch.stack(images)
                options = self.predictor.resolve(batch)
                answers = self.predictor(batch, options)
            except _BAD as error:
                if not isinstance(error, DensectxError) and not out_of_memory(error):
                    raise
            else:
                for number, item in enumerate(group):
                    item.options = one_of(options, number)
                    item.answers = {key: value[number] for key, value in answers.items()}
                return
        for item in group:  # one alone, or each by itself since they do not go together
            if item.image is None:
                continue
            try:
                item.options = self.predictor.resolve(item.image)
                item.answers = self.predictor(item.image, item.options)
            except _BAD as error:
                item.error = error

    def _settle(self, group: Sequence[_Item]) -> None:
        """Write the answers for pictures and what is to be said about them."""
        for item in group:
            if item.before is not None:
                self.record.add(item.job.key, item.before)
            else:
                self._told(item, partial(self._write, item))

    def _write(self, item: _Item) -> None:
        """All files of a picture, once all of them are encoded."""
        if item.error is not None:
            raise item.error
        assert item.image is not None
        contents = {
            name: self.writers[task][suffix](Answer(item.image, item.deep, item.answers[task]))
            for (task, suffix), name in item.job.outputs.items()
        }
        self._started(item)
        for name, content in contents.items():
            replace(self.out, name, content)

    def _large(self, item: _Item) -> None:
        """A picture that is read and written by windows, start to end."""

        def do() -> None:
            source = WindowedFile(item.job.path, self.reading.channels, self.reading.value_range)
            self.predictor.check_windows(item.job.path)
            item.options = options_of(self.predictor, source, self.say)
            self._started(item)
            answer(self.predictor, source, item.options, self.out, item.job.outputs)

        self._told(item, do)

    def _started(self, item: _Item) -> None:
        names = list(item.job.outputs.values())
        self.record.add(item.job.key, entry_of(str(item.job.path), "started", item.mark, names))

    def _told(self, item: _Item, do: Callable[[], None]) -> None:
        """Do it; what came of it goes into the record and to the user."""
        path = str(item.job.path)
        try:
            do()
        except StorageError:
            raise
        except _BAD as error:
            message = _message(path, error)
            self.say(f"densectx: {message}")
            self.record.add(item.job.key, entry_of(path, "failed", item.mark, error=message))
            return
        entry = entry_of(path, "done", item.mark, list(item.job.outputs.values()))
        if estimated := {name: value.item() for name, value in item.options.items() if isinstance(value, Tensor)}:
            entry["estimated"] = estimated
            said = ", ".join(f"{name} {value:.4g}" for name, value in estimated.items())
            self.say(f"densectx: {path}: estimated {said}.")
        self.record.add(item.job.key, entry)


def _shape(item: _Item) -> torch.Size | None:
    return None if item.image is None else item.image.shape


def _message(path: str, error: Exception) -> str:
    """One line that names the file; raises errors that are bugs."""
    text = str(error)
    if out_of_memory(error):
        text = "the memory is too small for the image as a whole; cut it, or take another --device."
    elif not isinstance(error, DensectxError):
        raise error
    return text if path in text else f"{path}: {text}"
