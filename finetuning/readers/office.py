"""Excel and Word files: sheets and tables to records, paragraphs to text. What they unpack to is bounded."""

import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from typing import Any

from finetuning.common.bounds import DOCUMENT, PARAGRAPHS, TAGS
from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.readers.files import DataFile
from finetuning.readers.names import meaning
from finetuning.readers.opening import BLOCK, Chunk
from finetuning.readers.sample import BrokenSample, Remark
from finetuning.readers.tables import Row, is_header, table_records

_MAX_CELLS = 256  # of a row that are looked at: a sheet may be said to be 16,384 wide
_TOP = 20  # rows within which a sheet has its header
_TOP_OF_TABLE = 5  # rows within which a table in Word has its header: a title may stand above
_MAX_EMPTY_ROWS = 10_000  # after which a sheet has ended: it may be said to be a million long


def _check_size(file: DataFile) -> None:
    """Refuse an archive that says it unpacks to more; `zipfile` holds each part to what it says."""
    shown = clean_line(file.source, 200)
    try:
        with zipfile.ZipFile(file.path) as archive:
            total = sum(part.file_size for part in archive.infolist())
            encrypted = any(part.flag_bits & 1 for part in archive.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        hint = (
            "if it asks for a password, save it without one; if it is of the old kind, save it anew"
        )
        raise UserError(f"{shown} is no Excel or Word file of today's kind ({hint})") from error
    if encrypted:
        raise UserError(f"{shown} is encrypted; save it without a password")
    if total > DOCUMENT.limit:
        raise UserError(
            f"{shown} unpacks to {total >> 20} MiB, more than {DOCUMENT}; split it, or save it as CSV"
        )


def _check_markup(file: DataFile) -> None:
    """Refuse a Word file whose tree would be many times as large as its text."""
    tags = paragraphs = 0
    with zipfile.ZipFile(file.path) as archive:
        for name in archive.namelist():
            if name.endswith(".xml"):
                with archive.open(name) as part:
                    while block := part.read(BLOCK):
                        tags += block.count(b"<")
                        paragraphs += (
                            block.count(b"<w:p>") + block.count(b"<w:p ") + block.count(b"<w:p/")
                        )
    if tags > TAGS.limit or paragraphs > PARAGRAPHS.limit:
        raise UserError(
            f"{clean_line(file.source, 200)} holds {tags:,} tags and {paragraphs:,} paragraphs, more than "
            f"{TAGS} or {PARAGRAPHS}; split it"
        )


# What the libraries raise for a file that is not what they expect; they have no error of their own for it.
_NOT_EXPECTED = (
    *(KeyError, ValueError, TypeError, AttributeError, IndexError, ArithmeticError, SyntaxError),
    *(NotImplementedError, AssertionError, EOFError, zlib.error, zipfile.BadZipFile),
)


@contextmanager
def _told(file: DataFile) -> Iterator[None]:
    """An error of a library within becomes one line that names the file."""
    try:
        yield
    except _NOT_EXPECTED as error:
        reason = clean_line(str(error), 100) or type(error).__name__
        shown = clean_line(file.source, 200)
        raise UserError(f"{shown} can't be read ({reason}); open it and save it anew") from error


# ---- Excel --------------------------------------------------------------------------------------


def excel_records(chunk: Chunk) -> Iterator[tuple[int, Any] | BrokenSample | Remark]:
    """Records of all sheets that have a header; the others are told. A line is a row of its sheet."""
    import openpyxl

    _check_size(chunk.file)
    with _told(chunk.file), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts that nobody reads
        book = openpyxl.load_workbook(chunk.file.path, read_only=True, data_only=True)
        sheets = [sheet for sheet in book.worksheets if hasattr(sheet, "iter_rows")]
    try:
        for sheet in sheets:
            yield from _sheet_records(sheet, chunk.file, several=len(sheets) > 1)
    finally:
        book.close()


def _sheet_records(sheet: Any, file: DataFile, several: bool) -> Iterator[Any]:
    name = clean_line(sheet.title, 40)
    rows = list(_top(sheet, file))
    wanted = {column for _, column in file.columns}
    has_header = any(
        is_header(c) or (wanted and wanted <= {str(x).strip() for x in c}) for _, c in rows
    )
    if several and not has_header:
        if rows:
            yield Remark(
                file.source,
                1,
                f"sheet “{name}” has no header with a question and an answer; it is not read",
            )
        return
    if several and sheet.sheet_state != "visible":
        yield Remark(file.source, 1, f"sheet “{name}” is hidden; it is read")
    for item in table_records(_rows(sheet, file), file):
        if several and isinstance(item, BrokenSample):
            item = BrokenSample(item.source, item.line, f"sheet “{name}”: {item.reason}")
        yield item


def _top(sheet: Any, file: DataFile) -> Iterator[Row]:
    for row in _rows(sheet, file):
        if row[0] > _TOP:
            return
        yield row


def _rows(sheet: Any, file: DataFile) -> Iterator[Row]:
    """The rows that hold something, cells as text."""
    empty, line = 0, 0
    with _told(file):
        values = sheet.iter_rows(values_only=True, max_col=_MAX_CELLS)
    while empty <= _MAX_EMPTY_ROWS:
        with _told(file):
            cells = next(values, None)
            texts = [_cell(value) for value in cells] if cells is not None else []
        if cells is None:
            return
        line += 1
        while texts and texts[-1] is None:
            texts.pop()
        if texts:
            yield line, texts
        empty = 0 if texts else empty + 1


def _cell(value: Any) -> Any:
    """A cell as text: a number as it is shown, without the .0 of a float; a date in ISO form."""
    if value is None or isinstance(value, bool):
        return value if value is None else str(value).upper()
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, (datetime, date, time)):
        return value.isoformat(" ") if isinstance(value, datetime) else value.isoformat()
    text = (
        str(value).replace("_x000D_", "").replace("_x000d_", "")
    )  # how Excel writes a carriage return
    return text if text.strip() else None


