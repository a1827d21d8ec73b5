"""What one sample is, and how it is found in a Markdown text or in a record of JSON, Parquet or CSV.

Forms of records: Alpaca, ShareGPT, messages, prompt/completion, question/reasoning/answer. Markdown:

    ## 难度 2 对称密码            a section heading ends an answer; `难度 k` in it holds for the section
    ### Q1: 什么是分组密码？       `Q1` with an ASCII or full-width colon, or none
    难度: 3                       optional, for this question only
    <thinking>
    …
    </thinking>

    A1: …                         the marker may be missing after the thinking

`### q1`, `### 问题1` and `### 问1` are questions too where a reply follows, `a1`, `答案1` and `答1` markers.

White space around a question, a reasoning or an answer is not content and is dropped, as is a rule
(`---`) that closes an answer; nothing else is.
"""

import bisect
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safe_text import clean_line


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
        text = json.dumps(self.content, sort_keys=True)
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


class BrokenRecordError(ValueError):
    """Why a record can't become a sample; readers turn it into a `BrokenSample`."""


# ---- reasoning inside a text ------------------------------------------------------------------

_TAG = re.compile(r"<(/?)(think(?:ing)?)\s*>", re.IGNORECASE)
_WIDE_TAG = re.compile(r"＜[/／]?(?:think|THINK|Think)")


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking, rest) of a text that may open with one `<think>` or `<thinking>` block.

    Raises BrokenRecordError for an unclosed, nested, stray or second tag, or text before the block.
    """
    tags = list(_TAG.finditer(text))
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


# ---- Markdown ---------------------------------------------------------------------------------

# Found anywhere, since real files glue a heading to the end of the answer before it.
_QUESTION = re.compile(
    r"#{3,6}\s*(?:\*\*)?Q[ \t]*(\d+)(?:\*\*)?[ \t]*[:：.、]?(?:\*\*)?"
    r"|^#{1,2}[ \t]*(?:\*\*)?Q[ \t]*(\d+)(?:\*\*)?[ \t]*[:：](?:\*\*)?"
    r"|^#{1,6}[ \t]*(?:\*\*)?(?:q|问题?)[ \t]*(\d+)(?:\*\*)?(?:[ \t]*[:：.、](?:\*\*)?|\s|\Z)",
    re.MULTILINE,
)
_HEADING = re.compile(r"^#{1,2}(?:[ \t\u3000]+\S|[\u4e00-\u9fff]).*$", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})", re.MULTILINE)
_DIFFICULTY_LINE = re.compile(
    r"^[ \t]*[*_]*(?:难度|difficulty)[ \t]*[:：][ \t]*([1-4])[*_]*[ \t]*$", re.MULTILINE | re.I
)
_DIFFICULTY_HEADING = re.compile(r"难度[ \t]*[:：]?[ \t]*([1-4])(?!\d)")
_ANSWER = re.compile(r"^[ \t]*\**([Aa]|答案?)[ \t]*(\d*)\**[ \t]*[:：]\**", re.MULTILINE)
# What in an answer looks like another question or answer.
_STRANGER = re.compile(
    r"^(?:#{3,6}.*\n\s*\**(?:答案?|回答)\**[ \t]*[:：]"
    r"|#{3,6}[ \t]*(?:\*\*)?(?:[Qq]|问题?)[ \t]*[\d一二三四五六七八九十]"
    r"|#{3,6}[ \t]*(?:\*\*)?(?P<number>\d+)[ \t]*(?:[.、．:：)）]|$)"
    r"|\*\*[Qq][ \t]*\d|[ \t]*\**(?:A|答案?|回答)[ \t]*\d+\**[ \t]*[:：]).*$",
    re.MULTILINE,
)
_RULE = re.compile(r"\n[ \t]*(?:-{3,}|\*{3,}|_{3,})[ \t]*\Z")
_RESIDUE = re.compile(r"[\u4e00-\u9fff]{1,11}类")


def _same(number: str, other: str) -> bool:
    return bool(number) and number.lstrip("0") == other.lstrip("0")


def _rank(marker: re.Match, number: str) -> int:
    """0 for the question's own marker, 1 for another's or 答, 2 for a bare `A`, which may be an option
    of a multiple-choice question, 3 for an `a`, which marks nothing."""
    if _same(marker[2], number):
        return 0
    return {"a": 3, "A": 1 if marker[2] else 2}.get(marker[1], 1)


def _answer_marker(text: str, number: str) -> re.Match | None:
    markers = [marker for marker in _ANSWER.finditer(text) if _rank(marker, number) < 3]
    return min(markers, key=lambda marker: _rank(marker, number), default=None)


def _code_spans(text: str) -> list[tuple[int, int]]:
    """Spans of the code fences that are closed again."""
    spans, opening = [], None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]):
            spans.append((opening.start(), fence.end()))
            opening = None
    return spans


def _within(place: int, spans: list[tuple[int, int]]) -> bool:
    i = bisect.bisect(spans, place, key=lambda span: span[0])
    return i > 0 and place < spans[i - 1][1]


def _cut_at_heading(text: str) -> tuple[str, str]:
    """(answer, following section): a heading line ends an answer, save in a code fence."""
    spans = _code_spans(text)
    for heading in _HEADING.finditer(text):
        if not _within(heading.start(), spans):
            return text[: heading.start()], text[heading.start() :]
    return text, ""


def _cut_at_section(reply: str) -> tuple[str, str]:
    """(reply, following section): a heading inside the reasoning ends nothing, and tags behind the
    heading that ends the answer are not the answer's."""
    answer, section = _cut_at_heading(reply)
    if not _TAG.search(answer):
        return answer, section
    closing = next((tag for tag in _TAG.finditer(reply) if tag[1]), None)
    cut = closing.end() if closing else 0
    answer, section = _cut_at_heading(reply[cut:])
    return reply[:cut] + answer, section


