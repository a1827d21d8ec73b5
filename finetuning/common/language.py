"""What people read, in their language: English texts come in, Chinese ones go out where that is asked for.

The program is written in English. `docs/messages_zh.tsv` holds its texts and their translations, a pair a
line; `{}` stands for a value. A name within the braces says more of it: `{n1}` is a quantity, `{said}` are
words of another program, `{names}` are the user's, `{one}` is no list, `{word}` may be a single word of the
program; any other name is of a value that may be empty and stays within its sentence. A finished text finds
its line by what stands between the values, so it is translated where it is shown, and nobody else has to know
of languages. Values are looked up as well: they may be texts of the program. A single word is not, save for
`{word}` and `{one}`, nor is what stands in quotes: a folder may be called data. Texts side by side (`JOINTS`)
are looked up one by one.

A text comes out whole: its translation is used only where each value is translated as well or is no prose.
Else the text stays in English. Names of settings, tags and files stay as they are.
"""

import csv
import functools
import itertools
import locale
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = ("en", "zh")
FLAG = "--language"  # of every program
DOCS = Path(__file__).parents[2] / "docs"
FRAMES = ("warning: ", "error: ")  # before any text
JOINTS = {  # between texts that stand alone
    "; ": "；", ". ": "。", ": ": "：", "  ": "  ", ", ": "，", " or ": " 或 ", " and ": " 和 ",
}  # fmt: skip
AS_THEY_ARE = ("said", "names")  # values that nobody has to translate
MOST_READINGS = 32  # ways in which a line may be made of one text
MOST_CUTS = 8  # places of a joint that are tried one by one
PLACE = re.compile(r"\{(\w*)\}")  # of a value
CHINESE = re.compile("[\u4e00-\u9fff]")
# Bounded, as what is searched may be anybody's text.
QUOTED = re.compile(
    r"“[^”]{0,500}”|`[^`]{0,500}`|\"[^\"]{0,500}\"|(?<![A-Za-z])'[^']{0,500}'(?![A-Za-z])"
)
COMMANDS = (
    "uv", "hf", "iconv", "chmod", "modelscope", "nvidia-smi", "python", "ulimit", "ollama", "llama-server",
)  # fmt: skip
_END = "[^\\s，。；：（）“”]"  # what no Chinese sentence adds
NO_PROSE = re.compile(
    rf"{QUOTED.pattern}"
    rf"|\b(?:{'|'.join(COMMANDS)}) [^，。；（）“”]*"
    rf"|--[\w-]+(?: {_END}+)?"  # an option with its value
    rf"|{_END}{{0,200}}[/\\_=<>]{_END}*"  # a path, a setting, a tag
)
QUANTITY = re.compile(r"[-+~]?\d[\d.,:e+-]*(?: ?(?:%|°C|[A-Za-z]{1,3}(?:/s)?))?")  # with its unit
PROSE = re.compile("[A-Za-z][A-Za-z'’-]{1,40} [a-z][a-z'’-]+")
LOOSE = re.compile(r"(?<![\w.-])[A-Za-z]?[a-z]{2,}(?![\w.-])")  # a word that is no file's name
OPENING = ("“", "`", '"', "'")  # of a quotation
WITH_WORDS = ("word", "one")  # values that may be a single word of the program
_current = ["en"]  # of this process, as a locale is


def use(language: str) -> None:
    """Show texts in this language from now on: en, zh, or auto, which asks the locale of the environment."""
    asked = language in LANGUAGES
    _current[0] = language if asked else of_locale(os.environ, _system_locale())


def of_locale(environment: Mapping[str, str], system: str = "") -> str:
    """By the variables that say in which language messages are, in the order of GNU's gettext: LANGUAGE, a
    list, comes before the locale unless that is C. system: the locale where no variable is set."""
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    chosen = next((environment[name] for name in names if environment.get(name)), system)
    listed = environment.get("LANGUAGE", "").split(":")
    is_plain = re.split("[._@]", chosen)[0] in ("", "C", "POSIX")
    wanted = [chosen] if is_plain or listed == [""] else listed
    return next(filter(None, map(_language_of, wanted)), "en")


def _language_of(name: str) -> str:
    """Of zh_CN.UTF-8, or of Chinese (Simplified)_China, as Windows says it; empty for one of nobody here."""
    name = name.lower()
    return "zh" if name.startswith(("zh", "chinese")) else "en" if name.startswith("en") else ""


def _system_locale() -> str:
    try:
        return locale.getlocale()[0] or ""
    except ValueError:  # a name that Python does not know
        return ""


def current() -> str:
    """The language that was chosen."""
    return _current[0]


def translated(text: str) -> str:
    """The text in the chosen language, line by line."""
    if current() == "en" or not text:
        return text
    return "\n".join(in_chinese(line) for line in text.split("\n"))


def in_chinese(line: str) -> str:
    """A line in Chinese; as it is where there is no translation of the whole of it."""
    text = line.strip()
    for frame in FRAMES:
        if text.startswith(frame):
            message = next((m for m in _catalogue()[1] if m.text == f"{frame}{{}}"), None)
            return message.filled([in_chinese(text[len(frame) :])], [True]) if message else line
    whole = _whole(text)
    return line if whole is None else line.replace(text, whole)


def is_prose(text: str) -> bool:
    """Whether English words stand in it that a reader would have to understand."""
    return bool(PROSE.search(NO_PROSE.sub("|", text)))


