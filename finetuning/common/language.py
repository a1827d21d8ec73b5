"""What people read, in their language: English texts come in, Chinese ones go out where that is asked for.

The program is written in English. `docs/messages_zh.tsv` holds its texts and their translations, a pair a
line; `{}` stands for a value, and `{name}` for one within a sentence that may be empty. A finished text finds
its line by what stands between the values, so a text is translated where it is shown, and nobody else has to
know of languages. Names of settings, tags and files stay as they are, and so does a text without a line.
Values are looked up as well: they may be texts of the program.
"""

import csv
import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = ("en", "zh")
DOCS = Path(__file__).parents[2] / "docs"
DEEPEST = 6  # values within values
FRAMES = ("warning: {}", "error: {}")  # around any text, so they are taken off first
PLACE = re.compile(r"\{(\w*)\}")  # of a value
_current = ["en"]  # of this process, as a locale is


def use(language: str) -> None:
    """Show texts in this language from now on: en, zh, or auto, which asks the locale of the environment."""
    _current[0] = language if language in LANGUAGES else of_locale(os.environ)


def of_locale(environment: Mapping[str, str]) -> str:
    """By the first of the variables that say in which language messages are."""
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    locale = next((environment[name] for name in names if environment.get(name)), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def current() -> str:
    """The language that was chosen."""
    return _current[0]


def translated(text: str) -> str:
    """The text in the chosen language, line by line."""
    if current() == "en" or not text:
        return text
    return "\n".join(in_chinese(line) for line in text.split("\n"))


def in_chinese(line: str, depth: int = 0) -> str:
    """A line in Chinese; as it is where there is no translation of it."""
    found = find(line) if depth < DEEPEST else None
    if found is not None:
        message, values = found
        return message.filled([in_chinese(value, depth + 1) for value in values])
    parts = line.split("; ") if depth < DEEPEST else []
    told = [in_chinese(part, depth + 1) for part in parts]
    whole = len(parts) > 1 and all(a != b for a, b in zip(parts, told, strict=True))
    return "；".join(told) if whole else line  # half in one language, half in another is no text


@dataclass(frozen=True)
class Message:
    """A text of the program and its translation."""

    text: str
    chinese: str

    @functools.cached_property
    def fixed(self) -> tuple[str, ...]:
        """What stands around the values."""
        return tuple(PLACE.split(self.text)[::2])

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of its values, empty where one has none."""
        return tuple(PLACE.findall(self.text))

    def values(self, line: str) -> list[str] | None:
        """The values in a line that was made of this text; None where it was made of another one."""
        found = self._between(line)
        return found if found is None or all(map(_fits, self.names, found)) else None

    def _between(self, line: str) -> list[str] | None:
        first, *others = self.fixed
        if not line.startswith(first):
            return None
        if not others:
            return [] if line == first else None
        found, place = [], len(first)
        for part in others[:-1]:
            end = line.find(part, place)
            if end < 0:
                return None
            found.append(line[place:end])
            place = end + len(part)
        last = len(line) - len(others[-1])
        if last < place or not line.endswith(others[-1]):
            return None
        return [*found, line[place:last]]

    def filled(self, values: list[str]) -> str:
        """The translation with these values: {} takes the next, {0} the first, {name} that of this name."""
        rest, known = iter(values), dict(zip(self.names, values, strict=True))
        known |= {str(number): value for number, value in enumerate(values)}
        return PLACE.sub(lambda place: known[place[1]] if place[1] else next(rest), self.chinese)


def _fits(name: str, value: str) -> bool:
    """Whether it can be the value of such a place: one with a name stays within its sentence."""
    return ". " not in value if name else bool(value)


def find(line: str) -> tuple[Message, list[str]] | None:
    """The message that a line was made of, and its values: `FRAMES`, then those with most fixed text."""
    exact, patterns = _catalogue()
    if line in exact:
        return exact[line], []
    for message in patterns:
        values = message.values(line)
        if values is not None:
            return message, values
    return None


def pairs(name: str) -> Iterator[tuple[str, str]]:
    """The lines of a catalogue below docs/: a key and its Chinese text."""
    path = DOCS / name
    if not path.is_file():  # somebody has copied the program without its documents
        return
    with open(path, encoding="utf-8", newline="") as file:
        yield from csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


@functools.cache
def _catalogue() -> tuple[dict[str, Message], list[Message]]:
    messages = [Message(*pair) for pair in pairs("messages_zh.tsv")]
    exact = {message.text: message for message in messages if not message.names}
    patterns = [message for message in messages if message.names]
    patterns.sort(key=lambda message: (message.text not in FRAMES, -len("".join(message.fixed))))
    return exact, patterns


@functools.cache
def meanings(name: str) -> dict[str, str]:
    """Chinese texts by tag (metrics_zh.tsv) or by setting (settings_zh.tsv)."""
    return dict(pairs(name))
