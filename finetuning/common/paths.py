"""Paths as users give them: a home directory behind `~`, a cache without one, names that a locale breaks."""

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line


def expanded(path: str, name: str) -> str:
    """`path` with the home directory in place of `~`, which no shell has replaced in `--name=~/…` or TOML.

    Raises UserError where there is no such home directory: a folder called `~` is never meant; and for a
    name that this locale can't write.
    """
    check_letters(path, name)
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(
            f"{name} {clean_line(path, 200)}: no home directory is known here (HOME is not set); give the "
            "path without ~"
        )
    return found


def check_letters(path: str, name: str) -> None:
    """Raise UserError for a path with letters that this locale has not, as a file of settings may hold."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        raise UserError(
            f"{name} {clean_line(ascii(path), 200)}: this locale ({encoding}) has no such letters; start "
            "with PYTHONUTF8=1 or LC_ALL=C.UTF-8, or use a name of ASCII letters"
        ) from error


def check_there(folder: str, name: str) -> None:
    """Raise UserError for a folder that is not there; what may be a name of the hub is left alone."""
    if folder.startswith((".", "/", "\\")) and not os.path.exists(folder):
        raise UserError(f"{name} {clean_line(folder, 200)}: no such folder; check the path")


def fault_above(path: Path) -> int:
    """The error (of `errno`) that making a file or folder would end with for what lies above it, which is
    made where it is missing; 0: none."""
    path = path.absolute()
    above = next((parent for parent in path.parents if os.path.lexists(parent)), path)
    if not above.is_dir():
        return errno.ENOTDIR
    return 0 if os.access(above, os.W_OK | os.X_OK) else errno.EACCES


def check_place(file: Path, name: str) -> None:
    """Raise UserError for a file that can't be written, before the work for it."""
    try:
        fault = errno.EISDIR if file.is_dir() else fault_above(file)
    except OSError as error:  # a name that is too long, or no path at all
        fault = error.errno or errno.EINVAL
    if fault:
        raise UserError(f"{name} {file}: can't be written ({os.strerror(fault)})")


def home_cache(name: str) -> Path | None:
    """`~/.cache/<name>`; None where there is no home directory, or nothing can be written there."""
    folder = Path(os.path.expanduser("~"), ".cache", name)
    if not folder.is_absolute():  # a user that the system does not know, and HOME is not set
        return None
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return folder if os.access(existing, os.W_OK | os.X_OK) else None


def is_utf8(path: str | Path) -> bool:
    """Whether Python writes a path as libraries in Rust and C++ do, which is UTF-8 whatever the locale is."""
    text = os.fspath(path)
    try:
        return os.fsencode(text) == text.encode()
    except UnicodeEncodeError:
        return False


def check_name(path: str | Path, name: str, *, only_text: bool = False) -> None:
    """Raise UserError for a path at which a library would look elsewhere than Python does.

    only_text: a name that is text will do, in whatever encoding: nothing but Python goes there.
    """
    text = os.fspath(path)
    if only_text and text.isprintable():  # a byte that no encoding explains is a surrogate here
        return
    if not is_utf8(text):
        raise UserError(
            f"{name} {clean_line(ascii(text), 200)}: this locale writes the name in another way than "
            "UTF-8, which libraries expect; start with LC_ALL=C.UTF-8 or PYTHONUTF8=1 and a name in UTF-8, "
            "or use a name of ASCII letters"
        )


@contextmanager
def utf8_twin(folder: Path) -> Iterator[Path]:
    """A place where such a library can write what belongs into `folder`: itself, if its name is UTF-8."""
    if is_utf8(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as twin:
        yield Path(twin)
        for path in Path(twin).iterdir():
            shutil.move(path, folder / path.name)
