"""Samples that cannot be read and are left out of training: found by loader processes, known to the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import final

import torch

from densectx.data.base import Dataset
from densectx.errors import DataError
from densectx.types import Sample


@final
class Corrupt:
    """Training samples that could not be read, one flag a sample in memory that loader processes share.

    Each is reported on stderr when it is found (by a loader process perhaps) and not tried again.

    Args:
        datasets: by source name, none empty.
    """

    def __init__(self, datasets: Mapping[str, Dataset]) -> None:
        self._datasets = dict(datasets)
        self._bad = {source: torch.zeros(len(data), dtype=torch.bool) for source, data in datasets.items()}
        for bad in self._bad.values():
            bad.share_memory_()  # type: ignore[no-untyped-call]

    def read(self, source: str, index: int) -> tuple[int, Sample]:
        """The sample, or the next of its source that can be read (after the last comes the first), and its index.

        Raises:
            DataError: none can be read.
        """
        dataset, bad = self._datasets[source], self._bad[source]
        for place in range(index, index + len(bad)):
            found = place % len(bad)
            if bad[found]:
                continue
            try:
                return found, dataset[found]
            except DataError as error:
                bad[found] = True
                _warn(f"{source}: {_named(dataset.name(found), str(error))} Skipped (data.on_corrupt).")
        try:  # once more for the reason: other loader processes may have found every one of them
            return index, dataset[index]
        except DataError as error:
            reason = _named(dataset.name(index), str(error))
            raise DataError(f"data.sources.{source}: none of {len(bad)} samples can be read. {reason}") from error

    def names(self) -> dict[str, list[str]]:
        """What was skipped so far by this rank: ``{source: [names]}``, without sources that are sound."""
        found = {source: bad.nonzero().flatten().tolist() for source, bad in self._bad.items()}
        return {s: [self._datasets[s].name(index) for index in indices] for s, indices in found.items() if indices}

    def report(self) -> None:
        """One line a source on stderr that counts and names them; nothing if all are sound."""
        for source, names in self.names().items():
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            _warn(f"{source}: {len(names)} of {len(self._bad[source])} training samples were skipped: {shown}")


def _warn(message: str) -> None:
    sys.stderr.write(f"densectx: warning: data.sources.{message}\n")
    sys.stderr.flush()


def _named(name: str, reason: str) -> str:
    return reason if name in reason else f"{name}: {reason}"
