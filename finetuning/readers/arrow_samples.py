"""Samples in Arrow files that are mapped, so that a million take the memory of a few thousand."""

import bisect
import json
import mmap
import operator
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.readers.sample import Sample

_BATCH_CHARACTERS = 32 * 2**20  # beyond which a batch is written with fewer rows
_ROWS = 1000  # per record batch: the unit that is decoded when samples are read in order
_LOOKS = 100  # samples taken one by one until the pages that they lie on are given back
_JSON_COLUMNS = ("history", "tool_turns", "tool_calls")
_TEXT_COLUMNS = ("question", "thinking", "answer", "system", "source", "tools", *_JSON_COLUMNS)
_JSON = slice(_TEXT_COLUMNS.index(_JSON_COLUMNS[0]), len(_TEXT_COLUMNS))


def write_samples(path: str, samples: Iterable[Sample]) -> bytes:
    """Write an Arrow file of samples; their ids, 8 bytes each."""
    import pyarrow as pa

    rows, ids, characters = [], bytearray(), 0
    with pa.OSFile(path, "wb") as out, pa.ipc.new_file(out, _schema()) as writer:
        for sample in samples:
            rows.append(_row(sample))
            ids += bytes.fromhex(sample.id)
            characters += sum(map(len, rows[-1][: len(_TEXT_COLUMNS)]))
            if len(rows) == _ROWS or characters > _BATCH_CHARACTERS:
                writer.write_batch(_batch(rows))
                rows, characters = [], 0
        if rows:
            writer.write_batch(_batch(rows))
    return bytes(ids)


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
