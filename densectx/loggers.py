"""The run's ``metrics.csv``."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from os import SEEK_END
from pathlib import Path
from typing import Any, final

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only


@final
class MetricsFile(Logger):
    """One row a step with a column a metric, written at once, so that a killed run keeps what it measured.

    Unlike Lightning's CSV logger it goes on in the file of a resumed run: rows of steps that are done again are
    replaced, the others stay.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.rows: dict[int, dict[str, str]] | None = None  # read when the first value comes
        self.columns = ["step"]
        self.start = 0  # of the last row in the file

    @property
    def name(self) -> str:
        """Nothing: the file lies in the run folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Nothing."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of a step."""
        step = step or 0
        opened = self.rows is None
        if self.rows is None:
            self.rows = self._read(step)
        fresh = [name for name in metrics if name not in self.columns and name != "step"]
        self.columns += fresh
        last = next(reversed(self.rows), None)
        self.rows.setdefault(step, {"step": str(step)}).update({k: f"{v:.9g}" for k, v in metrics.items()})
        if opened or fresh or last is None or step < last:  # opened: rows of steps done again are still in the file
            self._write()
            return
        with self.path.open("r+", newline="", encoding="utf-8") as file:
            if step == last:  # more values of the last row: it is written again
                file.seek(self.start)
                file.truncate()
            else:
                self.start = file.seek(0, SEEK_END)
            csv.DictWriter(file, self.columns).writerow(self.rows[step])

    def _read(self, before: int) -> dict[int, dict[str, str]]:
        """What an earlier part of the run measured before this step."""
        if not self.path.exists():
            return {}
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = {int(row["step"]): row for row in reader if int(row["step"]) < before}
        self.columns = list(reader.fieldnames or self.columns)
        return rows

    def _write(self) -> None:
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            for row in (self.rows or {}).values():
                self.start = file.tell()
                writer.writerow(row)
        temporary.replace(self.path)
