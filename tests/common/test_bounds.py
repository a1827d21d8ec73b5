"""Every limit stands in one table, is kept by code that takes it from there, and has a test."""

import re
from pathlib import Path

from finetuning.common.bounds import BOUNDS
from scripts import update_bounds

ROOT = Path(__file__).parents[2]
CODE = {
    path: path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.py"), *(ROOT / "finetuning").rglob("*.py"))
    if path.name != "bounds.py"
}


def test_the_page_shows_the_table_as_it_is():
    shown = update_bounds.PAGE.read_text(encoding="utf-8")
    assert shown == update_bounds.page(), "run scripts/update_bounds.py"


def test_every_bound_is_cited_by_code():
    for name in BOUNDS:
        cited = re.compile(rf"\b{name}\b(?!\s*=)")
        assert any("common.bounds" in text and cited.search(text) for text in CODE.values()), name


def test_every_bound_has_its_test():
    for name, bound in BOUNDS.items():
        file, _, test = bound.held_by.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {test}(" in text, f"{name}: no {test} in tests/{file}"
