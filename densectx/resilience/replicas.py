"""Several ranks train one model: the same start, the same gradients, the same weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

import densectx
from densectx.data.fingerprint import Snapshot, fingerprint, take
from densectx.data.module import data_of
from densectx.errors import ConfigError, DistributedError
from densectx.module import DenseModule
from densectx.resuming import differences

_NAMED = 6  # keys or parameters that a message names
_CHUNK = 1 << 22  # numbers of a parameter that a checksum makes 64 bits wide at a time


@final
class Replicas(pl.Callback):
    """Compares the ranks of a run; nothing on one process.

    Before the first step: config, version and code of densectx, torch, the listing of the data, and the step that each
    goes on from. Then and every so many steps: a checksum of the bits of each parameter. After every backward pass:
    whether each trained parameter took part in the loss, since plain DDP waits for ever for one that did not.

    Args:
        every_n_steps: optimizer steps between two comparisons of the weights.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ConfigError(f"replicas: every_n_steps {every_n_steps} must be positive.", "trainer.callbacks")
        self.every_n_steps = every_n_steps
        self._step = -1
        self.data = ""  # fingerprint, where the data were listed already

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare what the ranks were started with.

        Raises:
            ConfigError: a rank differs; it and what differs are named.
        """
        if trainer.world_size == 1 or not isinstance(pl_module, DenseModule):
            return
        data = data_of(trainer)
        listed = self.data or (fingerprint(take(data.datasets)) if data else "")
        own = {
            "config": pl_module.config,
            "densectx": f"{densectx.__version__}, source {_source()}",
            "torch": torch.__version__,
            "data": listed,
        }
        found: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(found, json.loads(json.dumps(own, default=str)))
        for rank, other in enumerate(found):
            if said := _difference(found[0], other):
                raise ConfigError(
                    f"rank {rank} was not started like rank 0: {said}. Start every rank with the same config, code and"
                    " data."
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the first step and the weights that it begins with.

        Raises:
            DistributedError: a rank did not find the checkpoint that the first goes on from.
        """
        self._step = trainer.global_step
        if trainer.world_size > 1:
            steps: list[Any] = [None] * trainer.world_size
            distributed.all_gather_object(steps, self._step)
            for rank, step in enumerate(steps):
                if step != steps[0]:
                    raise DistributedError(
                        f"rank {rank} goes on from step {step}, rank 0 from step {steps[0]}: they do not see the same"
                        " run folder. trainer.default_root_dir must lie on a file system that all share; if it does,"
                        " and shows new files late, start once more."
                    )
        self._compare(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the weights where it is due."""
        step = trainer.global_step
        if step != self._step and step % self.every_n_steps == 0:
            self._compare(trainer, pl_module)
        self._step = step

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that every trained parameter took part.

        Raises:
            DistributedError: some did not; they are named.
        """
        wrapped = trainer.strategy.model
        if not isinstance(wrapped, DistributedDataParallel) or wrapped.find_unused_parameters:
            return
        idle = [name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]
        if idle:
            shown = ", ".join(idle[:_NAMED]) + (f" and {len(idle) - _NAMED} more" if len(idle) > _NAMED else "")
            raise DistributedError(
                f"rank {trainer.global_rank}: the loss of step {trainer.global_step} does not depend on {shown}; the"
                " other ranks would wait for ever for their gradients. Use them in every step of every rank (add"
                " 0 times their sum), do not register them, freeze them (model.freeze), or take"
                " trainer.strategy: ddp_find_unused_parameters_true."
            )

    def _compare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """See that the weights of all ranks are the same bits.

        Raises:
            DistributedError: on every rank; the first rank that differs and its parameters are named.
        """
        if trainer.world_size == 1:
            return
        named = dict(module.named_parameters())
        own = torch.stack([checksum(parameter) for parameter in named.values()])
        found = [torch.empty_like(own) for _ in range(trainer.world_size)]
        distributed.all_gather(found, own)
        for rank, other in enumerate(found):
            bad = [name for name, same in zip(named, (other == found[0]).tolist(), strict=True) if not same]
            if bad:
                shown = ", ".join(bad[:_NAMED]) + (f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
                raise DistributedError(
                    f"the weights of rank {rank} are not those of rank 0 at step {trainer.global_step}: {shown}. What"
                    " changes weights outside the optimizer step (a callback, a hook) must do the same on every rank;"
                    " go on from a checkpoint before, which holds those of rank 0."
                )


def expect_data(trainer: pl.Trainer, listed: Snapshot) -> None:
    """Let :class:`Replicas` compare a listing of the data that is there already: to make one takes long."""
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if isinstance(callback, Replicas) and trainer.world_size > 1:
            callback.data = fingerprint(listed)


def checksum(parameter: Tensor) -> Tensor:
    """Of the bits, not of the numbers: an int64 scalar on the parameter's device."""
    data = parameter.detach().contiguous().flatten()
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for number, bits in enumerate(torch.split(data.view(width), _CHUNK)):
        start = 1 + number * _CHUNK
        place = torch.arange(start, start + len(bits), device=bits.device)
        total += ((2 * place + 1) * bits).sum()  # wraps; exchanged values change it too
    return total


def _difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs between the facts of two ranks, empty if nothing does."""
    said = []
    if keys := [key for key, _, _ in differences(first["config"], other["config"])]:
        said.append(f"its config differs in {', '.join(keys[:_NAMED])}{', ...' if keys[_NAMED:] else ''}")
    versions = [key for key in ("densectx", "torch") if first[key] != other[key]]
    said += [f"{key} is {other[key]}, not {first[key]}" for key in versions]
    if first["data"] != other["data"]:
        said.append("its data are others (names, sizes or contents of the files)")
    return "; ".join(said)


def _source() -> str:
    """8 hexadecimal digits of this package's source, which a version alone does not tell apart."""
    digest = hashlib.sha256()
    root = Path(densectx.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]
