"""Bytes to records: JSON Lines, JSON, CSV, Parquet and Arrow, compressed or not."""

import codecs
import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.readers.files import COMPRESSIONS, MAX_RECORD, DataFile
from finetuning.readers.sample import BrokenSample, Remark

CHUNK = 16 * 2**20
"""Bytes of a JSONL file that one worker reads at a time."""

_BLOCK = 2**20
_HEAD = 1000  # bytes that tell the encoding

Record = tuple[int, Any]


@dataclass(frozen=True)
class Chunk:
    """A part of a file that can be read on its own: whole lines of JSONL, else the whole file."""

    file: DataFile
    start: int = 0
    stop: int | None = None
    """Byte range [start, stop) of a plain JSONL file."""
    first_line: int = 1


# ---- splitting and hashing --------------------------------------------------------------------


def split_file(file: DataFile, seen: Callable[[int], None]) -> tuple[list[Chunk], str]:
    """(chunks in order, content hash) in one pass; `seen` gets the size of every block read."""
    digest = hashlib.blake2b(digest_size=16)
    splittable = file.kind == "jsonl" and not file.path.lower().endswith(COMPRESSIONS)
    chunks, position, line = [Chunk(file)], 0, 1
    with _opened(file) as raw:
        while block := raw.read(_BLOCK):
            if position == 0 and _utf_bom(block) not in (None, codecs.BOM_UTF8):
                splittable = False
            digest.update(block)
            seen(len(block))
            newline = block.rfind(b"\n")
            if splittable and newline >= 0 and position + newline + 1 - chunks[-1].start >= CHUNK:
                boundary = position + newline + 1
                last = chunks[-1]
                chunks[-1] = Chunk(file, last.start, boundary, last.first_line)
                chunks.append(Chunk(file, boundary, None, line + block.count(b"\n")))
            line += block.count(b"\n")
            position += len(block)
    return chunks, digest.hexdigest()


# ---- opening ----------------------------------------------------------------------------------

# UTF-32 first, since its little-endian mark begins with that of UTF-16.
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip


def _utf_bom(head: bytes) -> bytes | None:
    return next((bom for bom in _BOMS if head.startswith(bom)), None)


def _opened(file: DataFile) -> BinaryIO:
    try:
        return open(file.path, "rb")
    except OSError as error:
        raise UserError(f"can't open {clean_line(file.source, 200)}: {error.strerror}") from error


def _stream(file: DataFile) -> io.BufferedReader:
    """The file's bytes, decompressed on the way."""
    raw = _opened(file)
    if file.path.lower().endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if file.path.lower().endswith(".zst"):
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        reader = decompressor.stream_reader(raw, read_across_frames=True, closefd=True)
        return io.BufferedReader(reader, _BLOCK)
    return raw


