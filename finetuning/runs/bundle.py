"""Files that are whole together at a mirror: uploaded first, their manifest last, known by digest.

    ADDRESS/<run>/checkpoint-50/
        adapter_model.safetensors, …        as below checkpoints/
        tensorboard_logs/…, training_logs/… the run's, as they were then
        mirror.json                         written last: SHA-256 of every file, and of itself

Whatever has no manifest, or not its own, is not there: an upload that was cut is never taken for whole.
What was saved later has the later time, whatever the clocks of the machines say that mirror a run.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetuning.common.bounds import RECORD
from finetuning.common.files import fsync_files, sealed_json
from finetuning.common.remote import RemoteFolder, entry_of

MANIFEST = "mirror.json"
FORMAT = "qwen3-thinking-finetuning mirror 1"
MOMENT = 0.001  # s by which a bundle is later than the one before, where clocks say otherwise


class DamagedBundle(Exception):
    """A file is not what the manifest says; the message names it."""


@dataclass(frozen=True)
class Bundle:
    """What lies at a mirror, by its manifest."""

    run: str
    name: str
    step: int
    at: float  # s since the epoch, when it was whole; later than what was there before
    files: dict[str, dict[str, Any]]

    @property
    def folder(self) -> str:
        """Below the mirror."""
        return f"{self.run}/{self.name}"


@dataclass(frozen=True)
class Checkpoints:
    """What lies at a mirror under the names of a run's checkpoints."""

    whole: list[Bundle]  # the newest first
    damaged: list[str]  # folders with a manifest that is none, or was altered
    cut: list[str]  # folders without one


def read_checkpoints(mirror: RemoteFolder, run: str) -> Checkpoints:
    """Those of one run, by their manifests."""
    found = Checkpoints([], [], [])
    for name in mirror.names(run):
        if name.startswith("checkpoint-"):
            folder = f"{run}/{name}"
            if bundle := read_bundle(mirror, run, name):
                found.whole.append(bundle)
            else:
                (found.damaged if has_manifest(mirror, folder) else found.cut).append(folder)
    found.whole.sort(key=lambda bundle: bundle.at, reverse=True)
    return found


def has_manifest(mirror: RemoteFolder, folder: str) -> bool:
    """Whether a bundle was whole there once; where it is no more, it is damaged."""
    return mirror.read(f"{folder}/{MANIFEST}", 1) is not None


def read_bundle(mirror: RemoteFolder, run: str, name: str) -> Bundle | None:
    """The bundle that is whole there, by its manifest; None where there is none."""
    data = mirror.read(f"{run}/{name}/{MANIFEST}", RECORD.limit)
    try:
        content = json.loads(data or b"")
        kinds = {"step": int, "at": float, "files": dict, "run": str, "name": str}
        known = content.pop("format") == FORMAT and data == sealed_json(
            {"format": FORMAT, **content}
        )
        right = all(type(content[key]) is kind for key, kind in kinds.items())
        bundle = Bundle(**{key: content[key] for key in kinds})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    safe = all(_stays_below(file) for file in bundle.files)
    return bundle if known and right and safe and bundle.folder == f"{run}/{name}" else None


def write_bundle(
    mirror: RemoteFolder, about: Mapping[str, Any], files: Mapping[str, Path], after: float
) -> Bundle:
    """Upload files under their names, each compared with what is there afterwards, then the manifest.

    about: run, name and step. What was there under this name goes first. after: the time of what was
    mirrored before. Raises DamagedBundle for a file that arrived otherwise than it was sent, and whatever
    the library raises.
    """
    folder = f"{about['run']}/{about['name']}"
    mirror.remove(folder)
    entries = {}
    for name, path in files.items():
        mirror.put(path, f"{folder}/{name}")
        with path.open("rb") as file:
            entries[name] = entry_of(file)
        if mirror.entry(f"{folder}/{name}") != entries[name]:
            raise DamagedBundle(f"{folder}/{name} is not what was sent")
    bundle = Bundle(**about, at=max(time.time(), after + MOMENT), files=entries)
    manifest = sealed_json({"format": FORMAT, **asdict(bundle)})
    mirror.write(f"{folder}/{MANIFEST}", manifest)
    if mirror.read(f"{folder}/{MANIFEST}", RECORD.limit) != manifest:
        raise DamagedBundle(f"{folder}/{MANIFEST} is not what was sent")
    return bundle


def fetch_files(mirror: RemoteFolder, bundle: Bundle, names: Sequence[str], target: Path) -> None:
    """Download some files of a bundle below `target`, by the last part of their names, and compare each with
    its digest. Raises DamagedBundle, and whatever the library raises."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = target / PurePosixPath(name).name
        try:
            mirror.get(f"{bundle.folder}/{name}", path)
        except FileNotFoundError as error:
            raise DamagedBundle(f"{bundle.folder}/{name} is missing") from error
        with path.open("rb") as file:
            if entry_of(file) != bundle.files[name]:
                raise DamagedBundle(f"{bundle.folder}/{name} is not what its manifest says")
    fsync_files(target)


def _stays_below(name: str) -> bool:
    """Whether it is the name of a file, or of one in a folder, that leads nowhere else."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and not set(part) & set("\\:\0") for part in parts)
    return plain and len(parts) <= 2
