"""Draws of single numbers from a given generator."""

from __future__ import annotations

import torch


def uniform(low: float, high: float, rng: torch.Generator) -> float:
    """Uniform in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=rng))


def integer(high: int, rng: torch.Generator) -> int:
    """Uniform in 0..high, both included."""
    return int(torch.randint(high + 1, (), generator=rng))


def happens(probability: float, rng: torch.Generator) -> bool:
    """True with this probability, in [0, 1]."""
    return uniform(0, 1, rng) < probability
