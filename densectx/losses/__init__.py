"""Losses as (sum, weight) pairs, so that each can be normalised over ranks exactly."""

from densectx.losses.base import Loss
from densectx.losses.classes import CrossEntropy
from densectx.losses.criterion import Criterion
from densectx.losses.elementwise import L1, MSE, Charbonnier

__all__ = ["L1", "MSE", "Charbonnier", "Criterion", "CrossEntropy", "Loss"]
