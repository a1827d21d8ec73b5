"""Written files are strict JSON, and whole or as before."""

import json
import math
import os
import stat

import pytest

from finetuning.common.files import atomic_write_text, write_json
from finetuning.common.text import clean


def test_json_is_strict_and_the_file_is_whole_or_old(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"nan": math.nan, "inf": [math.inf], "路": path})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "nan": None,
        "inf": [None],
        "路": str(path),
    }
    if os.name == "posix":
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "\ud800")
    assert json.loads(path.read_text(encoding="utf-8"))["nan"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"], "a temporary file was left"


def test_json_keeps_all_text_and_shows_no_control(tmp_path):
    nasty = "a\x1b[31m\u202e\u200b\x9b\ud800\u2028中\n"
    path = tmp_path / "a.json"
    write_json(path, {"key\u2066": [nasty, float("inf")]})
    raw = path.read_text(encoding="utf-8")
    assert json.loads(raw) == {"key\u2066": [nasty, None]}
    assert "中" in raw and clean(raw) == raw
