"""Which files a path, folder, glob, `datasets` folder or hub name means."""

import glob
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object
from finetuning.common.text import clean_line

KINDS = {
    ".md": "markdown", ".markdown": "markdown", ".json": "json", ".jsonl": "jsonl",
    ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst")
# They describe a folder of data and hold no samples.
_NOT_DATA = {"readme.md", "dataset_info.json", "dataset_infos.json", "dataset_dict.json",
             "state.json"}  # fmt: skip

MAX_RECORD = 16 * 2**20
"""Longest record read, in bytes (of a line) or characters (of a JSON element)."""


@dataclass(frozen=True)
class DataFile:
    """One file to read, under the name that its samples carry as their source."""

    path: str
    source: str
    kind: str
    """markdown, json, jsonl, csv, parquet or arrow."""


# ---- which files ------------------------------------------------------------------------------


def list_files(path: str, cache_dir: Path | None = None) -> list[DataFile]:
    """The data files behind a file, folder, glob, `datasets` folder or hub name, in a fixed order."""
    shown = clean_line(str(path), 200)
    if not path or "\0" in path:
        raise UserError(f"data path {shown!r} is no path; give a file, folder or glob")
    expanded = os.path.expanduser(path)
    mode = _mode(expanded, shown)
    if mode is not None:
        return _existing(expanded, path, mode)
    if glob.has_magic(expanded):
        found = sorted(glob.glob(expanded, recursive=True))
        files = [file for name in found for file in _matched(name)]
        if not files:
            raise UserError(f"no data file matches {shown}; readable are {_readable()}")
        return files
    if _HUB_NAME.fullmatch(path) and not os.path.isdir(path.split("/")[0]):
        return _hub_files(path, cache_dir)
    raise UserError(f"there is no {shown}; give an existing file, folder or glob")


def _readable() -> str:
    return ", ".join(KINDS) + " and these with " + " or ".join(COMPRESSIONS)


def _mode(path: str, shown: str) -> int | None:
    """File mode behind symbolic links, None where nothing is there."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"can't look at {shown}: {reason}") from error


def _existing(path: str, source: str, mode: int) -> list[DataFile]:
    if stat.S_ISDIR(mode):
        return _folder_files(path, source)
    if not stat.S_ISREG(mode):
        raise UserError(f"{clean_line(source, 200)} is no regular file (a pipe or device?)")
    kind = _kind_of(path)
    if kind is None:
        raise UserError(f"can't read {clean_line(source, 200)}: readable are {_readable()}")
    return [DataFile(path, _source(source), kind)]


def _source(*parts: str) -> str:
    """A file's name as samples carry it: forward slashes, and UTF-8 even if the disk's name is not."""
    return os.fsencode(Path(*parts).as_posix()).decode("utf-8", "replace")


def _kind_of(path: str) -> str | None:
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
        return KINDS.get(suffix) if KINDS.get(suffix) not in ("parquet", "arrow") else None
    return KINDS.get(suffix)


def _matched(name: str) -> list[DataFile]:
    """What a glob found; like a folder's, files that are no data are passed over."""
    mode = _mode(name, clean_line(name, 200))
    passed = mode is None or _kind_of(name) is None or _is_no_data(name)
    return [] if passed and not os.path.isdir(name) else _existing(name, name, mode)


def _is_no_data(name: str) -> bool:
    """Files that describe a folder, and those by which Office locks an open one (`~$name`)."""
    base = os.path.basename(name).lower()
    return base in _NOT_DATA or base.startswith("~$")


def _folder_files(path: str, source: str) -> list[DataFile]:
    splits = _splits(path)
    if splits:
        return [file for split in splits for file in _saved_dataset(path, source, split)]
    if os.path.isfile(os.path.join(path, "state.json")):
        return _saved_dataset(path, source, "")
    files = []
    for folder, folders, names in os.walk(path, onerror=_unreadable_folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            full = os.path.join(folder, name)
            if name.startswith(".") or _is_no_data(name) or _kind_of(name) is None:
                continue
            mode = _mode(full, full)
            if mode is None or not stat.S_ISREG(mode):
                raise UserError(f"{clean_line(full, 200)} is no regular file; remove it")
            inner = os.path.relpath(full, path)
            files.append(DataFile(full, _source(source, inner), _kind_of(name)))
    if not files:
        raise UserError(f"the folder {clean_line(source, 200)} holds no {_readable()} file")
    return sorted(files, key=lambda file: file.source)


def _unreadable_folder(error: OSError) -> None:
    shown = clean_line(str(error.filename), 200)
    raise UserError(f"can't look into {shown}: {error.strerror}") from error


def _splits(path: str) -> list[str]:
    """The splits to train on of a folder made by `DatasetDict.save_to_disk`: train, else all."""
    listing = os.path.join(path, "dataset_dict.json")
    if not os.path.isfile(listing):
        return []
    splits = read_json_object(Path(listing), MAX_RECORD).get("splits")
    if not isinstance(splits, list) or not all(_plain_name(split) for split in splits):
        raise UserError(f"{clean_line(listing, 200)} lists no splits")
    return ["train"] if "train" in splits else splits


def _saved_dataset(path: str, source: str, split: str) -> list[DataFile]:
    """The Arrow files of a folder made by `Dataset.save_to_disk`."""
    state = os.path.join(path, split, "state.json")
    entries = read_json_object(Path(state), MAX_RECORD).get("_data_files")
    names = [e.get("filename") if isinstance(e, dict) else None for e in entries or []]
    if not names or not all(_plain_name(name) for name in names):
        raise UserError(f"{clean_line(state, 200)} lists no data files")
    files = []
    for name in names:
        full = os.path.join(path, split, name)
        mode = _mode(full, full)
        if mode is None or not stat.S_ISREG(mode):
            raise UserError(f"{clean_line(full, 200)} is missing from the saved dataset")
        files.append(DataFile(full, _source(source, split, name), "arrow"))
    return files


def _plain_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) is not None and name != ".."


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+){0,2}")


def _hub_files(name: str, cache_dir: Path | None) -> list[DataFile]:
    """The Arrow files of a hub dataset, downloaded: `owner/name[:configuration][:split]`."""
    import datasets
    import huggingface_hub

    repository, *parts = name.split(":")
    split = parts.pop() if parts else "train"
    try:
        huggingface_hub.HfApi().dataset_info(repository, timeout=10)
        download = datasets.DownloadConfig()
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        if isinstance(error, huggingface_hub.errors.RepositoryNotFoundError):
            raise UserError(
                f"there is no file or folder {name} here, nor such a dataset on the hub"
            ) from error
        download = datasets.DownloadConfig(local_files_only=True, max_retries=0)
    try:
        data = datasets.load_dataset(
            repository, *parts, split=split, cache_dir=cache_dir, download_config=download
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = clean_line(str(error), 200)
        raise UserError(
            f"there is no file or folder {name} here, and as a dataset of the hub it can't be had: "
            f"{reason}; check the name, set HF_ENDPOINT to a mirror, or download it"
        ) from error
    return [DataFile(entry["filename"], name, "arrow") for entry in data.cache_files]
