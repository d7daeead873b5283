"""Monocular depth for densectx: a task, its loss, its metrics and a data set that needs no download."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from densectx import HEADS
from densectx.data.base import Dataset, Split
from densectx.data.labels import read_field
from densectx.data.reader import read_image
from densectx.errors import ConfigError, DataError
from densectx.losses import Criterion, Loss
from densectx.nn.colour import as_rgb
from densectx.tasks.base import Options, Target, Task
from densectx.tasks.regression import Range, side_by_side
from densectx.types import Feature, Sample, Score, SourceInfo, Spec, Terms

MEASURES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "delta1", "delta2", "delta3")


@final
class SILog(Loss):
    """Scale-invariant error of log depths, mean(d^2) - balance * mean(d)^2 (Eigen et al. 2014, equation 4).

    d = span * (output - target); of each image, weight = the number of images with known pixels.

    Args:
        span: given by the task, natural logarithms a unit of the output; 1 where outputs are log depths themselves.
        balance: lambda of the paper: 0 is the plain squared error, 1 ignores the scale of an image altogether.
    """

    takes = ("numbers",)

    def __init__(self, span: float = 1.0, balance: float = 0.5) -> None:
        super().__init__()
        if not 0 <= balance <= 1:
            raise ConfigError(f"silog: balance {balance} is not in 0..1; the paper takes 0.5.")
        self.span, self.balance = span, balance

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, H, W) twice, on a logarithmic scale, NaN = unknown -> (sum, number of images)."""
        known = ~target.isnan()
        d = self.span * torch.where(known, output.float() - target, 0.0).flatten(1)
        count = known.flatten(1).sum(1)
        pixels = count.clamp_min(1)
        error = d.square().sum(1) / pixels - self.balance * (d.sum(1) / pixels).square()
        return error.sum(), (count > 0).sum().to(error.dtype)


def measures(answer: Tensor, truth: Tensor) -> Tensor:
    """Errors of one image by :data:`MEASURES` (Eigen et al. 2014, section 4): positive metres (N,) twice -> (7,)."""
    answer, truth = answer.double(), truth.double()
    error, ratio = answer - truth, torch.maximum(answer / truth, truth / answer)
    parts = (error.abs() / truth, error.square() / truth, error.square(), ratio.log().square())
    abs_rel, sq_rel, square, square_log = (part.mean() for part in parts)
    deltas = [(ratio < 1.25**k).double().mean() for k in (1, 2, 3)]
    return torch.stack([abs_rel, sq_rel, square.sqrt(), square_log.sqrt(), *deltas])


def median(values: Tensor) -> Tensor:
    """The middle value (N,) -> (), of an even number the mean of the two middle ones, as ``numpy.median``."""
    ordered, count = values.sort().values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