# ---- Word ---------------------------------------------------------------------------------------


def word_text(file: DataFile) -> tuple[str, list[list[Row]]]:
    """(text with headings as in Markdown, tables that have a header of a question and an answer).

    Other tables stand in the text, their cells separated by ` | `. A line of the text is a paragraph.
    """
    import docx

    _check_size(file)
    lines, tables = [], []
    with _told(file):
        _check_markup(file)
        for part in docx.Document(file.path).iter_inner_content():
            if not hasattr(part, "rows"):
                lines.append(_paragraph(part))
                continue
            rows = [(i, [cell.text for cell in row.cells]) for i, row in enumerate(part.rows, 1)]
            if any(is_header(cells) for _, cells in rows[:_TOP_OF_TABLE]):
                tables.append(rows)
            else:
                lines += [_labelled_row(cells) for _, cells in rows]
    return "\n".join(lines), tables


def _labelled_row(cells: list[str]) -> str:
    """A row of a table without a header as a line of text: a label beside its text, or cells side by side."""
    if len(cells) == 2 and meaning(cells[0].rstrip(":： ")):
        return f"{cells[0].rstrip(':： ')}：{cells[1]}"
    return " | ".join(cells)


def _paragraph(paragraph: Any) -> str:
    """A paragraph's text; a heading, or a numbered line that asks, is marked as in Markdown."""
    text = paragraph.text
    style = paragraph.style.name if paragraph.style is not None else ""
    if not text.strip():
        return ""
    level = style.removeprefix("Heading ") if style.startswith("Heading ") else ""
    if level.isdigit():
        return f"{'#' * min(int(level), 6)} {text}"
    properties = paragraph._p.pPr
    numbered = properties is not None and properties.numPr is not None
    numbered = numbered or style.startswith(("List Number", "List Paragraph"))
    asks = text.rstrip().endswith(("?", "？"))
    if numbered and asks:
        return f"### {text}"
    runs = [run for run in paragraph.runs if run.text.strip()]
    if asks and runs and all(run.bold for run in runs) and not text.lstrip().startswith("**"):
        return f"**{text.strip()}**"
    return text
