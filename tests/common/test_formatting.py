"""Numbers as people read them.

uv run pytest tests/common/test_formatting.py
"""

import math

import pytest

from finetuning.common.formatting import (
    axis_number,
    four_digits,
    grouped,
    percent,
    shown,
    size_text,
)


def test_an_integer_and_a_text_stay_whole_and_a_float_has_four_digits():
    assert [shown(v) for v in (123456, 0.123456, 123456.0, "text", None, math.nan)] == [
        "123456", "0.1235", "1.235e+05", "text", "–", "nan",
    ]  # fmt: skip
    assert [four_digits(v) for v in (123456, 0.5, "nan", None)] == ["1.235e+05", "0.5", "nan", "–"]
    assert shown(None, "") == "" and four_digits(None, "not known yet") == "not known yet"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1234567, 2, "1,234,567"),
        (1234.5, 2, "1,234.50"),
        (3.0, 2, "3"),
        (0.12345, 3, "0.123"),
        (None, 2, "–"),
        (9999.5, 0, "10,000"),
        (math.inf, 0, "inf"),
    ],
)
def test_thousands_are_grouped(value, digits: int, text: str):
    assert grouped(value, digits) == text


def test_shares_sizes_and_ticks():
    assert percent(12.345) == "12.3 %"
    assert [size_text(n) for n in (2**20, 1.5 * 2**30)] == ["1.0 MiB", "1.5 GiB"]
    ticks = [0.0, 0.5, 20000.0, 100000.0, 0.00002, 2.5e-12]
    assert [axis_number(v) for v in ticks] == ["0", "0.5", "20000", "1e5", "2e-5", "2.5e-12"]
