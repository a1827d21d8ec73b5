"""A file's bytes and text: decompressed, in its encoding, in parts that can be read on their own."""

import codecs
import errno
import functools
import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from finetuning.common.bounds import EXPANSION, LINES, TEXT, UNPACKED
from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.readers.files import COMPRESSIONS, NOT_TEXT, DataFile

CHUNK = 16 * 2**20
"""Bytes of a JSONL file that one worker reads at a time."""
BLOCK = 2**20
SMALL = 2**16
"""Bytes of a file that is opened once: they are held until it has been read."""

_COUNTED = 8 * 2**20  # bytes of a compressed file that is unpacked once more to be counted
_HEAD = 1000  # bytes that tell the encoding
_LOOKED_AT = 16 * 2**20  # bytes by which an encoding is judged
_PUNCTUATION = frozenset("“”‘’—…·～、。《》〈〉「」『』【】（）：；，？！％＋－＝\u3000")
_COMMON = 0.7  # least share of everyday characters in a text of the right encoding


@dataclass(frozen=True)
class Chunk:
    """A part of a file that can be read on its own: whole lines of JSONL, else the whole file."""

    file: DataFile
    start: int = 0
    stop: int | None = None
    """Byte range [start, stop) of a plain JSONL file."""
    first_line: int = 1

    @property
    def size(self) -> int:
        """Bytes."""
        return (self.file.size if self.stop is None else self.stop) - self.start


def held(file: DataFile) -> DataFile:
    """The file with its bytes, where they are few."""
    if file.size > SMALL or file.kind in NOT_TEXT or file.content is not None:
        return file
    with _opened(file) as raw:
        content = raw.read(file.size + 1)
    return file._replace(content=content) if len(content) == file.size else file


def split_file(file: DataFile, seen: Callable[[int], None]) -> tuple[list[Chunk], str]:
    """(chunks in order, content hash) in one pass; `seen` gets the size of every block read."""
    digest = hashlib.blake2b(digest_size=16)
    if file.content is not None:
        digest.update(file.content)
        seen(file.size)
        return [Chunk(file._replace(content=None))], digest.hexdigest()
    utf8 = file.encoding in ("utf-8", "utf-8-sig")
    splittable = file.kind == "jsonl" and utf8 and not file.path.lower().endswith(COMPRESSIONS)
    chunks, position, line = [Chunk(file)], 0, 1
    with _opened(file) as raw:
        while block := raw.read(BLOCK):
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


# ---- bytes --------------------------------------------------------------------------------------


def _opened(file: DataFile) -> BinaryIO:
    if file.content is not None:
        return io.BytesIO(file.content)
    try:
        return open(file.path, "rb")
    except OSError as error:
        raise too_many_open(error) or UserError(
            f"can't open {clean_line(file.source, 200)}: {error.strerror}"
        ) from error


def byte_stream(file: DataFile) -> BinaryIO:
    """The file's bytes, decompressed on the way. Reading raises UserError where they become too many."""
    raw = _opened(file)
    if file.path.lower().endswith(".gz"):
        return io.BufferedReader(_Unpacked(gzip.GzipFile(fileobj=raw), file), BLOCK)
    if file.path.lower().endswith(".zst"):
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        reader = decompressor.stream_reader(raw, read_across_frames=True, closefd=True)
        return io.BufferedReader(_Unpacked(reader, file), BLOCK)
    return raw


class Unpacking:
    """How much a compressed file has given so far, and how much it may."""

    def __init__(self, file: DataFile) -> None:
        self._file, self._given = file, 0
        self._most = max(UNPACKED.limit, EXPANSION.limit * file.size)

    def add(self, count: int) -> None:
        """Count bytes. Raises UserError beyond the bound."""
        self._given += count
        if self._given > self._most:
            raise UserError(
                f"{clean_line(self._file.source, 200)} unpacks to more than {self._most >> 20} MiB, over "
                f"{EXPANSION} its size; if it is no attack, unpack it first"
            )