def _question_and_reply(body: str, number: str) -> tuple[str, str]:
    """Cut after the question: at the thinking, at the answer marker, or else after the first line."""
    tag, marker = _TAG.search(body), _answer_marker(body, number)
    cuts = [match.start() for match in (tag, marker) if match]
    own = _cut_at_heading(body)[0]
    unmarked = "\n" in own.strip() and not (marker and _same(marker[2], number))
    if cuts and (min(cuts) < len(own) or not unmarked):
        return body[: min(cuts)], body[min(cuts) :]
    lead = len(body) - len(body.lstrip())
    end = body.find("\n", lead)
    return (body, "") if end < 0 else (body[:end], body[end:])


def _strip_marker(text: str, number: str) -> tuple[str, str | None]:
    """Take an answer marker off the start; also its number, '' where bare, None where missing."""
    text = text.strip()
    marker = _ANSWER.match(text)
    if not marker or _rank(marker, number) > 2:
        return text, None
    return text[marker.end() :].strip(), marker[2]


def _section_difficulty(text: str) -> int | None:
    headings = _HEADING.findall(text)
    stated = _DIFFICULTY_HEADING.search(headings[-1]) if headings else None
    return int(stated[1]) if stated else None


def _markdown_block(body: str, number: str) -> tuple[Sample, str, list[str]]:
    """One question with all that follows it: the sample, the next section's text, remarks."""
    question, reply = _question_and_reply(body, number)
    stated = _DIFFICULTY_LINE.search(question)
    question = _DIFFICULTY_LINE.sub("", question).strip()
    reply, marker = _strip_marker(reply, number)
    reply, section = _cut_at_section(reply)
    has_tags = _TAG.search(reply) is not None
    thinking, answer = split_thinking(_RULE.sub("", reply.rstrip()))
    if marker is None:
        answer, marker = _strip_marker(answer, number)
    remarks = []
    if marker is None:
        remarks.append(f"Q{number} has no answer marker A{number}:")
    elif marker and not _same(marker, number):
        remarks.append(f"Q{number} is answered by A{marker}")
    if has_tags and not thinking:
        remarks.append(f"Q{number} has an empty thinking block")
    if _RESIDUE.fullmatch(answer.rpartition("\n")[2].strip()):
        remarks.append(f"the answer to Q{number} ends with what looks like a section heading")
    difficulty = int(stated[1]) if stated else None
    sample = checked(Sample(question, thinking, answer, difficulty=difficulty))
    return sample, section, [*remarks, *(f"Q{number}: {text}" for text in _oddities(sample))]


