"""Every metric of the project with random samples, for one process, for ranks that are only played, and for real ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densectx.metrics import ConfusionMetrics, ImageMetrics, LabelMetrics, psnr
from densectx.metrics.colour import ColourMetrics
from densectx.metrics.regression import RegressionMetrics
from densectx.metrics.ssim import ssim
from densectx.nn.ab_prior import AbPrior

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
SIZE = 13  # pixels


@dataclass
class Case:
    """A metric: how it is made, and the arguments of ``update`` for a number of samples."""

    make: Callable[[], Any]
    samples: Callable[[int, torch.Generator], tuple[Tensor, ...]]


def _plugin(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(
        f"{name}_of_the_tests", PLUGINS / name.replace("_", "-") / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _holes(x: Tensor, rng: torch.Generator) -> Tensor:
    """Some pixels unknown, and in about every fourth sample all."""
    share = torch.rand(len(x), 1, 1, 1, generator=rng) * 1.3
    return x.masked_fill(torch.rand(x[:, :1].shape, generator=rng) > 1.3 - share, torch.nan)


def _ids(count: int, rng: torch.Generator) -> Tensor:
    ids = torch.randint(0, 4, (count, SIZE, SIZE), generator=rng)
    return ids.masked_fill(torch.rand(ids.shape, generator=rng) < 0.1, 255)


def _lab(count: int, rng: torch.Generator) -> Tensor:
    lab = torch.rand(count, 3, SIZE, SIZE, generator=rng)
    return lab * torch.tensor([100.0, 120, 120]).view(3, 1, 1) - torch.tensor([0.0, 60, 60]).view(3, 1, 1)


def _depths(count: int, rng: torch.Generator) -> Tensor:
    return torch.rand(count, 1, SIZE, SIZE, generator=rng) * 9 + 1


def cases() -> dict[str, Case]:
    """By the name of the metric's class."""
    edges, depth, keypoints = map(_plugin, ("densectx_edges", "densectx_depth", "densectx_keypoints"))
    image = (3, SIZE, SIZE)

    def unknown_chroma(count: int, rng: torch.Generator) -> Tensor:
        lab = _lab(count, rng)
        return torch.cat([lab[:, :1], _holes(lab[:, 1:], rng)], 1)

    def boundaries(count: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        edge = torch.rand(count, 1, SIZE, SIZE, generator=rng) < 0.2
        return torch.rand(count, 1, SIZE, SIZE, generator=rng), edge, ~edge

    def heat(count: int, rng: torch.Generator) -> Tensor:
        heat = torch.rand(count, 2, SIZE, SIZE, generator=rng) * 0.9
        return heat.masked_fill(torch.rand(heat.shape, generator=rng) < 0.02, 1.0)

    return {
        "ConfusionMetrics": Case(
            lambda: ConfusionMetrics(4, 255, ("a", "b", "c", "d"), boundary=0.1),
            lambda n, rng: (torch.rand(n, 4, SIZE, SIZE, generator=rng), _ids(n, rng)),
        ),
        "LabelMetrics": Case(
            lambda: LabelMetrics(("a", "b"), boundary=0.1),
            lambda n, rng: (
                torch.rand(n, 2, SIZE, SIZE, generator=rng),
                _holes(torch.rand(n, 2, SIZE, SIZE, generator=rng).round(), rng),
            ),
        ),
        "ImageMetrics": Case(
            lambda: ImageMetrics({"psnr": psnr, "ssim": ssim}, "input"),
            lambda n, rng: tuple(torch.rand(n, *image, generator=rng) for _ in range(3)),
        ),
        "ColourMetrics": Case(lambda: ColourMetrics(AbPrior()), lambda n, rng: (_lab(n, rng), unknown_chroma(n, rng))),
        "RegressionMetrics": Case(RegressionMetrics, lambda n, rng: (_depths(n, rng), _holes(_depths(n, rng), rng))),
        "BoundaryMetrics": Case(edges.BoundaryMetrics, boundaries),
        "DepthMetrics": Case(depth.DepthMetrics, lambda n, rng: (_depths(n, rng), _holes(_depths(n, rng), rng))),
        "KeypointMetrics": Case(
            keypoints.KeypointMetrics, lambda n, rng: (torch.rand(n, 2, SIZE, SIZE, generator=rng), heat(n, rng))
        ),
    }
