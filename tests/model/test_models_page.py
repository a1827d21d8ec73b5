"""docs/models.md names every architecture, and says what a trial gives.

uv run pytest -m "not long" tests/model/test_models_page.py
"""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from scripts import update_models

PAGE = update_models.PAGE.read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", PAGE, re.MULTILINE))
MADE_WITH = re.search(r"with transformers (\S+), torch (\S+);", PAGE).groups()
SAME_VERSION = MADE_WITH[0] == version("transformers")


def test_the_page_has_a_row_for_every_architecture_of_its_version():
    outcomes = {*update_models.OUTCOMES.values(), "**refused**"}
    names = {title.partition(",")[0] for title in ROWS} - {"architecture"}
    assert {outcome for title, outcome in ROWS.items() if title in names} <= outcomes
    assert len(names) > 150
    if SAME_VERSION:
        assert names == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_a_refusal_and_a_detour_have_a_reason_and_no_difference_is_large():
    for line in PAGE.splitlines():
        if not line.startswith("| ") or line.startswith("| architecture"):
            continue
        _, outcome, difference, reason = (cell.strip() for cell in line.strip("|").split(" |"))
        assert (reason == "") == (outcome == "packed rows"), line
        assert outcome == "**refused**" or float(difference) <= 1e-6, line


def test_the_text_is_the_one_that_the_script_writes():
    head = update_models.head()
    for name, made_with in zip(("transformers", "torch"), MADE_WITH, strict=True):
        head = head.replace(f"{name} {version(name)}", f"{name} {made_with}")
    assert PAGE.startswith(head)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "mamba", "codegen"])
def test_a_row_is_what_a_trial_gives(name: str, tmp_path: Path, monkeypatch):
    """Written into a copy of the page, from which the row was missing; all else stays."""
    lines = PAGE.splitlines(keepends=True)
    page = tmp_path / "models.md"
    page.write_text("".join(x for x in lines if not x.startswith(f"| {name} |")), encoding="utf-8")
    monkeypatch.setattr(update_models, "PAGE", page)
    update_models.main([name])
    text = page.read_text(encoding="utf-8")
    if SAME_VERSION:
        assert len(text.splitlines()) == len(lines)
    rows = re.findall(rf"^\| ({name}(?:, [^|]+?)?) \| ([^|]+?) \|", text, re.MULTILINE)
    assert rows and all(ROWS[title] == outcome for title, outcome in rows)


@pytest.mark.long
@pytest.mark.skipif(not SAME_VERSION, reason="the page was made with another version")
def test_the_page_is_what_the_trials_give():
    found, trials = {}, update_models.Trials()
    for name, variant, settings in update_models.cases(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        line = update_models.row(name, variant, trials.tried(name, settings))
        _, title, outcome, *_ = (cell.strip() for cell in line.split("|"))
        found[title] = outcome
    ROWS.pop("architecture", None)
    assert found == ROWS
