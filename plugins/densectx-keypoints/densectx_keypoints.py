"""Keypoints as heat maps for densectx: a task, its loss, its metrics and a synthetic data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from densectx import HEADS
from densectx.data.base import Dataset, Split
from densectx.data.transforms import size_of
from densectx.errors import ConfigError, DataError
from densectx.losses import Criterion, Loss
from densectx.nn.colour import as_rgb
from densectx.rng import seed_of
from densectx.tasks.base import Options, Target, Task
from densectx.types import Feature, Sample, Score, SourceInfo, Spec, Terms

PRIOR = math.log(0.1 / 0.9)  # logit of what an untrained head answers everywhere, as in Law & Deng's


@final
class HeatmapFocal(Loss):
    """Focal loss of heat maps (Law & Deng 2018, equation 1), whose peaks are exactly 1.

    -(1 - p)^alpha log p at peaks, -(1 - y)^beta p^alpha log(1 - p) elsewhere; weight = peaks, 1 for an image without.

    Args:
        alpha: how fast well answered pixels stop counting.
        beta: how fast pixels near a peak do.
    """

    takes = ("labels",)

    def __init__(self, alpha: float = 2.0, beta: float = 4.0) -> None:
        super().__init__()
        if alpha < 0 or beta < 0:
            raise ConfigError(f"heatmap_focal: alpha {alpha} and beta {beta} must not be negative.")
        self.alpha, self.beta = alpha, beta

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and heat (B, K, H, W), NaN = unlabelled -> (sum, weight)."""
        output = output.float()
        known = ~target.isnan()
        heat, peak = target.nan_to_num(), target == 1
        p = output.sigmoid()
        at_peak = (1 - p) ** self.alpha * F.logsigmoid(output)
        elsewhere = (1 - heat) ** self.beta * p**self.alpha * F.logsigmoid(-output)
        total = -(torch.where(peak, at_peak, elsewhere) * known).sum()
        peaks = peak.flatten(1).sum(1).clamp_min(1) * known.flatten(1).any(1)
        return total, peaks.sum().to(total.dtype)


def peaks(heat: Tensor, radius: int, threshold: float = 0.0, most: int = 500) -> Tensor:
    """Largest values of their surroundings: (H, W) -> (N, 2) rows and columns, best first.

    Args:
        heat: (H, W).
        radius: two peaks are farther apart than this in rows or in columns.
        threshold: smallest value of a peak.
        most: N is at most this.
    """
    largest = F.max_pool2d(heat[None, None], 2 * radius + 1, 1, radius)[0, 0]
    places = ((heat == largest) & (heat >= threshold)).nonzero()
    order = heat[places[:, 0], places[:, 1]].argsort(descending=True, stable=True)
    kept: list[Tensor] = []
    for place in places[order[: 4 * most]]:  # of a plateau one
        if len(kept) < most and all((place - other).abs().max() > radius for other in kept):
            kept.append(place)
    return torch.stack(kept) if kept else places[:0]


def matched(found: Tensor, truth: Tensor, distance: float) -> int:
    """Pairs of (N, 2) and (M, 2) at most ``distance`` pixels apart, every point in one pair, the best ones first."""
    if not len(found) or not len(truth):
        return 0
    table = torch.cdist(found.double(), truth.double())
    hits = 0
    for row in range(len(found)):
        value, column = table[row].min(0)
        if value <= distance:
            hits += 1
            table[:, column] = math.inf
    return hits


