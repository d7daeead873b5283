"""All sources of a config as the loaders that Lightning asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, Literal, TypeAlias, final, get_args

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from densectx.data.base import Dataset, Split
from densectx.data.collate import Collate
from densectx.data.corrupt import Corrupt
from densectx.data.items import Items
from densectx.data.streams import EvalSampler, Sampling, StepSampler
from densectx.data.transforms import Augment
from densectx.errors import ConfigError, DataError, suggest
from densectx.registry import DATASETS
from densectx.types import SourceInfo

OnCorrupt: TypeAlias = Literal["error", "skip"]

WORKER_TIMEOUT = 300.0
"""Seconds after which a worker that delivers nothing ends the run."""

_RESERVED = ("batch_size", "eval_batch_size", "augment")


@final
class DataModule(pl.LightningDataModule):
    """Sources by name; batches are ``{source: collated sample}``, see :data:`densectx.types.Batch`.

    The samples of a training step, their order and their augmentation are functions of (seed, step, rank, number of
    ranks), so a run goes on exactly at any step and with any number of workers. Lightning's own sampler must be off
    (``use_distributed_sampler=False``): ranks are shared out here.

    Args:
        sources: spec of a data set by source name, with ``batch_size`` (per rank, default 4), ``eval_batch_size``
            (default 1) and ``augment`` (training only, see :class:`densectx.data.transforms.Augment`).
        sampling: ``joint``: a batch of every source at every step; ``alternate``: one source a step, in turn.
        num_workers: loader processes of each loader; torch gives each one thread.
        seed: of order and augmentation.
        steps_per_epoch: default: as many as show the longest source once.
        on_corrupt: what a training sample that cannot be read does: ``error`` ends the run; ``skip`` takes the next
            sample of the source instead, names each on stderr once and counts them at the end. Evaluation always
            ends with an error, since its numbers would be of other data.

    Raises:
        ConfigError: unknown names or options, with their key path.
    """

    def __init__(
        self,
        sources: dict[str, Any],
        sampling: Literal["joint", "alternate"] = "joint",
        num_workers: int = 2,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        on_corrupt: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__()
        if not isinstance(sources, Mapping) or not sources:
            raise ConfigError(f"data.sources: expected a mapping of source names to data sets, got {sources!r}.")
        _one_of(sampling, get_args(Sampling), "data.sampling")
        _one_of(on_corrupt, get_args(OnCorrupt), "data.on_corrupt")
        self.sampling: Sampling = sampling
        self.on_corrupt: OnCorrupt = on_corrupt
        self.num_workers = _count(num_workers, "data.num_workers", least=0)
        self.seed = seed
        self.steps_per_epoch = None if steps_per_epoch is None else _count(steps_per_epoch, "data.steps_per_epoch")
        self.batch_sizes: dict[str, int] = {}
        self.eval_batch_sizes: dict[str, int] = {}
        self.augments: dict[str, Augment | None] = {}
        self.datasets: dict[Split, dict[str, Dataset]] = {split: {} for split in get_args(Split)}
        for name, spec in sources.items():
            self._add(name, spec)
        self._steps = 0
        self._corrupt: Corrupt | None = None

    def _add(self, name: str, spec: Any) -> None:
        where = f"data.sources.{name}"
        spec = {"name": spec} if isinstance(spec, str) else spec
        if not isinstance(spec, Mapping):
            raise ConfigError(f"{where}: expected a data set as a name or a mapping with 'name', got {spec!r}.")
        self.batch_sizes[name] = _count(spec.get("batch_size", 4), f"{where}.batch_size")
        self.eval_batch_sizes[name] = _count(spec.get("eval_batch_size", 1), f"{where}.eval_batch_size")
        own = {key: value for key, value in spec.items() if key not in _RESERVED}
        for split, datasets in self.datasets.items():
            datasets[name] = DATASETS.build(own, where, also=_RESERVED, split=split)
        given, info = spec.get("augment"), self.datasets["train"][name].info
        self.augments[name] = None if given is None else Augment.from_config(given, f"{where}.augment", info)

    def info(self) -> dict[str, SourceInfo]:
        """What a model must know of each source; reads no file. ``size`` is that after augmentation."""
        infos = {name: dataset.info for name, dataset in self.datasets["train"].items()}
        sizes = {name: augment.size for name, augment in self.augments.items() if augment is not None}
        return {name: replace(info, size=sizes.get(name, info.size)) for name, info in infos.items()}

    def sample_name(self, source: str, index: int, split: Split = "train") -> str:
        """What messages and reports call a sample."""
        return self.datasets[split][source].name(index)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of this rank, endless in meaning; an iteration is an epoch that starts where the run stands.

        Raises:
            DataError: a source has no training samples.
        """
        lengths = {name: len(dataset) for name, dataset in self.datasets["train"].items()}
        for name, length in lengths.items():
            if length == 0:
                raise DataError(f"data.sources.{name}: no training samples.")
        world, rank = self._ranks()
        longest = max(ceil(length / (self.batch_sizes[name] * world)) for name, length in lengths.items())
        sampler = StepSampler(
            lengths,
            self.batch_sizes,
            sampling=self.sampling,
            seed=self.seed,
            world=world,
            rank=rank,
            steps=self.steps_per_epoch or longest * (len(lengths) if self.sampling == "alternate" else 1),
            start=self._steps_done,
        )
        self._corrupt = Corrupt(self.datasets["train"]) if self.on_corrupt == "skip" else None
        items = Items(self.datasets["train"], self.augments, self.seed, self._corrupt)
        fix = "set data.sources.{source}.augment.crop or augment.pad, or batch_size 1"
        pad = [name for name, augment in self.augments.items() if augment is not None and augment.pad]
        return _TrainLoader(items, **self._options(sampler, fix, pad))

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation sample exactly once over all ranks; the sources in turn."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Every test sample exactly once over all ranks; the sources in turn."""
        return self._eval_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """``{"steps": training batches whose step is done}``."""
        return {"steps": self._steps_done()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after that many batches."""
        self._steps = int(state_dict["steps"])

    def skipped(self) -> dict[str, list[str]]:
        """Training samples that this rank has passed over as damaged: ``{source: [names]}``, see ``on_corrupt``."""
        return self._corrupt.names() if self._corrupt else {}

    def teardown(self, stage: str) -> None:
        """At the end of training: says what was skipped."""
        if self._corrupt and stage == "fit":
            self._corrupt.report()

    def _eval_loader(self, split: Split) -> DataLoader[Any]:
        world, rank = self._ranks()
        lengths = {name: len(dataset) for name, dataset in self.datasets[split].items()}
        if 0 < max(lengths.values()) < world:
            raise ConfigError(
                f"no source has a {split} sample for each of {world} ranks ({lengths}); evaluate on fewer devices."
            )
        sampler = EvalSampler(lengths, self.eval_batch_sizes, world=world, rank=rank)
        items = Items(self.datasets[split], dict.fromkeys(lengths), self.seed)
        return DataLoader(items, **self._options(sampler, "set data.sources.{source}.eval_batch_size to 1"))

    def _options(self, sampler: StepSampler | EvalSampler, fix: str, pad: Sequence[str] = ()) -> dict[str, Any]:
        infos = {name: dataset.info for name, dataset in self.datasets["train"].items()}
        return {
            "batch_sampler": sampler,
            "collate_fn": Collate(infos, fix, pad),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "timeout": WORKER_TIMEOUT if self.num_workers else 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _steps_done(self) -> int:
        """Lightning's count over the run, restored by it on resume.

        ``processed`` alone is right in every hook: ``ready`` is ahead inside a step, ``completed`` is behind in
        ``on_train_batch_end``, where checkpoints are written.
        """
        if self.trainer is None:
            return self._steps
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()
        return int(progress["total"]["processed"])


@final
class _TrainLoader(DataLoader[Any]):
    """Tells Lightning that it can resume, which spares a false warning; where to is the sampler's matter."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _one_of(value: Any, known: Sequence[str], where: str) -> None:
    if value not in known:
        raise ConfigError(f"{where}: expected {' or '.join(known)}, got {value!r}{suggest(str(value), known)}")


def _count(value: Any, where: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where}: expected a whole number of at least {least}, got {value!r}.")
    return value
