"""What F22 reads of binary formats: whole files, and a few bytes that unpack to hundreds of MB."""

import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import docx
import openpyxl
import pyarrow as pa
import pyarrow.parquet
import zstandard

from finetuning.common.bounds import DOCUMENT, UNPACKED

COLUMNS = ("question", "thinking", "answer")
Rows = Sequence[tuple[str, str, str]]


def parquet(rows: Rows) -> bytes:
    """A table of Parquet."""
    out = io.BytesIO()
    pyarrow.parquet.write_table(_table(rows), out)
    return out.getvalue()


def arrow(rows: Rows, form: Callable = pa.ipc.new_stream) -> bytes:
    """A table of Arrow, as a stream or a file."""
    out, table = io.BytesIO(), _table(rows)
    with form(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def excel(rows: Rows) -> bytes:
    """A workbook."""
    book, out = openpyxl.Workbook(), io.BytesIO()
    for row in (COLUMNS, *rows):
        book.active.append(row)
    book.save(out)
    return out.getvalue()


def word(rows: Rows) -> bytes:
    """A document of labelled paragraphs."""
    document, out = docx.Document(), io.BytesIO()
    for labelled in rows:
        for label, text in zip(("问", "思考", "答"), labelled, strict=True):
            document.add_paragraph(f"{label}：{text}")
    document.save(out)
    return out.getvalue()


def json_lines(rows: Rows) -> bytes:
    """What is packed by gzip and zstandard."""
    records = (dict(zip(COLUMNS, row, strict=True)) for row in rows)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _table(rows: Rows) -> pa.Table:
    return pa.table(dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True)))


def whole(rows: Rows) -> Mapping[str, bytes]:
    """A file of every binary kind by its name."""
    return {
        "a.parquet": parquet(rows),
        "a.arrow": arrow(rows),
        "b.arrow": arrow(rows, pa.ipc.new_file),
        "a.xlsx": excel(rows),
        "a.docx": word(rows),
        "a.jsonl.gz": gzip.compress(json_lines(rows)),
        "a.jsonl.zst": zstandard.compress(json_lines(rows)),
    }


def bombs(rows: Rows) -> Iterator[tuple[str, bytes]]:
    """Small files that unpack to more than what is allowed."""
    packed_mib, office_mib = UNPACKED.limit // 2**20 + 40, DOCUMENT.limit // 2**20 + 40
    yield "a.parquet", _repeated(value="长" * 2**19, rows=packed_mib)
    line = json_lines(rows)
    frames = zstandard.compress(line * (4 * 2**20 // len(line)), 3) * (packed_mib // 4)
    yield "a.jsonl.zst", frames
    yield "a.jsonl.gz", gzip.compress(line * (2**20 // len(line)), 9) * packed_mib
    sheet = "xl/worksheets/sheet1.xml"
    cells = (b"<worksheet><sheetData>", b"<row><c/></row>", b"</sheetData></worksheet>")
    yield "a.xlsx", _inflated(excel(rows), sheet, cells, office_mib)
    names = b'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    paragraphs = (b"<w:document " + names + b"><w:body>", b"<w:p/>", b"</w:body></w:document>")
    yield "a.docx", _inflated(word(rows), "word/document.xml", paragraphs, office_mib)


def _repeated(value: str, rows: int) -> bytes:
    """Parquet of one answer, held once, in so many rows."""
    answers = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    table = pa.table({"question": [f"问{i}" for i in range(rows)], "answer": answers})
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out, compression="zstd", store_schema=False)
    return out.getvalue()


def _inflated(archive: bytes, part: str, text: tuple[bytes, bytes, bytes], mib: int) -> bytes:
    """An Office file of which one part is a thing repeated: (before, the thing, after)."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for name in old.namelist():
            if name != part:
                new.writestr(name, old.read(name))
        before, thing, after = text
        with new.open(part, "w") as file:
            file.write(before)
            for _ in range(mib):
                file.write(thing * (2**20 // len(thing)))
            file.write(after)
    return out.getvalue()
