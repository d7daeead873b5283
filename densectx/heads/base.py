"""The contract of a head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class Head(nn.Module, ABC):
    """Feature maps and the task's input to the task's output.

    Runtime arguments a head may take, all given by the model: ``features`` (the trunk's levels, fine to coarse, the
    last one being the context module's output), ``in_channels`` (of the task input), ``out_channels``, ``scale``
    (output size / input size), ``residual`` (the output is a correction of the task input's first channels),
    ``exclusive`` (softmax makes probabilities of the output: of classes, each pixel has one).

    Attributes:
        reads_pyramid: whether ``forward`` looks at levels below the context module's output. For a head that does
            not, the last level may be all that it is given: those below need not be computed.
    """

    reads_pyramid: bool = True

    @abstractmethod
    def forward(self, features: Sequence[Tensor], x: Tensor) -> Tensor:
        """[(B, C_i, H / s_i, W / s_i)], (B, in_channels, H, W) -> (B, out_channels, H * scale, W * scale)."""
