"""All sources of a config as the loaders that Lightning asks for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, Final, Literal, TypeAlias, final, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import DataLoader

from densectx.data.base import Dataset, Split
from densectx.data.collate import Collate
from densectx.data.corrupt import Corrupt
from densectx.data.items import Items
from densectx.data.progress import Progress, leave_signals_to_the_run
from densectx.data.sampling import Sampling, check_sampling, make_sampling
from densectx.data.streams import BEGIN, EvalSampler, Origin, StepSampler
from densectx.data.train_loader import TrainLoader
from densectx.data.transforms import Augment
from densectx.errors import ConfigError, DataError, suggest
from densectx.registry import DATASETS
from densectx.types import Batch, SourceInfo

_READ = ("key", "surround")  # of a sample: numbers for the CPU

OnCorrupt: TypeAlias = Literal["error", "skip"]

WORKER_TIMEOUT = 120.0
"""Seconds after which loader processes that deliver no batch end the run, unless ``data.timeout`` says otherwise."""

RESERVED = ("batch_size", "eval_batch_size", "augment")
"""Options of a source that are not its data set's."""


@final
class DataModule(pl.LightningDataModule):
    """Sources by name; batches are ``{source: collated sample}``, see :data:`densectx.types.Batch`.

    The samples of a training step, their order and their augmentation are functions of (seed, step, rank, number of
    ranks), so a run goes on exactly at any step and with any number of workers. With other ranks or batch sizes it goes
    on at the next sample of every source. Lightning's own sampler must be off (``use_distributed_sampler=False``):
    ranks are shared out here.

    Args:
        sources: spec of a data set by source name, with ``batch_size`` (per rank, default 4), ``eval_batch_size``
            (default 1) and ``augment`` (training only, see :class:`densectx.data.transforms.Augment`).
        sampling: ``joint``: a batch of every source at every step; ``alternate``: one source a step, in turn; by
            ratio, temperature or in phases, see :func:`densectx.data.sampling.make_sampling`.
        num_workers: loader processes of each loader; torch gives each one thread.
        seed: of order and augmentation.
        steps_per_epoch: default: as many as show the longest source once.
        timeout: seconds that a batch may take the loader processes (default 120) before the run ends with status 7.
        on_corrupt: what a training sample that cannot be read does: ``error`` ends the run; ``skip`` takes the next
            sample of the source instead, names each on stderr once and counts them at the end. Evaluation always
            ends with an error, since its numbers would be of other data.

    Raises:
        ConfigError: unknown names or options, with their key path.
    """

    def __init__(
        self,
        sources: dict[str, Any],
        sampling: Any = "joint",
        num_workers: int = 2,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        on_corrupt: OnCorrupt = "error",
        timeout: float = WORKER_TIMEOUT,
    ) -> None:
        super().__init__()
        if not isinstance(sources, Mapping) or not sources:
            raise ConfigError(f"data.sources: expected a mapping of source names to data sets, got {sources!r}.")
        check_sampling(sampling, list(sources))
        _one_of(on_corrupt, get_args(OnCorrupt), "data.on_corrupt")
        self.sampling = sampling
        self.on_corrupt = on_corrupt
        self.num_workers = whole(num_workers, "data.num_workers", least=0)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ConfigError(f"data.timeout: expected a number of seconds above 0, got {timeout!r}.")
        self.timeout = float(timeout)
        self.seed = seed
        self.steps_per_epoch = None if steps_per_epoch is None else whole(steps_per_epoch, "data.steps_per_epoch")
        self.batch_sizes: dict[str, int] = {}
        self.eval_batch_sizes: dict[str, int] = {}
        self.augments: dict[str, Augment | None] = {}
        self.datasets: dict[Split, dict[str, Dataset]] = {split: {} for split in get_args(Split)}
        for name, spec in sources.items():
            self._add(name, spec)
        self._saved: Mapping[str, Any] = {}  # the state that the run goes on from
        self._sampler: StepSampler | None = None
        self._corrupt: Corrupt | None = None
        self._progress: dict[Split, Progress] = {}

    def _add(self, name: str, spec: Any) -> None:
        where = f"data.sources.{name}"
        spec = {"name": spec} if isinstance(spec, str) else spec
        if not isinstance(spec, Mapping):
            raise ConfigError(f"{where}: expected a data set as a name or a mapping with 'name', got {spec!r}.")
        self.batch_sizes[name] = whole(spec.get("batch_size", 4), f"{where}.batch_size")
        self.eval_batch_sizes[name] = whole(spec.get("eval_batch_size", 1), f"{where}.eval_batch_size")
        own = {key: value for key, value in spec.items() if key not in RESERVED}
        for split, datasets in self.datasets.items():
            datasets[name] = DATASETS.build(own, where, also=RESERVED, split=split)
            datasets[name].key_path = where
        given, info = spec.get("augment"), self.datasets["train"][name].info
        augment = None if given is None else Augment.from_config(given, f"{where}.augment", info)
        varies = augment is not None and augment.scale[0] < augment.scale[1] and not (augment.crop or augment.pad)
        if varies and self.batch_sizes[name] > 1:
            raise ConfigError(
                f"{where}.augment.scale: gives every sample a size of its own, and those of a batch of"
                f" {self.batch_sizes[name]} must have one; set {where}.augment.crop, augment.pad: true, which"
                " enlarges them to the largest of the batch, or batch_size: 1."
            )
        self.augments[name] = augment

    def info(self) -> dict[str, SourceInfo]:
        """What a model must know of each source; reads no file. ``size`` is that after augmentation."""
        infos = {name: dataset.info for name, dataset in self.datasets["train"].items()}
        sizes = {name: augment.size for name, augment in self.augments.items() if augment is not None}
        return {name: replace(info, size=sizes.get(name, info.size)) for name, info in infos.items()}

    def sample_name(self, source: str, index: int, split: Split = "train") -> str:
        """What messages and reports call a sample."""
        return self.datasets[split][source].name(index)

    def reading(self) -> list[str]:
        """What each loader process read last: ``"process 12: mosaic, index 3 in pass 0 (its name)"``."""
        found = []
        for split, progress in self._progress.items():
            for pid, source, pass_, index in progress.last():
                name = self.sample_name(source, index, split)
                found.append(f"process {pid}: {source} ({split}), index {index} in pass {pass_} ({name})")
        return found

    def loader_pids(self) -> set[int]:
        """Of the loader processes that have read something."""
        return {pid for progress in self._progress.values() for pid in progress.pids()}

    def setup(self, stage: str) -> None:
        """A run begins at the first sample, unless a checkpoint follows, which Lightning loads after this."""
        if stage == "fit":
            self._saved = {}

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
        batches = {name: ceil(length / (self.batch_sizes[name] * world)) for name, length in lengths.items()}
        sampling = make_sampling(self.sampling, lengths)
        self._sampler = StepSampler(
            lengths,
            self.batch_sizes,
            sampling=self.sampling,
            seed=self.seed,
            world=world,
            rank=rank,
            steps=self.steps_per_epoch or sampling.steps(batches),
            start=self._steps_done,
            origin=_origin(self._saved, sampling),
        )
        self._corrupt = Corrupt(self.datasets["train"]) if self.on_corrupt == "skip" else None
        items = Items(self.datasets["train"], self.augments, self.seed, self._corrupt, self._watched("train"))
        fix = "set data.sources.{source}.augment.crop or augment.pad, or batch_size 1"
        pad = [name for name, augment in self.augments.items() if augment is not None and augment.pad]
        loader = TrainLoader(items, **self._options(self._sampler, fix, pad))
        loader.trainer = self.trainer
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation sample exactly once over all ranks; the sources in turn."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Every test sample exactly once over all ranks; the sources in turn."""
        return self._eval_loader("test")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """What is computed with. What is read as numbers stays: reading it from a device waits for all of its work.

        A batch of a window of gradient accumulation stays: the window moves copies of all its batches when it begins.
        """
        if self._in_window(batch):
            return batch
        kept = {source: {k: v for k, v in sample.items() if k in _READ} for source, sample in batch.items()}
        rest = {source: {k: v for k, v in sample.items() if k not in _READ} for source, sample in batch.items()}
        moved: Batch = super().transfer_batch_to_device(rest, device, dataloader_idx)
        return {source: {**sample, **kept[source]} for source, sample in moved.items()}

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands.

        ``{"steps": training batches whose step is done, "ranks": how many, "batch_sizes": of each, by source,
        "positions": of the next sample of each source, once there is a training loader}``.
        """
        steps = self._steps_done()
        state = {"steps": steps, "ranks": self._ranks()[0], "batch_sizes": dict(self.batch_sizes)}
        if self._sampler is None:
            return state
        return {**state, "positions": {source: self._sampler.position(steps, source) for source in self.batch_sizes}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after that many batches; says what another number of ranks, or of samples of a step, changes."""
        self._saved = dict(state_dict)
        old = {source: state_dict["ranks"] * size for source, size in state_dict.get("batch_sizes", {}).items()}
        if old and (said := _taken(old, state_dict["ranks"], self._ranks()[0], self.batch_sizes)):
            rank_zero_info(said)

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
        sampler = EvalSampler(lengths, self.eval_batch_sizes, world=world, rank=rank)
        items = Items(self.datasets[split], dict.fromkeys(lengths), self.seed, progress=self._watched(split))
        return DataLoader(items, **self._options(sampler, "set data.sources.{source}.eval_batch_size to 1"))

    def _options(self, sampler: StepSampler | EvalSampler, fix: str, pad: Sequence[str] = ()) -> dict[str, Any]:
        infos = {name: dataset.info for name, dataset in self.datasets["train"].items()}
        return {
            "batch_sampler": sampler,
            "collate_fn": Collate(infos, fix, pad),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "timeout": self.timeout if self.num_workers else 0,
            "worker_init_fn": leave_signals_to_the_run,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }

    def _watched(self, split: Split) -> Progress | None:
        if not self.num_workers:
            return None
        self._progress[split] = Progress(list(self.datasets[split]), self.num_workers)
        return self._progress[split]

    def _in_window(self, batch: Batch) -> bool:
        if self.trainer is None or not getattr(self.trainer.lightning_module, "moves_windows", False):
            return False  # somebody else's module
        loader = self.trainer.train_dataloader
        place = loader.place if isinstance(loader, TrainLoader) else None
        return place is not None and any(one is batch for one in place.window)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _steps_done(self) -> int:
        """Lightning's count over the run, restored by it on resume.

        ``processed`` alone is right in every hook: ``ready`` is ahead inside a step, ``completed`` is behind in
        ``on_train_batch_end``, where checkpoints are written.
        """
        if self.trainer is None:
            return int(self._saved.get("steps", 0))
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()
        return int(progress["total"]["processed"])


