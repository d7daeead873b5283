"""How often each bin of chroma occurs in photographs, and the weights that even this out."""

from __future__ import annotations

import json
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densectx.errors import DataError
from densectx.nn.ab_bins import BINS, SIGMA, centres

SHIPPED = Path(__file__).with_name("ab_prior.json")
"""Counted over the train and test images of BSDS500 by ``benchmarks/ab_prior.py``."""


@final
class AbPrior:
    """Frequencies of the 313 bins (Zhang et al. 2016, section 2.2).

    The file is read when a number is first asked for, as training or evaluation starts: a model built from a checkpoint
    answers without it.

    Args:
        path: JSON file whose ``counts`` are the pixels of each bin; None for the one densectx ships.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = SHIPPED if path is None else Path(path).expanduser()

    @cached_property
    def counts(self) -> NDArray[np.float64]:
        """(313,): pixels of each bin.

        Raises:
            DataError: the file is missing, or holds no 313 counts.
        """
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path}: the prior of chroma cannot be read ({error}); benchmarks/ab_prior.py writes one, and"
                " `prior: null` takes the one of densectx."
            ) from None
        counts = found.get("counts") if isinstance(found, dict) else None
        if (
            not isinstance(counts, list)
            or len(counts) != BINS
            or not all(_is_count(n) for n in counts)
            or not any(counts)
        ):
            raise DataError(f"{self.path}: expected an object whose 'counts' are {BINS} numbers >= 0, not all 0.")
        return np.array(counts, dtype=np.float64)

    @cached_property
    def smoothed(self) -> NDArray[np.float64]:
        """Probabilities (313,), positive: one pixel added to each bin, then a Gaussian of sigma 5 in ab.

        The Gaussian's weights are normalised for each bin that gives, so that the probabilities sum to 1.
        """
        places, counts = centres().double().numpy(), self.counts + 1
        kernel = np.exp(-np.square(places[:, None] - places[None]).sum(2) / (2 * SIGMA**2))
        smoothed: NDArray[np.float64] = (kernel / kernel.sum(0)) @ (counts / counts.sum())
        return smoothed

    @cached_property
    def mean(self) -> tuple[float, float]:
        """The mean colour (a, b), units of Lab."""
        a, b = self.counts @ centres().double().numpy() / self.counts.sum()
        return float(a), float(b)

    def weights(self, rebalance: float) -> Tensor:
        """Weight of each bin (313,) float64, equation 4: w ~ 1 / ((1 - lambda) p + lambda / 313), mean 1 under p.

        Args:
            rebalance: 1 - lambda, in [0, 1]: 0 gives weights of 1, 0.5 is the paper's, 1 the inverse of p.
        """
        weights = 1 / (rebalance * self.smoothed + (1 - rebalance) / BINS)
        return torch.from_numpy(weights / (self.smoothed @ weights))


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value >= 0
