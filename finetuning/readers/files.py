"""Which files a path, folder, glob, `datasets` folder or hub address means."""

import difflib
import glob
import operator
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finetuning.common.bounds import RECORD
from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object
from finetuning.common.paths import check_letters
from finetuning.common.text import clean_line
from finetuning.config import DataSettings
from finetuning.readers.sample import Remark

KINDS = {
    ".md": "markdown", ".markdown": "markdown", ".txt": "text", ".docx": "word", ".json": "json",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".xlsx": "excel", ".xlsm": "excel",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
TEXTS = ("markdown", "text", "word")
COMPRESSIONS = (".gz", ".zst")
NOT_TEXT = ("parquet", "arrow", "excel", "word")
"""Kinds that are archives of their own."""
# What to do about kinds that people have and that are not read.
_SAVE_AS = {
    ".xls": "save it as .xlsx", ".et": "save it as .xlsx", ".ods": "save it as .xlsx",
    ".xlsb": "save it as .xlsx", ".doc": "save it as .docx", ".wps": "save it as .docx",
    ".rtf": "save it as .docx", ".odt": "save it as .docx",
    ".pdf": "copy its questions and answers into a .docx or .xlsx", ".html": "save it as .docx or .md",
    ".htm": "save it as .docx or .md", ".zip": "unpack it", ".rar": "unpack it", ".7z": "unpack it",
    ".tar": "unpack it", ".tgz": "unpack it", ".pkl": "save it as .jsonl", ".pickle": "save it as .jsonl",
    ".yaml": "save it as .jsonl", ".yml": "save it as .jsonl", ".xml": "save it as .jsonl",
}  # fmt: skip
# They describe a folder of data and hold no samples.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_DESCRIBES = re.compile(
    r"(?:readme|license|licence|changelog|contributing|requirements|(?:使用|数据)?说明)(?:[_.-].*)?",
    re.I,
)
_LOCKS = ("~$", ".")
_EMPTY = "skipped: it is empty"
_OF_A_KIND = 20  # skipped files that are told one by one
_HUB = "hf://datasets/"
_SPLIT = re.compile(
    r"(train|training|训练集?|训练)|(test|testing|validation|valid|val|dev|eval|holdout|测试集?|验证集?|评测集?|评估集?)",
    re.IGNORECASE,
)
_SPLIT_WORD = re.compile(
    r"(?:^|[-_ ])(?:test|validation|valid|val|dev|eval)(?:[-_ ]|$)|测试集|验证集"
)
_FOR_TESTS = "its name says that it is for tests; it is read all the same"
_SHARD = re.compile(r"(?:[-_.]|(?<!\d))\d++(?:[-_]of[-_]\d++)?$")


class DataFile(NamedTuple):
    """One file to read, under the name that its samples carry as their source."""

    path: str
    source: str
    kind: str
    """markdown, text, word, json, jsonl, csv, excel, parquet or arrow."""
    size: int
    """Bytes on the disk."""
    real: str
    """Where it lies behind all links: a file that is reached twice is read once."""
    named: bool = True
    """Whether the user named the file itself, and not the folder it lies in."""
    encoding: str = ""
    """Of text; empty until it was looked at."""
    columns: tuple[tuple[str, str], ...] = ()
    """(field, name of its column), as the user rules it."""
    described: tuple[tuple[str, str], ...] = ()
    """The same, as a file beside it says; a record may lack such a column."""
    content: bytes | None = None
    """Its bytes while they are held: a small file is opened once."""


@dataclass(frozen=True)
class Listing:
    """The files that paths mean, and what lies beside them and is not read."""

    files: list[DataFile]
    remarks: list[Remark]
    """On files that are read although their name speaks against it."""
    skipped: list[Remark]
    """Files that are not read, and why."""


# ---- which files ------------------------------------------------------------------------------


def list_files(path: str, cache_dir: Path | None = None) -> Listing:
    """The data files behind a file, folder, glob, `datasets` folder or hub address, in a fixed order."""
    found = Listing([], [], [])
    shown = clean_line(str(path), 200)
    if not path or "\0" in path:
        raise UserError(f"data path {shown!r} is no path; give a file, folder or glob")
    check_letters(path, "data path")
    expanded = os.path.expanduser(path)
    there = None if path.startswith(_HUB) else _look_at(expanded, shown)
    if there is not None:
        _add_existing(expanded, path, there, found)
    elif path.startswith(_HUB):
        found.files.extend(_hub_files(path, cache_dir))
    elif glob.has_magic(expanded):
        for name in sorted(glob.glob(expanded, recursive=True)):
            _add_matched(name, found)
        if not found.files:
            known = f"no data file matches {shown}; readable are {_readable()}"
            raise UserError(f"{known}{_beside(found.skipped)}")
    else:
        raise UserError(_nothing_there(path, expanded))
    return found


