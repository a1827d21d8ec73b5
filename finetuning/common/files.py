"""Files that are written whole or not at all, and strict JSON."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from finetuning.common.text import CONTROLS, INVISIBLE


def strict(value: Any) -> Any:
    """`value` as strict JSON can hold it: non-finite numbers become None, paths and others text."""
    if isinstance(value, dict):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item"):  # NumPy scalar
        return strict(value.item())
    return str(value)


def json_text(value: Any, indent: int | None = None) -> str:
    """Strict JSON, readable, all content kept: what `clean` drops is written as an escape."""
    text = json.dumps(strict(value), ensure_ascii=False, indent=indent, allow_nan=False)
    for hidden in (CONTROLS, INVISIBLE):
        text = hidden.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return text


def atomic_write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, usual_mode())  # mkstemp's is 0600
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def usual_mode() -> int:
    """Permissions that a new file has: others read what we leave like any other file."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def write_json(path: Path, value: Any) -> None:
    """Strict, readable JSON, written atomically."""
    atomic_write_text(path, json_text(value, indent=2) + "\n")