def is_loose(text: str) -> bool:
    """Whether an English word stands in it that is no name."""
    return bool(LOOSE.search(NO_PROSE.sub("|", text)))


@functools.lru_cache(maxsize=4096)
def _whole(text: str, words: bool = True, begins: bool = True) -> str | None:
    """The translation of a text with all that is in it; None where there is none. words: a single word may be
    one of the program; begins: a line or a value begins with it."""
    exact, patterns = _catalogue()
    if text in exact:
        return exact[text].chinese if words or not _is_word(text) else None
    for message in patterns:
        for values in itertools.islice(message.readings(text), MOST_READINGS):
            told = list(map(_value, message.names, values, message.are_quoted))
            if None not in told:
                return message.filled(
                    told, [zh != value for zh, value in zip(told, values, strict=True)]
                )
    joined = (_joined(text, words, begins, joint) for joint in JOINTS)
    return next(filter(None, joined), None)


def _value(name: str, value: str, is_quoted: bool) -> str | None:
    """How a value is shown; None where it is prose without a translation."""
    if is_quoted or QUOTED.fullmatch(value):
        return value
    told = None if name == "names" else _whole(value, name.rstrip("12") in WITH_WORDS)
    return value if told is None and (name in AS_THEY_ARE or not is_prose(value)) else told


def _is_word(text: str) -> bool:
    return not re.search(r"\s", text)


def _joined(text: str, words: bool, begins: bool, joint: str) -> str | None:
    """Texts side by side, each whole: a word that stands loose is English, too. A word before the first colon
    may be the user's, as a path is of which something is said; before the next one it says what that is."""
    says = joint == ": "
    for first, *rest in _cut(text, joint):
        own = says and begins and _is_word(first)
        told = [None if own else _whole(first, words or says, begins)]
        told += [_whole(part, words, begins and not says) for part in rest]
        both = list(zip([first, *rest], told, strict=True))
        loose = (zh is None and is_loose(part) for part, zh in both[own:])
        if any(told) and not any(loose):
            return JOINTS[joint].join(part if zh is None else zh for part, zh in both)
    return None


def _cut(text: str, joint: str) -> Iterator[list[str]]:
    """In two at each place outside quotes; a long list, where that would take too long, at all of them."""
    hidden = QUOTED.sub(lambda quoted: "|" * len(quoted[0]), text)
    places = [found.span() for found in re.finditer(re.escape(joint), hidden)]
    if len(places) <= MOST_CUTS:
        yield from ([text[:start], text[end:]] for start, end in places)
        return
    bounds = itertools.pairwise([(0, 0), *places, (len(text), len(text))])
    yield [text[end:start] for (_, end), (start, _) in bounds]


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

    @functools.cached_property
    def are_quoted(self) -> tuple[bool, ...]:
        """Which of its values stand in quotes, and are somebody's."""
        return tuple(part.endswith(OPENING) for part in self.fixed[:-1])

    def readings(self, line: str) -> Iterator[list[str]]:
        """The values in a line, in every way in which it can be made of this text."""
        first, last = self.fixed[0], self.fixed[-1]
        inner = line[len(first) : len(line) - len(last)]
        if line == first + inner + last and all(part in inner for part in self.fixed[1:-1]):
            yield from self._readings(inner, 0)

    def _readings(self, rest: str, number: int) -> Iterator[list[str]]:
        """Of the values from this one on."""
        name, after = self.names[number], self.fixed[number + 1]
        if number == len(self.names) - 1:
            if _fits(name, rest):
                yield [rest]
            return
        place = rest.find(after)
        while place >= 0:
            if _fits(name, rest[:place]):
                for others in self._readings(rest[place + len(after) :], number + 1):
                    yield [rest[:place], *others]
            place = rest.find(after, place + 1)

    def filled(self, values: list[str], are_words: list[bool]) -> str:
        """The translation with these values: {} takes the next without name, {0} the first, {name} its.

        are_words: which of them are words of the program; between these and other Chinese stands no space.
        """
        told = list(zip(values, are_words, strict=True))
        named = list(zip(self.names, told, strict=True))
        rest, known = iter([value for name, value in named if not name]), dict(named)
        known |= {str(number): value for number, value in enumerate(told)}
        first, *others = PLACE.split(self.chinese)
        line = first
        for name, after in zip(others[::2], others[1::2], strict=True):
            value, is_word = known[name] if name else next(rest)
            if is_word and CHINESE.match(value) and re.search("[\u4e00-\u9fff] $", line):
                line = line[:-1]
            if is_word and CHINESE.match(value[-1:]) and re.match(" [\u4e00-\u9fff]", after):
                after = after[1:]
            line += value + after
        return line


def _fits(name: str, value: str) -> bool:
    """Whether it can be the value of such a place."""
    if re.fullmatch(r"n\d", name):
        return QUANTITY.fullmatch(value) is not None
    if name == "one":
        return "; " not in value
    if name in ("", *AS_THEY_ARE) or name.startswith("word"):
        return bool(value)
    return ". " not in value and value[:1] in ("", *" ,;:(")  # as a clause begins, no end of a word


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
    patterns.sort(key=lambda message: -len("".join(message.fixed)))
    return exact, patterns


@functools.cache
def meanings(name: str) -> dict[str, str]:
    """Chinese texts by tag (metrics_zh.tsv) or by setting (settings_zh.tsv)."""
    return dict(pairs(name))
