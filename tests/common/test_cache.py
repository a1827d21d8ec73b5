"""A folder of the cache is whole or absent, written by one process, and found only by what would make it.

uv run pytest -m "not long" tests/common/test_cache.py
"""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from finetuning.common import cache
from finetuning.common.cache import (
    cached_folder,
    cached_value,
    code_version,
    kept_array,
    private_folder,
    temporary_folder,
)
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
    damaged = bytearray(numbers.read_bytes())
    damaged[-1] ^= 1  # no reader of arrays would notice
    numbers.write_bytes(damaged)
    assert fetch(folder) == 10
    (folder / "another.npy").touch()
    assert fetch(folder) == 10
    assert (tmp_path / "cache" / "written").read_text() == "xxxxxx"
    assert not list((tmp_path / "cache").glob(".building-*"))


def test_a_value_is_made_once_and_anew_where_it_can_not_be_read(tmp_path: Path):
    made = []

    def make() -> dict:
        made.append(1)
        return {"tokens": len(made)}

    def value(name: str = "tokens") -> int:
        return cached_value(tmp_path / "cache" / "a", make, lambda kept: int(kept[name]))

    assert [value(), value()] == [1, 1]
    (tmp_path / "cache" / "a" / "value.json").write_text("{")
    assert [value(), value()] == [2, 2]
    with pytest.raises(UserError, match="can't be read back"):
        value("another")
    assert len(made) == 3


def test_what_others_may_write_and_what_lies_elsewhere_is_made_anew(tmp_path: Path):
    folder, elsewhere = tmp_path / "cache" / "a", tmp_path / "elsewhere"
    former = os.umask(0)  # as in some containers
    try:
        assert fetch(folder) == 10
    finally:
        os.umask(former)
    assert fetch(folder) == 10
    numbers = folder / "numbers.npy"
    numbers.chmod(0o666)
    assert fetch(folder) == 10
    folder.chmod(0o775)
    assert fetch(folder) == 10
    numbers.rename(elsewhere)
    numbers.symlink_to(elsewhere)  # of the right content, now
    assert fetch(folder) == 10 and not numbers.is_symlink() and elsewhere.exists()
    folder.rename(tmp_path / "folder")
    folder.symlink_to(tmp_path / "folder")
    assert fetch(folder) == 10 and not folder.is_symlink()
    folder.rename(tmp_path / "another")
    folder.symlink_to(tmp_path / "nowhere")
    assert fetch(folder) == 10 and not folder.is_symlink()
    assert (tmp_path / "cache" / "written").read_text() == "xxxxxx"
    assert {path.name for path in folder.parent.iterdir()} == {"a", "a.lock", "written"}


@pytest.fixture(params=["without effect", "refused"])
def without_modes(request, tmp_path, monkeypatch):
    """A mount that keeps no permissions and no owners, as a drive of Windows: all of it looks alike."""
    look, change = os.stat, os.chmod

    def seen(path, *arguments, **named):
        found = look(path, *arguments, **named)
        if not str(path).startswith(str(tmp_path)):
            return found
        fields, others = found.__reduce__()[1]
        mode, inode, device, links, _, *rest = fields
        return os.stat_result((mode | 0o777, inode, device, links, 54321, *rest), others)

    def changed(path, *arguments, **named):
        if not str(path).startswith(str(tmp_path)):
            change(path, *arguments, **named)
        elif request.param == "refused":
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "stat", seen)
    monkeypatch.setattr(os, "chmod", changed)


def test_where_no_permissions_are_kept_a_folder_is_found_again(tmp_path, without_modes):
    folder = tmp_path / "cache" / "a"
    for _ in range(3):
        assert fetch(folder) == 10
    assert (tmp_path / "cache" / "written").read_text() == "x"
    (folder / "numbers.npy").write_bytes(b"damaged")
    assert fetch(folder) == 10
    assert (tmp_path / "cache" / "written").read_text() == "xx"
    assert {path.name for path in folder.parent.iterdir()} == {"a", "a.lock", "written"}


def test_what_dead_processes_were_building_is_removed_and_what_lives_stays(tmp_path: Path):
    dead, alive = tmp_path / ".building-dead", tmp_path / ".building-alive"
    for folder in (dead, alive):
        (folder / "part").mkdir(parents=True)
    with FileLock(tmp_path / "alive.lock"):
        assert fetch(tmp_path / "a") == 10
        assert not dead.exists() and alive.exists()
    assert fetch(tmp_path / "b") == 10
    assert not alive.exists()


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root to change owners"
)
def test_a_folder_of_another_user_is_refused_unless_the_cache_is_shared_on_purpose(
    tmp_path: Path, monkeypatch
):
    assert fetch(tmp_path / "a") == 10
    os.chown(tmp_path / "a", 54321, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        fetch(tmp_path / "a")
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, -1, 4321)
    shared.chmod(0o2770)
    assert fetch(shared / "kind" / "a") == 10
    assert (shared / "kind").stat().st_mode & 0o7777 == 0o2770
    made = shared / "kind" / "a"
    assert all(path.stat().st_mode & 0o040 for path in (made, *made.iterdir()))
    os.chown(made, 54321, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        fetch(made)
    monkeypatch.setattr(os, "getgroups", lambda: [4321])
    assert fetch(made) == 10


def test_a_folder_of_code_is_its_owners_alone(tmp_path: Path):
    folder = private_folder(tmp_path / "cache" / "compiled")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder(folder) == folder
    folder.chmod(0o777)
    with pytest.raises(UserError, match="others may write it"):
        private_folder(folder)


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
