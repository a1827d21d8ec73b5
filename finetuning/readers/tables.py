"""Rows of a table (CSV, Excel, Word, Markdown) become records by the names of its header."""

import csv
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from finetuning.common.bounds import COLUMNS, RECORD
from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.readers.files import DataFile
from finetuning.readers.names import NAMELESS, is_record
from finetuning.readers.opening import Chunk, text_stream
from finetuning.readers.sample import BrokenSample, Remark

Row = tuple[int, list[Any]]
"""(line, cells)"""
_HEADER_WITHIN = 10  # rows: above a header a sheet may have a title and notes


def table_records(
    rows: Iterable[Row], file: DataFile
) -> Iterator[tuple[int, Any] | BrokenSample | Remark]:
    """(line, record) of every row below the header that holds something.

    The header is the first row that names a question and an answer, or what `--columns` names; rows above
    it are told. Raises UserError where two columns have one name.
    """
    rows = ((line, cells) for line, cells in rows if any(map(_filled, cells)))
    first = list(itertools.islice(rows, _HEADER_WITHIN))
    at = _header(first, file)
    if at is None:
        return
    for line, cells in first[:at]:
        text = clean_line(" ".join(str(cell) for cell in cells if _filled(cell)), 40)
        yield Remark(file.source, line, f"“{text}” stands above the header and is not used")
    line, header = first[at]
    if len(header) > COLUMNS.limit:
        place = f"{clean_line(file.source, 200)}:{line}"
        raise UserError(f"{place}: {len(header):,} columns, more than {COLUMNS}; split the table")
    names = _names(header, line, file)
    for line, cells in itertools.chain(first[at + 1 :], rows):
        if len(cells) > len(names) + COLUMNS.limit:
            yield BrokenSample(file.source, line, "more fields than the header has")
            continue
        filled = [i for i, cell in enumerate(cells) if _filled(cell)]
        if (
            file.kind != "csv"
        ):  # where a cell stands is certain there; in CSV it is a quote that is missing
            names += [_nameless(i) for i in range(len(names), len(cells))]
        if filled[-1] >= len(names):
            yield BrokenSample(file.source, line, "more fields than the header has")
            continue
        if cells == header:
            yield Remark(file.source, line, "the header stands here once more")
            continue
        pairs = itertools.zip_longest(names, cells[: len(names)])
        yield line, {name: cell for name, cell in pairs if name is not None}


def _filled(cell: Any) -> bool:
    return cell is not None and (not isinstance(cell, str) or bool(cell.strip()))


def _header(rows: list[Row], file: DataFile) -> int | None:
    """Which row is the header; the first where none says so, None in an empty table."""
    wanted = {column for _, column in file.columns}
    for at, (_, cells) in enumerate(rows):
        names = {str(cell).strip() for cell in cells if _filled(cell)}
        if (wanted and wanted <= names) or (not wanted and is_header(names)):
            return at
    return 0 if rows else None


def is_header(cells: Iterable[Any]) -> bool:
    """Whether cells name the parts of a record: names are short, and mean a question and an answer."""
    names = [str(cell).strip() for cell in cells if _filled(cell)]
    return all(len(name) <= 40 for name in names) and is_record(tuple(names))


def _names(cells: list[Any], line: int, file: DataFile) -> list[str | None]:
    """The columns' names. One without a name is called by its place, save the first: pandas writes its row
    numbers there."""
    names = [str(cell).strip() if _filled(cell) else "" for cell in cells]
    twice = sorted(name for name, count in Counter(names).items() if name and count > 1)
    if twice:
        shown = clean_line(twice[0], 40)
        raise UserError(
            f"{clean_line(file.source, 200)}:{line}: two columns are called {shown!r}; rename one"
        )
    return [name or (_nameless(i) if i else None) for i, name in enumerate(names)]


def _nameless(i: int) -> str:
    return f"column {i + 1}{NAMELESS}"


# ---- CSV ----------------------------------------------------------------------------------------


def csv_records(chunk: Chunk) -> Iterator[tuple[int, Any] | BrokenSample | Remark]:
    """Records of a CSV file; what separates its columns is seen from its first lines."""
    file = chunk.file
    csv.field_size_limit(RECORD.limit)
    with text_stream(file) as text:
        text = _lines(text, file)
        head = list(itertools.islice(text, _HEADER_WITHIN))
        mark, skipped = _separator(file, head)
        lines = itertools.chain(head[skipped:], text)
        # A quote behind a blank is one as well: as text, its cell would end at the first comma inside.
        rows = csv.reader(lines, delimiter=mark, skipinitialspace=True, strict=True)
        yield from table_records(_rows(rows, file, skipped), file)


def _lines(text: TextIO, file: DataFile) -> Iterator[str]:
    most = RECORD.limit
    for number, line in enumerate(iter(functools.partial(text.readline, most + 1), ""), 1):
        if len(line) > most:
            place = f"{clean_line(file.source, 200)}:{number}"
            raise UserError(f"{place}: a line longer than {RECORD}; split it")
        yield line


def _rows(reader: Any, file: DataFile, skipped: int) -> Iterator[Row]:
    line = 1 + skipped
    try:
        for cells in reader:
            yield line, cells
            line = reader.line_num + 1 + skipped
    except csv.Error as error:
        place = f"{clean_line(file.source, 200)}:{line}"
        raise UserError(
            f"{place}: broken CSV: {clean_line(str(error), 100)}; mend the quotes there"
        ) from error


_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)


def _separator(file: DataFile, head: list[str]) -> tuple[str, int]:
    """(separator, lines to skip): what Excel's `sep=` says; else, in the first line that has one, a comma,
    or a tab in a .tsv, or what Excel writes elsewhere."""
    if head and (said := _SEPARATOR_LINE.fullmatch(head[0])):
        return said[1], 1
    usual = "\t" if ".tsv" in file.path.lower()[-8:] else ","
    marks = (usual, *"\t;,|")
    for line in head:
        named = [
            m
            for m in marks
            if m in line and is_header(cell.strip(' "\r\n') for cell in line.split(m))
        ]
        if named:
            return named[0], 0
    first = next((line for line in head if any(mark in line for mark in marks[:4])), "")
    return next((mark for mark in marks[:4] if mark in first), usual), 0
