"""How statistics look: what tests/analysis/test_statistics.py does not see with its own figures.

uv run pytest tests/analysis/test_report.py
"""

from pathlib import Path

import pytest
from matplotlib import font_manager

from finetuning.analysis import report


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
