"""Numbers that are not finite, found before an optimizer step makes them the weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import pytorch_lightning as pl
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from densectx.data.module import DataModule, data_of
from densectx.errors import ConfigError, NumericError
from densectx.module import DenseModule
from densectx.types import Batch

FILE: Final = "bad_batch.json"
"""In the run folder: which samples every rank had in the step that was not finite."""

_NAMED = 4  # tensors that a message names


@final
class FiniteGuard(pl.Callback):
    """Refuses a step whose gradient is not finite, and weights or batch statistics that are not.

    One norm a step over gradients and running statistics; only if that is not finite is each looked at, weights
    first: one that is not finite spoils the gradients of the next step that uses it. Gradients are those of all ranks
    together, so every rank decides alike. With float16 the gradient scaler expects overflows and skips their steps
    itself: there weights are looked at instead, gradients only once its scale has fallen below 1. The samples of such
    steps are named in ``RUN/bad_batch.json``.

    Args:
        skip: such steps in a row, by loss or gradient, that are left out instead (no weight moves, the schedule goes
            on); each is reported. Running statistics that took in what is not finite end the run all the same.
    """

    def __init__(self, skip: int = 0) -> None:
        super().__init__()
        if skip < 0:
            raise ConfigError(f"finite guard: skip {skip} is negative.", "trainer.callbacks")
        self.skip = skip
        self.skipped = 0  # in a row
        self._window: list[dict[str, Tensor]] = []  # keys of the samples since the last optimizer step
        self._terms: list[str] = []  # terms of its losses that were not finite
        self._step = -1
        self._running: list[Tensor] = []  # statistics of the module: listing them every step takes longer than the norm
        self._agreed = True  # whether every rank sees what is wrong

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With ``skip`` a loss that is not finite comes through to its gradient."""
        if isinstance(pl_module, DenseModule):
            pl_module.refuses_not_finite = self.skip == 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The module is on its device and a checkpoint is loaded: its running statistics stay these tensors."""
        self._running = [*_statistics(pl_module).values()]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember whose samples the next step is made of."""
        if trainer.global_step != self._step:
            self._step, self._window, self._terms = trainer.global_step, [], []
        self._window.append({source: sample["key"] for source, sample in batch.items() if "key" in sample})

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember what the losses of a window of accumulation were."""
        if isinstance(pl_module, DenseModule):
            self._terms += pl_module.not_finite

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at gradients and running statistics.

        Raises:
            NumericError: one is not finite, more often in a row than may be skipped.
        """
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        expected = scaler is not None and scaler.get_scale() >= 1
        terms = [] if expected else list(dict.fromkeys(self._terms))
        if expected:
            looked_at = [*_lasting(pl_module).values()]
        else:
            trained = (p for group in optimizer.param_groups for p in group["params"])
            looked_at = [*(p.grad for p in trained if p.grad is not None), *self._running]
        if not terms and finite(looked_at):
            self.skipped = 0
            return
        gradients = {} if expected else {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        if named := _not_finite(_lasting(pl_module)):
            self._agreed = "running_" not in named
            raise _error(f"{named} before step {trainer.global_step}")
        named = _not_finite(gradients, "the gradient of ")
        if terms:
            named = f"the loss of {', '.join(terms)} is not finite{'; ' + named if named else ''}"
        if not named:  # finite, only their norm is not
            return
        said = f"{named} at step {trainer.global_step}"
        if self.skipped >= self.skip:
            more = f", {self.skipped} before it were skipped" if self.skip else ""
            raise _error(f"{said}{more}; the weights are those of the step before")
        self.skipped += 1
        for parameter in pl_module.parameters():
            parameter.grad = None
        self._write(trainer, said)
        if trainer.is_global_zero:
            sys.stderr.write(f"densectx: warning: {said}: skipped ({self.skipped} in a row, {self.skip} allowed).\n")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nothing that is not finite is saved.

        Raises:
            NumericError: a weight, a running statistic or an average of one, which the file has in their place, is not
                finite.
        """
        lasting = _lasting(pl_module)
        averages: dict[str, Tensor] = {}
        if "current_model_state" in checkpoint:  # else the file's state_dict is what is looked at already
            averages = {name: value for name, value in checkpoint["state_dict"].items() if name in lasting}
        for tensors, prefix in ((lasting, ""), (averages, "the average of ")):
            if not finite([*tensors.values()]) and (named := _not_finite(tensors, prefix)):
                self._agreed = "running_" not in named
                raise _error(f"{named} after step {trainer.global_step}; it is not saved")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Name the weights behind a loss that is not finite, and write down the batch."""
        if not isinstance(exception, NumericError) or not trainer.training:
            return
        said = str(exception)
        if (named := _not_finite(_lasting(pl_module))) and named not in said:
            exception.args = (f"{named}; {said}",)
        self._write(trainer, str(exception))

    def _write(self, trainer: pl.Trainer, what: str) -> None:
        """Keep the samples of all ranks; only of this one if the others may be elsewhere."""
        data = data_of(trainer)
        own = {"rank": trainer.global_rank, "samples": [_samples(keys, data) for keys in self._window]}
        ranks: list[Any] = [own]
        if trainer.world_size > 1 and self._agreed:
            ranks = [None] * trainer.world_size
            distributed.all_gather_object(ranks, own)
        if not trainer.is_global_zero:
            return
        content = {
            "format": 1,
            "what": what,
            "step": trainer.global_step,
            "seed": data.seed if data else None,
            "ranks": ranks,
        }
        path = Path(trainer.default_root_dir) / FILE
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every value is finite; wrongly False where only their common norm overflows."""
    return not tensors or bool(get_total_norm(tensors).isfinite())


def _lasting(module: nn.Module) -> dict[str, Tensor]:
    """What outlives a step: weights and running statistics."""
    return {**{name: parameter.detach() for name, parameter in module.named_parameters()}, **_statistics(module)}


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    """Running statistics of batch norms."""
    return {n: buffer for n, buffer in module.named_buffers() if n.endswith(("running_mean", "running_var"))}


def _not_finite(tensors: Mapping[str, Tensor], prefix: str = "") -> str:
    """Which are not finite, as the beginning of a sentence; empty if all are."""
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    more = f" and of {len(bad) - _NAMED} more" if prefix else f" and {len(bad) - _NAMED} more"
    shown = ", ".join(bad[:_NAMED]) + (more if len(bad) > _NAMED else "")
    return f"{prefix}{shown} {'is' if len(bad) == 1 else 'are'} not finite" if bad else ""


def _error(what: str) -> NumericError:
    return NumericError(
        f"{what}. The samples of the step are in {FILE} of the run folder. Try a lower learning rate,"
        " trainer.gradient_clip_val or float32."
    )


def _samples(keys: Mapping[str, Tensor], data: DataModule | None) -> dict[str, list[dict[str, Any]]]:
    """Pass, index and name of the samples of a batch, by source."""
    return {source: list(_named(source, key.tolist(), data)) for source, key in keys.items()}


def _named(source: str, keys: Sequence[Sequence[int]], data: DataModule | None) -> Iterator[dict[str, Any]]:
    for pass_, index in keys:
        name = data.sample_name(source, index) if data else None
        yield {"pass": pass_, "index": index, "name": name}
