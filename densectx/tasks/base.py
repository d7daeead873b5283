"""The contract of a task, the unit of extension."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from densectx.errors import ConfigError
from densectx.heads.base import Head
from densectx.losses import Criterion
from densectx.types import Sample, Score, Terms

Target = dict[str, Tensor]

Options: TypeAlias = Mapping[str, float | Tensor | None]
"""Run-time options of ``predict``: one number for all images, a (B,) tensor of one an image, or None."""

Estimator: TypeAlias = Callable[[Tensor], Tensor]
"""What finds a run-time option that is not given: (B, C, H, W) sRGB 0..1, as the task takes it -> (B,)."""


class Counting(ABC):
    """A task that knows the weights of its loss terms before there is an output, see :meth:`Task.loss`.

    With gradient accumulation its terms are normalised over the whole window; those of other tasks, and of losses
    that are not :class:`densectx.losses.Countable`, batch by batch.
    """

    @abstractmethod
    def weights(self, target: Target) -> dict[str, Tensor]:
        """{term: the weight that ``loss`` will return for this target}, scalars, of ``criterion.countable``."""


class ReadingFiles(ABC):
    """A task with files of its own, which training and evaluation need and ``predict`` does not."""

    @abstractmethod
    def read_files(self) -> None:
        """Read them; called as training or evaluation starts, so that none is missed after hours.

        Raises:
            DataError: a file is missing or not what it should be.
        """


class Task(nn.Module, ABC):
    """One question asked of every pixel: how a sample becomes input and target, head, loss, metrics, pictures.

    A task is built by the model with the runtime arguments ``features`` (the trunk's levels), ``in_channels`` (of
    the trunk) and ``info`` (:class:`densectx.types.SourceInfo` of its source) beside the options of the config; it
    takes those it needs. Its constructor sets ``head``, ``metrics`` and ``criterion``.

    Args:
        source: key of the data source that feeds it.
        weight: factor of its loss in the sum over tasks.
        channels: channels of its input x.
        in_channels: channels of the trunk's input.
        maps: how many of the last channels are maps (a noise level) that the trunk may leave to the head.

    Attributes:
        requires: sample keys it cannot train or evaluate without; the model refuses a source without those of labels
            (``mask``, ``target``).
        score: the metric it is judged by and the trivial answer beside it.
        scale: size of the answer / size of the image.
        input_scale: size of x / size of the image (a network that is fed an enlarged image); divides ``scale``.
        unchanged: x is the image of the source as it is, in training too; such tasks of a source are one kind of input
            to the trunk (``norm: per_input``), any other task is a kind of its own.
        options: run-time options of ``predict`` with their defaults (None: must be given or is estimated).
        estimators: {option: what finds it in an image}; asked for each image where the option is None or negative.
        convention: how ``score`` is measured, in a few words (``"Y, crop 2, per image, peak 255"``); printed beside
            every number, since numbers of different conventions cannot be compared.
        on_colour: what ``predict`` does with a colour image where the model has one channel: each channel on its
            own, the luma only with bicubic chroma, or its gray version.
        output: what the answer of ``predict`` is, for those who write it: ``"classes"`` (a probability for each
            class of the source), ``"labels"`` (an independent probability for each class), ``"restored"`` (the input,
            improved: gray if the input is), ``"values"`` (numbers that are no picture: metres, disparities) or
            ``"image"`` (any other picture if it has 1 or 3 channels, else numbers).
        period: pixels of the image, along each axis, after which what the task makes of it repeats: windows of a large
            image start at its multiples. Above 1 where places have a meaning: 2 for a Bayer mosaic, in which every
            second row and column begins with the same colour. A window that starts elsewhere is read as another image.
        turns: whether a turned or mirrored image may be answered and the answer turned back (``predict --tta``);
            false where places have a meaning, as in a mosaic, or channels a direction, as components of vectors. Then
            training does not mirror or turn a source whose ``target`` the task learns from.
    """

    requires: tuple[str, ...] = ("image",)
    score: Score
    head: Head
    metrics: Metric
    criterion: Criterion
    scale: int = 1
    input_scale: int = 1
    unchanged: bool = False
    options: Mapping[str, float | None] = {}
    estimators: Mapping[str, Estimator] = {}
    convention: str = ""
    on_colour: Literal["per_channel", "luma", "gray"] = "gray"
    output: Literal["classes", "labels", "restored", "values", "image"] = "image"
    period: int = 1
    turns: bool = True

    def __init__(self, source: str, weight: float, *, channels: int, in_channels: int, maps: int = 0) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise ConfigError(f"task of source {source!r}: weight {weight} is not a number from 0 up.")
        if in_channels not in (channels, channels - maps) and channels - maps != 1:
            raise ConfigError(
                f"a task of source {source!r} gives {channels - maps} channels, the backbone takes {in_channels};"
                f" set model.backbone.in_channels to {channels}, or the channels of the source."
            )
        self.source, self.weight = source, weight
        self.channels, self.in_channels, self.maps = channels, in_channels, maps

    @abstractmethod
    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """A collated batch to (x, target), on its device, float32, without gradient.

        Args:
            batch: collated samples of the task's source, with the keys of ``requires``.
            rngs: one generator a sample, the only source of randomness.

        Returns:
            x: (B, channels, H, W). A task that uses the image unchanged returns the very tensor: tasks with the
                same input share a pass through the trunk.
            target: tensors that ``loss``, ``update`` and ``draw`` read.
        """

    @abstractmethod
    def inputs(self, image: Tensor, options: Options) -> Tensor:
        """What ``predict`` feeds the network: (B, C, H, W) sRGB 0..1 as it is given -> x. Adds no noise.

        Args:
            image: with the channels of the task's source.
            options: every option of ``options``, estimated ones included.
        """

    @abstractmethod
    def loss(self, output: Tensor, target: Target) -> Terms:
        """(B, K, H', W') float32, of the answer's size -> {term: (sum, weight)}, see :class:`densectx.losses.Loss`.

        Called in training and, without gradient, in evaluation.
        """

    @abstractmethod
    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """What ``predict`` returns and ``update`` compares: output, x -> (B, K', H * scale, W * scale) float32."""

    @abstractmethod
    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """Count a batch of postprocessed predictions in ``metrics``."""

    @abstractmethod
    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Pictures of one sample to put side by side: [(3, H', W')] sRGB 0..1, by rule input, answer, truth.

        Args:
            prediction: (1, K', H', W') postprocessed.
            x: (1, channels, H, W).
            target: as ``prepare`` gave it, one sample.
        """

    def adapt(self, x: Tensor) -> Tensor:
        """The task's input to the trunk's: (B, channels, H, W) -> (B, in_channels, H, W).

        The same tensor if the channels agree; one channel is repeated; a last extra channel (a noise-level map)
        that the trunk does not take is left to the head. It depends on nothing but x and these numbers: what tasks
        make of the same x in the same way is one input, and they share a pass.
        """
        if x.shape[1] == self.in_channels:
            return x
        image = x[:, : self.channels - self.maps]
        return image.expand(-1, self.in_channels, -1, -1)  # one channel repeated, or the image without its maps

    @property
    def countable(self) -> frozenset[str]:
        """Loss terms whose weight is known from the target alone."""
        return self.criterion.countable if isinstance(self, Counting) else frozenset()

    @property
    def coefficients(self) -> dict[str, float]:
        """{loss term: its coefficient}; the terms are known before the first batch."""
        return self.criterion.coefficients

    def extra_repr(self) -> str:
        """Source and weight."""
        return f"source={self.source!r}, weight={self.weight}"
