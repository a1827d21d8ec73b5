"""Files and folders are the old ones or the new ones, and what was in the making is gone.

uv run pytest tests/common/test_files.py
"""

import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from finetuning.common.errors import UserError
from finetuning.common.files import (
    atomic_write,
    atomic_write_text,
    durable_file,
    fsync_directory,
    fsync_files,
    publish_folder,
    read_json_object,
    staging_folder,
    strict,
    write_json,
)
from finetuning.common.text import clean


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was flushed to the disk, in order."""
    names, real = [], os.fsync

    def noted(descriptor: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return names


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of descriptors from /proc")
def test_a_file_is_on_the_disk_before_it_takes_the_place(tmp_path: Path, synced: list[str]):
    path, temporary = tmp_path / "x", tmp_path / ".x.tmp"
    path.write_bytes(b"old")
    with atomic_write(path, temporary) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old" and synced == []
    assert path.read_bytes() == b"new" and synced == [".x.tmp"]
    assert not temporary.exists()


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_stays_and_the_new_one_is_gone(tmp_path: Path, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(path, tmp_path / ".x.tmp") as file:
        file.write(b"half")
        raise error
    with pytest.raises(type(error)), durable_file(tmp_path / "y") as file:
        file.write(b"half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and path.read_bytes() == b"old"


def test_a_file_that_can_not_take_the_place_is_gone(tmp_path: Path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError), atomic_write(tmp_path / "x", tmp_path / ".x.tmp") as file:
        file.write(b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_staging_folder_is_empty_and_goes_unless_it_was_renamed(tmp_path: Path):
    left = tmp_path / ".new-7"
    left.mkdir()
    (left / "of a dead process").touch()
    with staging_folder(tmp_path, ".new-", "7") as staging:
        assert staging == left and not list(staging.iterdir())
        staging.rename(tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt), staging_folder(tmp_path, ".new-") as staging:
        assert staging.name.startswith(".new-") and staging.is_dir()
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_a_published_folder_replaces_the_earlier_one_whole(tmp_path: Path):
    target = tmp_path / "model"
    for content in ("one", "two"):
        with staging_folder(tmp_path, ".model-", "1") as staging:
            (staging / content).write_text(content)
            publish_folder(staging, target)
        assert [p.name for p in target.iterdir()] == [content]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of descriptors from /proc")
def test_files_and_directories_are_flushed(tmp_path: Path, synced: list[str]):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).touch()
    fsync_files(folder)
    assert sorted(synced) == ["a", "b"]
    fsync_directory(folder)
    assert synced[-1] == "folder"


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


def test_what_is_not_finite_is_none_or_keeps_its_name():
    value = {"a": [math.nan, (math.inf, 1)], 2: Path("x"), "n": np.float32(math.nan)}
    assert strict(value) == {"a": [None, [None, 1]], "2": "x", "n": None}
    assert strict(value, nonfinite=str) == {"a": ["nan", ["inf", 1]], "2": "x", "n": "nan"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "can't be read"),
        (b"\xff", "can't be read"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "can't be read"),
    ],
)
def test_a_file_without_an_object_is_named(tmp_path: Path, content: bytes, complaint: str):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"a.json: {complaint}"):
        read_json_object(path)


def test_an_object_is_read_and_a_limit_holds(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text('{"钥": 1}', encoding="utf-8")
    assert read_json_object(path) == {"钥": 1}
    with pytest.raises(UserError, match="can't be read"):
        read_json_object(path, 3)
    with pytest.raises(UserError, match="can't be read"):
        read_json_object(tmp_path / "missing.json")
