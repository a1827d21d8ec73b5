"""`Fields`: the values of one record or turn by what they are for.

What is taken is noted, so that what nobody took can be told; no reader has to remember it.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from finetuning.common.bounds import COLUMNS
from finetuning.readers.names import layout
from finetuning.readers.sample import BrokenRecordError
from finetuning.readers.values import (
    is_absent,
    is_absent_word,
    is_no_switch,
    others,
    short_text,
    steps_text,
    text_of,
)


class Oddity(NamedTuple):
    """What is odd about a record; `{}` in its text stands for an example, which differs between records."""

    text: str
    example: str = ""

    def __str__(self) -> str:
        return self.text.replace("{}", self.example)


class Notes:
    """What is to be said of one record beside its sample."""

    def __init__(self) -> None:
        self.remarks: list[Oddity] = []
        self.left: dict[str, Any] = {}
        """Values that nobody took, by column, or by `turn: key`."""
        self.meant: set[str] = set()
        """Those of them whose name says that they are part of a sample."""

    def add(self, fields: "Fields", where: str = "") -> None:
        """What remains of a record or a turn once it is read."""
        if left := fields.left():
            self.left.update({f"{where}{name}": value for name, value in left.items()})
            self.meant.update(f"{where}{name}" for name in left if name in fields.layout.meant)
        self.remarks += fields.remarks


class Fields:
    """A record's values. Nothing is read but through `take` and `first`."""

    def __init__(self, record: Mapping[str, Any], chosen: tuple[tuple[str, str], ...] = ()) -> None:
        """chosen: (role, column) as the user rules it. Raises BrokenRecordError for too many columns."""
        self._values = record
        self._ruled = dict(chosen) if chosen else {}
        self._taken: set[str] = set()
        self._names = tuple(record)
        if len(self._names) > COLUMNS.limit:
            raise BrokenRecordError(f"{len(self._names):,} columns, more than {COLUMNS}")
        self._filled = {name: value for name, value in record.items() if not is_absent(value)}
        self.layout = layout(self._names, chosen)
        self.remarks: list[Oddity] = []
        self._beside: dict[str, Any] = {}  # what objects hold beside the text that was taken

    def remark(self, text: str, example: str = "") -> None:
        """Say what is odd about the record's values."""
        self.remarks.append(Oddity(text, example))

    def names(self) -> list[str]:
        """All columns."""
        return list(self._values)

    def has(self, role: str) -> bool:
        """Whether there is a column for a role, empty or not."""
        return bool(self.layout.of(role))

    def is_ruled(self, role: str) -> bool:
        """Whether the user said which column a role has."""
        return role in self._ruled

    def flags(self, flagged: Callable[[str], Any]) -> list[tuple[str, Any]]:
        """What the columns say that `flagged` picks by name, save those that the user rules."""
        names = self.layout.picked(flagged)
        if not names:
            return []
        ruled = self._ruled.values()
        return [
            (name, self._filled[name])
            for name in names
            if name in self._filled and name not in ruled and name not in self._taken
        ]

    def take(self, name: str) -> Any:
        """A column's value, which counts as used from now on; None where it is absent."""
        self._taken.add(name)
        return self._filled.get(name)

    def text(self, name: str) -> str:
        """Take a column that holds text, see `text_of`."""
        return text_of(self.take(name), name, self._beside)

    def short(self, name: str) -> str:
        """Take a column that holds an option: a text or a number."""
        value = self._filled.get(name)
        is_short = isinstance(value, (str, int, float))
        return short_text(self.take(name)) if is_short else self.text(name).strip()

    def leave(self, value: dict[str, Any], taken: Collection[str | None], name: str) -> None:
        """Note what an object in a column holds beside what was taken of it."""
        self._beside |= others(value, taken, name)

    def steps(self, name: str) -> str:
        """Take a column that holds a reasoning, see `steps_text`."""
        return steps_text(self.take(name), name, self._beside)

    def peek(self, name: str) -> Any:
        """A column's value, which does not count as used."""
        return self._values.get(name)

    def first(self, role: str, fits: Callable[[Any], bool] | None = None) -> str | None:
        """The likeliest column of a role that holds something fitting."""
        for name in self.layout.columns.get(role, ()):
            if name in self._filled and (fits is None or fits(self._filled[name])):
                return name
        return None

    def first_text(self, role: str) -> str | None:
        """The likeliest column of a role that holds text, or a list or object of it."""
        return self.first(role, is_no_switch)

    def first_of(self, names: tuple[str, ...]) -> str | None:
        """The first of these columns that holds something."""
        for name in names:
            if name in self._filled:
                return name
        return None

    def left(self) -> dict[str, Any]:
        """What nobody took; and a remark on words such as nan, which were read as no value."""
        if len(self._filled) < len(self._names):
            for name, value in self._values.items():
                if name not in self._filled and is_absent_word(value):
                    self.remark(f"“{value.strip()}” in {name} is read as no value")
        if self._taken.issuperset(self._filled):
            return self._beside
        left = {name: v for name, v in self._filled.items() if name not in self._taken}
        return left | self._beside
