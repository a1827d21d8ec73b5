"""A file's records, whatever its kind: which reader reads it, and those of Parquet and Arrow."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

from finetuning.common.bounds import UNPACKED
from finetuning.readers.files import DataFile
from finetuning.readers.json_records import json_records, jsonl_records, with_layout
from finetuning.readers.office import excel_records
from finetuning.readers.opening import (
    Chunk,
    Unpacking,
    archive_errors,
    check_unpacked,
    damaged,
    encoding_error,
    held,
    with_encoding,
)
from finetuning.readers.sample import BrokenSample, Remark, Sample
from finetuning.readers.tables import csv_records
from finetuning.readers.texts import text_items

Record = tuple[int, Any]
_ROWS = 100  # of Parquet and Arrow that are converted at a time
_ROW = 64  # bytes that a row takes at least, whatever is in it
_MOST_VALUES = 2 * 2**20  # bytes of the values that stand once; writers leave off at half of it
_DENSE = 20  # times its size that a column of text seldom unpacks to


def recognized(file: DataFile) -> DataFile:
    """The file with what is to be known before it is read in parts: its encoding, how its JSON stands."""
    try:
        check_unpacked(file)
        file = with_encoding(held(file))
        return with_layout(file)
    except UnicodeDecodeError:
        return file
    except archive_errors() as error:
        raise damaged(file, error) from error


def read_records(chunk: Chunk) -> Iterator[Record | Sample | BrokenSample | Remark]:
    """(line, value) of every record in a chunk of a file of any kind; Markdown may give samples at once."""
    readers = {
        "json": json_records, "jsonl": jsonl_records, "csv": csv_records, "parquet": _parquet,
        "arrow": _arrow, "excel": excel_records, "word": text_items, "text": text_items,
        "markdown": text_items,
    }  # fmt: skip
    try:
        yield from readers[chunk.file.kind](chunk)
    except UnicodeDecodeError:
        raise encoding_error(chunk.file) from None
    except archive_errors() as error:
        raise damaged(chunk.file, error) from error


def _parquet(chunk: Chunk) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        _check_columns(chunk.file.path)
        with pyarrow.parquet.ParquetFile(chunk.file.path) as file:
            dense = _dense_columns(file.metadata, Unpacking(chunk.file))
        with pyarrow.parquet.ParquetFile(chunk.file.path, read_dictionary=dense) as file:
            yield from _rows(file.iter_batches(batch_size=_ROWS), chunk.file)
    except (pa.ArrowException, ValueError, NotImplementedError) as error:
        raise damaged(chunk.file, error) from error


class _WithoutData(Exception):
    """A reader has understood what a file says about its columns, and asks for their data."""


class _Description:
    """A Parquet file that can be opened; later it gives no bytes any more."""

    closed = False

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self.open = raw, False
        self.seek, self.tell = raw.seek, raw.tell
        self.readable = self.seekable = lambda: True

    def read(self, count: int = -1) -> bytes:
        if self.open:
            raise _WithoutData
        return self._raw.read(count)

    def close(self) -> None:
        """Who opened the file closes it."""


def _check_columns(path: str) -> None:
    """Raise OSError or ArrowException for columns that a damaged file describes wrongly. The reader of
    pyarrow says so; its `RowGroupMetaData.column` would end this process (std::terminate)."""
    import pyarrow as pa
    import pyarrow.parquet

    with open(path, "rb") as raw:
        described = _Description(raw)
        with pyarrow.parquet.ParquetFile(pa.PythonFile(described, mode="r")) as file:
            described.open = True
            for group in range(file.metadata.num_row_groups):
                with suppress(_WithoutData):
                    next(file.iter_batches(batch_size=1, row_groups=[group]), None)


def _dense_columns(metadata: Any, unpacking: Unpacking) -> list[str]:
    """Columns whose values stand in the file once for many rows: read as they stand there, a few bytes of
    disk do not become gigabytes. Raises UserError for pages that unpack to too much."""
    dense = set()
    for group in range(metadata.num_row_groups):
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            unpacking.add(max(0, column.total_uncompressed_size))
            if column.has_dictionary_page:
                repeats = column.total_uncompressed_size * _ROWS > UNPACKED.limit
                small = column.total_uncompressed_size > _DENSE * column.total_compressed_size
                values = column.data_page_offset - (column.dictionary_page_offset or 0)
                if repeats and (small or values > _MOST_VALUES):
                    dense.add(column.path_in_schema)
    return sorted(dense)


def _arrow(chunk: Chunk) -> Iterator[Record]:
    """An Arrow IPC file; `datasets` writes the streaming form, others the form with a footer."""
    import pyarrow as pa

    try:
        with pa.memory_map(chunk.file.path) as memory:
            with_footer = memory.read(6) == b"ARROW1"
            memory.seek(0)
            if with_footer:
                reader = pa.ipc.open_file(memory)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = iter(pa.ipc.open_stream(memory))
            yield from _rows(_validated(batches), chunk.file)
    except (pa.ArrowException, ValueError, NotImplementedError) as error:
        raise damaged(chunk.file, error) from error


def _validated(batches: Iterator) -> Iterator:
    """Arrow trusts the offsets in a file; a wrong one would read foreign memory."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _rows(batches: Iterator, file: DataFile) -> Iterator[Record]:
    """All rows, converted so many at a time as are not too large, and counted."""
    unpacking, row = Unpacking(file), 1
    for batch in batches:
        unpacking.add(batch.nbytes + _ROW * batch.num_rows)
        dense = any("dictionary<" in str(kind) for kind in batch.schema.types)
        step = 1 if dense else _ROWS
        for start in range(0, batch.num_rows, step):
            for value in _values(batch.slice(start, step)):
                if dense:
                    unpacking.add(_size(value))
                yield row, value
                row += 1


def _values(batch: Any) -> list[dict]:
    """A batch's rows. What Python can't hold, such as a time after the year 9999, is no text in its record
    and no fault of the others."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        columns = [[_value(item) for item in column] for column in batch.columns]
        return [
            dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)
        ]


def _value(item: Any) -> Any:
    try:
        return item.as_py()
    except (ValueError, OverflowError):
        return b""


def _size(value: Any) -> int:
    """Bytes of a row's texts, and of its items."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, (dict, list)):
        return 8 + sum(map(_size, value.values() if isinstance(value, dict) else value))
    return 8
