"""Raw files → `Sample`s, with everything that could not be read listed by file and line.

Small data become a plain list. Data beyond `LARGE_DATA` go through Arrow files that are memory-mapped,
so that a million samples take the memory of a few thousand; order and content do not depend on
the number of workers, and the files are kept under `cache_dir` by the hash of what was read.
"""

import bisect
import hashlib
import json
import mmap
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.common.cache import cached_folder, code_version, temporary_folder
from finetuning.common.errors import UserError
from finetuning.common.files import write_json
from finetuning.common.text import clean_line
from finetuning.common.workers import in_order
from finetuning.readers.files import COMPRESSIONS, TEXTS, DataFile, Listing, list_files
from finetuning.readers.findings import HINTS, Findings, encoding_remark, urgency, without_sample
from finetuning.readers.formats import read_records, recognized
from finetuning.readers.opening import Chunk, split_file
from finetuning.readers.records import SAMPLE_KEYS, record_sample
from finetuning.readers.sample import (
    BrokenRecordError,
    BrokenSample,
    LeftOutError,
    Remark,
    Sample,
)

LARGE_DATA = 4 * 2**20
"""Bytes of input from which on samples live in Arrow files and are read in parallel."""

_BATCH_CHARACTERS = 32 * 2**20  # beyond which a batch is written with fewer rows
_ROWS = 1000  # per record batch: the unit that is decoded when samples are read in order
SPAN = 500  # samples that a worker looks at before it hands in what it found
_LOOKS = 100  # samples taken one by one until the pages that they lie on are given back

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
    ruled = tuple((columns or {}).items())
    files = [recognized(replace(file, columns=ruled)) for file in listing.files]
    total = sum(_expected_bytes(file) for file in files)
    if total <= LARGE_DATA:
        found = _read_small(files, progress)
    else:
        found = _read_large(files, cache_dir, max(1, workers), progress)
    return _accounted(found, files, listing)


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
            real = os.path.realpath(file.path)
            if real not in seen:
                seen.add(real)
                whole.files.append(file)
        whole.remarks.extend(found.remarks)
        whole.skipped.extend(found.skipped)
    if not whole.files:
        raise UserError("no data path given; name a file, a folder or a glob")
    for file in whole.files:
        if os.path.getsize(file.path) == 0:
            raise UserError(f"{clean_line(file.source, 200)} is empty; remove it or fill it")
    return whole


def _expected_bytes(file: DataFile) -> int:
    """Rough size of the text inside, only to tell small data from large."""
    packed = ("parquet", "excel", "word")
    compressed = file.kind in packed or file.path.lower().endswith(COMPRESSIONS)
    return os.path.getsize(file.path) * (4 if compressed else 1)


def _accounted(found: SampleSet, files: list[DataFile], listing: Listing) -> SampleSet:
    """What was read with a word on every file. A text in a folder that holds no question was not meant to be
    read; any other file without a sample is most likely not what its user meant it to be."""
    broken: dict[str, list[BrokenSample]] = {}
    for item in found.broken:
        broken.setdefault(item.source, []).append(item)
    left_out = {r.source for r in found.remarks if r.text.startswith("left out")}
    skipped, per_file = [*dict.fromkeys(listing.skipped)], dict(found.samples_per_file)
    for file in files:
        if found.samples_per_file[file.source]:
            continue
        if not file.named and file.kind in TEXTS and file.source not in broken:
            per_file.pop(file.source)
            skipped.append(Remark(file.source, 1, "skipped: no question was found in it"))
            continue
        raise UserError(without_sample(file, broken.get(file.source, []), file.source in left_out))
    if not per_file:
        raise UserError(
            f"no question was found in {clean_line(files[0].source, 200)}; {HINTS['text']}"
        )
    encodings = [remark for file in files if (remark := encoding_remark(file))]
    remarks = sorted(
        (*found.remarks, *dict.fromkeys(listing.remarks), *encodings, *skipped), key=urgency
    )
    return replace(found, remarks=tuple(remarks), skipped=tuple(skipped), samples_per_file=per_file)


# ---- reading ----------------------------------------------------------------------------------


def _read_chunk(chunk: Chunk, findings: Findings) -> Iterator[Sample | BrokenSample]:
    """All samples of a chunk in order, and what is broken between them; the rest is found."""
    file = chunk.file
    depends = bool(file.described) or file.kind in TEXTS
    for item in read_records(chunk):
        if isinstance(item, tuple):
            line, record = item
            columns = _columns_of(file, record) if depends else file.columns
            try:
                reading = record_sample(record, columns)
            except BrokenRecordError as error:
                yield BrokenSample(file.source, line, str(error))
            except LeftOutError as error:
                findings.note(line, f"left out: {error}")
            else:
                findings.record(line, reading)
                yield _placed(reading.sample, file.source, line)
        elif isinstance(item, Remark):
            findings.note(item.line, item.text)
        elif isinstance(item, BrokenSample):
            yield item
        else:
            findings.sample(item)
            yield item


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


