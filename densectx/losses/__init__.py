"""Losses as (sum, weight) pairs, so that each can be normalised over ranks exactly."""

from densectx.losses.base import Countable, Form, Loss
from densectx.losses.classes import BCE, CrossEntropy, Focal
from densectx.losses.criterion import Criterion
from densectx.losses.elementwise import L1, MSE, Charbonnier
from densectx.losses.lovasz import Lovasz
from densectx.losses.region import Dice, Tversky

__all__ = [
    "BCE",
    "L1",
    "MSE",
    "Charbonnier",
    "Countable",
    "Criterion",
    "CrossEntropy",
    "Dice",
    "Focal",
    "Form",
    "Loss",
    "Lovasz",
    "Tversky",
]
