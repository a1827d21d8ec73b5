"""Files and folders that appear whole or not at all, and strict JSON."""

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from finetuning.common.errors import UserError
from finetuning.common.text import CONTROLS, INVISIBLE, clean_line

_NO_MODES = (
    errno.EPERM,
    errno.ENOTSUP,
    errno.ENOSYS,
)  # what a file system without permissions says

# -----------------------------------------------------------------------------
# Files


@contextmanager
def durable_file(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a new file to write; at the end of the block it is on the disk, after an error it is gone.

    options: those of `open`.
    """
    try:
        with path.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    with atomic_write(path, Path(name), "w", encoding="utf-8", newline="\n") as file:
        give_mode(Path(name), usual_mode())  # mkstemp's is 0600
        file.write(text)


@contextmanager
def atomic_write(
    path: Path, temporary: Path, mode: str = "wb", **options: Any
) -> Iterator[IO[Any]]:
    """Write `temporary`, which takes the place of `path` at the end of the block; after an error it is
    gone, and `path` as it was."""
    with durable_file(temporary, mode, **options) as file:
        yield file
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def regular(path: Path) -> Path:
    """`path`, to be read to its end. Raises UserError for a pipe or a device, which may have none."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{clean_line(str(path), 200)} is no regular file (a pipe or device?)")
    return path


def usual_mode() -> int:
    """Permissions that a new file has: others read what we leave like any other file."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def give_mode(path: Path, mode: int) -> None:
    """Permissions of a file or folder of ours; without effect where none are kept, as on FAT, drives of
    Windows and some network mounts. Who relies on them looks at what they became."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in _NO_MODES:
            raise


# -----------------------------------------------------------------------------
# Folders


@contextmanager
def staging_folder(parent: Path, prefix: str, name: str = "") -> Iterator[Path]:
    """A new folder to fill and then to rename; at the end of the block it is gone if it still has its name.

    It is called `prefix` and `name`, and what a dead process left under that name is removed; without
    `name` it gets one that nobody has, and permissions for its owner only.
    """
    if name:
        staging = parent / f"{prefix}{name}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    else:
        staging = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish_folder(staging: Path, target: Path) -> None:
    """Rename a filled staging folder to `target`; an earlier folder steps aside first and then goes.

    `runs.directory` finds the earlier folder by its name if the program dies in between.
    """
    old = target.with_name(f".{target.name}-old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    rename_durably(staging, target)
    shutil.rmtree(old, ignore_errors=True)


def rename_durably(made: Path, target: Path) -> None:
    """Give a file, or a folder of files, that is on the disk its name, which a power cut does not lose."""
    if made.is_dir():
        fsync_directory(made)
    os.rename(made, target)
    fsync_directory(target.parent)


def fsync_files(folder: Path) -> None:
    """Wait until every file directly in `folder` is on the disk."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk: a rename alone is not durable."""
    if os.name == "nt":  # Windows has no handle on a directory to flush
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -----------------------------------------------------------------------------
# JSON


def strict(value: Any, *, nonfinite: Callable[[float], Any] = lambda number: None) -> Any:
    """`value` as strict JSON can hold it: paths and others become text, non-finite numbers None.

    nonfinite: what they become instead; `str` keeps their name, such as "nan".
    """
    if isinstance(value, Mapping):
        return {str(k): strict(v, nonfinite=nonfinite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v, nonfinite=nonfinite) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else nonfinite(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item"):  # NumPy scalar
        return strict(value.item(), nonfinite=nonfinite)
    return str(value)


def json_text(value: Any, indent: int | None = None) -> str:
    """Strict JSON, readable, all content kept: what `clean` drops is written as an escape."""
    text = json.dumps(strict(value), ensure_ascii=False, indent=indent, allow_nan=False)
    for hidden in (CONTROLS, INVISIBLE):
        text = hidden.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return text


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file of ours; the same content gives the same bytes."""
    return (json_text(value, indent=1) + "\n").encode()


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """`json_bytes` with the SHA-256 of the other entries as `sha256`: whoever reads such bytes and seals them
    again has the same ones, or something was altered."""
    content = {key: entry for key, entry in value.items() if key != "sha256"}
    digest = hashlib.sha256(json_bytes(content)).hexdigest()
    return json_bytes({**content, "sha256": digest})


def write_json(path: Path, value: Any) -> None:
    """Strict, readable JSON, written atomically."""
    atomic_write_text(path, json_text(value, indent=2) + "\n")


def read_json_object(path: Path, limit: int = -1) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where there is none, naming the file.

    limit: characters that are read at most; a longer file is broken then.
    """
    try:
        with open(regular(path), encoding="utf-8") as file:
            content = json.loads(file.read(limit))
    except (OSError, ValueError, RecursionError) as error:
        reason = clean_line(str(error), 300)
        raise UserError(f"{clean_line(str(path))}: can't be read ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{clean_line(str(path))}: not a JSON object")
    return content
