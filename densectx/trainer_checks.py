"""What Lightning would accept and a run cannot do: refused before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.accelerators import MPSAccelerator
from pytorch_lightning.utilities import rank_zero_info

from densectx.data.module import DataModule
from densectx.data.sampling import make_sampling
from densectx.errors import ConfigError
from densectx.module import DenseModule
from densectx.precision import full_name

# What Lightning divides by or multiplies gradients with, and does not look at.
_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
}

_ACCELERATOR = "trainer.accelerator"


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuse options of a config's ``trainer`` that Lightning would accept and this framework cannot do.

    Raises:
        ConfigError: such an option; it is named, and what to take instead.
    """
    precision = full_name(trainer.get("precision") or "32-true")
    if precision.endswith("true") and not precision.startswith("32"):
        raise ConfigError(
            f"inputs, losses and sums are float32, so {precision!r} is not possible; take bf16-mixed or 16-mixed.",
            "trainer.precision",
        )
    if trainer.get("overfit_batches"):
        raise ConfigError(
            "Lightning would repeat the first batches, which is not done here: the order is that of the data's own"
            " sampler. Take limit_train_batches, or a source with a few images.",
            "trainer.overfit_batches",
        )
    if trainer.get("use_distributed_sampler"):
        raise ConfigError(
            "the data's own sampler gives every rank its samples, each counted once; leave it out.",
            "trainer.use_distributed_sampler",
        )
    if trainer.get("sync_batchnorm"):
        raise ConfigError(
            "torch's conversion drops the activations inside timm's norm layers, and ranks that run different tasks"
            " would wait for each other; take model.norm group or frozen.",
            "trainer.sync_batchnorm",
        )
    for key, least in _LEAST.items():
        if isinstance(value := trainer.get(key), int | float) and value < least:
            raise ConfigError(f"expected {least} or more, got {value!r}.", f"trainer.{key}")
    window, interval = trainer.get("accumulate_grad_batches") or 1, trainer.get("val_check_interval")
    if isinstance(interval, int | float) and interval <= 0:
        raise ConfigError(
            f"expected a number of batches, or a part of an epoch as 0.5, got {interval!r}.",
            "trainer.val_check_interval",
        )
    if isinstance(window, int) and window > 1 and isinstance(interval, str | Mapping):
        raise ConfigError(
            f"{interval!r} may be over inside a window of accumulate_grad_batches, {window}, and checkpoints written"
            " there could not be resumed exactly; take a number of batches.",
            "trainer.val_check_interval",
        )
    if isinstance(window, int) and isinstance(interval, int) and interval % window:
        raise ConfigError(
            f"{interval} batches are no multiple of accumulate_grad_batches, {window}: checkpoints are written at"
            " validation, and inside a window of accumulation they could not be resumed exactly.",
            "trainer.val_check_interval",
        )


def avoid_mps(trainer: dict[str, Any]) -> None:
    """Take the CPU where Lightning would choose Apple's GPU, and say so.

    Args:
        trainer: of a config; its ``accelerator`` is changed.

    Raises:
        ConfigError: the config asks for that GPU.
    """
    given = trainer.get("accelerator") or "auto"
    name = str(given.get("class_path") if isinstance(given, Mapping) else given).rpartition(".")[2].lower()
    there = MPSAccelerator.is_available()
    if name.startswith("mps") or (name == "gpu" and there):
        raise ConfigError("Apple's GPU (mps) has no float64, in which metrics are summed; take cpu.", _ACCELERATOR)
    if name == "auto" and there:
        trainer["accelerator"] = "cpu"
        rank_zero_info(f"{_ACCELERATOR}: auto is cpu: Apple's GPU (mps) has no float64, in which metrics are summed.")


def check_clock(interval: Any, ranks: int) -> None:
    """Refuse a time as the ``val_check_interval`` of several ranks.

    Raises:
        ConfigError: it is one.
    """
    if ranks > 1 and isinstance(interval, str | Mapping):
        raise ConfigError(
            f"{interval!r} is a time: each of {ranks} ranks would go by its own clock, and those that validate would"
            " wait for those that still train; take a number of batches.",
            "trainer.val_check_interval",
        )


def check_balancing(balancing: Any, module: DenseModule, data: DataModule) -> None:
    """Refuse to compare tasks where no step has two of them: nothing would be balanced, and nothing said.

    Args:
        balancing: of the config.
        module: with the balancer that was made of it.
        data: whose sampling says which sources a step has.

    Raises:
        ConfigError: no step has two tasks.
    """
    balancer = module.balancer
    sources = [module.model.task(key).source for key, weight in balancer.weights.items() if weight > 0]
    if len(sources) < 2 or not (balancer.method.compares or balancer.watch):
        return
    sampling = make_sampling(data.sampling, dict.fromkeys(data.batch_sizes, 1))  # lengths change how often, not what
    if any(sum(source in place for source in sources) > 1 for place in sampling.together()):
        return
    name = balancing.get("name") if isinstance(balancing, Mapping) else balancing
    phases = data.sampling if isinstance(data.sampling, list | tuple) else [data.sampling]
    said = ", then ".join(str(one.get("name") if isinstance(one, Mapping) else one) for one in phases)
    if balancer.method.compares:
        reason, fix = f"{name} compares the tasks of a step: it would do nothing", "take fixed or uncertainty"
    else:
        reason, fix = "watch: true compares the gradients of the tasks of a step", "leave it out"
    raise ConfigError(
        f"{reason}, since with data.sampling {said} no step has two. Take data.sampling joint, or {fix}.",
        "model.balancing",
    )
