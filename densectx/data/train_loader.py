"""The training loader: endless in meaning, and aware of the windows of gradient accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, final

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from densectx.types import Batch, Place


@final
class TrainLoader(DataLoader[Any]):
    """Tells Lightning that it can resume, which spares a false warning; where to is the sampler's matter.

    While gradients are accumulated over N batches, the N batches of a window are fetched before the first is given
    out (:class:`densectx.types.Windowed`). Lightning begins a window at the start of an epoch and after each optimizer
    step, and ends it at the end of the epoch at the latest; so does this, also where it goes on inside a window.

    Attributes:
        trainer: that asks for batches; None where none does.
    """

    trainer: pl.Trainer | None = None
    place: Place | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # what iterates is nobody's business
        return self._placed(super().__iter__())

    def _placed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while window := list(islice(batches, self._size())):
            for index, batch in enumerate(window):
                self.place = Place(window, index) if self._accumulates else None
                yield batch

    @property
    def _accumulates(self) -> bool:
        return self.trainer is not None and self.trainer.accumulate_grad_batches > 1

    def _size(self) -> int:
        """Batches of the window that begins now."""
        if self.trainer is None or not self._accumulates:
            return 1
        # Lightning asks for a batch when the one before is done, so the count is that of the batches before
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        size, left = self.trainer.accumulate_grad_batches, int(self.trainer.num_training_batches) - done
        return max(1, min(size - done % size, left))

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""