def check_paths(settings: DataSettings) -> None:
    """Raise UserError, at once, for a path that is not there or of which nothing can be read."""
    for path in (*settings.data_path, *settings.eval_path):
        if not str(path).startswith(_HUB):
            list_files(os.fspath(path))


def _nothing_there(path: str, expanded: str) -> str:
    """What a path lacks, with what it may have meant."""
    shown = clean_line(path, 200)
    parent, name = os.path.split(expanded.rstrip("/\\"))
    here = "" if os.path.isabs(expanded) else f" in {clean_line(os.getcwd(), 200)}"
    if parent and not os.path.isdir(parent):
        return (
            f"there is no {shown}: no folder {clean_line(parent, 100)}{here}; give an "
            f"existing file, folder or glob ({_HUB}owner/name is a dataset of the hub)"
        )
    try:
        beside = sorted(os.listdir(parent or "."))
    except OSError:
        beside = []
    near = difflib.get_close_matches(name, beside, n=1)
    meant = f"; is {clean_line(os.path.join(parent, near[0]), 200)} meant?" if near else ""
    todo = meant or "; give an existing file, folder or glob"
    return f"there is no {shown}{here}{todo}"


def _readable() -> str:
    return ", ".join(KINDS) + " and these with " + " or ".join(COMPRESSIONS)


def _look_at(path: str, shown: str) -> os.stat_result | None:
    """What is there behind symbolic links, None for nothing."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"can't look at {shown}: {reason}") from error


def _add_existing(path: str, source: str, there: os.stat_result, found: Listing) -> None:
    if stat.S_ISDIR(there.st_mode):
        _add_folder(path, source, found)
        return
    shown = clean_line(source, 200)
    if not stat.S_ISREG(there.st_mode):
        raise UserError(f"{shown} is no regular file (a pipe or device?)")
    kind = _kind_of(path)
    if kind is None:
        todo = _SAVE_AS.get(os.path.splitext(path.lower())[1])
        if todo:
            raise UserError(f"can't read {shown}: {todo}; readable are {_readable()}")
        raise UserError(f"can't read {shown}: readable are {_readable()}")
    real = os.path.realpath(path)
    found.files.append(DataFile(path, _source(source), kind, there.st_size, real))
    if _is_held_out(os.path.basename(path), set()):
        found.remarks.append(Remark(_source(source), 1, _FOR_TESTS))


def _source(*parts: str) -> str:
    """A file's name as samples carry it: forward slashes, and UTF-8 even if the disk's name is not."""
    return os.fsencode(Path(*parts).as_posix()).decode("utf-8", "replace")


def _kind_of(path: str) -> str | None:
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
        return KINDS.get(suffix) if KINDS.get(suffix) not in NOT_TEXT else None
    return KINDS.get(suffix)


def _add_matched(name: str, found: Listing) -> None:
    """What a glob found; like a folder's, files that are no data are passed over."""
    there = _look_at(name, clean_line(name, 200))
    if there is None or _is_lock(name):
        return
    if not os.path.isdir(name) and (_kind_of(name) is None or _describes(name)):
        found.skipped.append(_skipped(name, name))
    elif stat.S_ISREG(there.st_mode) and there.st_size == 0:
        found.skipped.append(Remark(_source(name), 1, _EMPTY))
    else:
        _add_existing(name, name, there, found)


def _is_lock(name: str) -> bool:
    """By files called `~$name` and `.~name` Office and WPS lock an open one."""
    return os.path.basename(name).startswith(_LOCKS)


def _describes(name: str) -> bool:
    """Whether a file describes the folder that it lies in."""
    base = os.path.basename(name).lower()
    return base in _DESCRIPTIONS or _DESCRIBES.fullmatch(base) is not None


def _skipped(name: str, source: str) -> Remark:
    todo = _SAVE_AS.get(os.path.splitext(name.lower())[1])
    if _describes(name):
        reason = "it describes the folder"
    elif todo:
        reason = f"this kind is not read; {todo}"
    else:
        reason = "this kind is not read"
    return Remark(_source(source), 1, f"skipped: {reason}")


