"""A place is looked at before the work, belongs to one maker until it is filled, and is filled whole.

uv run pytest tests/common/test_destination.py
"""

import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from finetuning.common.destination import Destination
from finetuning.common.errors import UserError


def folder_at(path: Path) -> Destination:
    return Destination(path, False, "--output")


def fill(destination: Destination, text: str) -> None:
    with destination.held(0) as staging:
        made = staging / destination.path.name if destination.is_file else staging
        (made if destination.is_file else made / "file").write_text(text)
        destination.publish(made)


@pytest.mark.parametrize("is_file", [True, False])
def test_what_was_made_is_all_that_is_left(tmp_path: Path, is_file: bool):
    destination = Destination(tmp_path / "new" / "made", is_file, "--output")
    fill(destination, "whole")
    assert [path.name for path in destination.path.parent.iterdir()] == ["made"]
    made = destination.path if is_file else destination.path / "file"
    assert made.read_text() == "whole"
    with pytest.raises(UserError, match="exists; choose one"):
        destination.check_free()


def test_an_empty_folder_is_a_place(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    folder_at(tmp_path / "empty").check_free()
    fill(folder_at(tmp_path / "empty"), "whole")
    assert (tmp_path / "empty" / "file").is_file()


def a_link(tmp_path: Path) -> Path:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    return tmp_path / "link"


def into_nothing(tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    return tmp_path / "link"


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file" / "made"


def below_a_link_into_nothing(tmp_path: Path) -> Path:
    return into_nothing(tmp_path) / "made"


def where_the_system_lets_nobody_write(tmp_path: Path) -> Path:
    if not Path("/proc/self").is_dir():
        pytest.skip("needs /proc")
    return Path("/proc/made")


def too_long(tmp_path: Path) -> Path:
    return tmp_path / ("x" * 250)


def where_a_disk_begins(tmp_path: Path) -> Path:
    if not os.path.ismount("/dev/shm") or os.listdir("/dev/shm"):
        pytest.skip("no empty disk is mounted here")
    return Path("/dev/shm")


def the_root(_: Path) -> Path:
    return Path(Path.cwd().anchor)


IMPOSSIBLE = {
    the_root: "a disk begins there",
    a_link: "a link; give the place that it leads to",
    into_nothing: "a link; give the place that it leads to",
    below_a_file: "can't be written (Not a directory); choose another place",
    below_a_link_into_nothing: "can't be written (Not a directory); choose another place",
    where_the_system_lets_nobody_write: "can't be written (",
    too_long: "can't be written (File name too long)",
    where_a_disk_begins: "a disk begins there",
}


@pytest.mark.parametrize("make", IMPOSSIBLE, ids=lambda make: make.__name__)
def test_a_place_that_can_never_be_filled_is_refused_at_once(tmp_path: Path, make: Callable):
    destination = folder_at(make(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error, destination.held(0):
        raise AssertionError("the work has begun")
    assert IMPOSSIBLE[make] in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_begins_where_one_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    with pytest.raises(UserError, match="choose a name below it"):
        folder_at(tmp_path / "disk").check_free()
    folder_at(tmp_path / "disk" / "made").check_free()


def test_a_folder_of_others_is_told_before_the_work(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=r"can't be written \(Permission denied\); choose another"):
        folder_at(tmp_path / "new" / "made").check_free()


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path: Path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9e9, 8e9, 1e9))
    with folder_at(tmp_path / "made").held(int(1e9)):
        pass
    with (
        pytest.raises(UserError, match="1000 MB free, about 1001 MB needed"),
        folder_at(tmp_path / "made").held(int(1e9) + 10**6),
    ):
        raise AssertionError("the work has begun")
    assert not list(tmp_path.iterdir())


def test_a_place_belongs_to_one_maker(tmp_path: Path):
    with folder_at(tmp_path / "made").held(0) as staging:
        (staging / "file").write_text("first")
        with (
            pytest.raises(UserError, match="another process is writing it"),
            folder_at(tmp_path / "made").held(0),
        ):
            raise AssertionError("the work has begun")
        fill(folder_at(tmp_path / "beside"), "another name")
        folder_at(tmp_path / "made").publish(staging)
    assert (tmp_path / "made" / "file").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "made"]


def test_many_makers_at_once_leave_what_one_of_them_made(tmp_path: Path):
    """Whoever comes while the lock file of the one before is going, too."""
    started, told, done = threading.Barrier(8), [], []

    def make(number: int) -> None:
        started.wait()
        for _ in range(20):
            try:
                fill(folder_at(tmp_path / "made"), str(number))
                done.append(number)
            except UserError as error:
                told.append(str(error))

    makers = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(done) == 1 and len(told) == 8 * 20 - 1
    assert (tmp_path / "made" / "file").read_text() == str(done[0])
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of descriptors from /proc")
@pytest.mark.parametrize("is_file", [True, False])
def test_content_and_names_are_on_the_disk_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_file: bool
):
    order, fsync, rename = [], os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def note_rename(source: Path, target: Path) -> None:
        rename(source, target)
        order.append("renamed")

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    fill(Destination(tmp_path / "made", is_file, "--output"), "whole")
    before = ["made"] if is_file else ["file", ".made-unchecked"]
    assert order == [*before, "renamed", tmp_path.name]
