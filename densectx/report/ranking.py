"""The best and the worst samples of a task, kept while all of them pass by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from densectx.report.errors import ErrorMap

SHOWN = 3
"""Samples at either end."""

_KEPT = 2 * SHOWN  # where all scores are equal, the ends are the same samples, and each shows half of them


@final
@dataclass(frozen=True, eq=False)
class Scored:
    """A sample with the score of the answer and of the trivial one, by the task's own metric on it alone.

    Attributes:
        name: of the sample.
        score: of the answer.
        trivial: of the trivial answer, NaN where there is none.
        pictures: input, answer and truth, empty where they are not shown.
        error: where the answer is wrong.
        size: height and width of the task's input.
    """

    name: str
    score: float
    trivial: float
    pictures: tuple[Tensor, ...] = ()
    error: ErrorMap | None = None
    size: tuple[int, int] = (0, 0)


@final
class Ranking:
    """The ends of a list of samples by score.

    Args:
        higher_is_better: which end is the best one.
    """

    def __init__(self, higher_is_better: bool) -> None:
        self._sign = 1 if higher_is_better else -1
        self._worst: list[Scored] = []
        self._best: list[Scored] = []

    def takes(self, score: float) -> bool:
        """Whether a sample of this score belongs to one of the ends, as far as they are known."""
        return any(_enters(score * sign, ends, sign) for ends, sign in self._ends())

    def add(self, scored: Scored) -> None:
        """Keep a sample that :meth:`takes` has been asked for."""
        for ends, sign in self._ends():
            if _enters(scored.score * sign, ends, sign):
                ends.append(scored)
                ends.sort(key=lambda one: one.score * sign)
                del ends[_KEPT:]

    def ends(self) -> tuple[list[Scored], list[Scored]]:
        """(worst, worst first; best, best first); no sample is in both, of few the worse half is the worst."""
        count = len({*self._worst, *self._best})
        worst = self._worst[: min(SHOWN, (count + 1) // 2)]
        return worst, [one for one in self._best if one not in worst][:SHOWN]

    def _ends(self) -> list[tuple[list[Scored], int]]:
        return [(self._worst, self._sign), (self._best, -self._sign)]


def _enters(score: float, ends: Sequence[Scored], sign: int) -> bool:
    return len(ends) < _KEPT or score < ends[-1].score * sign
