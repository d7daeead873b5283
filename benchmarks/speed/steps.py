"""A training step of a model of several tasks, as one writes it by hand; batches that lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from densectx.model import DenseModel
from densectx.nn.precision import full
from densectx.rng import generator
from densectx.types import Batch
from speed.networks import autocast

SIGMA = 25.0


def stepper(model: DenseModel, dtype: str) -> Callable[[Batch], None]:
    """Prepare, forward, losses, backward, AdamW. The model is left in training mode."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run(batch: Batch) -> None:
        inputs, targets = {}, {}
        with torch.no_grad():
            for key in model.tasks:
                task = model.task(key)
                sample = batch[task.source]
                rngs = [generator(0, task.source, *k, key) for k in sample["key"].tolist()]
                inputs[key], targets[key] = task.prepare(sample, rngs)
        with autocast(dtype):
            outputs = model(inputs)
        losses: list[Tensor] = []
        for key, y in outputs.items():
            task = model.task(key)
            terms = task.loss(full(y), targets[key])
            losses += [task.weight * task.coefficients[name] * total / weight.clamp_min(1e-12)
                       for name, (total, weight) in terms.items()]  # fmt: skip
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()

    return run


def predictor(models: Iterable[DenseModel], image: Tensor, dtype: str) -> Callable[[], None]:
    """All answers of some models for one picture."""
    models = list(models)

    def run() -> None:
        with autocast(dtype):
            for model in models:
                options = {f"{k}.{o}": SIGMA for k in model.tasks for o in model.task(k).options}
                model.predict(image, options=options)

    return run


def batch_of(sources: Mapping[str, Mapping[str, Any]], divide: int = 1) -> Batch:
    """Random pictures and labels of the sizes that a config's sources deliver.

    Args:
        sources: the ``data.sources`` of a config: ``batch_size``, ``augment.crop``, ``channels``.
        divide: what sides and batch sizes are divided by, for quick runs.
    """
    rng = torch.Generator().manual_seed(0)
    batch: Batch = {}
    for name, spec in sources.items():
        count = max(1, spec.get("batch_size", 4) // divide)
        crop = (spec.get("augment") or {}).get("crop") or spec.get("size", 96)
        height, width = (side // divide for side in ([crop, crop] if isinstance(crop, int) else crop))
        batch[name] = {
            "image": torch.rand(count, spec.get("channels", 3), height, width, generator=rng),
            "mask": torch.randint(2, (count, height, width), generator=rng),
            "gray": torch.zeros(count, dtype=torch.bool),
            "key": torch.tensor([[0, i] for i in range(count)]),
        }
    return batch
