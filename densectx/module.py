"""Training by Lightning: one DDP forward a step, exact normalisation over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any, final

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce, get_world_size, is_available, is_initialized
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from densectx.balancing import make_balancing
from densectx.errors import ConfigError, NumericError, suggest, unknown
from densectx.feature_cache import FeatureCache
from densectx.model import DenseModel
from densectx.nn.norm import PerInput
from densectx.nn.precision import full
from densectx.rng import generator, seed_of
from densectx.surround import surround_of, with_surround
from densectx.tasks.base import Target
from densectx.types import Batch

MakeOptimizer = Callable[[Any], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


@final
class DenseModule(pl.LightningModule):
    """Trains a :class:`DenseModel` on batches ``{source: samples}``; a task runs when its source has what it needs.

    Every loss term is its sum over all ranks divided by its weight over all ranks, so uneven numbers of labelled
    pixels give the gradient of one process with the same global batch. With gradient accumulation each of the N
    batches is normalised on its own and then averaged. Logs ``train/<task>/loss`` and
    ``val|test/<task>/<metric>``.

    Args:
        model: built model.
        optimizer: parameters or groups -> optimizer.
        lr_scheduler: optimizer -> scheduler, stepped every optimizer step; null for a constant rate.
        balancing: ``fixed`` or ``uncertainty``.
        seed: counted randomness of samples and dropout starts from it.
        freeze: names of modules of the model (``backbone``, ``tasks.denoising.head``) that are not trained; their
            batch norms keep their statistics.
        cache_features: folder where the features of a frozen backbone and projection are kept, see
            :class:`densectx.feature_cache.FeatureCache`; for inputs that come back (whole pictures, mirrored or not).
        param_groups: ``{"match": pattern on parameter names ("backbone.*", "*.bias"), "lr": ...}`` and other options
            of the optimizer; the first that matches counts.
        channels_last: memory format of the model; faster with bf16 on CPU and with tensor cores.
        compile: ``torch.compile`` in place (state-dict keys stay as they are).
        config: of the whole experiment, kept in checkpoints.
    """

    def __init__(
        self,
        model: DenseModel,
        optimizer: MakeOptimizer,
        lr_scheduler: MakeScheduler | None = None,
        *,
        balancing: str = "fixed",
        seed: int = 0,
        freeze: Sequence[str] = (),
        cache_features: str | None = None,
        param_groups: Sequence[Mapping[str, Any]] = (),
        channels_last: bool = False,
        compile: bool = False,  # noqa: A002 - the name users know
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model
        self.balancing = make_balancing(balancing, {key: model.task(key).weight for key in model.tasks})
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.seed, self.config = seed, dict(config or {})
        self.param_groups = {_pattern(group): dict(group) for group in param_groups}
        self.frozen = [_submodule(model, name) for name in freeze]
        for module in self.frozen:
            module.requires_grad_(False)
        self.features = FeatureCache(cache_features, model, self.frozen) if cache_features else None
        model.kept = self.features
        if compile:
            limit = 8 * len(set(model.kinds.values())) or None  # torch's own 8, for each kind of input
            # part by part: what lies between them shares passes by object identity, which a graph cannot hold
            for part in (model.backbone, *model.context.values(), *(model.task(key).head for key in model.tasks)):
                part.compile(recompile_limit=limit)
        self._terms = [(key, term) for key in model.tasks for term in model.task(key).coefficients]
        self._idle: set[str] = set(model.tasks)  # tasks without labels on any rank since the last optimizer step

    # training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout is a function of (seed, batch number, rank), so that nothing has to be stored to repeat it."""
        step = self.trainer.fit_loop.total_batch_idx
        torch.manual_seed(seed_of(self.seed, "model", step, self.global_rank))
        for module in self.frozen:
            module.eval()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch; its mean over ranks is the loss of the global batch."""
        inputs, targets, surround = self._prepare(batch)
        outputs = self._run(inputs, surround)
        with torch.autocast(self.device.type, enabled=False):
            terms = {key: self.model.task(key).loss(full(y), targets[key]) for key, y in outputs.items()}
            zero = torch.zeros((), device=self.device)
            table = [terms[key][term] if key in terms else (zero, zero) for key, term in self._terms]
            totals = torch.stack([torch.stack([s.detach(), w]) for s, w in table]).double()
            world = self._sum_over_ranks(totals)
            losses: dict[str, Tensor] = {}
            values: dict[str, Tensor] = {}
            for (key, term), (total, _), (all_sum, all_weight) in zip(self._terms, table, totals, strict=True):
                scale = (self.model.task(key).coefficients[term] / all_weight.clamp_min(1e-12)).to(total.dtype)
                if key in terms:
                    losses[key] = losses.get(key, zero) + world * scale * total
                values[key] = values.get(key, zero) + scale * all_sum.to(total.dtype)
            numbers = totals.tolist()
            present = frozenset(k for (k, _), (_, w) in zip(self._terms, numbers, strict=True) if w > 0)
            self._refuse_not_finite(numbers, batch)
            for key in present:  # labels on other ranks only: no share of the loss, but of what regularises
                losses.setdefault(key, zero)
            loss = (self.balancing(losses, present) if losses else zero) + self._touch(set(terms))
        self._idle -= present
        for key in sorted(present):
            self.log(f"train/{key}/loss", values[key], prog_bar=True, batch_size=1)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Parts of tasks that no rank had labels for do not move: no momentum, no weight decay."""
        for users, parameters in self._parts():
            if users <= self._idle:
                for parameter in parameters:
                    parameter.grad = None
        self._idle = set(self.model.tasks)

    def configure_optimizers(self) -> Any:
        """Parameter groups by pattern; the schedule steps with the optimizer."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        named += [(f"balancing.{name}", p) for name, p in self.balancing.named_parameters()]
        if not named:
            raise ConfigError("model.freeze: nothing is left to train.")
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in named:
            pattern = next((p for p in self.param_groups if fnmatchcase(name, p)), "")
            groups.setdefault(pattern, []).append(parameter)
        for pattern in self.param_groups:
            if pattern not in groups:
                raise ConfigError(
                    f"model.param_groups: pattern {pattern!r} matches no trained parameter (first match wins);"
                    f" names look like {named[0][0]!r}."
                )
        own = {p: {k: v for k, v in group.items() if k != "match"} for p, group in self.param_groups.items()}
        try:
            optimizer = self.make_optimizer([{"params": ps, **own.get(p, {})} for p, ps in groups.items()])
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error), "model.optimizer") from error
        for group in self.param_groups.values():
            for option in group:
                if option not in ("match", *optimizer.defaults):
                    raise ConfigError(unknown("optimizer option", option, optimizer.defaults), "model.param_groups")
                value, usual = group[option], optimizer.defaults.get(option)
                if type(usual) in (int, float) and type(value) not in (int, float):
                    raise ConfigError(f"{option}: expected a number, got {value!r}.", "model.param_groups")
            if group.get("lr", 0) < 0:
                raise ConfigError(f"lr {group['lr']} is negative.", "model.param_groups")
        if self.make_scheduler is None:
            return optimizer
        try:
            scheduler = self.make_scheduler(optimizer)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error), "model.lr_scheduler") from error
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigError(
                "schedules step with the optimizer and see no metric; take another.", "model.lr_scheduler"
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_end(self) -> None:
        """Say whether keeping features was worth it."""
        if self.features is not None:
            found = self.features
            rank_zero_info(f"model.cache_features {found.folder}: {found.read} read, {found.computed} computed.")

    # evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Count a batch in the metrics of its tasks; returns the answers, for callbacks that draw them."""
        answers = self.answer(batch)
        for key, (prediction, x, target) in answers.items():
            self.model.task(key).update(prediction, x, target)
        return answers

    def on_validation_epoch_end(self) -> None:
        """Log and reset the metrics, summed over ranks."""
        self._log_metrics("val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """As :meth:`validation_step`."""
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log and reset the metrics, summed over ranks."""
        self._log_metrics("test")

    def answer(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor, Target]]:
        """{task: (postprocessed prediction, x, target)} of the tasks that a batch has data for."""
        inputs, targets, surround = self._prepare(batch)
        outputs = self._run(inputs, surround)
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

    # parts

    @torch.no_grad()
    def _prepare(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Target], dict[str, int]]:
        """Inputs and targets of the tasks that a batch has data for; the surroundings in inputs that have some."""
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
        return inputs, targets, surround

    def _run(self, inputs: Mapping[str, Tensor], surround: Mapping[str, int]) -> dict[str, Tensor]:
        """The outputs in the size of the targets: zeros where x is surroundings, for which no target is known."""
        outputs: dict[str, Tensor] = self.model(inputs, surround)
        return outputs | {k: with_surround(outputs[k], self.model.task(k), s) for k, s in surround.items()}

    def _sum_over_ranks(self, totals: Tensor) -> int:
        """Sum in place; returns the number of ranks."""
        if not (is_available() and is_initialized()):
            return 1
        all_reduce(totals, op=ReduceOp.SUM)
        return get_world_size()

    def _parts(self) -> Iterator[tuple[set[str], list[nn.Parameter]]]:
        """Trained parameters that not every task uses, with the tasks that use them."""
        model = self.model
        for key in model.tasks:
            modules = [model.tasks[key], *([model.context[key]] if key in model.context else [])]
            own = [p for module in modules for p in module.parameters() if p.requires_grad]
            yield {key}, own + [p for name, p in self.balancing.named_parameters() if name.rpartition(".")[2] == key]
        if model.kinds:
            norms = [m.norms for m in model.modules() if isinstance(m, PerInput)]
            for kind in dict.fromkeys(model.kinds.values()):
                users = {key for key, other in model.kinds.items() if other == kind}
                yield users, [p for norm in norms for p in norm[kind].parameters() if p.requires_grad]

    def _touch(self, run: set[str]) -> Tensor:
        """Zero with a graph to the parameters that this rank did not use, so that plain DDP reduces them."""
        unused = [p for users, parameters in self._parts() if not users & run for p in parameters]
        if not run:
            unused += [p for p in self.model.parameters() if p.requires_grad]
        elif self.model.ablate:
            trunk = (self.model.backbone, self.model.projection)
            unused += [p for part in trunk for p in part.parameters() if p.requires_grad]
        zero = torch.zeros((), device=self.device)
        for parameter in unused:
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
        if bad and (self._trainer is None or self.trainer.precision != "16-mixed"):
            keys = {source: sample["key"].tolist() for source, sample in batch.items()}
            raise NumericError(
                f"the loss of {', '.join(bad)} is not finite at step {self.global_step}; the weights are those of the"
                f" step before. This rank's samples, [pass, index] by source: {keys}. Try a lower learning rate,"
                " trainer.gradient_clip_val or float32."
            )

    def _log_metrics(self, stage: str) -> None:
        for key in self.model.tasks:
            metrics = self.model.task(key).metrics
            with warnings.catch_warnings():  # every rank computes, also one that saw no sample: sums are reduced
                warnings.filterwarnings("ignore", "The ``compute`` method of metric")
                values = metrics.compute()
            self.log_dict({f"{stage}/{key}/{name}": value.float() for name, value in values.items()}, batch_size=1)
            metrics.reset()


def _pattern(group: Any) -> str:
    """What a group of ``param_groups`` is for."""
    pattern = group.get("match") if isinstance(group, Mapping) else None
    if not isinstance(pattern, str):
        others = [str(key) for key in group if key != "match"] if isinstance(group, Mapping) else []
        near = next((found for key in others if (found := suggest(key, ["match"])) != "."), ".")
        raise ConfigError(f"expected {{match: pattern, lr: ...}}, got {group!r}{near}", "model.param_groups")
    return pattern


def _submodule(model: DenseModel, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [name for name, _ in model.named_modules() if name]
        raise ConfigError(f"model.freeze: the model has no part {name!r}{suggest(name, known)}") from None
