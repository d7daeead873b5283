"""What a run measured while it went: ``metrics.csv`` as series."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from densectx.errors import DataError


@final
@dataclass(frozen=True)
class Series:
    """A metric over steps.

    Attributes:
        steps: optimizer steps, rising.
        values: as many finite numbers.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]


@final
class History:
    """The columns of a run's ``metrics.csv``.

    Args:
        series: {column: what was measured}; columns without a single finite number are left out.
        rows: {step: {column: value}} with the values that are not finite.
    """

    def __init__(self, series: Mapping[str, Series], rows: Mapping[int, Mapping[str, float]]) -> None:
        self.series, self.rows = dict(series), {step: dict(row) for step, row in rows.items()}

    @property
    def steps(self) -> int:
        """Optimizer steps that were logged: the last row's, counted from 1."""
        return max(self.rows, default=-1) + 1

    def validation(self, step: int | None) -> tuple[int, dict[str, float]]:
        """The validation at a checkpoint: (steps done, {``val/...``: value}), empty without one.

        Lightning writes the validation after step N into the row of step N - 1, which is the last one that was taken.

        Args:
            step: of the checkpoint, null for the last validation.
        """
        validated = [at for at, row in self.rows.items() if any(key.startswith("val/") for key in row)]
        wanted = [at for at in validated if step is None or at == step - 1]
        if not wanted:
            return 0, {}
        row = self.rows[max(wanted)]
        return max(wanted) + 1, {key: value for key, value in row.items() if key.startswith("val/")}


def read_history(path: Path) -> History:
    """The history of a run, empty where it has no ``metrics.csv``.

    Raises:
        DataError: the file is no such table.
    """
    if not path.exists():
        return History({}, {})
    rows: dict[int, dict[str, float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for cells in csv.DictReader(file):
                values = {key: float(text) for key, text in cells.items() if key and key != "step" and text}
                rows[int(cells["step"])] = values
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{path}: is no table of metrics by step ({type(error).__name__}: {error}).") from None
    columns: dict[str, list[tuple[int, float]]] = {}
    for step in sorted(rows):
        for key, value in rows[step].items():
            if math.isfinite(value):
                columns.setdefault(key, []).append((step + 1, value))
    series = {key: Series(*map(tuple, zip(*points, strict=True))) for key, points in columns.items()}
    return History(series, dict(sorted(rows.items())))
