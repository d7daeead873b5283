"""Config values against annotations."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from densectx.typecheck import describe, fits
from densectx.types import Spec


@pytest.mark.parametrize(
    ("value", "hint", "right"),
    [
        (1, int, True),
        (True, int, False),
        (1.5, int, False),
        (1, float, True),
        ("1", float, False),
        (True, bool, True),
        (1, bool, False),
        (None, int | None, True),
        ([1, 2.5], Sequence[float], True),
        ([1, "x"], Sequence[float], False),
        ("12", Sequence[str], False),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (1, Literal[True], False),
        ("linear", Spec, True),
        ({"name": "linear", "x": [1]}, Spec, True),
        (3, Spec, False),
        (["l1", {"name": "mse"}], Spec | Sequence[Spec], True),
        ({"a": 1}, Mapping[str, float], True),
        ({"a": "b"}, Mapping[str, float], False),
        (object(), Any, True),
    ],
)
def test_fits(value, hint, right):
    assert fits(value, hint) is right


def test_describe():
    assert describe(float | Sequence[float]) == "a number or a list (a number each)"
    assert describe(Literal[8, 16] | None) == "8 or 16 or null"