def _origin(saved: Mapping[str, Any], sampling: Sampling) -> Origin:
    """Of a state; older ones have no positions: all steps before took as many samples as the last."""
    steps, positions = int(saved.get("steps", 0)), saved.get("positions")
    if positions is not None:
        return Origin(steps, positions)
    sizes = saved.get("batch_sizes")
    if sizes is None:
        return BEGIN
    ranks = saved["ranks"]
    return Origin(steps, {source: sampling.count(steps, source) * ranks * size for source, size in sizes.items()})


def _taken(old: Mapping[str, int], before: int, now: int, sizes: Mapping[str, int]) -> str:
    """What another number of ranks, or of samples of a step, means for a run that goes on; empty for the same."""
    new = {source: now * size for source, size in sizes.items()}
    said = f"Saved by {before} rank{'s' * (before > 1)}, goes on with {now}"
    if old != new:
        return (
            f"{said}: a step takes {new} samples instead of {old} (batch_size of each rank x ranks), from the next"
            " sample of each source on, so every sample still comes once a pass."
        )
    if before == now:
        return ""
    return (
        f"{said}: the same samples in the same order; equal but for rounding (and for batch norm and dropout, which"
        " each rank does by itself)."
    )


DATA_KEYS: Final[frozenset[str]] = frozenset(inspect.signature(DataModule).parameters) - {"seed"}
"""Of ``data`` in a config; the seed is that of the run."""


def read_here(options: Mapping[str, Any], seed: int = 0) -> DataModule:
    """The data of a config for commands that look at them and do not train: without loader processes of its own.

    Args:
        options: ``data`` of the config, of :data:`DATA_KEYS`; null is the default.
        seed: of order and augmentation.

    Raises:
        ConfigError: no sources, or unknown names or options.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if not given.get("sources"):
        raise ConfigError("data.sources is missing; the configs folder of densectx has examples.")
    return DataModule(**{**given, "num_workers": 0}, seed=seed)


def data_of(trainer: Any) -> DataModule | None:
    """The data of a Lightning trainer, if they are ours."""
    data = trainer.datamodule
    return data if isinstance(data, DataModule) else None


def _one_of(value: Any, known: Sequence[str], where: str) -> None:
    if value not in known:
        raise ConfigError(f"{where}: expected {' or '.join(known)}, got {value!r}{suggest(str(value), known)}")


def whole(value: Any, where: str, least: int = 1) -> int:
    """A whole number of at least so much, checked.

    Raises:
        ConfigError: it is none; ``where`` says where it was given.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where}: expected a whole number of at least {least}, got {value!r}.")
    return value