def _add_folder(path: str, source: str, found: Listing) -> None:
    splits = _splits(path)
    if splits:
        found.files.extend(
            [file for split in splits for file in _saved_dataset(path, source, split)]
        )
        return
    if os.path.isfile(os.path.join(path, "state.json")):
        found.files.extend(_saved_dataset(path, source, ""))
        return
    files, skipped = [], []
    below = "" if _source(source) == "." else _source(source).rstrip("/") + "/"
    for inner, entry, folder in _walk(path):
        kind = None if _describes(inner) else _kind_of(inner)
        name = below + os.fsencode(inner).decode("utf-8", "replace")
        if kind is None:
            skipped.append(_skipped(inner, name))
            continue
        there = _regular(entry)
        if there.st_size == 0:
            skipped.append(Remark(name, 1, _EMPTY))
            continue
        real = (
            os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(folder, entry.name)
        )
        files.append((inner, DataFile(entry.path, name, kind, there.st_size, real, named=False)))
    if not files:
        shown = clean_line(source, 200)
        raise UserError(f"the folder {shown} holds no {_readable()} file{_beside(skipped)}")
    _add_for_training(files, found)
    found.skipped.extend(_grouped(skipped, source))
    _add_described_columns(path, found)


def _beside(skipped: list[Remark]) -> str:
    """How many files lie where no file can be read, for a message."""
    empty = sum(remark.text == _EMPTY for remark in skipped)
    others = len(skipped) - empty
    more = f"; {others} files of other kinds lie there" if others else ""
    return more + (f"; empty files: {empty}" if empty else "")


def _grouped(skipped: list[Remark], source: str) -> Iterator[Remark]:
    """Skipped files one by one, but many of one kind, such as pictures, as one."""
    suffixes = [os.path.splitext(remark.source)[1].lower() for remark in skipped]
    counts = Counter(suffixes)
    for suffix, remark in zip(suffixes, skipped, strict=True):
        if counts[suffix] <= _OF_A_KIND:
            yield remark
    for suffix, count in counts.items():
        if count > _OF_A_KIND:
            kind = f"{clean_line(suffix, 20)} files" if suffix else "files without a suffix"
            yield Remark(_source(source), 1, f"skipped: {count} {kind}, a kind that is not read")


def _walk(path: str) -> list[tuple[str, os.DirEntry, str]]:
    """(path below the folder, entry, its folder behind all links) of all files save hidden ones and locks, in
    the order of their paths; a folder that is a link is not entered."""
    found, folders = [], [("", path, os.path.realpath(path))]
    while folders:
        below, folder, real = folders.pop()
        try:
            with os.scandir(folder) as entries:
                inside = list(entries)
        except OSError as error:
            shown = clean_line(str(error.filename), 200)
            raise UserError(f"can't look into {shown}: {error.strerror}") from error
        for entry in inside:
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith("."):
                    folders.append(
                        (f"{below}{entry.name}/", entry.path, os.path.join(real, entry.name))
                    )
            elif not entry.name.startswith(_LOCKS) and not _is_folder(entry):
                found.append((below + entry.name, entry, real))
    return sorted(found, key=operator.itemgetter(0))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: not a file, which is said where it would be read
        return False


def _regular(entry: os.DirEntry | Path) -> os.stat_result:
    """What a file of a folder is behind links. Raises UserError unless it is a regular one."""
    try:
        there = entry.stat()
    except OSError:
        there = None
    if there is None or not stat.S_ISREG(there.st_mode):
        shown = clean_line(os.fspath(entry), 200)
        raise UserError(f"{shown} is missing or no regular file; remove it, or bring it back")
    return there


def _add_for_training(files: list[tuple[str, DataFile]], found: Listing) -> None:
    """Of a folder with files for training and for tests, as the hub names them, those for training."""
    names = {_stem(inner) for inner, _ in files}
    held_out = {inner for inner, _ in files if _is_held_out(inner, names)}
    all_of_them = len(held_out) == len(files)
    for inner, file in files:
        if inner in held_out and not all_of_them:
            text = "skipped: its name says that it is for tests; --eval-path evaluates on it"
            found.skipped.append(Remark(file.source, 1, text))
            continue
        found.files.append(file)
        if inner in held_out:
            found.remarks.append(Remark(file.source, 1, _FOR_TESTS))
        elif _SPLIT_WORD.search(_stem(inner)):
            found.remarks.append(Remark(file.source, 1, f"{_FOR_TESTS} (perhaps)"))


def _stem(inner: str) -> str:
    return os.path.basename(inner).lower().split(".")[0]


