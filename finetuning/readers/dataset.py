"""Raw files → `Sample`s, with everything that could not be read listed by file and line.

Small data become a plain list. Data beyond `LARGE_DATA` go through Arrow files that are memory-mapped,
so that a million samples take the memory of a few thousand; order and content do not depend on
the number of workers, and the files are kept under `cache_dir` by the hash of what was read.
"""

import bisect
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from finetuning.common.cache import cached_folder, code_version, temporary_folder
from finetuning.common.errors import UserError
from finetuning.common.files import write_json
from finetuning.common.text import clean_line
from finetuning.common.workers import in_order
from finetuning.readers.files import COMPRESSIONS, DataFile, list_files
from finetuning.readers.formats import Chunk, read_records, read_text, split_file
from finetuning.readers.markdown import markdown_samples
from finetuning.readers.records import SAMPLE_KEYS, record_sample
from finetuning.readers.sample import (
    BrokenRecordError,
    BrokenSample,
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
Read = Sample | BrokenSample | Remark


@dataclass(frozen=True)
class SampleSet:
    """All samples in the order of the files, and what is to be said about the reading."""

    samples: Sequence[Sample]
    broken: tuple[BrokenSample, ...]
    samples_per_file: dict[str, int]
    fingerprint: str
    """32 hexadecimal digits over the contents in their order."""
    remarks: tuple[Remark, ...] = ()
    """Oddities of samples that were read: a glued heading, a column that is left unused. What is odd
    about records is told once a file."""
    skipped: tuple[Remark, ...] = ()
    """The files beside those that were read that are not read themselves; they are in `remarks` too."""
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
    """Read files, folders, globs, `datasets` folders and hub names (`owner/name[:config][:split]`).

    `columns` maps a field (question, thinking, answer, system, history, tools, difficulty,
    messages) to the column that holds it; the others are looked for under their usual names.
    `progress(done, total)` counts bytes. A file reached twice is read once. Raises UserError where a
    path or a whole file can't be read, and where nothing at all was found; single broken records are
    listed in `broken` instead.
    """
    _check_columns(columns)
    files = _all_files(paths, cache_dir)
    total = sum(_expected_bytes(file) for file in files)
    if total <= LARGE_DATA:
        found = _read_small(files, columns, progress)
    else:
        found = _read_large(files, columns, cache_dir, max(1, workers), progress)
    _check_found(found)
    return found


def _check_columns(columns: dict[str, str] | None) -> None:
    unknown = sorted(set(columns or ()) - set(SAMPLE_KEYS))
    if unknown:
        known = ", ".join(SAMPLE_KEYS)
        raise UserError(f"columns: unknown field {clean_line(unknown[0], 60)!r}; known are {known}")


def _all_files(paths: Sequence[str], cache_dir: Path | None) -> list[DataFile]:
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    files, seen = [], set()
    for path in paths:
        for file in list_files(os.fspath(path), cache_dir):
            real = os.path.realpath(file.path)
            if real not in seen:
                seen.add(real)
                files.append(file)
    if not files:
        raise UserError("no data path given; name a file, a folder or a glob")
    for file in files:
        if os.path.getsize(file.path) == 0:
            raise UserError(f"{clean_line(file.source, 200)} is empty; remove it or fill it")
    return files


def _expected_bytes(file: DataFile) -> int:
    """Rough size of the text inside, only to tell small data from large."""
    compressed = file.kind == "parquet" or file.path.lower().endswith(COMPRESSIONS)
    return os.path.getsize(file.path) * (4 if compressed else 1)


def _check_found(found: SampleSet) -> None:
    """A file without a sample is most likely not what its user meant it to be."""
    broken = {}
    for item in found.broken:
        broken.setdefault(item.source, item)
    for source, count in found.samples_per_file.items():
        if count:
            continue
        if source in broken:
            number = sum(item.source == source for item in found.broken)
            raise UserError(f"no sample can be read, {number} broken; the first: {broken[source]}")
        hint = "a question looks like “### Q1: …”" if source.endswith(".md") else "no record in it"
        raise UserError(f"{clean_line(source, 200)} holds no sample; {hint}")


# ---- reading ----------------------------------------------------------------------------------


def _read_chunk(chunk: Chunk, columns: dict[str, str] | None) -> Iterator[Read]:
    """All samples of a chunk in order, with what is broken or odd between them."""
    if chunk.file.kind == "markdown":
        yield from markdown_samples(read_text(chunk.file), chunk.file.source)
        return
    told = set()  # what is odd about one record is so about a million like it
    for item in _read_records(chunk, columns):
        if not isinstance(item, Remark):
            yield item
        elif item.text not in told:
            told.add(item.text)
            yield replace(item, text=f"{item.text} (first here)")


def _read_records(chunk: Chunk, columns: dict[str, str] | None) -> Iterator[Read]:
    source = chunk.file.source
    for record in read_records(chunk):
        if isinstance(record, (BrokenSample, Remark)):
            yield record
            continue
        line, value = record
        try:
            sample, remarks = record_sample(value, columns)
        except BrokenRecordError as error:
            yield BrokenSample(source, line, str(error))
        else:
            yield _placed(sample, source, line)
            yield from (Remark(source, line, text) for text in remarks)


def _placed(sample: Sample, source: str, line: int) -> Sample:
    object.__setattr__(sample, "source", source)  # fresh from the reader, nobody else holds it yet
    object.__setattr__(sample, "line", line)
    return sample


def _read_small(
    files: list[DataFile], columns: dict[str, str] | None, progress: Progress | None
) -> SampleSet:
    samples, broken, remarks = [], [], []
    per_file = dict.fromkeys((file.source for file in files), 0)
    total = sum(os.path.getsize(file.path) for file in files)
    done = 0
    for file in files:
        for item in _read_chunk(Chunk(file), columns):
            kind = {Sample: samples, BrokenSample: broken, Remark: remarks}[type(item)]
            kind.append(item)
            per_file[file.source] += kind is samples
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


def _read_large(
    files: list[DataFile],
    columns: dict[str, str] | None,
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
        hashes.append((file.source, file.kind, digest))
    readers = ("dataset", "files", "formats", "markdown", "records", "sample")
    version = code_version(*(f"readers.{name}" for name in readers), libraries=("pyarrow",))
    key = json.dumps([version, hashes, columns], sort_keys=True, ensure_ascii=True)
    root = Path(cache_dir) if cache_dir else temporary_folder()
    folder = root / "samples" / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    found = cached_folder(
        folder, _load, lambda building: _write_parts(chunks, columns, building, workers, meter)
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


def _write_parts(
    chunks: list[Chunk],
    columns: dict[str, str] | None,
    building: Path,
    workers: int,
    meter: _Meter,
) -> None:
    """One Arrow file per chunk, then the index."""
    jobs = [(chunk, columns, str(building / _part(i))) for i, chunk in enumerate(chunks)]
    if workers > 1 and len(jobs) > 1:
        written = in_order(_write_part, jobs, workers)
    else:
        written = (_write_part(*job) for job in jobs)
    index = {
        "parts": len(chunks),
        "samples_per_file": dict.fromkeys((chunk.file.source for chunk in chunks), 0),
        "broken": [],
        "remarks": [],
    }
    fingerprint = hashlib.blake2b(digest_size=16)
    for chunk, (ids, broken, remarks) in zip(chunks, written, strict=True):
        fingerprint.update(ids)
        index["samples_per_file"][chunk.file.source] += len(ids) // 8
        index["broken"] += broken
        told = {(r["source"], r["text"]) for r in index["remarks"]} if chunk.start else ()
        index["remarks"] += [r for r in remarks if (r["source"], r["text"]) not in told]
        meter.add((chunk.stop or os.path.getsize(chunk.file.path)) - chunk.start)
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


def _write_part(
    chunk: Chunk, columns: dict[str, str] | None, path: str
) -> tuple[bytes, list[dict], list[dict]]:
    """Write a chunk's samples as an Arrow file. Their ids (8 bytes each), what is broken or odd."""
    import pyarrow as pa

    broken, remarks, rows, ids, characters = [], [], [], bytearray(), 0
    with pa.OSFile(path, "wb") as out, pa.ipc.new_file(out, _schema()) as writer:
        for item in _read_chunk(chunk, columns):
            if isinstance(item, Sample):
                rows.append(_row(item))
                ids += bytes.fromhex(item.id)
                characters += sum(len(rows[-1][name]) for name in _TEXT_COLUMNS)
            else:
                (broken if isinstance(item, BrokenSample) else remarks).append(asdict(item))
            if len(rows) == _ROWS or characters > _BATCH_CHARACTERS:
                writer.write_batch(_batch(rows))
                rows, characters = [], 0
        if rows:
            writer.write_batch(_batch(rows))
    return bytes(ids), broken, remarks


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


def _schema():
    import pyarrow as pa

    fields = [(name, pa.string()) for name in _TEXT_COLUMNS]
    return pa.schema([*fields, ("line", pa.int64()), ("difficulty", pa.int8())])


def _row(sample: Sample) -> dict:
    row = {name: getattr(sample, name) for name in (*_TEXT_COLUMNS, "line", "difficulty")}
    for name in _JSON_COLUMNS:
        row[name] = json.dumps(row[name], ensure_ascii=False) if row[name] else ""
    return row


def _batch(rows: list[dict]):
    """A record batch made of its buffers: pyarrow's own ways from lists import pandas, 60 MB."""
    import pyarrow as pa

    columns = []
    for name in _TEXT_COLUMNS:
        texts = [row[name].encode() for row in rows]
        starts = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        if starts[-1] >= 2**31:
            places = f"{clean_line(rows[-1]['source'], 200)}:{rows[-1]['line']}"
            raise UserError(f"{places}: a sample of 2 GB can't be stored; split it")
        buffers = [None, pa.py_buffer(starts.astype(np.int32)), pa.py_buffer(b"".join(texts))]
        columns.append(pa.Array.from_buffers(pa.string(), len(rows), buffers))
    lines = pa.py_buffer(np.array([row["line"] for row in rows], np.int64))
    columns.append(pa.Array.from_buffers(pa.int64(), len(rows), [None, lines]))
    known = np.array([row["difficulty"] is not None for row in rows])
    values = np.array([row["difficulty"] or 0 for row in rows], np.int8)
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
