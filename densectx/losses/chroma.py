"""Cross-entropy of chroma in bins, rare colours weighted up (Zhang et al. 2016, section 2.2)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from densectx.errors import ConfigError
from densectx.nn.ab_bins import AbBins
from densectx.nn.ab_prior import AbPrior


@final
class ChromaCrossEntropy(nn.Module):
    """Softmax cross-entropy with the soft encoding of (a, b), equations 2 and 4; the criterion of one kind of answer.

    A pixel's encoding q are its 5 nearest bins under a Gaussian of sigma 5; its term is -sum_i q_i log p_i, times the
    weight w of its nearest bin. Sum and weight are those of w * term and of w over labelled pixels, so that the value
    is the weighted mean over any number of ranks.

    Args:
        prior: how often each bin occurs.
        rebalance: strength in [0, 1): 0 weighs every pixel the same, 0.5 is the paper's (its lambda is 1 - rebalance).

    Attributes:
        coefficients: as of :class:`densectx.losses.Criterion`.
        countable: nothing: the weight takes as long to find as the loss.
    """

    def __init__(self, prior: AbPrior, rebalance: float = 0.5) -> None:
        super().__init__()
        if not 0 <= rebalance < 1:
            raise ConfigError(
                f"rebalance {rebalance} is not in [0, 1): 0 weighs all colours the same, 0.5 is the paper's."
            )
        self.prior, self.rebalance = prior, rebalance
        self.coefficients = {"chroma_cross_entropy": 1.0}
        self.countable: frozenset[str] = frozenset()
        self.bins = AbBins()

    def forward(self, logits: Tensor, ab: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, 313, H, W) float; (B, 2, H, W) in units of Lab, NaN = unlabelled -> {term: (sum, weight)}.

        Raises:
            DataError: the file of the prior cannot be read.
        """
        ab = ab.movedim(1, -1)
        labelled = ~ab.isnan().any(-1)
        scores = logits.movedim(1, -1)[labelled]  # (N, 313)
        index, share = self.bins.encode(ab[labelled].to(scores.dtype))
        term = scores.logsumexp(1) - (share * scores.gather(1, index)).sum(1)
        weight = self._weights(scores)[index[:, 0]]
        return {"chroma_cross_entropy": ((weight * term).sum(), weight.sum())}

    def weights(self, ab: Tensor) -> dict[str, Tensor]:
        """Nothing is countable."""
        return {}

    def _weights(self, like: Tensor) -> Tensor:
        if self.rebalance == 0:
            return torch.ones_like(self.bins.centres[:, 0], dtype=like.dtype)
        return self.prior.weights(self.rebalance).to(like)
