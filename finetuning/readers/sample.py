"""`Sample`: one conversation, and what is said of records that are left out or odd."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetuning.common.bounds import DEPTH
from finetuning.common.errors import UserError
from finetuning.common.text import clean_line

# ---- reasoning inside a text ------------------------------------------------------------------
THINK_TAG = re.compile(r"<(/?)(think(?:ing)?)(?:\s+\w+=[^<>\n]{0,100})?\s*>", re.IGNORECASE)
WIDE_TAG = re.compile(r"＜[/／]?(?:think|THINK|Think)")
_SORTED = json.JSONEncoder(sort_keys=True)
_quoted = json.encoder.encode_basestring_ascii


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation, seen from its last assistant turn: what was asked, thought and answered."""

    question: str
    thinking: str
    answer: str
    system: str = ""
    source: str = ""
    """The file as the user named it, or folder/name below a folder."""
    line: int = 0
    """1-based line in a text file, row in Parquet and Arrow files."""
    history: tuple[dict, ...] = ()
    """Messages before the question: role, content, reasoning_content?, tool_calls?, name?."""
    tools: str = ""
    """The tools on offer as a JSON list."""
    difficulty: int | None = None
    """1 to 4 where the file states it."""
    tool_turns: tuple[dict, ...] = ()
    """Messages between the question and the final turn: tool calls and tool responses."""
    tool_calls: tuple[dict, ...] = ()
    """Tool calls of the final turn, whose answer may then be empty."""

    @property
    def content(self) -> tuple:
        """All that the model can see; where it was read from is left out."""
        return (
            self.question,
            self.thinking,
            self.answer,
            self.system,
            self.history,
            self.tools,
            self.tool_turns,
            self.tool_calls,
        )

    @property
    def id(self) -> str:
        """16 hexadecimal digits that depend on the content alone."""
        if self.history or self.tools or self.tool_turns or self.tool_calls:
            text = _SORTED.encode(self.content)
        else:  # the same text, written at once
            texts = map(_quoted, (self.question, self.thinking, self.answer, self.system))
            text = f'[{", ".join(texts)}, [], "", [], []]'
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def messages(self) -> list[dict]:
        """The conversation as `tokenizer.apply_chat_template` takes it, the final turn last."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": self.question}
        final = {"role": "assistant", "content": self.answer}
        if self.thinking:
            final["reasoning_content"] = self.thinking
        if self.tool_calls:
            final["tool_calls"] = list(self.tool_calls)
        return [*system, *self.history, question, *self.tool_turns, final]


@dataclass(frozen=True, slots=True)
class BrokenSample:
    """A record that was left out, and why."""

    source: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Remark:
    """Something odd in the text around samples that were read all the same."""

    source: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.text}"


_NOTE = 2000  # characters; what a note tells is short, but what to do about it stands at its end


class Finding(NamedTuple):
    """Something that is wrong with a place in the data, or odd about it."""

    source: str
    line: int
    kind: str
    note: str

    def __str__(self) -> str:
        return f"{clean_line(self.source)}:{self.line}: {self.kind}: {clean_line(self.note, _NOTE)}"


class NothingLeftError(UserError):
    """No sample is left, of a file or of all; `findings` say why, place by place, for --check-data."""

    def __init__(self, message: str, findings: Iterable[Finding]) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class BrokenRecordError(ValueError):
    """Why a record can't become a sample; readers turn it into a `BrokenSample`."""


class LeftOutError(ValueError):
    """Why a whole record is not to be learnt from, as it says itself; readers tell how many there are."""


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking, rest) of a text that may open with one `<think>` or `<thinking>` block.

    Raises BrokenRecordError for an unclosed, nested, stray or second tag, or text before the block.
    """
    tags = list(THINK_TAG.finditer(text))
    if not tags:
        return "", text.strip()
    opening, closing = tags[0], tags[-1]
    if opening[1]:
        raise BrokenRecordError(f"stray {opening[0]} without an opening tag before it")
    if len(tags) == 1:
        raise BrokenRecordError(f"{opening[0]} is never closed")
    if not tags[1][1]:
        raise BrokenRecordError(f"{tags[1][0]} inside a {opening[0]} block")
    if len(tags) > 2:
        raise BrokenRecordError(f"stray {tags[2][0]} after the reasoning was closed")
    if opening[2].lower() != closing[2].lower():
        raise BrokenRecordError(f"{opening[0]} is closed by {closing[0]}")
    if text[: opening.start()].strip():
        raise BrokenRecordError(f"text before {opening[0]}")
    return text[opening.end() : closing.start()].strip(), text[closing.end() :].strip()


def checked(sample: Sample) -> Sample:
    """The sample itself if it can be learnt from and written as UTF-8."""
    if not sample.question:
        raise BrokenRecordError("empty question")
    if not sample.answer and not sample.tool_calls:
        raise BrokenRecordError("empty answer")
    nested = sample.history or sample.tools or sample.tool_turns or sample.tool_calls
    plain = (sample.question, sample.thinking, sample.answer, sample.system)
    text = "".join(strings_of(sample.content) if nested else plain)
    if "\0" in text:
        raise BrokenRecordError("NUL character (is the file UTF-16 without a byte order mark?)")
    try:
        text.encode()
    except UnicodeEncodeError:
        reason = "lone surrogate (half of a character, \\ud800 to \\udfff)"
        raise BrokenRecordError(reason) from None
    return sample


def strings_of(value: Any, depth: int = 0) -> Iterator[str]:
    """All strings of a nested value, keys included."""
    if isinstance(value, str):
        yield value
    elif depth > DEPTH.limit:
        raise BrokenRecordError(f"nested deeper than {DEPTH.limit} levels")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_of(key, depth)
            yield from strings_of(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_of(item, depth + 1)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise BrokenRecordError(f"{type(value).__name__} is no value of JSON")