def _is_held_out(inner: str, names: set[str]) -> bool:
    """Whether a file is called test, validation or the like, or lies in such a folder, or is the other
    half of one that is for training (`qa_test` beside `qa_train`)."""
    if not _SPLIT.search(inner):
        return False
    for part in (*inner.split("/")[:-1], _SHARD.sub("", _stem(inner))):
        match = _SPLIT.fullmatch(part)
        if match and match[2]:
            return True
    stem = _stem(inner)
    words = re.split(r"([-_ ])", stem)
    for i, word in enumerate(words):
        match = _SPLIT.fullmatch(word)
        if match and match[2]:
            trains = (
                "".join([*words[:i], train, *words[i + 1 :]])
                for train in ("train", "training", "训练", "训练集")
            )
            if any(name in names for name in trains):
                return True
    return False


# What LLaMA-Factory calls the columns that `dataset_info.json` names.
_INFO_COLUMNS = {
    "prompt": "question", "query": "input", "response": "answer", "system": "system", "history": "history",
    "messages": "messages", "tools": "tools", "chosen": "answer",
}  # fmt: skip


def _add_described_columns(path: str, found: Listing) -> None:
    """Give files the columns that a LLaMA-Factory `dataset_info.json` in their folder names for them."""
    info = os.path.join(path, "dataset_info.json")
    if not os.path.isfile(info):
        return
    described = read_json_object(Path(info), RECORD.limit)
    by_name = {}
    for entry in described.values():
        columns = entry.get("columns") if isinstance(entry, dict) else None
        if isinstance(columns, dict) and isinstance(entry.get("file_name"), str):
            pairs = [
                (_INFO_COLUMNS[k], v)
                for k, v in columns.items()
                if k in _INFO_COLUMNS and isinstance(v, str)
            ]
            by_name[os.path.join(path, entry["file_name"])] = tuple(pairs)
    for i, file in enumerate(found.files):
        if pairs := by_name.get(file.path):
            found.files[i] = file._replace(described=pairs)
            names = ", ".join(f"{field} {column}" for field, column in pairs)
            found.remarks.append(
                Remark(
                    file.source, 1, f"dataset_info.json names its columns: {clean_line(names, 200)}"
                )
            )


def _splits(path: str) -> list[str]:
    """The splits to train on of a folder made by `DatasetDict.save_to_disk`: train, else all."""
    listing = os.path.join(path, "dataset_dict.json")
    if not os.path.isfile(listing):
        return []
    splits = read_json_object(Path(listing), RECORD.limit).get("splits")
    if not isinstance(splits, list) or not all(_plain_name(split) for split in splits):
        raise UserError(f"{clean_line(listing, 200)} lists no splits")
    return ["train"] if "train" in splits else splits


def _saved_dataset(path: str, source: str, split: str) -> list[DataFile]:
    """The Arrow files of a folder made by `Dataset.save_to_disk`."""
    state = os.path.join(path, split, "state.json")
    entries = read_json_object(Path(state), RECORD.limit).get("_data_files")
    names = [e.get("filename") if isinstance(e, dict) else None for e in entries or []]
    if not names or not all(_plain_name(name) for name in names):
        raise UserError(f"{clean_line(state, 200)} lists no data files")
    files = []
    for name in names:
        full = Path(path, split, name)
        size, real = _regular(full).st_size, os.path.realpath(full)
        files.append(DataFile(str(full), _source(source, split, name), "arrow", size, real))
    return files


def _plain_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) is not None and name != ".."


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+){0,2}")


def _hub_files(address: str, cache_dir: Path | None) -> list[DataFile]:
    """The Arrow files of a hub dataset, downloaded: `hf://datasets/owner/name[:configuration][:split]`."""
    name = address.removeprefix(_HUB)
    if not _HUB_NAME.fullmatch(name):
        raise UserError(
            f"{clean_line(address, 200)}: a dataset of the hub is {_HUB}owner/name[:configuration][:split]"
        )
    import datasets
    import huggingface_hub

    repository, *parts = name.split(":")
    split = parts.pop() if parts else "train"
    try:
        huggingface_hub.HfApi().dataset_info(repository, timeout=10)
        download = datasets.DownloadConfig()
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        if isinstance(error, huggingface_hub.errors.RepositoryNotFoundError):
            raise UserError(f"there is no dataset {name} on the hub; check the name") from error
        download = datasets.DownloadConfig(local_files_only=True, max_retries=0)
    try:
        data = datasets.load_dataset(
            repository, *parts, split=split, cache_dir=cache_dir, download_config=download
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = clean_line(str(error), 200)
        raise UserError(
            f"the dataset {name} of the hub can't be had: {reason}; check the name, set HF_ENDPOINT to a "
            "mirror, or download it"
        ) from error
    files = [Path(entry["filename"]) for entry in data.cache_files]
    return [DataFile(str(f), address, "arrow", _regular(f).st_size, str(f)) for f in files]
