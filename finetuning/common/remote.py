"""A folder anywhere, through fsspec: of this machine, `s3://…`, `memory://…`, whatever has a package."""

import hashlib
from pathlib import Path
from typing import Any

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line, redact

BLOCK = 8 * 2**20  # bytes that are held at once


def check_address(address: str, name: str) -> None:
    """Raise UserError where nothing here can reach such an address. Nothing is asked over a network.

    name: of the setting. An empty address is none.
    """
    if not address:
        return
    import fsspec
    from fsspec.utils import get_protocol

    protocol = get_protocol(address)
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        reason = clean_line(str(error), 200)
        raise UserError(
            f"{name} {clean_line(protocol, 40)}://: {reason}; install what it takes, or give a folder"
        ) from None


def shown_address(address: str) -> str:
    """What records and messages show of an address: no user, password, query or fragment."""
    protocol, separator, rest = address.partition("://")
    if not separator:
        return redact(address)
    place = rest.rpartition("@")[2].partition("?")[0].partition("#")[0]
    return redact(f"{protocol}://{place}")


def hidden_parts(address: str) -> list[str]:
    """What of an address is not shown."""
    before, _, place = address.partition("://")[2].rpartition("@")
    return [before, place.partition("?")[2], place.partition("#")[2]]


class RemoteFolder:
    """Files below an address, by names with `/`. What goes wrong is whatever the library raises."""

    def __init__(self, address: str) -> None:
        import fsspec
        from fsspec.utils import get_protocol

        local = get_protocol(address) in ("file", "local")
        options = {"auto_mkdir": True} if local else {}
        self._files, self._root = fsspec.core.url_to_fs(address, **options)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def names(self, folder: str = "") -> list[str]:
        """Of what lies directly in a folder; none where it is not there."""
        self._files.invalidate_cache()
        try:
            found = self._files.ls(self._path(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(
            {str(path).rstrip("/").replace("\\", "/").rpartition("/")[2] for path in found}
        )

    def read(self, name: str, limit: int) -> bytes | None:
        """The content of a small file, at most `limit` bytes; None where it is not there."""
        try:
            with self._files.open(self._path(name), "rb") as file:
                return file.read(limit)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """A small file, in place of what was there."""
        self._files.pipe_file(self._path(name), data)

    def put(self, source: Path, name: str) -> None:
        """A file of this machine."""
        self._files.put_file(str(source), self._path(name))

    def get(self, name: str, target: Path) -> None:
        """Into a file of this machine."""
        self._files.get_file(self._path(name), str(target))

    def entry(self, name: str) -> dict[str, Any]:
        """Size and digest of a file, by reading it."""
        with self._files.open(self._path(name), "rb") as file:
            return entry_of(file)

    def remove(self, folder: str) -> None:
        """A folder with all that is in it, if it is there."""
        self._files.invalidate_cache()
        if self._files.exists(self._path(folder)):
            self._files.rm(self._path(folder), recursive=True)


def entry_of(file: Any) -> dict[str, Any]:
    """`{"bytes": …, "sha256": …}` of an open binary file, block by block."""
    digest, size = hashlib.sha256(), 0
    while data := file.read(BLOCK):
        digest.update(data)
        size += len(data)
    return {"bytes": size, "sha256": digest.hexdigest()}
