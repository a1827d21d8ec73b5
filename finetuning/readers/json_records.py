"""JSON to records: a value a line, an array, values one after another, or tables and wrappers of them."""

import codecs
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from finetuning.common.bounds import RECORD
from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.readers.files import DataFile
from finetuning.readers.names import is_record
from finetuning.readers.opening import BLOCK, Chunk, text_stream, utf8_stream
from finetuning.readers.sample import BrokenSample, Remark
from finetuning.readers.turns import are_turns
from finetuning.readers.values import is_text, kind

Record = tuple[int, Any]
_BLANK_LINES = 100  # at the beginning of a file
_SPLITS = ("train", "training")
_OTHER_SPLITS = ("test", "validation", "valid", "dev", "eval")


def with_layout(file: DataFile) -> DataFile:
    """A `.jsonl` whose values take several lines, or that is one array, is read as JSON is."""
    if file.kind != "jsonl":
        return file
    with text_stream(file) as stream:
        text = stream.readline(RECORD.limit)
        for _ in range(_BLANK_LINES):
            if text.strip() or len(text) >= RECORD.limit:
                break
            text = stream.readline(RECORD.limit)
        more = stream.readline(RECORD.limit).strip()
    text = text.strip()
    if not text.startswith(("{", "[")):
        return file
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        # A first line that breaks off where a value goes on; a line cut short is told as a broken line.
        goes_on = error.pos >= len(text) and text[-1] in "{[," and not more.startswith("{")
        return file._replace(kind="json") if goes_on else file
    except (RecursionError, ValueError):  # an integer of thousands of digits
        return file
    array = isinstance(value, list) and not more and not are_turns(value)
    return file._replace(kind="json") if array and not are_turns(value[:1]) else file


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
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            self.faults.append(f"duplicate key {clean_line(twice, 40)!r}")
        return value

    def decode_at(self, text: str, position: int) -> tuple[Any, int]:
        """(value, end); raises json.JSONDecodeError or RecursionError."""
        self.faults.clear()
        return self._decoder.raw_decode(text, position)


_SPACE = re.compile(r"[ \t\n\r]*")


def _skip_space(text: str, position: int = 0) -> int:
    return _SPACE.match(text, position).end()


def jsonl_records(chunk: Chunk) -> Iterator[Record | BrokenSample]:
    """One JSON value per line. A line ends at \\n alone: U+2028 and its kin are content."""
    decoder, source = _Decoder(), chunk.file.source
    for line, raw, at in _raw_lines(chunk):
        if raw is None:
            yield BrokenSample(source, line, f"line longer than {RECORD}")
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{raw[error.start]:02x} at offset {at + error.start}"
            yield BrokenSample(source, line, f"{byte} is not UTF-8")
            continue
        start = _skip_space(text)
        if start < len(text):
            yield _json_line(decoder, (text, start), source, line)


def _json_line(
    decoder: _Decoder, place: tuple[str, int], source: str, line: int
) -> Record | BrokenSample:
    text, start = place
    try:
        value, end = decoder.decode_at(text, start)
    except json.JSONDecodeError as error:
        reason = clean_line(error.msg, 80)
        if text.lstrip().startswith("{'"):
            reason = "these are Python's quotes; write the file with json.dumps"
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
    with utf8_stream(chunk.file) as stream:
        if position:
            stream.seek(position)
        while chunk.stop is None or position < chunk.stop:
            raw = stream.readline(RECORD.limit + 1)
            if not raw:
                return
            too_long = len(raw) > RECORD.limit
            mark = len(codecs.BOM_UTF8) if not position and raw.startswith(codecs.BOM_UTF8) else 0
            yield line, None if too_long else raw[mark:], position + mark
            position += len(raw)
            while too_long and raw and not raw.endswith(b"\n"):
                raw = stream.readline(RECORD.limit)
                position += len(raw)
            line += 1


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
        more = self._stream.read(max(BLOCK, len(ahead)))
        self.text, self.position = ahead + more, 0
        return bool(more)

    def next_char(self) -> str:
        """The next character that is no white space, '' at the end."""
        while True:
            self.move_to(_skip_space(self.text, self.position))
            if self.position < len(self.text) or not self.grow():
                return self.text[self.position : self.position + 1]


def json_records(chunk: Chunk) -> Iterator[Record | BrokenSample | Remark]:
    """Arrays, element by element, and other values, one after another; or JSON lines after all."""
    file, first = chunk.file, True
    with text_stream(file) as stream:
        window = _Window(stream)
        while char := window.next_char():
            if char == "[" and not _opens_conversation(window):
                yield from _json_array(window, file)
                first = False
                continue
            line = window.line
            try:
                value, faults = _element(window, file)
            except _TooLongError:
                if char != "{":
                    raise
                yield from _long_object(window, file)
                first = False
                continue
            on_one_line = window.line == line
            if first and on_one_line and window.next_char() in ("{", "[") and window.line > line:
                break  # where a broken line costs one sample
            first = False
            if faults:
                yield BrokenSample(file.source, line, faults[0])
            else:
                yield from _unwrapped(value, file, line)
        else:
            return
    yield from jsonl_records(chunk)


class _TooLongError(UserError):
    """A value that goes on beyond `RECORD.limit`."""


