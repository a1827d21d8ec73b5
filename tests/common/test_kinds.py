"""Values of a file against the types that they should have.

uv run pytest tests/common/test_kinds.py
"""

import dataclasses
from typing import Any, TypedDict

import pytest

from finetuning.common.kinds import misfit


class Point(TypedDict, total=False):
    x: float


@dataclasses.dataclass
class Whole:
    name: str
    points: list[Point] = dataclasses.field(default_factory=list)


FITS = [
    (1, int), (1, float), (1.5, float), (True, bool), ("a", str), (None, int | None), ([], list), ({}, dict),
    ([1, None], list[float | None]), ({"a": [1]}, dict[str, list[int]]), ({"x": 1}, Point), ({}, Point),
    ({"name": "a", "points": [{"x": 2}]}, Whole), (object(), Any),
    ([1, None], tuple[float, int | None]),
]  # fmt: skip
MISFITS = [
    (True, int, "kind"), (1.5, int, "kind"), ("1", float, "kind"), (None, str, "kind"), ((), list, "kind"),
    ([1, "a"], list[int], "kind"), ({"a": 1}, dict[str, str], "kind"), ({"y": 1}, Point, "y is not known"),
    ({"x": "1"}, Point, "x is of another kind"), ({"name": "a"}, Whole, "points is missing"),
    ({"name": "a", "points": [{"x": None}]}, Whole, "x is of another kind"), ([], Whole, "kind"),
    ({"name": "a", "points": [], "more": 1}, Whole, "more is not known"),
    ([1], tuple[int, int], "kind"), ([1, "a"], tuple[int, int], "kind"), ("ab", tuple[str, str], "kind"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "kind"), FITS)
def test_what_fits(value, kind):
    assert misfit(value, kind) == ""


@pytest.mark.parametrize(("value", "kind", "expected"), MISFITS)
def test_what_does_not(value, kind, expected):
    assert expected in misfit(value, kind)