def _read_small(files: list[DataFile], progress: Progress | None) -> SampleSet:
    samples, broken, remarks = [], [], []
    per_file = dict.fromkeys((file.source for file in files), 0)
    total = sum(os.path.getsize(file.path) for file in files)
    done = 0
    for file in files:
        findings = Findings()
        for item in _read_chunk(Chunk(file), findings):
            (samples if isinstance(item, Sample) else broken).append(item)
            per_file[file.source] += isinstance(item, Sample)
        remarks += findings.remarks(file.source)
        done += os.path.getsize(file.path)
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
    "damage", "dataset", "fields", "files", "findings", "flags", "formats", "json_records", "labelled",
    "markdown", "names", "office", "opening", "reasoning", "records", "sample", "tables", "texts", "turns",
    "values",
)  # fmt: skip


def _read_large(
    files: list[DataFile],
    cache_dir: Path | None,
    workers: int,
    progress: Progress | None,
) -> SampleSet:
    """Arrow files of all samples, from the cache or written now; two passes over the bytes."""
    total = 2 * sum(os.path.getsize(file.path) for file in files)
    meter = _Meter(total, progress)
    chunks, hashes = [], []
    for file in files:
        parts, digest = split_file(file, meter.add)
        chunks += parts
        hashes.append((file.source, file.kind, file.encoding, file.described, digest))
    libraries = ("pyarrow", "openpyxl", "python-docx")
    version = code_version(*(f"readers.{name}" for name in _READERS), libraries=libraries)
    key = json.dumps([version, hashes, files[0].columns], sort_keys=True, ensure_ascii=True)
    root = Path(cache_dir) if cache_dir else temporary_folder()
    folder = root / "samples" / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    found = cached_folder(
        folder, _load, lambda building: _write_parts(chunks, building, workers, meter)
    )
    meter.add(total - meter.done)
    return found


class _Meter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self._total, self._progress = 0, total, progress

    def add(self, count: int) -> None:
        self.done += count
        if self._progress:
            self._progress(self.done, self._total)