def _number(heading: re.Match) -> str:
    return heading[1] or heading[2] or heading[3]


def _questions(text: str) -> list[re.Match]:
    """The headings of questions: every `Q`. One like `问题2` asks where a reply follows, unless it stands
    in a reasoning, in a code fence, or in the answer to a `Q` as a part that is counted anew."""
    tags = itertools.pairwise(_TAG.finditer(text))
    thoughts = [(tag.start(), end.end()) for tag, end in tags if not tag[1] and end[1]]
    hiding = (thoughts, _code_spans(text))
    sections = [m.start() for m in _HEADING.finditer(text) if not _hidden(m, hiding)]
    found: list[re.Match] = []
    for heading, following in itertools.pairwise([*_QUESTION.finditer(text), None]):
        if heading[3]:
            body = text[heading.end() : following.start() if following else len(text)]
            replied = _TAG.search(body) or _answer_marker(body, heading[3])
            part = bool(found) and _is_part(heading, found[-1], sections)
            if part or not replied or _hidden(heading, hiding):
                continue
        found.append(heading)
    return found


def _hidden(heading: re.Match, hiding: tuple[list[tuple[int, int]], ...]) -> bool:
    return any(_within(heading.start(), spans) for spans in hiding)


def _is_part(heading: re.Match, question: re.Match, sections: list[int]) -> bool:
    """Whether a heading like `问题1` stands in the answer to a `Q` and does not count on from it."""
    at, before = (bisect.bisect(sections, match.start()) for match in (heading, question))
    counts_on = float(heading[3]) > float(_number(question))  # int refuses thousands of digits
    return not question[3] and at == before and not counts_on


def _stranger(answer: str) -> re.Match | None:
    """The first line that looks like another question or answer; parts counted from 1 are its own."""
    spans = _code_spans(answer)
    lines = [m for m in _STRANGER.finditer(answer) if not _within(m.start(), spans)]
    numbers = [m["number"] for m in lines if m["number"]]
    if numbers and float(numbers[0]) <= 1:
        lines = [m for m in lines if not m["number"]]
    return next(iter(lines), None)


