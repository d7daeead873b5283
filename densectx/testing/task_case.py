"""A task in a small model, with a batch of its source: what each check of a task starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from densectx.errors import ConfigError, DataError
from densectx.model import DenseModel
from densectx.nn.precision import full
from densectx.registry import TASKS
from densectx.tasks.base import Target, Task
from densectx.testing import samples
from densectx.testing.modules import stir
from densectx.testing.report import expect
from densectx.testing.states import preserved
from densectx.testing.subjects import Subject, called, named
from densectx.testing.values import copied
from densectx.types import Sample, SourceInfo, Terms

KEY, SOURCE = "task", "source"
RUNTIME = ("features", "in_channels", "info")
STRIDED = {"name": "timm", "model": "resnet10t", "levels": 3}


@final
@dataclass(frozen=True)
class TaskCase:
    """A task under test.

    Attributes:
        subject: name, spec, class or factory.
        given_info: its source, None to find one that it accepts.
        given_batch: collated samples, None to make some up that its ``prepare`` takes.
        options: run-time options for ``predict``, ``{"sigma": 25.0}``.
        model_config: replaces keys of the small model's config.
    """

    subject: Subject
    given_info: SourceInfo | None = None
    given_batch: Sample | None = None
    options: Mapping[str, float | None] = field(default_factory=dict)
    model_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What messages call it."""
        return called(TASKS, self.subject)

    @cached_property
    def info(self) -> SourceInfo:
        """What was given, else the first of several usual sources that the task accepts."""
        if self.given_info is not None:
            return self.given_info
        refusals = []
        for info in samples.candidates():
            try:
                self.model(info=info)
            except ConfigError as error:
                refusals.append(str(error))
            else:
                return info
        said = f"no usual source suits it: {refusals[0]}"
        expect(False, said, "pass info=SourceInfo(...) of a source that it can use")
        raise AssertionError

    def batch(self, size: tuple[int, int] | None = None) -> Sample:
        """Fresh collated samples, those that were given if some were; of a size if one is asked for."""
        if self.given_batch is None:
            return samples.make_batch(self.info, size=size, maps=self.maps)
        batch: Sample = copied(self.given_batch)
        count = len(batch["image"])
        batch.setdefault("gray", torch.zeros(count, dtype=torch.bool))
        batch.setdefault("key", torch.tensor([[0, index] for index in range(count)]))
        return batch if size is None else samples.resized(batch, self.info, size)

    @cached_property
    def maps(self) -> int:
        """Channels of made-up maps: the fewest that every method takes, or else the fewest that ``prepare`` takes."""
        errors: list[Exception] = []
        prepared: list[int] = []
        for maps in (1, 2, 3) if self.info.target == "map" else (1,):
            batch, model = samples.make_batch(self.info, maps=maps), self.model()
            try:
                x, _ = self.prepared(model, batch)
                if self.info.target != "map":
                    return maps
                prepared.append(maps)
                with preserved():  # what a method does to the process is found by a check
                    for _ in self.methods(model, batch, self.output(model, x)):
                        pass
            except Exception as error:  # a task need not look at the channels of its target
                errors.append(error)
            else:
                return maps
        if prepared:
            return prepared[0]
        first = errors[0]
        said = f"prepare refuses what is made up for it: {first}"
        expect(not isinstance(first, DataError), said, "pass info= and batch= that suit it")
        raise first

    @property
    def labelled(self) -> tuple[str, ...]:
        """The label keys that the task requires."""
        return tuple(key for key in self.model().task(KEY).requires if key in ("mask", "target"))

    def config(self, spec: Mapping[str, Any], info: SourceInfo, backbone: Mapping[str, Any] | None) -> dict[str, Any]:
        """Of a model that trains in milliseconds; its context is not tied to the identity."""
        trunk = dict(backbone or {"name": "plain", "width": 6})
        small = {
            "backbone": {**trunk, "in_channels": info.channels},
            "projection": {"channels": 4},
            "context": {"name": "context7", "init_noise": 0.3},
        }
        return {**small, **self.model_config, "tasks": {KEY: {"source": SOURCE, **spec}}}

    def model(
        self, *, seed: int = 0, info: SourceInfo | None = None, backbone: Mapping[str, Any] | None = None
    ) -> DenseModel:
        """A fresh model; parts that start at zero get some noise."""
        info = info or self.info
        torch.manual_seed(seed)
        with named(TASKS, self.subject) as spec:
            model = DenseModel.from_config(self.config(spec, info, backbone), {str(spec.get("source", SOURCE)): info})
        stir(model)
        return model

    def task(self, model: DenseModel) -> Task:
        """The task in a model."""
        return model.task(KEY)

    def prepared(self, model: DenseModel, batch: Sample) -> tuple[Tensor, Target]:
        """Input and target, with fresh generators."""
        with torch.no_grad():
            return self.task(model).prepare(batch, samples.generators(batch))

    def output(self, model: DenseModel, x: Tensor) -> Tensor:
        """What the head answers, in float32."""
        return full(model({KEY: x})[KEY])

    def terms(self, model: DenseModel, batch: Sample) -> Terms:
        """The loss of a batch."""
        x, target = self.prepared(model, batch)
        return self.task(model).loss(self.output(model, x), target)

    def value(self, model: DenseModel, terms: Terms) -> Tensor:
        """The terms as one number, as training adds them."""
        coefficients = self.task(model).coefficients
        parts = [coefficients[term] * total / weight.clamp_min(1e-12) for term, (total, weight) in terms.items()]
        return torch.stack(parts).sum()

    def answered(self, model: DenseModel, batch: Sample) -> tuple[Tensor, Tensor, Target]:
        """(prediction, x, target) in evaluation mode."""
        model.eval()
        with torch.no_grad():
            x, target = self.prepared(model, batch)
            return self.task(model).postprocess(self.output(model, x), x), x, target

    def predict(self, model: DenseModel, image: Tensor) -> Tensor:
        """As users do."""
        return model.predict(image, options={f"{KEY}.{name}": value for name, value in self.options.items()})[KEY]

    def raw(self, model: DenseModel, batch: Sample) -> Tensor:
        """The head's output in evaluation mode, without a graph; the model stays in that mode."""
        model.eval()
        with torch.no_grad():
            return self.output(model, self.prepared(model, batch)[0])

    def methods(self, model: DenseModel, batch: Sample, output: Tensor) -> Iterator[str]:
        """Call the methods of the task one after the other; tells the name of each when it is done."""
        task = self.task(model)
        x, target = task.prepare(batch, samples.generators(batch))
        yield "prepare"
        task.loss(output, target)
        yield "loss"
        prediction = task.postprocess(output, x)
        yield "postprocess"
        task.update(prediction, x, target)
        yield "update"
        task.metrics.compute()
        yield "metrics.compute"
        task.draw(prediction[:1], x[:1], {key: value[:1] for key, value in target.items()})
        yield "draw"
        task.inputs(batch["image"], self.resolved(model, batch["image"]))
        yield "inputs"

    def resolved(self, model: DenseModel, image: Tensor) -> dict[str, float | Tensor | None]:
        """The run-time options that ``inputs`` gets for an image."""
        found = model.resolve(image, [KEY], {f"{KEY}.{name}": value for name, value in self.options.items()})
        return {name.rpartition(".")[2]: value for name, value in found.items()}
