"""Raw files → `Sample`s, with everything that could not be read listed by file and line.

Small data become a plain list. Data beyond `LARGE_DATA` go through Arrow files that are memory-mapped,
so that a million samples take the memory of a few thousand; order and content do not depend on
the number of workers, and the files are kept under `cache_dir` by the hash of what was read.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from finetuning.common.bounds import BROKEN, OPEN_FILES
from finetuning.common.cache import cached_folder, code_version, temporary_folder
from finetuning.common.errors import UserError
from finetuning.common.files import write_json
from finetuning.common.text import clean_line
from finetuning.common.workers import in_order
from finetuning.readers.arrow_samples import ArrowSamples, write_samples
from finetuning.readers.files import COMPRESSIONS, TEXTS, DataFile, Listing, list_files
from finetuning.readers.findings import HINTS, Findings, urgency, without_sample
from finetuning.readers.formats import read_records, recognized
from finetuning.readers.opening import CHUNK, Chunk, held, split_file, too_many_open
from finetuning.readers.records import SAMPLE_KEYS, record_sample
from finetuning.readers.sample import (
    BrokenRecordError,
    BrokenSample,
    Finding,
    LeftOutError,
    NothingLeftError,
    Remark,
    Sample,
)

LARGE_DATA = 4 * 2**20
"""Bytes of input from which on samples live in Arrow files and are read in parallel."""

_SAMPLE = 200  # bytes that a sample in memory takes besides its texts
_MOST_HELD = 8  # times `LARGE_DATA` of samples in a list, which a small compressed file may give
SPAN = 500  # samples that a worker looks at before it hands in what it found

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SampleSet:
    """All samples in the order of the files, and what is to be said about the reading."""

    samples: Sequence[Sample]
    broken: tuple[BrokenSample, ...]
    samples_per_file: dict[str, int]
    fingerprint: str
    """32 hexadecimal digits over the contents in their order."""
    remarks: tuple[Remark, ...] = ()
    """What was read otherwise than its author may have meant, or was not used or not read: a glued heading,
    a column, a whole file. What is odd about records is told once a file, with their number."""
    skipped: tuple[Remark, ...] = ()
    """The files that lie beside those that were read and are not read themselves; also in `remarks`."""
    key: str = ""
    """32 hexadecimal digits over contents, names and columns of the files: what is kept of these samples
    is kept under it. Empty for small data, of which nothing is."""


def read_samples(
    paths: Sequence[str],
    *,
    columns: dict[str, str] | None = None,
    cache_dir: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> SampleSet:
    """Read files, folders, globs, `datasets` folders and hub data (`hf://datasets/owner/name[:config][:split]`).

    `columns` maps a field (`SAMPLE_KEYS`) to the column that holds it; the others are looked for by what
    their names mean.
    `progress(done, total)` counts bytes. A file reached twice is read once. Raises UserError where a
    path or a whole file can't be read, and where nothing at all was found; single broken records are
    listed in `broken` instead.
    """
    _check_columns(columns)
    listing = _all_files(paths, cache_dir)
    files = listing.files
    if columns:
        files = [file._replace(columns=tuple(columns.items())) for file in files]
    small = sum(map(_expected_bytes, files)) <= LARGE_DATA
    found = _read_small(files, progress) if small else None
    if found is None:
        found = _read_large(files, cache_dir, max(1, workers), progress)
    return _accounted(found, listing)


def _check_columns(columns: dict[str, str] | None) -> None:
    unknown = sorted(set(columns or ()) - set(SAMPLE_KEYS))
    if unknown:
        known = ", ".join(SAMPLE_KEYS)
        raise UserError(f"columns: unknown field {clean_line(unknown[0], 60)!r}; known are {known}")


def _all_files(paths: Sequence[str], cache_dir: Path | None) -> Listing:
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    whole, seen = Listing([], [], []), set()
    for path in paths:
        found = list_files(os.fspath(path), cache_dir)
        for file in found.files:
            if file.real not in seen:
                seen.add(file.real)
                whole.files.append(file)
        whole.remarks.extend(found.remarks)
        whole.skipped.extend(found.skipped)
    if not whole.files:
        raise UserError("no data path given; name a file, a folder or a glob")
    for file in whole.files:
        if file.size == 0:
            raise UserError(f"{clean_line(file.source, 200)} is empty; remove it or fill it")
    return whole


def _expected_bytes(file: DataFile) -> int:
    """Rough size of the text inside, only to tell small data from large."""
    packed = ("parquet", "excel", "word")
    compressed = file.kind in packed or file.path.lower().endswith(COMPRESSIONS)
    return file.size * (4 if compressed else 1)


def _accounted(found: SampleSet, listing: Listing) -> SampleSet:
    """What was read with a word on every file. A text in a folder that holds no question was not meant to be
    read, and a file there without any record holds nothing; any other file without a sample is most likely
    not what its user meant it to be."""
    broken: dict[str, list[BrokenSample]] = {}
    for item in found.broken:
        broken.setdefault(item.source, []).append(item)
    left_out = {r.source for r in found.remarks if r.text.startswith("left out")}
    skipped, per_file = [*dict.fromkeys(listing.skipped)], dict(found.samples_per_file)
    empty: list[Finding] = []
    for file in listing.files:
        if found.samples_per_file[file.source]:
            continue
        nothing = file.source not in broken and file.source not in left_out
        if not file.named and nothing:
            per_file.pop(file.source)
            what = "no question was found in it" if file.kind in TEXTS else "no record is in it"
            skipped.append(Remark(file.source, 1, f"skipped: {what}"))
            continue
        reason = without_sample(file, broken.get(file.source, []), file.source in left_out)
        empty.append(Finding(file.source, 1, "without a sample", reason))
    if not per_file:
        shown = clean_line(listing.files[0].source, 200)
        reason = f"no question was found in {shown}; {HINTS['text']}"
        empty.append(Finding(listing.files[0].source, 1, "without a sample", reason))
    remarks = sorted((*found.remarks, *dict.fromkeys(listing.remarks), *skipped), key=urgency)
    if empty:
        lost = (Finding(b.source, b.line, "broken", b.reason) for b in found.broken)
        odd = (Finding(r.source, r.line, "remark", r.text) for r in remarks)
        raise NothingLeftError(empty[0].note, (*lost, *empty, *odd))
    return replace(found, remarks=tuple(remarks), skipped=tuple(skipped), samples_per_file=per_file)


# ---- reading ----------------------------------------------------------------------------------


def _read_chunk(chunk: Chunk, findings: Findings) -> Iterator[Sample | BrokenSample]:
    """All samples of a chunk in order, and what is broken between them; the rest is found."""
    file, broken = chunk.file, 0
    depends = bool(file.described) or file.kind in TEXTS
    for item in read_records(replace(chunk, file=held(file)) if chunk.stop is None else chunk):
        if isinstance(item, tuple):
            line, record = item
            columns = _columns_of(file, record) if depends else file.columns
            try:
                reading = record_sample(record, columns)
            except BrokenRecordError as error:
                broken += 1
                yield BrokenSample(file.source, line, str(error))
            except LeftOutError as error:
                findings.note(line, f"left out: {error}")
            else:
                findings.record(line, reading)
                yield _placed(reading.sample, file.source, line)
        elif isinstance(item, Remark):
            findings.note(item.line, item.text)
        elif isinstance(item, BrokenSample):
            broken += 1
            yield item
        else:
            findings.sample(item)
            yield item
        if broken > BROKEN.limit:
            place = f"{clean_line(file.source, 200)}:{chunk.first_line}"
            raise UserError(
                f"{place}: more than {BROKEN} from here on are broken; is this a data file?"
            )


def _columns_of(file: DataFile, record: Any) -> tuple[tuple[str, str], ...]:
    """The columns that are ruled for a record. What a text calls its fields differs from file to file, and
    what a description says may be missing: there only those count that the record has."""
    if not isinstance(record, dict):
        return file.columns
    ruled = {field for field, _ in file.columns}
    described = tuple(p for p in file.described if p[0] not in ruled and p[1] in record)
    if file.kind in TEXTS:
        return tuple(pair for pair in file.columns if pair[1] in record)
    return file.columns + described


def _placed(sample: Sample, source: str, line: int) -> Sample:
    object.__setattr__(sample, "source", source)  # fresh from the reader, nobody else holds it yet
    object.__setattr__(sample, "line", line)
    return sample


def _read_small(files: list[DataFile], progress: Progress | None) -> SampleSet | None:
    """All samples in a list; None where compressed files turn out to hold too much for one."""
    samples, broken, remarks = [], [], []
    per_file = dict.fromkeys((file.source for file in files), 0)
    total = sum(file.size for file in files)
    done = held = 0
    for file in map(recognized, files):
        findings = Findings()
        for item in _read_chunk(Chunk(file), findings):
            if isinstance(item, Sample):
                samples.append(item)
                per_file[file.source] += 1
                held += len(item.question) + len(item.thinking) + len(item.answer) + _SAMPLE
                if held > _MOST_HELD * LARGE_DATA:
                    return None
            else:
                broken.append(item)
        remarks += findings.remarks(file)
        done += file.size
        if progress:
            progress(done, total)
    fingerprint = _fingerprint(bytes.fromhex(sample.id) for sample in samples)
    return SampleSet(samples, tuple(broken), per_file, fingerprint, tuple(remarks))


def _fingerprint(ids: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for item in ids:
        digest.update(item)
    return digest.hexdigest()


# ---- large data -------------------------------------------------------------------------------


_READERS = (
    "arrow_samples", "damage", "dataset", "fields", "files", "findings", "flags", "formats", "json_records",
    "labelled", "markdown", "names", "office", "opening", "reasoning", "records", "sample", "tables", "texts",
    "turns", "values", "verdicts",
)  # fmt: skip
_MAKERS = (
    "common.bounds",
    "common.files",
    "common.text",
)  # of other rooms; samples depend on them, too


def _read_large(
    files: list[DataFile],
    cache_dir: Path | None,
    workers: int,
    progress: Progress | None,
) -> SampleSet:
    """Arrow files of all samples, from the cache or written now; two passes over the bytes."""
    total = 2 * sum(file.size for file in files)
    meter = _Meter(total, progress)
    chunks, hashes = [], []
    for file in map(recognized, files):
        parts, digest = split_file(file, meter.add)
        chunks += parts
        hashes.append((file.source, file.kind, file.encoding, file.described, digest))
    libraries = ("pyarrow", "openpyxl", "python-docx")
    version = code_version(*_MAKERS, *(f"readers.{name}" for name in _READERS), libraries=libraries)
    key = json.dumps([version, hashes, files[0].columns], sort_keys=True, ensure_ascii=True)
    root = Path(cache_dir) if cache_dir else temporary_folder()
    folder = root / "samples" / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    found = cached_folder(
        folder, _load, lambda building: _write_parts(chunks, building, workers, meter)
    )
    meter.add(total - meter.done)
    return found


def _parts(chunks: list[Chunk]) -> list[list[Chunk]]:
    """Consecutive chunks that are written to one Arrow file. Each of these stays open while they are read, so
    large data have larger ones, not more."""
    least = max(CHUNK, sum(chunk.size for chunk in chunks) // OPEN_FILES.limit)
    parts, held = [], least
    for chunk in chunks:
        if held >= least:
            parts.append([])
            held = 0
        parts[-1].append(chunk)
        held += chunk.size
    return parts


class _Meter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self._total, self._progress = 0, total, progress

    def add(self, count: int) -> None:
        self.done += count
        if self._progress:
            self._progress(self.done, self._total)


def _write_parts(chunks: list[Chunk], building: Path, workers: int, meter: _Meter) -> None:
    """Arrow files of consecutive chunks, then the index."""
    parts = _parts(chunks)
    jobs = [(part, str(building / _part(i))) for i, part in enumerate(parts)]
    if workers > 1 and len(jobs) > 1:
        written = in_order(_write_part, jobs, workers)
    else:
        written = (_write_part(*job) for job in jobs)
    index = {
        "parts": len(parts),
        "samples_per_file": dict.fromkeys((chunk.file.source for chunk in chunks), 0),
        "broken": [],
    }
    fingerprint = hashlib.blake2b(digest_size=16)
    found: dict[str, Findings] = {}
    for part, (ids, broken, findings) in zip(parts, written, strict=True):
        fingerprint.update(ids)
        index["broken"] += broken
        for chunk, of_it in zip(part, findings, strict=True):
            source = chunk.file.source
            index["samples_per_file"][source] += of_it.samples
            found.setdefault(source, (chunk.file, Findings()))[1].merge(of_it)
            meter.add(chunk.size)
    index["remarks"] = [
        asdict(remark) for file, of_it in found.values() for remark in of_it.remarks(file)
    ]
    index["fingerprint"] = fingerprint.hexdigest()
    write_json(building / "index.json", index)


def map_spans(
    function: Callable, samples: Sequence[Sample], workers: int, *, pool_from: int
) -> Iterator:
    """function(samples, start, stop) of consecutive spans, in order; from `pool_from` samples on by
    worker processes."""
    spans = [(start, start + SPAN) for start in range(0, len(samples), SPAN)]
    if workers > 1 and len(samples) >= pool_from:
        lazy = isinstance(samples, ArrowSamples)  # each process reads its own share of the files
        jobs = ((samples, *s) if lazy else (samples[slice(*s)], 0, SPAN) for s in spans)
        yield from in_order(function, jobs, workers)
    else:
        yield from (function(samples, *span) for span in spans)


def _part(i: int) -> str:
    return f"part-{i:05d}.arrow"


def _write_part(chunks: list[Chunk], path: str) -> tuple[bytes, list[dict], list[Findings]]:
    """Write the samples of chunks as an Arrow file. Their ids (8 bytes each), what is broken, and what is
    found in each chunk."""
    broken: list[dict] = []
    findings = [Findings() for _ in chunks]

    def samples() -> Iterator[Sample]:
        for item in itertools.chain.from_iterable(map(_read_chunk, chunks, findings)):
            if isinstance(item, Sample):
                yield item
            else:
                broken.append(asdict(item))

    return write_samples(path, samples()), broken, findings


def _load(folder: Path) -> SampleSet | None:
    """What `_write_parts` wrote, None where it isn't there or isn't whole."""
    import pyarrow as pa

    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        samples = ArrowSamples([str(folder / _part(i)) for i in range(index["parts"])])
    except OSError as error:
        if too_many := too_many_open(error):
            raise too_many from error
        return None
    except (ValueError, KeyError, pa.ArrowException):
        return None
    if len(samples) != sum(index["samples_per_file"].values()):
        return None
    return SampleSet(
        samples,
        tuple(BrokenSample(**item) for item in index["broken"]),
        index["samples_per_file"],
        index["fingerprint"],
        tuple(Remark(**item) for item in index["remarks"]),
        key=folder.name,
    )
