"""A folder anywhere, through fsspec: of this machine, `s3://…`, `memory://…`, whatever has a package."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from finetuning.common.errors import UserError
from finetuning.common.text import REDACTED, clean_line, redact

BLOCK = 8 * 2**20  # bytes that are held at once
LOCAL = ("file", "local")  # protocols of folders of this machine


def check_address(address: str, name: str, *, output_dir: str = "") -> None:
    """Raise UserError where nothing here can reach such an address. Nothing is asked over a network.

    name: of the setting. An empty address is none. output_dir: what it must neither be, hold nor lie in.
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
    *through, last = address.split("::")  # an address may lead through others
    for part in (*(one for one in through if "://" in one), last):
        if output_dir and get_protocol(part) in LOCAL:
            place = fsspec.core.url_to_fs(part)[1]
            if _is_within(place, output_dir) or _is_within(output_dir, place):
                raise UserError(
                    f"{name} {clean_line(shown_address(part), 200)} and output_dir "
                    f"{clean_line(output_dir, 200)} are one folder, or one lies in the other; give the "
                    "mirror a place of its own"
                )


def _is_within(inner: str, outer: str) -> bool:
    """Whether a folder is another one, or lies below it, under whatever names; neither has to be there."""
    path, outer = os.path.realpath(inner), os.path.realpath(outer)
    while True:
        there = os.path.exists(path) and os.path.exists(outer)
        if path == outer or (there and os.path.samefile(path, outer)):
            return True
        if (above := os.path.dirname(path)) == path:
            return False
        path = above


def shown_address(address: str) -> str:
    """What records and messages show of an address: no user, password, query or fragment."""
    protocol, separator, rest = address.partition("://")
    if not separator:
        return redact(address)
    return redact(f"{protocol}://{_parts(rest)[1]}")


def hidden_parts(address: str) -> list[str]:
    """What of an address is not shown."""
    before, _, behind = _parts(address.partition("://")[2])
    return [before, behind]


def _parts(rest: str) -> tuple[str, str, str]:
    """What stands behind `://`: user and password, the place, and query and fragment.

    All of it is taken for the first where an `@` may be of either: behind `?` or `#`, and no `user:password`.
    """
    before, _, place = rest.rpartition("@")
    user = re.split("[?#]", before)[0]
    if user != before and not re.fullmatch(r"[^/:]+:(?!\d*$)[^/]*", user):
        return rest, REDACTED, ""
    place, _, behind = re.split("([?#]|$)", place, maxsplit=1)
    return before, place, behind


class RemoteFolder:
    """Files below an address, by names with `/`. What goes wrong is whatever the library raises."""

    def __init__(self, address: str) -> None:
        import fsspec
        from fsspec.utils import get_protocol

        self._is_local = get_protocol(address) in LOCAL
        options = {"auto_mkdir": True} if self._is_local else {}
        self._files, self._root = fsspec.core.url_to_fs(address, **options)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def look(self) -> None:
        """Raise NotADirectoryError where a file stands in its place, FileNotFoundError for a folder of this
        machine that is not there: its disk may be missing. Elsewhere a folder comes with its first file."""
        try:
            kind = self._files.info(self._root)["type"]
        except FileNotFoundError:
            if self._is_local:
                raise FileNotFoundError("no such folder; make it if it is a new one") from None
            return
        if kind != "directory":
            raise NotADirectoryError("a file, and not a folder")

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
        """The content of a small file, at most `limit` bytes; None where it is not there, nor its folder."""
        try:
            with self._files.open(self._path(name), "rb") as file:
                return file.read(limit)
        except (
            FileNotFoundError,
            NotADirectoryError,
            FileExistsError,
        ):  # the last is memory's word
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
