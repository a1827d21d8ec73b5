"""A file's records, whatever its kind: which reader reads it, and those of Parquet and Arrow."""

from collections.abc import Iterator
from typing import Any

from finetuning.readers.files import DataFile
from finetuning.readers.json_records import json_records, jsonl_records, with_layout
from finetuning.readers.office import excel_records
from finetuning.readers.opening import (
    Chunk,
    archive_errors,
    damaged,
    encoding_error,
    held,
    with_encoding,
)
from finetuning.readers.sample import BrokenSample, Remark, Sample
from finetuning.readers.tables import csv_records
from finetuning.readers.texts import text_items

Record = tuple[int, Any]


def recognized(file: DataFile) -> DataFile:
    """The file with what is to be known before it is read in parts: its encoding, how its JSON stands."""
    file = with_encoding(held(file))
    try:
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


def _parquet(chunk: Chunk) -> Iterator[Record | BrokenSample]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(chunk.file.path) as file:
            yield from _rows(file.iter_batches(batch_size=1000))
    except (pa.ArrowException, ValueError, NotImplementedError) as error:
        raise damaged(chunk.file, error) from error


def _arrow(chunk: Chunk) -> Iterator[Record | BrokenSample]:
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
            yield from _rows(_validated(batches))
    except (pa.ArrowException, ValueError, NotImplementedError) as error:
        raise damaged(chunk.file, error) from error


def _validated(batches: Iterator) -> Iterator:
    """Arrow trusts the offsets in a file; a wrong one would read foreign memory."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _rows(batches: Iterator) -> Iterator[Record]:
    row = 1
    for batch in batches:
        for value in batch.to_pylist():
            yield row, value
            row += 1
