"""Pages, tables and curves: escaped, closed, without scripts.

uv run pytest tests/common/test_html.py
"""

import math
import re

import pytest

from finetuning.common.html import (
    COLORS,
    COLUMNS,
    cell,
    html_page,
    line_chart,
    table,
    thinned,
    ticks,
)
from tests.helpers.html_page import Page, assert_harmless

EVIL = "<script>alert(1)</script>"


def test_a_page_with_a_table_is_closed_and_harmless():
    content = table(("name", EVIL), [[cell(EVIL), "<b>2</b>"], [cell("a\n b\x1b[31m"), ""]])
    page = html_page(EVIL, content)
    parsed = assert_harmless(page)
    assert {"table", "th", "td", "b"} <= parsed.tags
    assert "<td>a b</td>" in content and content.count("<tr>") == 3
    assert cell("密码学密码学", 3) == "密码学…"


def test_thinning_keeps_spikes_and_gaps():
    points = [(i, 1.0) for i in range(20_000)]
    points[7777], points[9999], points[12345] = (7777, 50.0), (9999, -9.0), (12345, math.nan)
    kept = thinned(points)
    assert len(kept) <= 3 * COLUMNS and [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert (7777, 50.0) in kept and (9999, -9.0) in kept
    assert any(math.isnan(y) for _, y in kept)
    assert thinned(points[:50]) == points[:50]


def test_a_chart_of_odd_curves():
    chart = line_chart("<t>", {"<a>": [(0, 1.0), (1, math.nan), (2, 1.0)], "b": []})
    Page(chart)
    assert "&lt;t&gt;" in chart and "&lt;a&gt;" in chart and "nan" not in chart
    assert chart.count("<circle") == 2, "points alone are dots"
    assert line_chart("none", {"a": [(0, math.inf)]}) == ""
    assert line_chart("one point", {"a": [(5, 5.0)]})


def test_no_two_curves_of_a_chart_look_alike():
    chart = line_chart("many", {f"<{i}>": [(0, 1.0), (1, i)] for i in range(30)})
    look = r'stroke="(#\w+)" stroke-dasharray="([\w ]+)"'
    curves = re.findall(f"<path {look}", chart)
    legend = re.findall(f"<line x2[^>]* {look}", chart)
    assert len(set(curves)) == len(curves) == 30 and legend == curves
    assert len(set(re.findall(look, line_chart("few", {"a": [(0, 1)], "b": [(0, 1)]})))) == 2


@pytest.mark.parametrize("ground", [1.0, 0.006], ids=["white", "#121212"])
def test_curves_stand_out_from_light_and_dark_pages(ground):
    for color in COLORS:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light = sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
        low, high = sorted((light, ground))
        assert (high + 0.05) / (low + 0.05) >= 3, color  # WCAG 2, 1.4.11


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1e-5, 3e-4), (-3, 7), (0, 123456)])
def test_ticks_are_few_round_and_inside(low, high):
    marks = ticks(low, high)
    assert 3 <= len(marks) <= 7 and all(low - 1e-12 <= m <= high * 1.0000001 for m in marks)
