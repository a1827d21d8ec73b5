"""Paths as users give them: a home directory behind `~`, a cache without one, names that a locale breaks."""

import os
from pathlib import Path

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line


def expanded(path: str, name: str) -> str:
    """`path` with the home directory in place of `~`, which no shell has replaced in `--name=~/…` or TOML.

    Raises UserError where there is no such home directory: a folder called `~` is never meant.
    """
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(
            f"{name} {clean_line(path, 200)}: no home directory is known here (HOME is not set); give the "
            "path without ~"
        )
    return found


def home_cache(name: str) -> Path | None:
    """`~/.cache/<name>`; None where there is no home directory, or nothing can be written there."""
    folder = Path(os.path.expanduser("~"), ".cache", name)
    if not folder.is_absolute():  # a user that the system does not know, and HOME is not set
        return None
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return folder if os.access(existing, os.W_OK | os.X_OK) else None


def check_name(path: str | Path, name: str) -> None:
    """Raise UserError for a path that the libraries in Rust and C++ would write elsewhere than Python.

    They take a name as UTF-8 whatever the locale is. A run would end at its first saved model.
    """
    text = os.fspath(path)
    try:
        same = os.fsencode(text) == text.encode()
    except UnicodeEncodeError:
        same = False
    if not same:
        raise UserError(
            f"{name} {clean_line(ascii(text), 200)}: this locale writes the name in another way than "
            "UTF-8, which libraries expect; start with LC_ALL=C.UTF-8 or PYTHONUTF8=1 and a name in UTF-8, "
            "or use a name of ASCII letters"
        )
