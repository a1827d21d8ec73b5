"""What is made of data once and kept in a cache: folders that are whole or absent, shared by processes.

Each is named by what it was made from, and by the code that made it (`code_version`), so that nothing old
is found by a program that would make something else.
"""

import atexit
import hashlib
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock

from finetuning.common.errors import UserError
from finetuning.common.files import publish_folder, staging_folder

T = TypeVar("T")
PACKAGE = Path(__file__).parents[1]


def cached_folder(
    folder: Path, load: Callable[[Path], T | None], write: Callable[[Path], None]
) -> T:
    """What `load` finds in a folder of the cache, which `write` fills if it finds nothing.

    One process at a time writes; others that want the same wait, and find it there. The folder appears
    under its name when all is written, or never. Raises UserError if the cache can't be written, or not
    be read back.
    """
    found = load(folder)
    if found is not None:
        return found
    with kept_in(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            found = load(folder)
            if found is None:
                with staging_folder(folder.parent, ".building-") as building:
                    write(building)
                    publish_folder(building, folder)  # in place of a damaged one
                found = load(folder)
    if found is None:
        raise UserError(
            f"the cache {folder} can't be read back; remove it, or choose another cache_dir"
        )
    return found


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Within it, what the system refuses is a cache that can't be written: UserError with a way out."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"can't write the cache {folder}: {error.strerror or error}; give --cache-dir a folder that "
            "can be written"
        ) from error


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
