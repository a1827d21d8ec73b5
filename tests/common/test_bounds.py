"""Every limit stands in one table, is kept by code that takes it from there, and has a test."""

import ast
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


def cited(text: str) -> set[str]:
    """The names of `common.bounds` that a module imports and then uses; words of a text are none."""
    tree = ast.parse(text)
    imported = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "finetuning.common.bounds"
        for name in node.names
    }
    loads = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return imported & {node.id for node in loads if isinstance(node.ctx, ast.Load)}


def test_every_bound_is_cited_by_code():
    assert not BOUNDS.keys() - set().union(*map(cited, CODE.values()))


def test_a_word_in_a_text_is_no_use_of_a_bound():
    used = (
        "from finetuning.common.bounds import NAME, DEPTH\nprint(DEPTH, '--columns FIELD NAME')\n"
    )
    assert cited(used) == {"DEPTH"}


def test_every_bound_has_its_test():
    for name, bound in BOUNDS.items():
        file, _, test = bound.held_by.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {test}(" in text, f"{name}: no {test} in tests/{file}"
