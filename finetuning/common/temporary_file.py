"""What does not fit into memory and nobody keeps: a file without a name."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from finetuning.common.errors import UserError


class TemporaryFile:
    """A file without a name: nothing of it remains, however the process ends.

    It is written first and mapped then, for reading alone: a mapped page that is written and finds no room on
    the disk would end the process by a signal (SIGBUS). It has no buffer, so a lack of room is told
    where it is met. Its methods raise UserError for it.
    """

    def __init__(self) -> None:
        with _room():
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed at the exit

    def __enter__(self) -> "TemporaryFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: bytes, start: int) -> None:
        """All of it, from a byte on: a disk that is nearly full takes a part, and refuses the next."""
        rest = memoryview(content)
        with _room():
            self._file.seek(start)
            while rest:
                rest = rest[self._file.write(rest) :]

    def read(self, size: int, start: int) -> bytes:
        """So many bytes, from a byte on."""
        self._file.seek(start)
        return self._file.read(size)

    def mapped(self, kind: type, shape: tuple[int, ...], start: int = 0) -> np.ndarray:
        """What was written, from a byte on, as an array that can't be written. It may outlive the file."""
        return np.memmap(self._file, kind, "r", offset=start, shape=shape)


@contextmanager
def _room() -> Iterator[None]:
    """Within it, what the system refuses is a temporary folder that is full: UserError with a way out."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"can't write to the temporary folder {tempfile.gettempdir()}: {error.strerror or error}; "
            "make room there, or set TMPDIR to a folder that has some"
        ) from error