class _Unpacked(io.RawIOBase):
    """What a decompressor gives, counted."""

    def __init__(self, source: BinaryIO, file: DataFile) -> None:
        super().__init__()
        self._source, self._given = source, Unpacking(file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self._source.readinto(buffer)
        self._given.add(count)
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


def check_unpacked(file: DataFile) -> None:
    """Unpack a small compressed file once to count. Raises UserError where it gives too much: at once, and
    not when its first million records have been read."""
    if file.path.lower().endswith(COMPRESSIONS) and file.size <= _COUNTED:
        with byte_stream(file) as stream:
            while stream.read(BLOCK):
                pass


def too_many_open(error: OSError) -> UserError | None:
    """The error of a system that opens no more files, None for another one."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    return UserError("too many files are open (EMFILE); raise the limit, as by: ulimit -n 4096")


def archive_errors() -> tuple[type[Exception], ...]:
    """What reading can raise on a damaged disk or archive."""
    zstandard = sys.modules.get("zstandard")
    return (OSError, EOFError, zlib.error, *([zstandard.ZstdError] if zstandard else []))


def damaged(file: DataFile, error: Exception) -> UserError:
    """The error of a file that ends before its end."""
    reason = clean_line(str(error), 200) or type(error).__name__
    return UserError(f"{clean_line(file.source, 200)} can't be read to its end: {reason}")


# ---- encodings ----------------------------------------------------------------------------------

# UTF-32 first, since its little-endian mark begins with that of UTF-16.
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip


def with_encoding(file: DataFile) -> DataFile:
    """The file with its encoding: what its byte order mark says, UTF-8, or else what gives Chinese text.

    A file that is UTF-8 save for some lines stays UTF-8, so that those lines are named.
    """
    if file.kind in NOT_TEXT:
        return file
    try:
        with byte_stream(file) as stream:
            first = stream.read(BLOCK)
            head = first[:_HEAD]
            mark = next((bom for bom in _BOMS if head.startswith(bom)), None)
            if mark:
                return file._replace(encoding=_BOMS[mark])
            if head.count(0) > max(1, len(head) // 100):
                return file._replace(encoding=_utf16(file, head))
            if _is_utf8(first, stream):
                return file._replace(encoding="utf-8")
        with byte_stream(file) as stream:
            return file._replace(encoding=_chinese(stream) or "utf-8")
    except archive_errors() as error:
        raise damaged(file, error) from error


def _utf16(file: DataFile, head: bytes) -> str:
    """UTF-16 without its mark: the half of each character that is NUL in ASCII tells the order."""
    for encoding, nul in (("utf-16-le", head[1::2]), ("utf-16-be", head[::2])):
        with byte_stream(file) as stream:
            text = _decoded(stream, encoding)
        if text and nul.count(0) * 2 > head.count(0) and "\0" not in text[:_HEAD]:
            return encoding
    raise UserError(
        f"{clean_line(file.source, 200)} begins with NUL bytes and is no UTF-16 text; save it as UTF-8 text"
    )


def _is_utf8(first: bytes, stream: BinaryIO) -> bool:
    """Whether the first block that is not ASCII is UTF-8: Chinese text of another encoding never is. What
    is wrong further on is told by its place."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for i in range(_LOOKED_AT // BLOCK):
        block = stream.read(BLOCK) if i else first
        if not block.isascii():
            try:
                decoder.decode(block, final=len(block) < BLOCK)
            except UnicodeDecodeError:
                return False
            return True
    return True


def _decoded(stream: BinaryIO, encoding: str) -> str | None:
    """The first text of a stream, None where any of it is not in this encoding."""
    decoder, kept, length = codecs.getincrementaldecoder(encoding)(), [], 0
    try:
        while block := stream.read(BLOCK):
            text = decoder.decode(block)
            if length < _LOOKED_AT:
                kept.append(text)
            length += len(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return None
    return "".join(kept)


def _chinese(stream: BinaryIO) -> str:
    """gb18030 or cp950 (Big5) where the text reads as Chinese in it; '' where it does in neither, or
    where most lines that are not ASCII are UTF-8."""
    good = bad = 0
    data = stream.read(_LOOKED_AT)
    for line in data.split(b"\n"):
        if not line.isascii():
            try:
                line.decode("utf-8")
                good += 1
            except UnicodeDecodeError:
                bad += 1
    if good >= bad:
        return ""
    rest = stream.read(1)
    scores = {}
    for encoding in ("gb18030", "cp950"):
        whole = data[: data.rfind(b"\n") + 1] if rest else data
        text = _decoded(io.BytesIO(whole), encoding)
        if text is not None:
            scores[encoding] = _share_of_everyday(text)
    best = max(scores, key=lambda encoding: scores[encoding], default="")
    return best if best and scores[best] >= _COMMON else ""


@functools.cache
def _everyday() -> frozenset[str]:
    """The 3,755 everyday characters of GB 2312 and the 5,401 of Big5, which stand first in each."""
    simplified = (bytes([a, b]) for a in range(0xB0, 0xD8) for b in range(0xA1, 0xFF))
    traditional = (
        bytes([a, b]) for a in range(0xA4, 0xC7) for b in (*range(0x40, 0x7F), *range(0xA1, 0xFF))
    )
    found = [
        *(c.decode("gb2312", "ignore") for c in simplified),
        *(c.decode("big5", "ignore") for c in traditional),
    ]
    return frozenset(found)


def _share_of_everyday(text: str) -> float:
    """Share of everyday characters among the Chinese ones; of a text without any, whether all that is not
    ASCII is punctuation."""
    wide = {letter for letter in text if ord(letter) > 0x7F}
    letters = [c for c in text if c >= "\u2e80" and c not in _PUNCTUATION]
    if not letters:
        return float(bool(wide) and wide <= _PUNCTUATION)
    everyday = _everyday()
    return sum(letter in everyday for letter in letters) / len(letters)


# ---- text ---------------------------------------------------------------------------------------


def text_stream(file: DataFile) -> io.TextIOWrapper:
    """The file's text in its encoding; line ends as they are."""
    return io.TextIOWrapper(byte_stream(file), encoding=file.encoding or "utf-8", newline="")


def utf8_stream(file: DataFile) -> BinaryIO:
    """The file's bytes as UTF-8: another encoding is converted on the way."""
    if file.encoding in ("", "utf-8", "utf-8-sig"):
        return byte_stream(file)
    return io.BufferedReader(_Converted(text_stream(file)), BLOCK)


class _Converted(io.RawIOBase):
    """A text as the bytes of UTF-8."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        super().__init__()
        self._text, self._ahead = text, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        if not self._ahead:
            self._ahead = self._text.read(BLOCK).encode("utf-8", "surrogatepass")
        count = min(len(buffer), len(self._ahead))
        buffer[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        return count

    def close(self) -> None:
        self._text.close()
        super().close()


def read_text(file: DataFile) -> str:
    """The whole text of a file. Raises UserError where it is too long to be held."""
    packed = file.path.lower().endswith(COMPRESSIONS)
    try:
        if file.content is not None and not packed:
            return bounded_text(file.content.decode(file.encoding or "utf-8"), file)
        with text_stream(
            file
        ) as text:  # its size bounds a plain file, and reading it at once is faster
            whole = text.read(TEXT.limit + 1 if packed or file.size > TEXT.limit else -1)
    except UnicodeDecodeError:
        raise encoding_error(file) from None
    except archive_errors() as error:
        raise damaged(file, error) from error
    return bounded_text(whole, file)


def bounded_text(text: str, file: DataFile) -> str:
    """The text itself. Raises UserError where it is too long to be held line by line."""
    shown = clean_line(file.source, 200)
    if len(text) > TEXT.limit:
        raise UserError(f"{shown} holds more than {TEXT} of text; split it")
    if (lines := text.count("\n")) > LINES.limit:
        raise UserError(f"{shown} holds {lines:,} lines, more than {LINES}; split it")
    return text


def encoding_error(file: DataFile) -> UserError:
    """Where the first byte is that the file's encoding doesn't allow; reads the file once more."""
    with text_stream(file) as text:
        encoding, stream = text.encoding, text.buffer
        decoder = codecs.getincrementaldecoder(encoding)()
        offset, line = 0, 1
        while True:
            block = stream.read(BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                line += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                good = block[: max(0, error.start - pending)].decode(encoding, "ignore")
                place = f"{clean_line(file.source, 200)}:{line + good.count(chr(10))}"
                byte = error.object[error.start : error.start + 1].hex()
                at = offset - pending + error.start
                return UserError(
                    f"{place}: byte 0x{byte} at offset {at} is not {encoding.upper()}; save the file as UTF-8"
                )
            if not block:
                return UserError(f"{clean_line(file.source, 200)}: not {encoding.upper()}")
            offset += len(block)


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a text whose lines end in any of the usual ways."""
    yield from enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)