def _encoding(stream: io.BufferedReader, file: DataFile) -> str:
    """What the file's first bytes say; UserError for the NUL bytes of UTF-16 without its mark."""
    head = stream.peek(_HEAD)[:_HEAD]
    if _utf_bom(head) is None and head.count(0) > max(1, len(head) // 100):
        stream.close()
        raise UserError(
            f"{clean_line(file.source, 200)} begins with NUL bytes, as UTF-16 without a byte order mark "
            "does; convert it, for example with: iconv -f UTF-16LE -t UTF-8 (or UTF-16BE)"
        )
    return _BOMS.get(_utf_bom(head), "utf-8")


def _text_stream(file: DataFile) -> io.TextIOWrapper:
    """The file's text: UTF-8, or what its byte order mark says; line ends as they are."""
    stream = _stream(file)
    return io.TextIOWrapper(stream, encoding=_encoding(stream, file), newline="")


def _archive_errors() -> tuple[type[Exception], ...]:
    """What reading can raise on a damaged disk or archive."""
    zstandard = sys.modules.get("zstandard")
    return (OSError, EOFError, zlib.error, *([zstandard.ZstdError] if zstandard else []))


def _encoding_error(file: DataFile) -> UserError:
    """Where the first byte is that the file's encoding doesn't allow; reads the file once more."""
    with _text_stream(file) as text:
        encoding, stream = text.encoding, text.buffer
        decoder = codecs.getincrementaldecoder(encoding)()
        offset, line = 0, 1
        while True:
            block = stream.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                line += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                good = block[: max(0, error.start - pending)].decode(encoding, "ignore")
                place = f"{clean_line(file.source, 200)}:{line + good.count(chr(10))}"
                byte = error.object[error.start : error.start + 1].hex()
                at = offset - pending + error.start
                return UserError(
                    f"{place}: byte 0x{byte} at offset {at} is not {encoding.upper()}; convert the "
                    "file, for example with: iconv -f GB18030 -t UTF-8"
                )
            if not block:
                return UserError(f"{clean_line(file.source, 200)}: not {encoding.upper()}")
            offset += len(block)


def read_text(file: DataFile) -> str:
    """The whole text of a file."""
    try:
        with _text_stream(file) as text:
            return text.read()
    except UnicodeDecodeError:
        raise _encoding_error(file) from None
    except _archive_errors() as error:
        raise _damaged(file, error) from error


# ---- records ----------------------------------------------------------------------------------


def read_records(chunk: Chunk) -> Iterator[Record | BrokenSample | Remark]:
    """(line, value) of every record in a chunk of a JSON, JSONL, CSV, Parquet or Arrow file."""
    readers = {"json": _json, "jsonl": _jsonl, "csv": _csv, "parquet": _parquet, "arrow": _arrow}
    try:
        yield from readers[chunk.file.kind](chunk)
    except UnicodeDecodeError:
        raise _encoding_error(chunk.file) from None
    except _archive_errors() as error:
        raise _damaged(chunk.file, error) from error


def _damaged(file: DataFile, error: Exception) -> UserError:
    reason = clean_line(str(error), 200) or type(error).__name__
    return UserError(f"{clean_line(file.source, 200)} can't be read to its end: {reason}")


class _Decoder:
    """JSON as its standard has it. What Python's reader lets pass is collected in `faults`."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._decoder = json.JSONDecoder(
            parse_constant=self._constant,
            parse_int=self._integer,
            parse_float=self._float,
            object_pairs_hook=self._object,
        )

    def _constant(self, name: str) -> None:
        self.faults.append(f"{name} is not JSON")

    def _integer(self, digits: str) -> int:
        if len(digits) > 400:
            self.faults.append(f"an integer of {len(digits)} digits")
            return 0
        return int(digits)

    def _float(self, digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            self.faults.append("a number too large for a float")
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self.faults.append(f"duplicate key {clean_line(twice, 40)!r}")
        return value

    def decode_at(self, text: str, position: int) -> tuple[Any, int]:
        """(value, end); raises json.JSONDecodeError or RecursionError."""
        self.faults.clear()
        return self._decoder.raw_decode(text, position)


_SPACE = re.compile(r"[ \t\n\r]*")


def _skip_space(text: str, position: int = 0) -> int:
    return _SPACE.match(text, position).end()


def _jsonl(chunk: Chunk) -> Iterator[Record | BrokenSample]:
    """One JSON value per line. A line ends at \\n alone: U+2028 and its kin are content."""
    decoder, source = _Decoder(), chunk.file.source
    for line, raw, at in _raw_lines(chunk):
        if raw is None:
            yield BrokenSample(source, line, f"line longer than {MAX_RECORD >> 20} MiB")
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{raw[error.start]:02x} at offset {at + error.start}"
            yield BrokenSample(source, line, f"{byte} is not UTF-8")
            continue
        if text.strip(" \t\r\n"):
            yield _json_line(decoder, text, source, line)


def _json_line(decoder: _Decoder, text: str, source: str, line: int) -> Record | BrokenSample:
    try:
        value, end = decoder.decode_at(text, _skip_space(text))
    except json.JSONDecodeError as error:
        reason = clean_line(error.msg, 80)
        return BrokenSample(source, line, f"broken JSON at column {error.pos + 1}: {reason}")
    except RecursionError:
        return BrokenSample(source, line, "JSON nested too deeply")
    if decoder.faults:
        return BrokenSample(source, line, decoder.faults[0])
    if _skip_space(text, end) < len(text):
        return BrokenSample(source, line, f"broken JSON at column {end + 1}: text after the value")
    return line, value


def _raw_lines(chunk: Chunk) -> Iterator[tuple[int, bytes | None, int]]:
    """(line number, bytes, byte offset) of each line; None for the bytes of one that is too long."""
    line, position = chunk.first_line, chunk.start
    with _utf8_stream(chunk.file) as stream:
        if position:
            stream.seek(position)
        while chunk.stop is None or position < chunk.stop:
            raw = stream.readline(MAX_RECORD + 1)
            if not raw:
                return
            too_long = len(raw) > MAX_RECORD
            mark = len(codecs.BOM_UTF8) if not position and raw.startswith(codecs.BOM_UTF8) else 0
            yield line, None if too_long else raw[mark:], position + mark
            position += len(raw)
            while too_long and raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_RECORD)
                position += len(raw)
            line += 1


def _utf8_stream(file: DataFile) -> BinaryIO:
    """The file's bytes as UTF-8: a file with a UTF-16 or UTF-32 mark is converted in memory."""
    stream = _stream(file)
    if _encoding(stream, file) in ("utf-8", "utf-8-sig"):
        return stream
    stream.close()
    return io.BytesIO(read_text(file).encode("utf-8", "surrogatepass"))


class _Window:
    """A text stream seen through a window that slides forward, with its line number."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream, self.text, self.position, self.line = stream, "", 0, 1

    def move_to(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def grow(self) -> bool:
        """Read on, as much again as is held ahead; False at the end of the stream."""
        ahead = self.text[self.position :]
        more = self._stream.read(max(_BLOCK, len(ahead)))
        self.text, self.position = ahead + more, 0
        return bool(more)

    def next_char(self) -> str:
        """The next character that is no white space, '' at the end."""
        while True:
            self.move_to(_skip_space(self.text, self.position))
            if self.position < len(self.text) or not self.grow():
                return self.text[self.position : self.position + 1]


def _json(chunk: Chunk) -> Iterator[Record | BrokenSample]:
    """A JSON array, element by element; an object with such an array; or JSON lines after all."""
    file = chunk.file
    with _text_stream(file) as stream:
        window = _Window(stream)
        first = window.next_char()
        if first == "[":
            yield from _json_array(window, file)
            return
        if not first:
            return
        line = window.line
        value, faults = _element(window, file)
        single = not window.next_char()
    if not single:
        yield from _jsonl(chunk)
    elif faults:
        yield BrokenSample(file.source, line, faults[0])
    else:
        yield from ((line, record) for record in _unwrapped(value))


def _unwrapped(value: Any) -> list:
    """The records of an object like {"data": [...]}; any other object is one record itself."""
    for key in ("data", "train", "samples", "examples", "rows", "records"):
        if isinstance(value, dict) and isinstance(value.get(key), list):
            return value[key]
    return [value]


def _json_array(window: _Window, file: DataFile) -> Iterator[Record | BrokenSample]:
    window.move_to(window.position + 1)
    separator = window.next_char()
    while separator != "]":
        window.next_char()
        line = window.line
        value, faults = _element(window, file)
        yield BrokenSample(file.source, line, faults[0]) if faults else (line, value)
        separator = window.next_char()
        if separator not in (",", "]") or not separator:
            raise _broken_json(file, window, "expected ',' or ']' after an element")
        if separator == ",":
            window.move_to(window.position + 1)
    window.move_to(window.position + 1)
    if window.next_char():
        raise _broken_json(file, window, "text after the array")


def _element(window: _Window, file: DataFile) -> tuple[Any, list[str]]:
    """Take the JSON value at the window's place, growing the window until it is complete."""
    decoder = _Decoder()
    while True:
        try:
            value, end = decoder.decode_at(window.text, window.position)
        except json.JSONDecodeError as error:
            ahead = error.pos - window.position
            if len(window.text) - window.position > MAX_RECORD or not window.grow():
                raise _broken_json(file, window, error.msg, window.position + ahead) from None
            continue
        except RecursionError:
            raise _broken_json(file, window, "nested too deeply") from None
        length = end - window.position
        if end == len(window.text) and window.grow():  # a number may go on
            continue
        window.move_to(window.position + length)
        return value, list(decoder.faults)


def _broken_json(
    file: DataFile, window: _Window, reason: str, position: int | None = None
) -> UserError:
    position = window.position if position is None else position
    line = window.line + window.text.count("\n", window.position, position)
    place = f"{clean_line(file.source, 200)}:{line}"
    return UserError(
        f"{place}: broken JSON: {clean_line(reason, 80)}; nothing behind this place can be read, "
        "so mend the file (or use JSONL, where a broken line costs one sample)"
    )


def _csv(chunk: Chunk) -> Iterator[Record | BrokenSample | Remark]:
    """Rows by the names of the header; empty ones, as Excel leaves them, are no records."""
    file, line = chunk.file, 1
    csv.field_size_limit(MAX_RECORD)
    with _text_stream(file) as text:
        header = text.readline()
        lines = itertools.chain([header], text)
        reader = csv.reader(lines, delimiter=_separator(file, header), strict=True)
        try:
            names = next(reader, [])
            _check_header(names, file)
            line = reader.line_num + 1
            for cells in reader:
                if any(map(str.strip, cells)):
                    yield from _csv_row(names, cells, file.source, line)
                line = reader.line_num + 1
        except csv.Error as error:
            place = f"{clean_line(file.source, 200)}:{line}"
            raise UserError(f"{place}: broken CSV: {clean_line(str(error), 100)}") from error


def _separator(file: DataFile, header: str) -> str:
    """A comma, or a tab in a .tsv; where the header has none, what it has: Excel writes others too."""
    usual = "\t" if ".tsv" in file.path.lower()[-8:] else ","
    return next((mark for mark in (usual, *"\t;,") if mark in header), usual)


def _check_header(names: list[str], file: DataFile) -> None:
    twice = sorted({name for name in names if name.strip() and names.count(name) > 1})
    if twice:
        shown = clean_line(twice[0], 40)
        raise UserError(f"{clean_line(file.source, 200)}:1: two columns are called {shown!r}")


def _csv_row(
    names: list[str], cells: list[str], source: str, line: int
) -> Iterator[Record | BrokenSample | Remark]:
    """A row that holds something. What has no name in the header is told, save the first column:
    pandas writes its row numbers there."""
    filled = [i for i, cell in enumerate(cells) if cell.strip()]
    if filled[-1] >= len(names):
        yield BrokenSample(source, line, "more fields than the header has")
        return
    for i in filled:
        if i and not names[i].strip():
            yield Remark(source, line, f"not used: column {i + 1}, which has no name in the header")
    pairs = itertools.zip_longest(names, cells[: len(names)])
    yield line, {name: cell for name, cell in pairs if name.strip()}


def _parquet(chunk: Chunk) -> Iterator[Record | BrokenSample]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(chunk.file.path) as file:
            yield from _rows(file.iter_batches(batch_size=1000))
    except (pa.ArrowException, ValueError, NotImplementedError) as error:
        raise _damaged(chunk.file, error) from error


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
        raise _damaged(chunk.file, error) from error


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