def markdown_samples(text: str, source: str) -> Iterator[Sample | BrokenSample | Remark]:
    """Every question of a Markdown text, whatever surrounds it. Lines count from 1."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    anchors = _questions(text)
    preamble = text[: anchors[0].start()] if anchors else ""
    difficulty = _section_difficulty(preamble)
    if stranger := _stranger(preamble):
        at = 1 + text.count("\n", 0, stranger.start())
        yield Remark(source, at, f"“{clean_line(stranger[0], 40)}” is not read as a question")
    line, counted = 1, 0
    for i, anchor in enumerate(anchors):
        line, counted = line + text.count("\n", counted, anchor.start()), anchor.start()
        number = _number(anchor)
        end = anchors[i + 1].start() if i + 1 < len(anchors) else len(text)
        body = text[anchor.end() : end]
        if anchor.start() and text[anchor.start() - 1] != "\n":
            yield Remark(
                source,
                line,
                f"the heading of Q{clean_line(number, 20)} is not on a line of its own",
            )
        try:
            sample, section, remarks = _markdown_block(body, number)
        except BrokenRecordError as error:
            yield BrokenSample(source, line, f"Q{clean_line(number, 20)}: {error}")
            section, remarks = _cut_at_heading(body)[1], []
        else:
            own = sample.difficulty or difficulty
            yield replace(sample, source=source, line=line, difficulty=own)
            if stranger := _stranger(sample.answer):
                below = body.count("\n", 0, body.find(sample.answer) + stranger.start())
                shown = clean_line(stranger[0], 40)
                told = f"“{shown}” is read as part of the answer to Q{clean_line(number, 20)}"
                yield Remark(source, line + below, told)
        for remark in remarks:
            yield Remark(source, line, clean_line(remark, 200))
        if section:
            difficulty = _section_difficulty(section)
            if _has_body(section):
                heading = clean_line(section.partition("\n")[0], 40)
                yield Remark(source, line, f"text under “{heading}” belongs to no question")


def _has_body(section: str) -> bool:
    rest = _HEADING.sub("", section)
    return bool(re.sub(r"^[ \t]*(?:[-*_][ \t]*){3,}$", "", rest, flags=re.MULTILINE).strip())


# ---- records ----------------------------------------------------------------------------------

QUESTION_KEYS = ("question", "instruction", "prompt", "query", "problem", "input")
ANSWER_KEYS = ("answer", "output", "response", "completion", "solution")
THINKING_KEYS = ("thinking", "reasoning", "reasoning_content", "think", "cot", "complex_cot")
# Beside a conversation, `reasoning` and `think` are as often a switch ("on") as a text.
_THINKING_BESIDE_TURNS = ("thinking", "reasoning_content", "cot", "complex_cot")
CONVERSATION_KEYS = ("messages", "conversations", "conversation")
_USED_KEYS = (
    *QUESTION_KEYS, *ANSWER_KEYS, *THINKING_KEYS, *CONVERSATION_KEYS, "system", "history",
)  # fmt: skip
SAMPLE_KEYS = (
    "question", "thinking", "answer", "system", "history", "tools", "difficulty", "messages",
)  # fmt: skip

MAX_DEPTH = 64
"""Levels of lists and objects within tools and tool calls; more is not data but an attack."""

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "call", "tool_call": "call",
    "tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool",
}  # fmt: skip


def record_sample(record: Any, columns: dict[str, str] | None = None) -> tuple[Sample, list[str]]:
    """A record of any known form as a sample, and what is odd about it; `columns` names the record's
    column for a field.

    Raises BrokenRecordError with the reason where that can't be done.
    """
    if not isinstance(record, dict):
        raise BrokenRecordError(f"a record must be an object, not {_kind(record)}")
    fields = _fields(record, columns or {})  # what is used is taken out, what is left is told
    key = _first(fields, CONVERSATION_KEYS)
    sample = _conversation(_parsed(fields.pop(key), key), fields) if key else _pair(fields)
    sample = checked(replace(sample, tools=_tools(fields), difficulty=_difficulty(fields)))
    return sample, [*_left_unused(fields, sample), *_oddities(sample)]


def _fields(record: dict, columns: dict[str, str]) -> dict:
    """The record's values by field where `columns` names one, the others by their names."""
    missing = [column for column in columns.values() if column not in record]
    if missing:
        names = clean_line(", ".join(map(str, record)), 200)
        raise BrokenRecordError(f"no column {clean_line(missing[0], 60)!r}; there is: {names}")
    taken = {*columns.values()}
    fields = {str(key).strip().lower(): v for key, v in record.items() if key not in taken}
    if "messages" not in columns and ("question" in columns or "answer" in columns):
        fields = {key: v for key, v in fields.items() if key not in CONVERSATION_KEYS}
    return {**fields, **{field: record[column] for field, column in columns.items()}}


def _left_unused(fields: dict, sample: Sample) -> Iterator[str]:
    """Names one would expect to be used, unless the sample holds their text all the same."""
    left = {key: fields[key] for key in _USED_KEYS if key in fields}
    left = {key: v.strip() if isinstance(v, str) else v for key, v in left.items()}
    held = {text.strip() for text in strings_of(sample.content)} if any(left.values()) else ()
    names = [key for key, v in left.items() if v and not (isinstance(v, str) and v in held)]
    if names:
        yield f"not used: {', '.join(names)}; --columns says which columns are meant"


def _oddities(sample: Sample) -> Iterator[str]:
    """What was read as it stands, though it may not have been meant so."""
    if any(_WIDE_TAG.search(t) for t in (sample.question, sample.thinking, sample.answer)):
        yield "＜think＞ with full-width brackets is read as text; write <think>"
    earlier = [message for message in sample.history if message["role"] != "system"]
    if any(message["role"] == "system" for message in (*sample.history, *sample.tool_turns)):
        yield "a system message among the turns is read as one of them"
    if earlier and earlier[0]["role"] == "assistant":
        yield "the conversation begins with a turn of the assistant"
    if any(message["role"] == "user" and not message["content"] for message in earlier):
        yield "a turn of the user in the history is empty"


_SURROGATE = re.compile("[\ud800-\udfff]")


