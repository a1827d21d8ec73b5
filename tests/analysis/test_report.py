"""How statistics look: what tests/analysis/test_statistics.py does not see with its own figures.

uv run pytest tests/analysis/test_report.py
"""

from pathlib import Path

import pytest
from matplotlib import font_manager

from finetuning.analysis import report
from finetuning.analysis.statistics import compute_statistics
from finetuning.common import language
from finetuning.readers.sample import Sample


@pytest.fixture
def old_list(monkeypatch):
    """matplotlib's list of fonts as it was before any Chinese font was installed."""
    every = font_manager.fontManager.ttflist
    chinese = {font.fname for font in every if font.name in report._CJK_FONTS}
    fonts = [font for font in every if font.fname not in chinese]  # all faces of a file go
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    report.cjk_font.cache_clear()
    yield
    report.cjk_font.cache_clear()


def test_a_font_that_was_installed_later_is_found(old_list, tmp_path: Path, monkeypatch):
    files = [f for f in font_manager.findSystemFonts() if "NotoSansCJK-Regular" in f]
    if not files:
        pytest.skip("no Noto Sans CJK on this machine (apt-get install fonts-noto-cjk)")
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font at all")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(broken), *files])
    assert report.cjk_font() in report._CJK_FONTS


def test_a_machine_without_any_has_none(old_list, monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    assert report.cjk_font() is None
    assert report.term_label("分组密码", 3, False).startswith(("#3 (", "block"))


def test_a_table_that_is_cut_says_so():
    samples = [
        Sample("什么是分组密码？", "想。", "一种对称密码。", source="a.md", line=i)
        for i in range(300)
    ]
    titles = [title for title, _, _ in report.tables(compute_statistics(samples).to_json())]
    assert "Exact duplicates (15 of 299)" in titles
    few = compute_statistics(samples[:9]).to_json()
    assert "Exact duplicates" in [title for title, _, _ in report.tables(few)]


def test_what_is_not_judged_has_no_number():
    """Neither a mean nor a level, and least of all zero."""
    text = "Привет, это длинный ответ на русском языке, который программа не оценивает."
    statistics = compute_statistics([Sample(text, text, text, source="a.md", line=1)])
    assert not [tag for tag in statistics.scalars() if "Quality" in tag]
    (overview,) = (
        rows for title, _, rows in report.tables(statistics.to_json()) if title == "Overview"
    )
    assert dict(overview)["Quality of the outputs"] == "not judged"
    assert dict(overview)["Outputs in a language that is not judged"] == "1"
    assert "not judged" in statistics.summary_markdown()


def test_names_of_files_are_no_texts_of_the_program(capsys):
    """A file that is called like a row of the report keeps its name in Chinese; the row is translated."""
    language.use("zh")
    try:
        assert language.translated("Overview") != "Overview"
        name = "Samples"
        assert language.translated(name) != name
        found = compute_statistics([Sample("问", "想。", "答。", source=name, line=1)]).to_json()
        tables = report.tables(found)
        report.print_report(found)
    finally:
        language.use("en")
    assert tables[1][2] == [(name, "1")]
    assert name not in [row[0] for row in tables[0][2]]
    shown = capsys.readouterr().out
    assert shown.count(tables[0][0]) == 1 and "Overview" not in shown