def _write_parts(chunks: list[Chunk], building: Path, workers: int, meter: _Meter) -> None:
    """One Arrow file per chunk, then the index."""
    jobs = [(chunk, str(building / _part(i))) for i, chunk in enumerate(chunks)]
    if workers > 1 and len(jobs) > 1:
        written = in_order(_write_part, jobs, workers)
    else:
        written = (_write_part(*job) for job in jobs)
    index = {
        "parts": len(chunks),
        "samples_per_file": dict.fromkeys((chunk.file.source for chunk in chunks), 0),
        "broken": [],
    }
    fingerprint = hashlib.blake2b(digest_size=16)
    found: dict[str, Findings] = {}
    for chunk, (ids, broken, findings) in zip(chunks, written, strict=True):
        fingerprint.update(ids)
        index["samples_per_file"][chunk.file.source] += len(ids) // 8
        index["broken"] += broken
        found.setdefault(chunk.file.source, Findings()).merge(findings)
        meter.add((chunk.stop or os.path.getsize(chunk.file.path)) - chunk.start)
    index["remarks"] = [
        asdict(remark) for source in found for remark in found[source].remarks(source)
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


def _write_part(chunk: Chunk, path: str) -> tuple[bytes, list[dict], Findings]:
    """Write a chunk's samples as an Arrow file. Their ids (8 bytes each), what is broken or odd."""
    import pyarrow as pa

    broken, rows, ids, characters = [], [], bytearray(), 0
    findings = Findings()
    with pa.OSFile(path, "wb") as out, pa.ipc.new_file(out, _schema()) as writer:
        for item in _read_chunk(chunk, findings):
            if isinstance(item, Sample):
                rows.append(_row(item))
                ids += bytes.fromhex(item.id)
                characters += sum(map(len, rows[-1][: len(_TEXT_COLUMNS)]))
            else:
                broken.append(asdict(item))
            if len(rows) == _ROWS or characters > _BATCH_CHARACTERS:
                writer.write_batch(_batch(rows))
                rows, characters = [], 0
        if rows:
            writer.write_batch(_batch(rows))
    return bytes(ids), broken, findings


def _load(folder: Path) -> SampleSet | None:
    """What `_write_parts` wrote, None where it isn't there or isn't whole."""
    import pyarrow as pa

    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        samples = ArrowSamples([str(folder / _part(i)) for i in range(index["parts"])])
    except (OSError, ValueError, KeyError, pa.ArrowException):
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


# ---- samples in Arrow files -------------------------------------------------------------------

_JSON_COLUMNS = ("history", "tool_turns", "tool_calls")
_TEXT_COLUMNS = ("question", "thinking", "answer", "system", "source", "tools", *_JSON_COLUMNS)
_JSON = slice(_TEXT_COLUMNS.index(_JSON_COLUMNS[0]), len(_TEXT_COLUMNS))


def _schema():
    import pyarrow as pa

    fields = [(name, pa.string()) for name in _TEXT_COLUMNS]
    return pa.schema([*fields, ("line", pa.int64()), ("difficulty", pa.int8())])


_values = operator.attrgetter(*_TEXT_COLUMNS, "line", "difficulty")


def _row(sample: Sample) -> tuple:
    """A sample's values in the order of the schema, as Arrow holds them."""
    row = _values(sample)
    if not any(row[_JSON]):
        return (*row[: _JSON.start], "", "", "", *row[_JSON.stop :])
    texts = (json.dumps(value, ensure_ascii=False) if value else "" for value in row[_JSON])
    return (*row[: _JSON.start], *texts, *row[_JSON.stop :])


def _batch(rows: list[tuple]):
    """A record batch made of its buffers: pyarrow's own ways from lists import pandas, 60 MB."""
    import pyarrow as pa

    columns = []
    *held, lines, difficulties = zip(*rows, strict=True)
    for column in held:
        texts = [text.encode() for text in column]
        starts = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        if starts[-1] >= 2**31:
            places = f"{clean_line(held[_TEXT_COLUMNS.index('source')][-1], 200)}:{lines[-1]}"
            raise UserError(f"{places}: a sample of 2 GB can't be stored; split it")
        buffers = [None, pa.py_buffer(starts.astype(np.int32)), pa.py_buffer(b"".join(texts))]
        columns.append(pa.Array.from_buffers(pa.string(), len(rows), buffers))
    numbers = pa.py_buffer(np.array(lines, np.int64))
    columns.append(pa.Array.from_buffers(pa.int64(), len(rows), [None, numbers]))
    known = np.array([stated is not None for stated in difficulties])
    values = np.array([stated or 0 for stated in difficulties], np.int8)
    buffers = [pa.py_buffer(np.packbits(known, bitorder="little")), pa.py_buffer(values)]
    columns.append(pa.Array.from_buffers(pa.int8(), len(rows), buffers))
    return pa.RecordBatch.from_arrays(columns, schema=_schema())


def _sample(row: dict) -> Sample:
    for name in _JSON_COLUMNS:
        row[name] = tuple(json.loads(row[name])) if row[name] else ()
    return Sample(**row)


class ArrowSamples(Sequence):
    """Samples in Arrow files; each is decoded when it is asked for.

    One by one they come from mapped files, in order they are read: pages of a mapped file that were
    looked at count as this process's memory. So those are given back from time to time.
    """

    def __init__(self, paths: list[str]) -> None:
        import pyarrow as pa

        self._paths = paths
        self._maps = [_mapped(path) for path in paths]
        readers = [pa.ipc.open_file(pa.BufferReader(pa.py_buffer(m))) for m in self._maps]
        counts = [reader.num_record_batches for reader in readers]
        self._batches = [r.get_batch(i) for r in readers for i in range(r.num_record_batches)]
        self._places = [(part, i) for part, n in enumerate(counts) for i in range(n)]
        self._looked_at: list[int] = []  # parts, since pages were given back
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64).tolist()

    def __reduce__(self) -> tuple:
        return ArrowSamples, (self._paths,)  # another process maps the same files

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return list(self._between(start, stop))
            return [self[i] for i in range(start, stop, step)]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, position)
        batch = self._batches[number]
        row = position - (self._ends[number] - batch.num_rows)
        sample = _sample({name: batch[name][row].as_py() for name in batch.schema.names})
        self._looked_at.append(self._places[number][0])
        if len(self._looked_at) >= _LOOKS:
            for part in set(self._looked_at):
                give_back_pages(self._maps[part])
            self._looked_at = []
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return self._between(0, len(self))

    def sources(self) -> Iterator[str]:
        """The source of every sample, without decoding the samples."""
        for number in range(len(self._batches)):
            yield from self._read(number)["source"].to_pylist()

    def _between(self, start: int, stop: int) -> Iterator[Sample]:
        number = bisect.bisect_right(self._ends, start)
        while start < stop:
            batch, end = self._read(number), min(stop, self._ends[number])
            first = start - (self._ends[number] - batch.num_rows)
            yield from map(_sample, batch.slice(first, end - start).to_pylist())
            start, number = end, number + 1

    def _read(self, number: int):
        import pyarrow as pa

        part, place = self._places[number]
        with pa.OSFile(self._paths[part]) as file:
            return pa.ipc.open_file(file).get_batch(place)


def _mapped(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def give_back_pages(mapped: mmap.mmap) -> None:
    """Let go of the pages of a file, mapped for reading, that were looked at; they come again when
    they are looked at again. Nothing happens on systems that take them back by themselves."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
