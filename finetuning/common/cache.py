"""What is made of data once and kept in a cache: folders that are whole or absent, shared by processes.

Each is named by what it was made from, and by the code that made it (`code_version`), so that nothing old
is found by a program that would make something else. Each has the digests of its files, and belongs to
the user who reads it: what a disk or somebody else has changed is made anew.
"""

import atexit
import hashlib
import json
import os
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from finetuning.common.errors import UserError
from finetuning.common.files import (
    atomic_write_text,
    give_mode,
    publish_folder,
    read_json_object,
    staging_folder,
)

T = TypeVar("T")
PACKAGE = Path(__file__).parents[1]
_DIGESTS = "digests.json"
_VALUE = "value.json"
_BUILDING = ".building-"


def cached_folder(
    folder: Path, load: Callable[[Path], T | None], write: Callable[[Path], None]
) -> T:
    """What `load` finds in a folder of the cache, which `write` fills if it finds nothing.

    One process at a time writes; others that want the same wait, and find it there. The folder appears
    under its name when all is written, or never. Raises UserError if the cache can't be written, not be
    read back, or belongs to somebody else.
    """
    found = _verified(folder, load)
    if found is not None:
        return found
    with kept_in(folder):
        _make_parents(folder.parent)
        with FileLock(f"{folder}.lock", mode=0o660 if _shared(folder.parent) else 0o600):
            found = _verified(folder, load)
            if found is None:
                _remove_leftovers(folder.parent)
                with staging_folder(folder.parent, _BUILDING, folder.name) as building:
                    write(building)
                    _seal(building)
                    if folder.is_symlink():
                        folder.unlink()
                    publish_folder(building, folder)  # in place of a damaged one
                found = _verified(folder, load)
    if found is None:
        raise UserError(
            f"the cache {folder} can't be read back; remove it, or choose another cache_dir"
        )
    return found


def cached_value(
    folder: Path, make: Callable[[], dict[str, Any]], read: Callable[[dict[str, Any]], T]
) -> T:
    """What `read` makes of a small JSON object, which `make` makes once for a folder of the cache.

    What `read` can't take (KeyError, TypeError, ValueError) is made anew.
    """

    def load(path: Path) -> T | None:
        try:
            return read(read_json_object(path / _VALUE))
        except (UserError, KeyError, TypeError, ValueError):
            return None

    def write(path: Path) -> None:
        (path / _VALUE).write_text(json.dumps(make()), encoding="utf-8")

    return cached_folder(folder, load, write)


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Within it, what the system refuses is a cache that can't be written: UserError with a way out."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"can't write the cache {folder}: {error.strerror or error}; give --cache-dir a folder that "
            "you may write"
        ) from error


# -----------------------------------------------------------------------------
# Whole, and ours


def _verified(folder: Path, load: Callable[[Path], T | None]) -> T | None:
    """What `load` finds in a folder whose files are as they were written, and ours; else None."""
    try:
        digests = json.loads((folder / _DIGESTS).read_bytes())
        _check_owner(folder)
        if not _is_closed(folder) or digests != _digests(folder):
            return None
    except (OSError, ValueError):
        return None
    return load(folder)


def _check_owner(folder: Path) -> None:
    """Raise UserError for a folder of another user. A group shares a cache on purpose by a root folder that
    it may write and whose group new files get: `chmod g+rws FOLDER`."""
    if not hasattr(os, "getuid") or folder.stat().st_uid in (os.getuid(), 0):
        return
    if _shared(folder.parent) and folder.parent.stat().st_gid in os.getgroups():
        return
    with suppress(OSError):  # nothing can be written beside it
        if folder.stat().st_uid == _as_made_here(folder.parent).st_uid:
            return
    raise UserError(
        f"the cache {folder} belongs to another user, who could change it; choose another --cache-dir, or "
        "share it with a group: chmod g+rws on the cache folder before it is used"
    )


def _is_closed(folder: Path) -> bool:
    """Whether nobody else may write a folder, as far as that can be prevented where it lies, and it holds no
    link to what lies elsewhere and may change."""
    others = stat.S_IWOTH | (0 if _shared(folder.parent) else stat.S_IWGRP)
    places = (folder, *folder.rglob("*"))
    if any(path.is_symlink() for path in places):
        return False
    if any(path.stat().st_mode & others for path in places):
        others &= ~_as_made_here(folder.parent).st_mode
    return not any(path.stat().st_mode & others for path in places)


def _as_made_here(folder: Path) -> os.stat_result:
    """What becomes of a new file that nobody else may write. FAT, drives of Windows and some network mounts
    keep neither owner nor permissions: there the mount says for all files who may write them."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".made-here-")
    os.close(handle)
    try:
        return os.stat(name)
    finally:
        os.unlink(name)


def _shared(folder: Path) -> bool:
    mode = folder.stat().st_mode
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def _make_parents(folder: Path) -> None:
    """Make the folder and those above it; below a shared one they are shared too."""
    if not folder.is_dir():
        _make_parents(folder.parent)
        folder.mkdir(exist_ok=True)
        if _shared(folder.parent):
            give_mode(folder, folder.parent.stat().st_mode)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, its digests aside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _DIGESTS)
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    return found


def _seal(building: Path) -> None:
    """Write the digests; nobody else may write, and in a shared cache the group may read all of it."""
    atomic_write_text(building / _DIGESTS, json.dumps(_digests(building)))
    shared = _shared(building.parent)
    for path in (building, *building.rglob("*")):
        readable = (0o050 if path.is_dir() else 0o040) if shared else 0
        give_mode(path, path.stat().st_mode & ~0o022 | readable)


def _remove_leftovers(parent: Path) -> None:
    """Remove what dead processes were building: the lock of its name is free."""
    for building in parent.glob(f"{_BUILDING}*"):
        name = building.name.removeprefix(_BUILDING)
        with suppress(Timeout, OSError), FileLock(parent / f"{name}.lock", timeout=0):
            shutil.rmtree(building, ignore_errors=True)


def private_folder(folder: Path) -> Path:
    """A folder whose content runs as code, for its owner only. Raises UserError where others may write it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise UserError(
            f"{folder} holds compiled code and others may write it; remove it, or choose another --cache-dir"
        )
    return folder


# -----------------------------------------------------------------------------
# What it holds
def kept_array(path: Path, *, mapped: bool = False) -> np.ndarray | None:
    """An array in a folder of the cache, None where it is not there or damaged; mapped, it is shared by
    the processes of a machine."""
    try:
        return np.load(path, mmap_mode="r" if mapped else None)
    except (OSError, ValueError, EOFError):
        return None


def temporary_folder() -> Path:
    """A new folder that is gone when the program ends."""
    folder = tempfile.mkdtemp(prefix="samples-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def code_version(*modules: str, files: Iterable[Path] = (), libraries: tuple[str, ...] = ()) -> str:
    """16 hexadecimal digits over modules of ours ("data.packing"), files of data, and libraries by their
    versions: what others have kept is not what these would make."""
    known = [unicodedata.unidata_version, *(f"{name} {version(name)}" for name in libraries)]
    digest = hashlib.blake2b("\n".join(known).encode(), digest_size=8)
    for file in (*(PACKAGE / f"{name.replace('.', '/')}.py" for name in modules), *files):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