def checked(sample: Sample) -> Sample:
    """The sample itself if it can be learnt from and written as UTF-8."""
    if not sample.question:
        raise BrokenRecordError("empty question")
    if not sample.answer and not sample.tool_calls:
        raise BrokenRecordError("empty answer")
    for text in strings_of(sample.content):
        if "\0" in text:
            raise BrokenRecordError("NUL character (is the file UTF-16 without a byte order mark?)")
        if _SURROGATE.search(text):
            raise BrokenRecordError("lone surrogate (half of a character, \\ud800 to \\udfff)")
    return sample


def strings_of(value: Any, depth: int = 0) -> Iterator[str]:
    """All strings of a nested value, keys included."""
    if isinstance(value, str):
        yield value
    elif depth > MAX_DEPTH:
        raise BrokenRecordError(f"nested deeper than {MAX_DEPTH} levels")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_of(key, depth)
            yield from strings_of(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_of(item, depth + 1)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise BrokenRecordError(f"{type(value).__name__} is no value of JSON")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "binary data")


def _first(record: dict, keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if record.get(key) is not None), None)


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BrokenRecordError(f"{name} must be text, not {_kind(value)}")
    return value


def _parsed(value: Any, name: str) -> Any:
    """A structure that a CSV cell or a Parquet column holds as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BrokenRecordError(f"{name} is text that is not JSON") from None


def _pair(record: dict) -> Sample:
    """A question and an answer in columns of their own, a list of messages in either included."""
    question_key, answer_key = _first(record, QUESTION_KEYS), _first(record, ANSWER_KEYS)
    if question_key is None or answer_key is None:
        missing = "question" if question_key is None else "answer"
        names = clean_line(", ".join(record), 200)
        raise BrokenRecordError(f"no column for the {missing}; there is: {names}")
    question, answer = record.pop(question_key), record.pop(answer_key)
    if isinstance(question, list) or isinstance(answer, list):
        question = question if isinstance(question, list) else [_message("user", question)]
        answer = answer if isinstance(answer, list) else [_message("assistant", answer)]
        return _conversation([*question, *answer], record)
    question = _text(question, question_key).strip()
    if question_key in ("instruction", "prompt"):
        extra = _text(record.pop("input", None), "input").strip()
        question = f"{question}\n{extra}".strip()
    thinking, answer = _reasoned(_text(answer, answer_key), record)
    return Sample(
        question=question,
        thinking=thinking,
        answer=answer,
        system=_text(record.pop("system", None), "system").strip(),
        history=_alpaca_history(record.pop("history", None)),
    )


def _message(role: str, content: Any) -> dict:
    return {"role": role, "content": content}


def _reasoned(text: str, fields: dict) -> tuple[str, str]:
    """(thinking, answer) with the reasoning inline or in a field beside the text, not in both."""
    inline, answer = split_thinking(text)
    key = _first(fields, THINKING_KEYS)
    beside = _beside(fields)
    if inline and beside:
        raise BrokenRecordError(f"reasoning is given twice: inline and as {key}")
    return inline or beside, answer


def _beside(fields: dict, keys: Sequence[str] = THINKING_KEYS) -> str:
    """Take the reasoning that has a field of its own; some sets keep the tags in it."""
    key = _first(fields, keys)
    text = _text(fields.pop(key), key).strip() if key else ""
    if not _TAG.search(text):
        return text
    thinking, rest = split_thinking(text)
    if rest:
        raise BrokenRecordError(f"text after the reasoning in {key}")
    return thinking


def _alpaca_history(history: Any) -> tuple[dict, ...]:
    """Alpaca's list of [question, answer] pairs as messages."""
    messages = []
    for pair in _parsed(history, "history") or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BrokenRecordError("history must be a list of [question, answer] pairs")
        messages.append(_message("user", _text(pair[0], "history")))
        messages.append(_assistant({"content": pair[1]}))
    return tuple(messages)


def _tools(record: dict) -> str:
    tools = record.get("tools")
    parsed = _parsed(tools, "tools") if tools else []
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise BrokenRecordError("tools must be a list of objects")
    list(strings_of(parsed))  # for its check of the depth
    if not parsed:
        return ""
    return tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)


def _difficulty(record: dict) -> int | None:
    """The stated difficulty; a scale other than 1 to 4 is not ours and counts as not stated."""
    value = record.get("difficulty")
    if isinstance(value, str) and value.strip() in ("1", "2", "3", "4"):
        return int(value)
    return value if type(value) is int and 1 <= value <= 4 else None


