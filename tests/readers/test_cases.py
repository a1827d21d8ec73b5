"""Every case of `cases/`: a small input as people have it, what becomes of it, and what is told; and the
page of the documents that is written from them."""

import pytest

from scripts import update_data_guide
from tests.helpers.reading_cases import Case, all_cases


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: f"{case.theme}: {case.title}")
def test_a_case_becomes_what_it_says(case: Case, tmp_path):
    assert case.outcome(tmp_path) == case.expected


def test_the_page_shows_the_cases():
    shown = update_data_guide.GUIDE.read_text(encoding="utf-8")
    assert shown == update_data_guide.guide(), "run scripts/update_data_guide.py"
