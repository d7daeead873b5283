"""Training by Lightning: one DDP forward a step, exact normalisation over ranks and accumulation windows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isfinite
from typing import Any, final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from densectx.accumulation import Accumulation, Prepared, check_validation
from densectx.balancing import make_balancer
from densectx.errors import ConfigError, NumericError, suggest
from densectx.feature_cache import FeatureCache
from densectx.limits import tell_time
from densectx.model import DenseModel
from densectx.nn.norm import PerInput
from densectx.nn.precision import full
from densectx.normalising import Evaluated, Normaliser
from densectx.optimizing import (
    MakeOptimizer,
    MakeScheduler,
    by_pattern,
    check_end,
    make_optimizer,
    make_scheduler,
    stepping,
)
from densectx.rng import generator, seed_of
from densectx.surround import surround_of, with_surround
from densectx.tasks.base import ReadingFiles, Target, Task
from densectx.types import Batch, Spec, Terms


@final
class DenseModule(pl.LightningModule):
    """Trains a :class:`DenseModel` on batches ``{source: samples}``; a task runs when its source has what it needs.

    Every loss term is its sum divided by its weight, both over all ranks and over all batches of an accumulation
    window, so uneven numbers of labelled pixels give the gradient of one process with one batch of all the samples.
    Terms whose weight no target tells (the bins of chroma, losses of others that are not
    :class:`densectx.losses.Countable`) are normalised batch by batch and averaged; so is everything where batches do
    not come from :class:`densectx.data.module.DataModule`. Logs ``train/<task>/loss``, ``val|test/<task>/<metric>``,
    ``val|test/<task>/loss`` (each term its sum over its weight, both of the whole split; before the task's weight and
    balancing, as in training) and, where gradients are measured, ``balance/cos/<a>/<b>``, ``balance/norm/<task>``,
    ``balance/weight/<task>``.

    Args:
        model: built model.
        optimizer: parameters or groups -> optimizer.
        lr_scheduler: optimizer -> scheduler, stepped every optimizer step; null for a constant rate.
        balancing: method, see :func:`densectx.balancing.make_balancer`.
        seed: counted randomness of samples and dropout starts from it.
        freeze: names of modules of the model (``backbone``, ``tasks.denoising.head``) that are not trained; their
            batch norms keep their statistics. A frozen task still makes the samples of training for the others.
        cache_features: folder where the features of a frozen backbone and projection are kept, see
            :class:`densectx.feature_cache.FeatureCache`; for inputs that come back (whole pictures, mirrored or not).
        param_groups: ``{"match": pattern on parameter names ("backbone.*", "*.bias"), "lr": ...}`` and other options
            of the optimizer; the first that matches counts.
        channels_last: memory format of the model; faster with bf16 on CPU and with tensor cores.
        compile: ``torch.compile`` in place (state-dict keys stay as they are); the backbone only where the gradients
            of tasks are measured, since compiled parts give up what a second backward would need; not even that where
            they are measured in the backbone, which has the last shared weights.
        config: of the whole experiment, kept in checkpoints.
    """

    moves_windows = True
    """Of :class:`densectx.data.module.DataModule`: batches of a window of accumulation are moved to the device here."""

    def __init__(
        self,
        model: DenseModel,
        optimizer: MakeOptimizer,
        lr_scheduler: MakeScheduler | None = None,
        *,
        balancing: Spec = "fixed",
        seed: int = 0,
        freeze: Sequence[str] = (),
        cache_features: str | None = None,
        param_groups: Sequence[Mapping[str, Any]] = (),
        channels_last: bool = False,
        compile: bool = False,  # noqa: A002 - the name users know
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=memory_format) if channels_last else model
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.seed, self.config = seed, dict(config or {})
        self.param_groups = by_pattern(param_groups)
        self.frozen = [_submodule(model, name) for name in freeze]
        for module in self.frozen:
            module.requires_grad_(False)
        self._frozen_tasks = [part for module in self.frozen for part in module.modules() if isinstance(part, Task)]
        self.balancer = make_balancer(balancing, model, seed)
        self.balancing = self.balancer.method  # a part of the module: its state is saved and shared out
        self.features = FeatureCache(cache_features, model, self.frozen, memory_format) if cache_features else None
        model.kept = self.features
        if compile:
            limit = 8 * len(set(model.kinds.values())) or None  # torch's own 8, for each kind of input
            # part by part: what lies between them shares passes by object identity, which a graph cannot hold
            rest = [*model.context.values(), *(model.task(key).head for key in model.tasks)]
            for part in (model.backbone, *([] if self.balancer.measures else rest)):
                if not self.balancer.measures_in(part):
                    part.compile(recompile_limit=limit)
        self._normaliser = Normaliser(model)
        self._terms = self._normaliser.terms
        self._evaluated = Evaluated(self._normaliser)
        self._accumulation = Accumulation(self._normaliser, self._prepare)
        self._recent: dict[str, float] = {}  # losses that were not logged yet: what nobody looks at costs time
        self._idle: set[str] = set(model.tasks)  # without weight, or labels on any rank, since the last optimizer step
        self.schedules_anew = False  # True: a run goes on with other options of its optimizer or schedule
        self.refuses_not_finite = True  # False: the finite guard decides at the optimizer step
        self.not_finite: list[str] = []  # terms of the last loss

    def setup(self, stage: str) -> None:
        """Before the first batch: files that a task reads for training and evaluation."""
        for key in self.model.tasks:
            task = self.model.task(key)
            if isinstance(task, ReadingFiles) and stage != "predict":
                task.read_files()

    # training

    def on_train_start(self) -> None:
        """No validation may lie inside an accumulation window; the config's rates after a resume that changes them."""
        check_validation(self.trainer)
        self.schedule_anew()
        check_end(self.lr_schedulers(), self.trainer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout is a function of (seed, batch number, rank), so that nothing has to be stored to repeat it."""
        step = self.trainer.fit_loop.total_batch_idx
        seed = seed_of(self.seed, "model", step, self.global_rank)
        # without an accelerator torch.manual_seed takes a stack trace for each kind of device that is not there
        torch.default_generator.manual_seed(seed) if self.device.type == "cpu" else torch.manual_seed(seed)
        for module in self.frozen:
            module.eval()
        for task in self._frozen_tasks:
            task.training = True  # its parts are held; the samples that it makes stay those of training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch; its mean over ranks is the loss of the global batch."""
        prepared, window, index = self._accumulation.open(batch, self.device, self._trainer)
        with self.balancer.branched():
            outputs = self._run(prepared.inputs, prepared.surround)
        with torch.autocast(self.device.type, enabled=False):
            terms = self._losses(outputs, prepared)
            found = self._normaliser(terms, self.device, window, index)
            self._refuse_not_finite(found.totals, batch)
            loss, numbers = self.balancer(found.shares, found.values, found.regular, log=self._logs, scale=self._scale)
            loss = loss + self._touch(set(terms))
        self._idle -= {key for key in found.values if self.balancer.weights[key] > 0}
        self._recent |= found.values
        if self._trainer is not None and (self._logs or not self.trainer.loggers or self.trainer.progress_bar_callback):
            self.log_dict({f"train/{key}/loss": v for key, v in self._recent.items()}, prog_bar=True, batch_size=1)
            self.log_dict(numbers, batch_size=1)
            self._recent = {}
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Parts of tasks that no rank had labels for, or of weight 0, do not move: no momentum, no weight decay."""
        for users, parameters in self._parts:
            if users <= self._idle:
                for parameter in parameters:
                    parameter.grad = None
        self._idle = set(self.model.tasks)

    def configure_optimizers(self) -> Any:
        """Parameter groups by pattern; the schedule steps with the optimizer."""
        optimizer = self._optimizer()
        if self.make_scheduler is None:
            return optimizer
        scheduler = make_scheduler(self.make_scheduler, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """A schedule by time is told the time first."""
        tell_time(scheduler, self.trainer)
        with stepping(scheduler):
            super().lr_scheduler_step(scheduler, metric)

    def _optimizer(self) -> Optimizer:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        named += [(f"balancing.{name}", p) for name, p in self.balancing.named_parameters()]
        return make_optimizer(self.make_optimizer, named, self.param_groups)

    def schedule_anew(self) -> None:
        """Once, where ``schedules_anew``: restored optimizer and schedule get the config's options.

        Their state brought those of the checkpoint along; the schedule stays at the point that it has reached.
        """
        if not self.schedules_anew:
            return
        self.schedules_anew = False
        own, schedule = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(own, Optimizer)  # there is one
        fresh = self._optimizer()
        if isinstance(schedule, LRScheduler):
            assert self.make_scheduler is not None
            anew = make_scheduler(self.make_scheduler, fresh)
            tell_time(anew, self.trainer)
            with warnings.catch_warnings(), stepping(anew):
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                for _ in range(self.global_step):
                    anew.step()
            schedule.load_state_dict(anew.state_dict())
        for group, new in zip(own.param_groups, fresh.param_groups, strict=True):
            group.update({option: value for option, value in new.items() if option != "params"})

    def on_fit_end(self) -> None:
        """Say whether keeping features was worth it."""
        if self.features is not None:
            found = self.features
            rank_zero_info(f"model.cache_features {found.folder}: {found.read} read, {found.computed} computed.")

    # evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Count a batch in the metrics and losses of its tasks; returns the answers, for callbacks that draw them."""
        prepared = self._prepare(batch)
        outputs = self._run(prepared.inputs, prepared.surround)
        # what a loss makes once and keeps must serve training too, which Lightning's inference mode would forbid; on
        # copies, since one that writes into its arguments would change what is measured
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            targets = {key: {name: value.clone() for name, value in t.items()} for key, t in prepared.targets.items()}
            copies = {key: output.clone() for key, output in outputs.items()}
            self._evaluated.add(self._losses(copies, prepared._replace(targets=targets)), self.device)
        answers = self._answers(outputs, prepared)
        for key, (prediction, x, target) in answers.items():
            self.model.task(key).update(prediction, x, target)
        return answers

    def on_validation_epoch_end(self) -> None:
        """Log and reset metrics and losses, summed over ranks."""
        self._log_metrics("val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """As :meth:`validation_step`."""
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log and reset metrics and losses, summed over ranks."""
        self._log_metrics("test")

    def answer(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor, Target]]:
        """{task: (postprocessed prediction, x, target)} of the tasks that a batch has data for."""
        prepared = self._prepare(batch)
        return self._answers(self._run(prepared.inputs, prepared.surround), prepared)

    def _answers(self, outputs: Mapping[str, Tensor], prepared: Prepared) -> dict[str, tuple[Tensor, Tensor, Target]]:
        inputs, targets = prepared.inputs, prepared.targets
        with torch.autocast(self.device.type, enabled=False):
            return {
                key: (self.model.task(key).postprocess(full(y), inputs[key]), inputs[key], targets[key])
                for key, y in outputs.items()
            }

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Our config under one key in plain JSON types; nothing that Lightning could override flags with."""
        from densectx.checkpoint import header

        checkpoint["densectx"] = header(self.model, self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A run that averages its weights no more goes on from the trained ones, which its file has beside them."""
        if self._trainer is None or self.trainer.state.fn != "fit" or "current_model_state" not in checkpoint:
            return
        listed: list[pl.Callback] = getattr(self.trainer, "callbacks", [])
        if not any(isinstance(callback, WeightAveraging) for callback in listed):
            checkpoint["state_dict"] = checkpoint.pop("current_model_state")
            rank_zero_info("trainer.callbacks averages no weights any more: going on from the trained ones.")

    # parts

    @torch.no_grad()
    def _prepare(self, batch: Batch) -> Prepared:
        inputs: dict[str, Tensor] = {}
        targets: dict[str, Target] = {}
        surround: dict[str, int] = {}
        with torch.autocast(self.device.type, enabled=False):
            for key in self.model.tasks:
                task = self.model.task(key)
                sample = batch.get(task.source)
                if sample is None or any(name not in sample for name in task.requires):
                    continue
                device = sample["image"].device
                rngs = [generator(self.seed, task.source, *k, key, device=device) for k in sample["key"].tolist()]
                inputs[key], targets[key] = task.prepare(sample, rngs)
                if border := surround_of(sample, inputs[key], key, task.source):
                    surround[key] = border
        return Prepared(inputs, targets, surround)

    def _run(self, inputs: Mapping[str, Tensor], surround: Mapping[str, int]) -> dict[str, Tensor]:
        """The outputs in the size of the targets: zeros where x is surroundings, for which no target is known."""
        outputs: dict[str, Tensor] = self.model(inputs, surround)
        return outputs | {k: with_surround(outputs[k], self.model.task(k), s) for k, s in surround.items()}

    def _losses(self, outputs: Mapping[str, Tensor], prepared: Prepared) -> dict[str, Terms]:
        return {key: self.model.task(key).loss(full(y), prepared.targets[key]) for key, y in outputs.items()}

    def _scale(self) -> float:
        """Of the gradient scaler, 1 without one."""
        scaler = None if self._trainer is None else getattr(self._trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    @property
    def _logs(self) -> bool:
        """Whether this step is one that loggers write."""
        if self._trainer is None:
            return False
        trainer: Any = self._trainer  # its type does not know this attribute
        return bool(trainer.loggers) and (self.global_step + 1) % max(1, trainer.log_every_n_steps) == 0

    @cached_property
    def _parts(self) -> list[tuple[set[str], list[nn.Parameter]]]:
        """Trained parameters that not every task uses, with the tasks that use them."""
        model, parts = self.model, []
        for key in model.tasks:
            modules = [model.tasks[key], *([model.context[key]] if key in model.context else [])]
            own = [p for module in modules for p in module.parameters()]
            own += [p for name, p in self.balancing.named_parameters() if name.rpartition(".")[2] == key]
            parts.append(({key}, own))
        if model.kinds:
            norms = [m.norms for m in model.modules() if isinstance(m, PerInput)]
            for kind in dict.fromkeys(model.kinds.values()):
                users = {key for key, other in model.kinds.items() if other == kind}
                parts.append((users, [p for norm in norms for p in norm[kind].parameters()]))
        return parts

    def _touch(self, run: set[str]) -> Tensor:
        """Zero with a graph to the parameters that this rank did not use, so that plain DDP reduces them."""
        unused = [p for users, parameters in self._parts if not users & run for p in parameters]
        unused += self.balancing.parameters()  # of a task that ran without labels, too
        if not run:
            unused += self.model.parameters()
        elif self.model.ablate:
            unused += [*self.model.backbone.parameters(), *self.model.projection.parameters()]
        zero = torch.zeros((), device=self.device)
        for parameter in unused:
            if parameter.requires_grad:
                zero = zero + parameter.flatten()[:0].sum()  # an empty slice: no NaN even if the parameter is inf
        return zero

    def _refuse_not_finite(self, totals: list[list[float]], batch: Batch) -> None:
        """Stop before a loss that is not finite reaches the weights; every rank sees the same sums.

        With float16 the gradient scaler expects overflows and skips their steps itself.
        """
        bad = [
            f"{key} ({term})"
            for (key, term), pair in zip(self._terms, totals, strict=True)
            if not all(map(isfinite, pair))
        ]
        self.not_finite = bad
        if bad and self.refuses_not_finite and (self._trainer is None or self.trainer.precision != "16-mixed"):
            keys = {source: sample["key"].tolist() for source, sample in batch.items()}
            raise NumericError(
                f"the loss of {', '.join(bad)} is not finite at step {self.global_step}; the weights are those of the"
                f" step before. This rank's samples, [pass, index] by source: {keys}. Try a lower learning rate,"
                " trainer.gradient_clip_val or float32."
            )

    def metric_names(self, stage: str) -> list[str]:
        """What a validation (``val``) or test (``test``) logs; every rank calls it, and nothing has been counted."""
        return [f"{stage}/{key}/{name}" for key in self.model.tasks for name in {**self._computed(key), "loss": None}]

    def _log_metrics(self, stage: str) -> None:
        losses = self._evaluated.take(self.device)
        for key in self.model.tasks:
            values: dict[str, Any] = {"loss": losses[key]} if key in losses else {}
            values |= {name: value.float() for name, value in self._computed(key).items()}  # a task's own loss is taken
            self.log_dict({f"{stage}/{key}/{name}": value for name, value in values.items()}, batch_size=1)

    def _computed(self, key: str) -> dict[str, Tensor]:
        """The metrics of a task, which then count from zero."""
        metrics = self.model.task(key).metrics
        with warnings.catch_warnings():  # every rank computes, also one that saw no sample: sums are reduced
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")
            values: dict[str, Tensor] = metrics.compute()
        metrics.reset()
        return values


def _submodule(model: DenseModel, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [name for name, _ in model.named_modules() if name]
        raise ConfigError(f"model.freeze: the model has no part {name!r}{suggest(name, known)}") from None