def _conversation(turns: Any, record: dict) -> Sample:
    """Messages or ShareGPT turns as a sample of their last assistant turn, to which the record's
    reasoning belongs where no turn has its own."""
    if not isinstance(turns, list) or not turns:
        raise BrokenRecordError("a conversation must be a list of turns")
    messages = [_turn(turn) for turn in turns]
    system = _text(record.pop("system", None), "system").strip()
    if messages[0]["role"] == "system":
        if system:
            raise BrokenRecordError("system prompt given twice: as a column and as a message")
        system = messages.pop(0)["content"].strip()
    if not messages or messages[-1]["role"] != "assistant":
        raise BrokenRecordError("the conversation does not end with a turn of the assistant")
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise BrokenRecordError("the conversation has no turn of the user")
    final = messages[-1]
    reasoned = any("reasoning_content" in message for message in messages)
    beside = [key for key in _THINKING_BESIDE_TURNS if isinstance(record.get(key), str)]
    return Sample(
        question=messages[asked[-1]]["content"].strip(),
        thinking=final.get("reasoning_content", "") if reasoned else _beside(record, beside),
        answer=final["content"],
        system=system,
        history=tuple(messages[: asked[-1]]),
        tool_turns=tuple(messages[asked[-1] + 1 : -1]),
        tool_calls=tuple(final.get("tool_calls", ())),
    )


def _turn(turn: Any) -> dict:
    """One turn of any form as a chat-template message."""
    if not isinstance(turn, dict):
        raise BrokenRecordError(f"a turn must be an object, not {_kind(turn)}")
    name = _first(turn, ("role", "from"))
    if name is None:
        raise BrokenRecordError("a turn without role")
    role = _ROLES.get(_text(turn[name], name).strip().lower())
    if role is None:
        raise BrokenRecordError(f"unknown role {clean_line(turn[name], 40)!r}")
    if role == "call":
        calls = _tool_calls(_parsed(turn.get("value", turn.get("content")), "function_call"))
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if role == "assistant":
        return _assistant({**turn})
    message = _message(role, _parts(turn)[0])
    if isinstance(turn.get("name"), str):
        message["name"] = turn["name"]
    if not message["content"] and role != "tool":
        raise BrokenRecordError(f"empty turn of the {role}")
    return message


def _assistant(turn: dict) -> dict:
    """An assistant turn: text, reasoning (inline, beside, or a typed part) and tool calls."""
    text, reasoning, calls = _parts(turn)
    # Where a part says which text is reasoning, a tag in another part is just text: `chat_tokens`
    # keeps it from becoming a real control token.
    thinking, answer = (reasoning, text.strip()) if reasoning else _reasoned(text, turn)
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            calls += _tool_calls(_parsed(turn[key], key))
    if not answer and not calls:
        raise BrokenRecordError("empty answer")
    message = _message("assistant", answer)
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = calls
    return message


def _parts(turn: dict) -> tuple[str, str, list[dict]]:
    """(text, reasoning, tool calls) of a turn whose content is text or a list of typed parts."""
    content = turn[key] if (key := _first(turn, ("content", "value"))) else None
    if not isinstance(content, list):
        return _text(content, "content"), "", []
    texts, reasonings, calls = [], [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        keys = ("value", str(kind), "text", "content")
        field = _first(part, keys) if isinstance(part, dict) else None
        value = part[field] if field else None
        if kind == "text":
            texts.append(_text(value, "a text part"))
        elif kind in ("reasoning", "thinking"):
            reasonings.append(_text(value, "a reasoning part"))
        elif kind == "tool_call":
            calls += _tool_calls(_parsed(value, "tool_call"))
        else:
            raise BrokenRecordError(f"a part of type {clean_line(str(kind), 40)!r} can't be used")
    return "".join(texts), "\n".join(reasonings).strip(), calls


def _tool_calls(calls: Any) -> list[dict]:
    """Tool calls in the form of the chat templates, from OpenAI's or ShareGPT's."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BrokenRecordError("a tool call must have a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(arguments, "tool call arguments")
        arguments = {} if arguments is None else arguments
        found.append(
            {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return found
