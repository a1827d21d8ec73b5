"""What a checkpoint says of itself: which files it has, of which run and step; told without torch."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetuning.common.files import sealed_json

FORMAT = "qwen3-thinking-finetuning checkpoint 1"
MANIFEST = "manifest.json"
STATE = "state.json"


class DamagedCheckpoint(Exception):
    """The directory is not what its manifest says; the message names the file and the difference."""


def manifests(
    directory: Path, warn: Callable[[str], None] | None = None
) -> list[tuple[Path, dict[str, Any]]]:
    """Our checkpoints below `directory` with their manifests, in the order in which they were saved.

    With `warn`, a directory of our name without a readable manifest is put aside and named.
    """
    found = []
    for path in directory.glob("checkpoint-*"):
        if not path.is_dir() or path.name.endswith(".damaged"):
            continue
        try:
            manifest = read_manifest(path)
            if path.name.partition(".")[0] != f"checkpoint-{manifest['step']}":
                raise DamagedCheckpoint(f"{path}: its manifest is that of step {manifest['step']}")
            found.append((path, manifest))
        except (DamagedCheckpoint, OSError) as error:
            if warn is not None and not path.is_symlink():
                warn(f"damaged checkpoint, kept aside as {put_aside(path).name}: {error}")
    return sorted(found, key=lambda item: item[1]["sequence"])


def read_manifest(path: Path) -> dict[str, Any]:
    """That of one checkpoint. Raises DamagedCheckpoint where it is none, or not as it was written."""
    file = path / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise DamagedCheckpoint(f"{file}: missing or not a plain file")
    data = file.read_bytes()
    try:
        manifest = json.loads(data)
        kinds = {"step": int, "run": str, "sequence": int, "files": dict}
        good = manifest["format"] == FORMAT and all(
            type(manifest[key]) is kind for key, kind in kinds.items()
        )
        # It has no manifest above it, so it carries its own digest; and no byte may differ.
        unaltered = data == sealed_json(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file}: not a manifest") from error
    if not good or STATE not in manifest["files"]:
        raise DamagedCheckpoint(f"{file}: not a manifest of this program's checkpoints")
    if not unaltered:
        raise DamagedCheckpoint(f"{file}: its own SHA-256 is not right")
    return manifest


def put_aside(path: Path) -> Path:
    """Rename a damaged directory, so that nothing takes it for a checkpoint; returns its new place."""
    aside, number = path.with_name(path.name + ".damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{number}.damaged")
    os.rename(path, aside)
    return aside
