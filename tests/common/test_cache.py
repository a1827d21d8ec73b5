"""A folder of the cache is whole or absent, written by one process, and found only by what would make it.

uv run pytest -m "not long" tests/common/test_cache.py
"""

import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from finetuning.common import cache
from finetuning.common.cache import cached_folder, code_version, kept_array, temporary_folder
from finetuning.common.errors import UserError


def load(folder: Path) -> np.ndarray | None:
    return kept_array(folder / "numbers.npy")


def write(building: Path) -> None:
    time.sleep(0.5)
    np.save(building / "numbers.npy", np.arange(5))
    with open(building.parent / "written", "a") as file:
        file.write("x")


def fetch(folder: str) -> int:
    return int(cached_folder(Path(folder), load, write).sum())


def test_what_was_written_is_found_and_what_is_damaged_made_anew(tmp_path: Path):
    folder = tmp_path / "cache" / "a"
    for _ in range(3):
        assert fetch(folder) == 10
    assert (tmp_path / "cache" / "written").read_text() == "x"
    numbers = folder / "numbers.npy"
    for size in (0, 40, numbers.stat().st_size - 1):
        numbers.write_bytes(numbers.read_bytes()[:size])
        assert fetch(folder) == 10, size
    assert (tmp_path / "cache" / "written").read_text() == "xxxx"
    assert not list((tmp_path / "cache").glob(".building-*"))


@pytest.mark.slow
def test_of_many_processes_one_writes(tmp_path: Path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(fetch, [str(tmp_path / "a")] * 3) == [10] * 3
    assert (tmp_path / "written").read_text() == "x"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path):
    def fails(building: Path) -> None:
        np.save(building / "numbers.npy", np.arange(5))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cached_folder(tmp_path / "a", load, fails)
    assert {path.name for path in tmp_path.iterdir()} <= {"a.lock"}


def test_a_cache_that_cannot_be_written_or_read_back_is_said(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't write the cache .*file.a"):
        cached_folder(tmp_path / "file" / "a", load, write)
    with pytest.raises(UserError, match=r"can't be read back; remove it, or choose another"):
        cached_folder(tmp_path / "a", lambda folder: None, lambda building: None)


def test_a_temporary_folder_is_a_new_one():
    one, two = temporary_folder(), temporary_folder()
    assert one != two and one.is_dir() and not list(two.iterdir())


def test_other_code_lists_or_libraries_are_another_version(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)
    for name in ("a.py", "b.py", "list.tsv"):
        (tmp_path / name).write_text(name)
    lists, libraries = [tmp_path / "list.tsv"], ("numpy",)
    seen = {code_version("a", "b", files=lists, libraries=libraries)}
    seen |= {code_version("a"), code_version("b"), code_version("a", files=lists)}
    seen |= {code_version("a", libraries=libraries)}
    assert len(seen) == 5 and all(len(name) == 16 for name in seen)
    for changed in ("a.py", "list.tsv"):
        (tmp_path / changed).write_text("changed")
        assert code_version("a", "b", files=lists, libraries=libraries) not in seen
        seen |= {code_version("a", "b", files=lists, libraries=libraries)}
    monkeypatch.setattr(cache, "version", lambda library: "0.0")
    assert code_version("a", "b", files=lists, libraries=libraries) not in seen