@final
class DepthMetrics(Metric):
    """The usual errors of depth: of each image over its known pixels, then the mean over images that have any.

    So do the evaluation programs that most tables come from (Godard et al. 2017); errors pooled over all pixels differ.
    ``delta1`` is the share of pixels with max(answer / truth, truth / answer) < 1.25, ``delta2`` and ``delta3`` with
    1.25^2 and 1.25^3. ``NAME_median`` is what the true median depth of each image would score as the answer for all of
    its pixels, which no constant that does not see the truth can be expected to reach.

    Args:
        median_scaling: multiply each answer by median(truth) / median(answer) first (Zhou et al. 2017), for models
            whose scale means nothing: of another camera, or trained without metres.
    """

    total: Tensor
    images: Tensor
    full_state_update = False

    def __init__(self, median_scaling: bool = False) -> None:
        super().__init__()
        self.median_scaling = median_scaling
        self.add_state("total", torch.zeros(2, len(MEASURES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """(B, 1, H, W) positive metres twice, NaN in the target = unknown."""
        for image, depth in zip(prediction, target, strict=True):
            known = ~depth.isnan()
            if known.any():
                answer, truth = image[known], depth[known]
                centre = median(truth)
                if self.median_scaling:
                    answer = answer * (centre / median(answer))
                self.total += torch.stack([measures(answer, truth), measures(centre.expand_as(truth), truth)])
                self.images += 1

    def compute(self) -> dict[str, Tensor]:
        """{measure: scalar, measure_median: scalar}; NaN without known pixels."""
        ours, median = self.total / self.images
        names = [f"{name}_median" for name in MEASURES]
        return dict(zip((*MEASURES, *names), (*ours, *median), strict=True))


@final
class Depth(Task):
    """Distance from the camera's plane in metres: image (B, C, H, W) -> (B, 1, H, W), in [low, high].

    The network answers log(depth / low) / log(high / low), which is what losses see.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of a source whose ``target`` is a map of metres, NaN where unknown.
        weight: of its loss.
        low: smallest answer in metres.
        high: largest answer in metres.
        median_scaling: see :class:`DepthMetrics`; changes what is measured, not what ``predict`` answers.
        head: spec of the head.
        loss: spec of the loss, or a list of them.
    """

    requires = ("image", "target")
    score = Score("abs_rel", "median", higher_is_better=False)
    output = "values"
    unchanged = True
    convention = "per image, mean over images"

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        low: float = 0.5,
        high: float = 10.0,
        median_scaling: bool = False,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "silog",
    ) -> None:
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        if info.target != "map" or info.scale != 1:
            raise ConfigError(f"depth: source {source!r} has no map of depths of its images' size as the target.")
        self.range = Range(low, high, "log")
        if median_scaling:
            self.convention += ", scaled to the true median"
        self.head = HEADS.build(head, "head", features=features, in_channels=info.channels, out_channels=1, scale=1)
        self.criterion = Criterion(loss, form="numbers", span=math.log(high / low))
        self.metrics = DepthMetrics(median_scaling)

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """The image itself; metres, and the network's scale.

        Raises:
            DataError: the target has more than one channel.
        """
        target = batch["target"]
        if target.shape[1] != 1:
            raise DataError(
                f"depth: the target of source {self.source!r} has {target.shape[1]} channels, expected one, metres;"
                " use the task regression for several."
            )
        return batch["image"], {"depth": target, "unit": self.range.to_unit(target)}

    def inputs(self, image: Tensor, options: Options) -> Tensor:
        """The image itself."""
        return image

    def loss(self, output: Tensor, target: Target) -> Terms:
        """On the network's logarithmic scale."""
        return self.criterion(output, target["unit"])

    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """Metres (B, 1, H, W)."""
        return self.range.to_value(output)

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """Count the images."""
        self.metrics.update(prediction, target["depth"])

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Image, answer, truth; dark is near, black unknown."""
        return [as_rgb(x)[0], *side_by_side(prediction[0], target["depth"][0], self.range)]


FOCAL, BASELINE, OFFSET = 994.978, 0.193001, 31.086  # pixels, metres, pixels: docstring of skimage's stereo_motorcycle
NYUD_UNITS = 5000.0  # of the 16-bit files, a metre
WIDTH, TRAIN, VAL = 741, 480, 496  # columns: training ends at 480, validation begins at 496


@final
class StereoMotorcycle(Dataset):
    """The left picture of scikit-image's stereo pair with its depth: ``Motorcycle`` of Middlebury 2014, a quarter size.

    Depth in metres is baseline * focal length / (disparity + offset) (Scharstein et al. 2014), 2.1 to 5.0; occluded
    pixels (7 %) are NaN. Training is the left 480 columns, validation the right 245, with 16 between them: one picture,
    so that it shows whether training works, and not how well a model sees another room.

    Args:
        split: ``train``, ``val``; ``test`` is the same as ``val`` unless ``nyud`` is given.
        nyud: folder whose pairs ``NAME.png`` and ``depth_gt_NAME.png`` (16 bit, 5000 a metre, 0 unknown; NYUD v2 as
            Nekrasov et al. 2019 give it out) are the test split, found in sub-folders too.
    """

    def __init__(self, *, split: Split, nyud: str | None = None) -> None:
        self.columns = slice(0, TRAIN) if split == "train" else slice(VAL, WIDTH)
        self.nyud = Path(nyud).expanduser() if nyud and split == "test" else None
        self.info = SourceInfo(keys=("image", "target"), size=(500, TRAIN), target="map")

    @cached_property
    def _pairs(self) -> list[tuple[Path, Path]]:
        assert self.nyud is not None
        depths = sorted(self.nyud.rglob("depth_gt_*.png"))
        if not depths:
            raise DataError(f"{self.nyud}: no file depth_gt_*.png in it.")
        return [(path.with_name(path.name.removeprefix("depth_gt_")), path) for path in depths]

    @cached_property
    def _motorcycle(self) -> Sample:
        spec = importlib.util.find_spec("skimage")
        if spec is None or spec.origin is None:
            raise DataError("stereo_motorcycle needs scikit-image's pictures: pip install scikit-image.")
        folder = Path(spec.origin).parent / "data"
        image, _ = read_image(folder / "motorcycle_left.png")
        with np.load(folder / "motorcycle_disp.npz", allow_pickle=False) as file:
            disparity = torch.from_numpy(file["arr_0"].astype(np.float32))
        depth = torch.where(disparity.isfinite(), BASELINE * FOCAL / (disparity + OFFSET), torch.nan)
        return {
            "image": image[..., self.columns].contiguous(),
            "target": depth[None, :, self.columns].contiguous(),
            "gray": torch.tensor(False),
        }

    def __len__(self) -> int:
        return len(self._pairs) if self.nyud else 1

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if not self.nyud:
            return {key: value.clone() for key, value in self._motorcycle.items()}
        image_file, depth_file = self._pairs[index]
        image, gray = read_image(image_file)
        stored = read_field(depth_file)
        if stored.shape[1:] != image.shape[1:]:
            raise DataError(
                f"{depth_file}: {tuple(stored.shape[1:])} pixels, but {image_file}: {tuple(image.shape[1:])}."
            )
        depth = torch.where(stored > 0, stored / NYUD_UNITS, torch.nan)
        return {"image": image, "target": depth.float(), "gray": torch.tensor(gray)}

    def name(self, index: int) -> str:
        """The path, or the columns of the picture."""
        return str(self._pairs[index][0]) if self.nyud else f"motorcycle, columns {self.columns.start}"