@final
class KeypointMetrics(Metric):
    """``precision``, ``recall`` and ``f1`` in percent, pooled over all points of all images and kinds.

    A point is found if an answer lies within ``distance`` pixels; each answer and each point counts once. ``f1_grid``
    is that of answers every 2 * distance pixels, which find nearly every point and much else.

    Args:
        radius: of the suppression of lesser answers, pixels.
        threshold: smallest heat of an answer.
        distance: pixels.
    """

    counts: Tensor
    full_state_update = False

    def __init__(self, radius: int = 3, threshold: float = 0.2, distance: float = 3.0) -> None:
        super().__init__()
        self.radius, self.threshold, self.distance = radius, threshold, distance
        # rows: ours, the grid; columns: pairs, answers, points
        self.add_state("counts", torch.zeros(2, 3, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, heat: Tensor) -> None:
        """Heat (B, K, H, W) twice; points are where the true one is 1, and no answer counts where it is NaN."""
        step = max(1, int(2 * self.distance))
        for answer, truth in zip(prediction.flatten(0, 1), heat.flatten(0, 1), strict=True):
            known = ~truth.isnan()
            points = (truth == 1).nonzero()
            found = peaks(answer.masked_fill(~known, -1), self.radius, self.threshold)
            rows = torch.arange(step // 2, len(truth), step, device=truth.device)
            columns = torch.arange(step // 2, truth.shape[1], step, device=truth.device)
            grid = torch.cartesian_prod(rows, columns)
            grid = grid[known[grid[:, 0], grid[:, 1]]]
            for row, answers in enumerate((found, grid)):
                pairs = matched(answers, points, self.distance)
                self.counts[row] += self.counts.new_tensor([pairs, len(answers), len(points)])

    def compute(self) -> dict[str, Tensor]:
        """{metric: scalar}; without answers the precision is 0; NaN without points."""
        pairs, answers, points = self.counts.double().T
        f1 = 100 * 2 * pairs / (answers + points)
        precision, recall = 100 * pairs / answers.clamp_min(1), 100 * pairs / points
        f1, precision = (torch.where(points > 0, value, torch.nan) for value in (f1, precision))
        return {"f1": f1[0], "precision": precision[0], "recall": recall[0], "f1_grid": f1[1]}


@final
class Keypoints(Task):
    """Probability that a keypoint of each kind is here: image (B, C, H, W) -> (B, kinds, H, W).

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of a source whose ``target`` is heat in 0..1, exactly 1 at keypoints, NaN where unlabelled.
            Augment it with crop, flips and turns; scale would lower the peaks.
        weight: of its loss.
        kinds: channels of the target.
        radius: of the suppression of lesser answers in the metrics, pixels.
        threshold: smallest probability of an answer in the metrics.
        distance: how far from a keypoint an answer may lie, pixels.
        head: spec of the head.
        loss: spec of the loss, or a list of them.
    """

    requires = ("image", "target")
    score = Score("f1", "grid")
    output = "values"
    unchanged = True

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        kinds: int = 1,
        radius: int = 3,
        threshold: float = 0.2,
        distance: float = 3.0,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "heatmap_focal",
    ) -> None:
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        if info.target != "map" or info.scale != 1:
            raise ConfigError(f"keypoints: source {source!r} has no heat maps of its images' size as the target.")
        if kinds < 1 or radius < 0 or distance < 0 or not 0 < threshold < 1:
            raise ConfigError(
                f"keypoints: kinds {kinds} (1 or more), radius {radius}, distance {distance} (0 or more) or threshold"
                f" {threshold} (in 0..1) is out of range."
            )
        self.kinds = kinds
        self.convention = f"within {distance:g} pixels, pooled over all points"
        self.head = HEADS.build(head, "head", features=features, in_channels=info.channels, out_channels=kinds, scale=1)
        self.criterion = Criterion(loss, form="labels")
        self.metrics = KeypointMetrics(radius, threshold, distance)

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """The image itself, and the heat.

        Raises:
            DataError: the target has other channels than there are kinds.
        """
        target = batch["target"]
        if target.shape[1] != self.kinds:
            raise DataError(
                f"keypoints: the target of source {self.source!r} has {target.shape[1]} channels, kinds is"
                f" {self.kinds}; set kinds to {target.shape[1]}."
            )
        return batch["image"], {"heat": target}

    def inputs(self, image: Tensor, options: Options) -> Tensor:
        """The image itself."""
        return image

    def loss(self, output: Tensor, target: Target) -> Terms:
        """Of logits."""
        return self.criterion(output + PRIOR, target["heat"])

    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """Probabilities (B, kinds, H, W)."""
        return (output.float() + PRIOR).sigmoid()

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """Count the points."""
        self.metrics.update(prediction, target["heat"])

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Image, answered points, true points, in red on the dimmed image."""
        image = as_rgb(x)[0]
        metrics = self.metrics
        assert isinstance(metrics, KeypointMetrics)
        found = [peaks(heat, metrics.radius, metrics.threshold) for heat in prediction[0]]
        return [image, _marked(image, found), _marked(image, [(heat == 1).nonzero() for heat in target["heat"][0]])]


def _marked(image: Tensor, points: Sequence[Tensor]) -> Tensor:
    """(3, H, W) dimmed, with a square of 3 pixels at each of the points [(N, 2)]."""
    dots = image.new_zeros(image.shape[1:])
    for row, column in torch.cat(list(points)).tolist():
        dots[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 1
    return torch.where(dots > 0, image.new_tensor([1.0, 0.2, 0.1]).view(3, 1, 1), image * 0.5)


@final
class Shapes(Dataset):
    """One polygon, star or checkerboard an image, with its corners as keypoints; some images hold an ellipse and none.

    In the manner of Synthetic Shapes (DeTone et al. 2018, section 4). A sample is a function of (seed, split, index).
    Samples: ``image`` (3, H, W), ``gray`` (false), ``target`` (1, H, W): the largest of the Gaussians around the
    keypoints, each of which is put at its nearest pixel, where the heat is exactly 1.

    Args:
        split: ``train``, ``val``; ``test`` is the same as ``val``.
        size: one number or [height, width] in pixels.
        length: number of training samples.
        val_length: number of validation samples.
        sigma: of the Gaussians, pixels.
        noise: standard deviation of the noise on the pictures, of 0..1.
        seed: of everything that is random.
    """

    def __init__(
        self,
        *,
        split: Split,
        size: int | Sequence[int] = 96,
        length: int = 2048,
        val_length: int = 64,
        sigma: float = 1.5,
        noise: float = 0.05,
        seed: int = 0,
    ) -> None:
        self.size = size_of(size, "size")
        if min(self.size) < 32 or min(length, val_length) < 1 or sigma <= 0 or noise < 0:
            raise ConfigError(
                f"shapes: size {size} (32 or more), length {length}, val_length {val_length} (1 or more), sigma {sigma}"
                f" (positive) or noise {noise} (0 or more) is out of range."
            )
        self.length = length if split == "train" else val_length
        self.part = "train" if split == "train" else "val"
        self.sigma, self.noise, self.seed = sigma, noise, seed
        self.info = SourceInfo(keys=("image", "target"), size=self.size, target="map")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:  # ends iteration, as of a list
            raise IndexError(index)
        rng = np.random.default_rng(seed_of(self.seed, "shapes", self.part, index))
        ground, *colours = _colours(rng)
        canvas = Image.new("RGB", (4 * self.size[1], 4 * self.size[0]), ground)  # reduced below: smooth edges
        shape = SHAPES[rng.choice(4, p=[0.3, 0.3, 0.3, 0.1])]
        points = shape(ImageDraw.Draw(canvas), rng, np.array(canvas.size, np.float64), colours) / 4
        image = np.asarray(canvas.resize(self.size[::-1], Image.Resampling.BOX), np.float32) / 255
        image = (image + self.noise * rng.standard_normal(image.shape, np.float32)).clip(0, 1)
        heat = torch.zeros(self.size)
        y, x = (torch.arange(float(side)) for side in self.size)
        for column, row in np.floor(points).astype(int):
            if 0 <= row < self.size[0] and 0 <= column < self.size[1]:
                square = (y[:, None] - row).square() + (x - column).square()
                heat = torch.maximum(heat, (-square / (2 * self.sigma**2)).exp())
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"image": pixels, "target": heat[None], "gray": torch.tensor(False)}

    def name(self, index: int) -> str:
        """``shapes/<part>/<index>``."""
        return f"shapes/{self.part}/{index}"


Points = NDArray[np.float64]
"""(N, 2) columns and rows; a pixel's centre is at half numbers."""


Colour = tuple[int, int, int]


def _colours(rng: np.random.Generator) -> list[Colour]:
    """Ground and two colours on it, their mean levels at least 37 apart."""
    levels = rng.permutation([40, 128, 215])[:, None] + rng.integers(-25, 26, (3, 3))
    return [(red, green, blue) for red, green, blue in levels.tolist()]


def _polygon(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: Points, colours: Sequence[Colour]) -> Points:
    """Three to six corners at different angles around a centre."""
    angles = _angles(rng)
    points = _centre(rng, size) + _rays(angles, 0.36 * size.min() * rng.uniform(0.6, 1.0, len(angles)))
    draw.polygon(_flat(points), fill=colours[0])
    return points


def _star(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: Points, colours: Sequence[Colour]) -> Points:
    """Three to six thick lines from a centre; their ends and the centre."""
    angles, centre, width = _angles(rng), _centre(rng, size), int(rng.integers(8, 17))
    ends = centre + _rays(angles, 0.36 * size.min() * rng.uniform(0.7, 1.0, len(angles)))
    for end in ends:
        draw.line(_flat(np.stack([centre, end])), fill=colours[0], width=width)
    return np.concatenate([centre[None], ends])


def _checkerboard(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: Points, colours: Sequence[Colour]
) -> Points:
    """Two to four rows and columns, turned and sheared; all corners of the fields."""
    rows, columns = rng.integers(2, 5, 2).tolist()
    turn, shear = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3)
    v, u = np.meshgrid(np.arange(rows + 1) - rows / 2, np.arange(columns + 1) - columns / 2, indexing="ij")
    side = 0.75 * size.min() / np.hypot(rows + 1, columns + 1) * rng.uniform(0.7, 1.0)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    points: Points = side * np.stack([u + shear * v, v], -1) @ matrix + _centre(rng, size)
    for row, column in np.ndindex(rows, columns):
        near, far = points[row, column : column + 2], points[row + 1, column : column + 2]
        draw.polygon(_flat(np.concatenate([near, far[::-1]])), fill=colours[(row + column) % 2])
    return points.reshape(-1, 2)


def _ellipse(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: Points, colours: Sequence[Colour]) -> Points:
    """A shape without corners."""
    half, centre = rng.uniform(0.15, 0.35, 2) * size, _centre(rng, size)
    draw.ellipse(_flat(np.stack([centre - half, centre + half])), fill=colours[0])
    return np.empty((0, 2))


SHAPES = (_polygon, _star, _checkerboard, _ellipse)


def _angles(rng: np.random.Generator) -> Points:
    count = int(rng.integers(3, 7))
    steps: Points = np.arange(count) + rng.uniform(-0.2, 0.2, count)
    return 2 * np.pi * steps / count + rng.uniform(0, 2 * np.pi)


def _centre(rng: np.random.Generator, size: Points) -> Points:
    centre: Points = size / 2 + rng.uniform(-0.1, 0.1, 2) * size
    return centre


def _rays(angles: Points, lengths: Points) -> Points:
    rays: Points = lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    return rays


def _flat(points: Points) -> list[float]:
    return [float(value) for value in points.ravel()]
