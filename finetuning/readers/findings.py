"""`Findings`: what is to be said of one file, counted. What is odd about one record is so about a million
like it, so each thing is told once a file, with the first place and how many there are."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from finetuning.common.bounds import DEPTH
from finetuning.common.text import clean_line
from finetuning.readers.fields import Oddity
from finetuning.readers.files import DataFile
from finetuning.readers.flags import may_refuse
from finetuning.readers.names import meaning
from finetuning.readers.records import Reading
from finetuning.readers.sample import BrokenSample, Remark, Sample, strings_of
from finetuning.readers.values import is_text, shown, width

_NAMED = 8  # columns that one remark names
_REASONING_WIDTH = 30  # of a text that may be a reasoning


@dataclass
class _Told:
    line: int
    example: str
    count: int = 1
    longest: int = 0


@dataclass
class Findings:
    """What one file's records have in common. Findings of a file's parts are merged in their order."""

    samples: int = 0
    thinking: int = 0
    """Samples that have a reasoning."""
    _told: dict[str, _Told] = field(default_factory=dict)
    _left: dict[str, _Told] = field(default_factory=dict)

    def note(self, line: int, text: str, example: str = "") -> None:
        """Something odd in a line; `{}` in its text stands for the example."""
        if known := self._told.get(text):
            known.count += 1
        else:
            self._told[text] = _Told(line, example)

    def notes(self, line: int, odd: Iterable[Oddity]) -> None:
        """All that is odd about one record."""
        for text, example in odd:
            self.note(line, text, example)

    def record(self, line: int, reading: Reading) -> None:
        """A record that was read: its oddities, and its values that nobody used."""
        self.sample(reading.sample)
        self.notes(line, reading.notes.remarks)
        self.notes(line, reading.oddities)
        held = None
        for name, value in reading.notes.left.items():
            if known := self._left.get(name):
                known.count += 1
                if isinstance(value, str) and len(value) > known.longest:
                    known.longest = len(value)
                continue
            meant = name in reading.notes.meant
            if not meant and isinstance(value, (int, float)) and not isinstance(value, bool):
                continue
            if not meant and may_refuse(name, value):
                self._left[name] = _Told(line, shown(value))
                continue
            texts = [text for text in _strings(value) if meant or is_text(text)]
            if texts:
                held = held or {text.strip() for text in strings_of(reading.sample.content)}
                texts = [text for text in texts if text.strip() not in held]
            if texts or (meant and not any(True for _ in _strings(value))):
                text = max(texts, key=lambda text: (is_text(text), len(text)), default=shown(value))
                self._left[name] = _Told(line, shown(text), longest=len(text))

    def sample(self, sample: Sample) -> None:
        """Count a sample."""
        self.samples += 1
        self.thinking += bool(sample.thinking)

    def merge(self, later: "Findings") -> None:
        """Add those of the next part of the same file."""
        self.samples += later.samples
        self.thinking += later.thinking
        for mine, theirs in ((self._told, later._told), (self._left, later._left)):
            for name, told in theirs.items():
                if known := mine.get(name):
                    known.count += told.count
                    known.longest = max(known.longest, told.longest)
                else:
                    mine[name] = told

    def remarks(self, file: DataFile) -> list[Remark]:
        """What is to be said of the file, by line."""
        source = file.source
        found = [
            Remark(source, told.line, self._text(text, told)) for text, told in self._told.items()
        ]
        if self._left:
            first = min(told.line for told in self._left.values())
            found.append(Remark(source, first, self._unused()))
        name = _ENCODINGS.get(file.encoding)
        encoding = [Remark(source, 1, f"read as {name}")] if name else []
        return [*sorted(found, key=lambda remark: remark.line), *encoding]

    def _text(self, text: str, told: _Told) -> str:
        text = text.replace("{}", clean_line(told.example, 60)) if told.example else text
        return f"{text} ({told.count} records, first here)" if told.count > 1 else text

    def _unused(self) -> str:
        """The columns that nobody used, the longest text first."""
        names = sorted(self._left, key=lambda name: (-self._left[name].longest, name))
        parts = [f"{clean_line(n, 60)} (“{self._left[n].example}”)" for n in names[:_NAMED]]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"not used: {', '.join(parts)}{more}; {self._advice(names)}"

    def _advice(self, names: list[str]) -> str:
        columns = [name for name in names if ": " not in name]
        if not columns:
            return "nothing reads these"
        personas = ("你是", "您是", "You are")
        persona = [name for name in columns if self._left[name].example.startswith(personas)]
        if persona:
            return f"--columns system {_quoted(persona[0])} makes it the system text"
        others = ("question", "answer", "chosen", "rejected")
        long = [
            n
            for n in columns
            if width(self._left[n].example) >= _REASONING_WIDTH
            and not ((meant := meaning(n)) and meant.role in others)
        ]
        if self.samples and not self.thinking and long:
            return (
                f"no reasoning was found: --columns thinking {_quoted(long[0])} reads it from there"
            )
        return "--columns FIELD NAME says what a column is for"


def _quoted(name: str) -> str:
    return f"'{name}'" if any(letter.isspace() for letter in name) else clean_line(name, 60)


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    """All texts in a value, whatever else is in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and depth < DEPTH.limit:
        for item in value.values():
            yield from _strings(item, depth + 1)
    elif isinstance(value, (list, tuple)) and depth < DEPTH.limit:
        for item in value:
            yield from _strings(item, depth + 1)


# ---- a whole file -------------------------------------------------------------------------------

_ENCODINGS = {
    "gb18030": "GB18030, since it is not UTF-8", "cp950": "Big5, since it is not UTF-8", "utf-16": "UTF-16",
    "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "utf-32": "UTF-32",
}  # fmt: skip
HINTS = {
    "markdown": "a question looks like “### Q1: …” or “问：…” with an answer “答：…” below",
    "text": "a question looks like “问：…” with an answer “答：…” below",
    "word": "a question looks like “问：…” with an answer “答：…” below, or is a row of a table",
}


def urgency(remark: Remark) -> int:
    """How soon a remark is to be seen: what is lost first, what is read all the same last."""
    lost = ("no reasoning was found", "left out", "not used")
    return next((i for i, text in enumerate(lost) if text in remark.text), len(lost))


def without_sample(file: DataFile, broken: list[BrokenSample], left_out: bool) -> str:
    """Why a file that gave no sample is refused, and what to do."""
    shown = clean_line(file.source, 200)
    if broken:
        return f"no sample can be read, {len(broken)} broken; the first: {broken[0]}{_column_hint(broken[0])}"
    if left_out:
        return f"{shown} holds no sample: all of its records say that they are not to be learnt"
    return f"{shown} holds no sample; {HINTS.get(file.kind, 'no record in it')}"


def _column_hint(broken: BrokenSample) -> str:
    role = next(
        (r for r in ("question", "answer") if f"no column for the {r}" in broken.reason), None
    )
    return f"; --columns {role} NAME says which column it is" if role else ""
