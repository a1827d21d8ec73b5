"""A file for what does not fit into memory.

uv run pytest tests/common/test_temporary_file.py
"""

import os
import tempfile

import numpy as np
import pytest

from finetuning.common.errors import UserError
from finetuning.common.temporary_file import TemporaryFile


class _Disk:
    """A file on a disk with little room, which takes a few bytes at a time."""

    def __init__(self, room: int) -> None:
        self._room, self.content = room, b""

    def seek(self, start: int) -> None:
        assert start == len(self.content)

    def write(self, content: memoryview) -> int:
        taken = min(len(content), 3, self._room - len(self.content))
        if not taken:
            raise OSError(28, "No space left on device")
        self.content += bytes(content[:taken])
        return taken

    def close(self) -> None:
        """Nothing waits to be written."""


@pytest.fixture
def disk(monkeypatch):
    """Where temporary files lie: room for ten bytes."""
    made = _Disk(10)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda buffering: made)
    return made


def test_what_a_disk_takes_in_parts_is_written_whole(disk):
    with TemporaryFile() as file:
        file.write(b"01234567", 0)
        assert disk.content == b"01234567"
        with pytest.raises(UserError, match=r"temporary folder .*: No space left .* set TMPDIR"):
            file.write(b"89ab", 8)


def test_a_folder_that_can_not_be_written_is_said(monkeypatch):
    def refused(buffering: int) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(UserError, match=r"temporary folder .*: Read-only .* set TMPDIR"):
        TemporaryFile()


def test_what_was_written_is_mapped_for_reading(tmp_path, monkeypatch):
    """Its pages are on the disk: none has to find room when it is touched."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = np.arange(3000, dtype=np.uint32), np.arange(7, dtype=np.uint8)
    with TemporaryFile() as file:
        file.write(second.tobytes(), first.nbytes)
        file.write(first.tobytes(), 0)
        assert not list(tmp_path.iterdir()) or os.name == "nt"
        found = file.mapped(np.uint32, (2, 1500)), file.mapped(np.uint8, (7,), first.nbytes)
        assert file.read(7, first.nbytes) == second.tobytes()
    np.testing.assert_array_equal(found[0], first.reshape(2, 1500))
    np.testing.assert_array_equal(found[1], second)
    with pytest.raises(ValueError, match="read-only"):
        found[0][0, 0] = 1