def _long_object(window: _Window, file: DataFile) -> Iterator[Record | BrokenSample]:
    """The records of a list in an object too large to be held, as in {"version": 1, "data": [...]}."""
    window.move_to(window.position + 1)
    while window.next_char() not in ("}", ""):
        _element(window, file)  # the name
        if window.next_char() != ":":
            raise _broken_json(file, window, "expected ':' after a name")
        window.move_to(window.position + 1)
        if window.next_char() == "[":
            yield from _array_elements(window, file)
        else:
            _element(window, file)
        if window.next_char() == ",":
            window.move_to(window.position + 1)
    window.move_to(window.position + 1)


def _opens_conversation(window: _Window) -> bool:
    """Whether an array begins with a turn, so that the whole of it is one conversation."""
    start = _skip_space(window.text, window.position + 1)
    if window.text[start : start + 1] != "{":
        return False
    try:
        value, _ = json.JSONDecoder().raw_decode(window.text, start)
    except (ValueError, RecursionError):
        return False
    return are_turns([value])


def _unwrapped(value: Any, file: DataFile, line: int) -> Iterator[Record | BrokenSample | Remark]:
    """The records of an object such as {"data": [...]}, of a table by columns, or the one that it is."""
    if isinstance(value, dict) and (rows := _by_columns(value)):
        yield from ((line, row) for row in rows)
        return
    if not isinstance(value, dict) or (is_record(map(str, value)) and not _is_table(value)):
        yield line, value
        return
    if _is_table(value):
        yield from (
            (line, dict(zip(value, row, strict=True))) for row in zip(*value.values(), strict=True)
        )
        return
    if all(isinstance(v, dict) for v in value.values()) and any(
        is_record(map(str, v)) for v in value.values()
    ):
        yield from (
            (line, record) for record in value.values()
        )  # as pandas writes them by their index
        return
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        names = [str(name) for name in value["columns"]]
        yield from (_row(names, row, file, line) for row in value["data"])
        return
    yield from _listed(value, file, line)


def _row(names: list[str], row: Any, file: DataFile, line: int) -> Record | BrokenSample:
    """A row of a table whose columns are named once."""
    if isinstance(row, list) and len(row) == len(names):
        return line, dict(zip(names, row, strict=True))
    has = f"{len(row)} values" if isinstance(row, list) else kind(row)
    return BrokenSample(file.source, line, f"a row of {has} below {len(names)} columns")


def _by_columns(value: dict) -> list[dict]:
    """The rows of a table as pandas writes it by columns: under each name an object, from the same row
    numbers to plain values; none for anything else."""
    columns = list(value.values())
    if len(columns) < 2 or not all(isinstance(column, dict) for column in columns):
        return []
    numbers = list(columns[0])
    same = all(list(column) == numbers for column in columns)
    numbered = bool(numbers) and all(str(number).isdigit() for number in numbers)
    if not (same and numbered and is_record(map(str, value))):
        return []
    return [{name: column[number] for name, column in value.items()} for number in numbers]


def _is_table(value: dict) -> bool:
    """Whether an object holds a column under each name, all of one length and of plain values."""
    lists = [v for v in value.values() if isinstance(v, list)]
    if not lists or len(lists) < len(value) or len(value) < 2 or not is_record(map(str, value)):
        return False
    plain = all(not isinstance(item, (dict, list)) for v in lists for item in v)
    return plain and len({len(v) for v in lists}) == 1


def _holds_record(value: Any) -> bool:
    """Whether a value is a record or a conversation, or an object that holds one."""
    if not isinstance(value, dict):
        return are_turns(value)
    inner = [item for item in value.values() if isinstance(item, dict)]
    return is_record(map(str, value)) or any(is_record(map(str, item)) for item in inner)


def _listed(value: dict, file: DataFile, line: int) -> Iterator[Record | Remark]:
    lists = {
        k: v
        for k, v in value.items()
        if isinstance(v, list) and v and isinstance(v[0], (dict, list))
    }
    held = {name for name, items in lists.items() if _holds_record(items[0])}
    lists = {name: items for name, items in lists.items() if name in held or not held}
    train = [name for name in lists if str(name).lower() in _SPLITS]
    others = [name for name in lists if str(name).lower() in _OTHER_SPLITS]
    for name in train or [name for name in lists if name not in others] or others:
        yield from ((line, record) for record in lists[name])
    empty = [name for name, items in value.items() if items == []]
    if not lists and empty and not any(isinstance(v, str) and is_text(v) for v in value.values()):
        text = f"{clean_line(str(empty[0]), 40)} is an empty list; no record is in it"
        yield Remark(file.source, line, text)
    elif not lists:
        yield line, value
    left = [name for name in others if train or len(lists) > len(others)]
    for name in left:
        text = f"{clean_line(str(name), 40)}: {len(lists[name])} records of this split are not trained on"
        yield Remark(file.source, line, text)


def _json_array(window: _Window, file: DataFile) -> Iterator[Record | BrokenSample]:
    yield from _array_elements(window, file)
    if window.next_char() not in ("", "[", "{"):
        raise _broken_json(file, window, "text after the array")


def _array_elements(window: _Window, file: DataFile) -> Iterator[Record | BrokenSample]:
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


def _element(window: _Window, file: DataFile) -> tuple[Any, list[str]]:
    """Take the JSON value at the window's place, growing the window until it is complete."""
    decoder = _Decoder()
    while True:
        try:
            value, end = decoder.decode_at(window.text, window.position)
        except json.JSONDecodeError as error:
            ahead = error.pos - window.position
            if len(window.text) - window.position > RECORD.limit:
                place = f"{clean_line(file.source, 200)}:{window.line}"
                raise _TooLongError(f"{place}: a value longer than {RECORD}; split it") from None
            if not window.grow():
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
