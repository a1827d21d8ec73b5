"""Whether the chat template has put all of a conversation into its text, and nothing else.

Neutral words in a conversation of the same shape are rendered once; the text between them is the
template's own, its *frame*. A document is right where its text is the frame with the conversation's
own words in their places, apart from white space at their ends. So nothing is lost, cut, escaped, repeated or
moved without being seen, and a document costs a comparison. What a template makes of tools and calls
depends on them: there every name, key and value has to stand in the text, as it is or as JSON. A short one
may stand there by chance, so the neutral conversation has neutral tools and calls as well: each of their
words has to stand in its text.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count, pairwise
from typing import Any, NamedTuple

from finetuning.data.chat_template import CLOSE, OPEN, ChatFormat, opens_thinking

MOST_FRAMES = 2_000  # that are remembered
_WORD = re.compile(r"Zq(\d{6})w")
_SPACE = re.compile(r"\s*")
_NAMES = {"system": "the system text", "user": "a turn of the user", "tool": "an answer of a tool"}
# What a JSON Schema says about its values: templates may say it in other words.
_SCHEMA_WORDS = {
    "type", "function", "name", "description", "parameters", "properties", "required", "enum", "items",
    "object", "array", "string", "number", "integer", "boolean", "null", "strict",
}  # fmt: skip


class RenderingFault(ValueError):
    """What the template refuses, loses or changes of a sample."""


@dataclass(frozen=True)
class Turn:
    """An assistant's turn, the messages before it, and the tools on offer."""

    before: list[dict]
    message: dict
    tools: list | None

    @cached_property
    def messages(self) -> list[dict]:
        """The conversation up to and with this turn."""
        return [*self.before, self.message]

    @cached_property
    def tools_text(self) -> str:
        """The tools as JSON; empty where there are none."""
        return json.dumps(self.tools) if self.tools else ""

    @property
    def thinking(self) -> str:
        """The turn's reasoning."""
        return self.message.get("reasoning_content", "")


class _Frame(NamedTuple):
    """A template's own text: parts[i] stands before field number fields[i], the last part at the end."""

    parts: tuple[str, ...]
    fields: tuple[int, ...]


class Verifier:
    """Compares rendered conversations with what they were made of.

    Args:
        texts: renders a turn: (prompt, completion).
        form: what is known about the template.
    """

    def __init__(self, texts: Callable[[Turn], tuple[str, str]], form: ChatFormat) -> None:
        self._texts, self._form = texts, form
        self._frames: dict[tuple, tuple[_Frame | None, _Frame | None]] = {}

    def check(self, turn: Turn, prompt: str, completion: str) -> None:
        """Raise RenderingFault, with the reason, where the texts are not those of the turn."""
        self._check_think_blocks(turn, prompt, completion)
        shape = _shape(turn)
        known = self._frames.get(shape)
        if known is not None:
            try:
                return self._compare(turn, known, prompt, completion)
            except RenderingFault:
                pass  # a template may write the date: once more with a frame of this moment
        frames = self._made_frames(turn)
        if len(self._frames) >= MOST_FRAMES:
            self._frames.clear()
        self._frames[shape] = frames
        self._compare(turn, frames, prompt, completion)

    def _check_think_blocks(self, turn: Turn, prompt: str, completion: str) -> None:
        """Exactly one think block where there is reasoning, at most one where there is none."""
        form = self._form
        opened, closed = completion.count(OPEN) + opens_thinking(prompt), completion.count(CLOSE)
        thinks = bool(turn.thinking.strip())
        if thinks and form.closes:
            raise RenderingFault(
                "it has reasoning, but the chat template's prompt closes the think block before the model "
                "writes; use the template of a model that thinks"
            )
        block = completion.partition(CLOSE)[0].rpartition(OPEN)[2]
        if thinks and turn.thinking.strip() not in block:
            raise RenderingFault("the chat template drops or changes the reasoning")
        own_marks = form.reasoning == "field" and opened == closed == 0
        wanted = (1,) if thinks and not own_marks else (0, 1)
        if opened != closed or opened not in wanted:
            raise RenderingFault(
                f"the chat template makes {opened} opened and {closed} closed think blocks of it, not one"
            )

    def _compare(
        self,
        turn: Turn,
        frames: tuple[_Frame | None, _Frame | None],
        prompt: str,
        completion: str,
    ) -> None:
        fields = _fields(turn.messages)
        for text, frame, is_prompt in zip((prompt, completion), frames, (True, False), strict=True):
            if frame is not None:
                _check_frame(text, frame, fields, turn.messages)
            elif is_prompt:
                _check_loosely(text, turn.before)
            else:
                _check_loosely(text.rpartition(CLOSE)[2], [turn.message])
        for forms in _tool_words(turn.tools_text) if turn.tools else ():
            if not any(form in prompt for form in forms):
                raise RenderingFault(f"the chat template drops of its tools: {_cut(forms[0])}")

    def _made_frames(self, turn: Turn) -> tuple[_Frame | None, _Frame | None]:
        """Frames of prompt and completion; None where calls or tools make them depend on the sample."""
        neutral = _neutral(turn)
        prompt, completion = map(_frame, self._texts(neutral))
        called = any(message.get("tool_calls") for message in turn.before)
        _check_order(prompt, turn.before)
        _check_completion(completion, turn)
        if turn.tools or called:
            _check_words("of its tools", prompt.parts, neutral.tools, turn.tools)
            for theirs, ours in zip(neutral.before, turn.before, strict=True):
                _check_calls(prompt.parts, theirs, ours)
        else:
            _check_roles(prompt, turn.before)
        _check_calls(completion.parts[-1:], neutral.message, turn.message)
        return (
            None if turn.tools or called else prompt,
            None if turn.message.get("tool_calls") else completion,
        )


# ---- the parts of a conversation ----------------------------------------------------------------


def _state(text: str | None) -> int:
    """0: nothing, 1: white space only, 2: text."""
    return 0 if not text else 2 if text.strip() else 1


def _shape(turn: Turn) -> tuple:
    """All that a template's own text may depend on, other than the words."""
    called = any("tool_calls" in message for message in turn.messages)
    return (
        _neutral_tools(turn.tools_text) if turn.tools else "",
        json.dumps(_neutral_calls(turn.messages)) if called else "",
        *(
            (
                message["role"],
                _state(message["content"]),
                _state(message.get("reasoning_content")),
                "name" in message,
            )
            for message in turn.messages
        ),
    )


def _fields(messages: Sequence[dict]) -> list[str]:
    """Three texts of each message, some of them empty: content, reasoning, name."""
    return [
        text
        for message in messages
        for text in (
            message["content"],
            message.get("reasoning_content", ""),
            message.get("name", ""),
        )
    ]


def _neutral(turn: Turn) -> Turn:
    """The same conversation with a word of its own in the place of each text, tools and calls included."""
    messages, calls = [], _neutral_calls(turn.messages)
    for number, message in enumerate(turn.messages):
        message = dict(message)
        if "tool_calls" in message:
            message["tool_calls"] = calls[number]
        for place, key in enumerate(("content", "reasoning_content", "name")):
            if _state(message.get(key)) == 2:
                message[key] = f"Zq{3 * number + place:06d}w"
        messages.append(message)
    return Turn(
        messages[:-1],
        messages[-1],
        json.loads(_neutral_tools(turn.tools_text)) if turn.tools else None,
    )


def _neutral_calls(messages: Sequence[dict]) -> list[list[dict]]:
    """The calls of each message, with a word or number of its own for every name, key and value."""
    numbers = count(730_000_000)  # as whole numbers no template writes

    def word(value: Any) -> Any:
        if isinstance(value, dict):
            return {word(key): word(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [word(item) for item in value]
        if value is None or isinstance(value, bool) or value == "" or str(value).isspace():
            return value
        number = next(numbers)
        return f"Zc{number}w" if isinstance(value, str) else type(value)(number)

    def neutral(call: dict) -> dict:
        function = call["function"]
        said = {key: word(function[key]) for key in ("name", "arguments") if key in function}
        return {**call, "function": {**function, **said}}

    return [[neutral(call) for call in message.get("tool_calls", ())] for message in messages]


@lru_cache(maxsize=64)
def _neutral_tools(tools: str) -> str:
    """The tools (JSON) with a word for each of their texts and for each name of a parameter, the same for the
    same: what is required is a name. The words of JSON Schema stay, as templates ask for them."""
    words: dict[str, str] = {}

    def word(value: Any, *, named: bool = False) -> Any:
        if isinstance(value, dict):
            return {
                word(key) if named else key: word(item, named=key == "properties" and not named)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [word(item) for item in value]
        if not isinstance(value, str) or value in _SCHEMA_WORDS or not value.strip():
            return value
        return words.setdefault(value, f"Zt{len(words):06d}w")

    return json.dumps(word(json.loads(tools)))


def _frame(text: str) -> _Frame:
    parts = _WORD.split(text)
    return _Frame(tuple(p.strip() for p in parts[::2]), tuple(map(int, parts[1::2])))


def _name_of(field: int, messages: Sequence[dict]) -> str:
    message, last = messages[field // 3], field // 3 == len(messages) - 1
    if field % 3 == 2:
        return "a name"
    if field % 3 == 1:
        return "the reasoning" if last else "the reasoning of an earlier turn"
    earlier = "the answer" if last else "an earlier answer"
    return _NAMES.get(message["role"], earlier)


# ---- is the frame itself right? -------------------------------------------------------------------


def _wanted(messages: Sequence[dict], first: int = 0) -> list[int]:
    """Numbers of the contents that have to be there; `first` is the number of the first message."""
    return [3 * i for i, m in enumerate(messages, first) if _state(m["content"]) == 2]


def _check_order(frame: _Frame, before: Sequence[dict]) -> None:
    """All contents stand in the prompt, in their order; a system text may stand where it likes."""
    places = {field: place for place, field in reversed(list(enumerate(frame.fields)))}
    last = -1
    for field in _wanted(before):
        if field not in places:
            raise RenderingFault(f"the chat template drops {_name_of(field, [*before, {}])}")
        if before[field // 3]["role"] == "system":
            continue
        if places[field] < last:
            raise RenderingFault("the chat template changes the order of the turns")
        last = places[field]


def _check_roles(frame: _Frame, before: Sequence[dict]) -> None:
    """Earlier turns of the assistant begin as the generation prompt does, think tags aside."""
    heads = {}
    for part, (left, right) in zip(frame.parts[1:], pairwise((*frame.fields, -1)), strict=True):
        asked = before[left // 3]["role"] == "user"
        answered = right < 0 or before[right // 3]["role"] == "assistant"
        if asked and answered and right // 3 in (left // 3 + 1, -1):
            heads[right] = "".join(part.replace(OPEN, "").replace(CLOSE, "").split())
    final = heads.pop(-1, None)
    for head in heads.values() if final is not None else ():
        if not (head.startswith(final) or final.startswith(head)):
            raise RenderingFault("the chat template swaps the roles of the turns")


def _check_completion(frame: _Frame, turn: Turn) -> None:
    """The reasoning once, then a mark, then the answer once, and nothing of other turns."""
    number = len(turn.before)
    wanted = [3 * number + 1] if turn.thinking.strip() else []
    wanted += _wanted([turn.message], number)
    if missing := [field for field in wanted if field not in frame.fields]:
        raise RenderingFault(f"the chat template drops {_name_of(missing[0], turn.messages)}")
    if list(frame.fields) != wanted:
        raise RenderingFault("the chat template repeats or moves parts of the turn")
    if len(wanted) == 2 and not frame.parts[1]:
        raise RenderingFault("the chat template writes no mark between reasoning and answer")


# ---- is the document in its frame? ----------------------------------------------------------------


def _check_frame(text: str, frame: _Frame, fields: list[str], messages: Sequence[dict]) -> None:
    """The text is the frame's parts with the fields between them, white space at their borders aside."""
    at, skip = 0, _SPACE.match
    for part, number in zip(frame.parts, (*frame.fields, -1), strict=True):
        if part:
            at = skip(text, at).end()
            if not text.startswith(part, at):
                raise RenderingFault(
                    "the chat template writes something else around it than around other samples, or "
                    f"changes it, near {_cut(text[max(0, at - 20) : at + 20])}"
                )
            at += len(part)
        if number >= 0:
            field = fields[number].strip()
            at = skip(text, at).end()
            if not text.startswith(field, at):
                raise RenderingFault(
                    f"the chat template drops or changes {_name_of(number, messages)}, "
                    f"near {_cut(_differing(text, at, field))}"
                )
            at += len(field)
    if skip(text, at).end() != len(text):
        raise RenderingFault(f"the chat template adds to it: {_cut(text[at:])}")


def _differing(text: str, at: int, field: str) -> str:
    """The field from shortly before the first character that is not in its place."""
    same = next(
        (i for i, letter in enumerate(field) if text[at + i : at + i + 1] != letter), len(field)
    )
    return field[max(0, same - 10) : same + 20]


def _cut(text: str) -> str:
    return json.dumps(text if len(text) <= 40 else f"{text[:40]}…", ensure_ascii=False)


# ---- tools and calls ------------------------------------------------------------------------------


def _check_words(of: str, parts: Sequence[str], neutral: Any, own: Any) -> None:
    """Every word of neutral tools or calls stands in the neutral text; a missing one is told by its own."""
    for forms, told in zip(_leaves(neutral), _leaves(own), strict=True):
        is_word = forms != told  # what is not replaced is looked for in the document only
        if is_word and not any(form in part for form in forms for part in parts):
            raise RenderingFault(f"the chat template drops {of}: {_cut(told[0])}")


def _check_calls(parts: Sequence[str], neutral: dict, own: dict) -> None:
    for theirs, ours in zip(neutral.get("tool_calls", ()), own.get("tool_calls", ()), strict=True):
        _check_words("of a tool call", parts, theirs["function"], ours["function"])


def _check_loosely(text: str, messages: Sequence[dict]) -> None:
    """All contents stand in the text, in order, and of every call its name, keys and values behind them."""
    at = 0
    for message in messages:
        role, content = message["role"], message["content"].strip()
        found = text.find(content, 0 if role == "system" else at)
        if found < 0:
            raise RenderingFault(f"the chat template drops or changes {_role_name(role)}")
        at = at if role == "system" else found + len(content)
        for call in message.get("tool_calls", ()):
            function = call["function"]
            for forms in (_forms(function["name"]), *_leaves(function["arguments"])):
                if not any(text.find(form, at) >= 0 for form in forms):
                    raise RenderingFault(
                        f"the chat template drops of a tool call: {_cut(forms[0])}"
                    )


def _role_name(role: str) -> str:
    return _NAMES.get(role, "an answer")


def _forms(value: Any) -> tuple[str, ...]:
    """How a value may stand in a text: as it is, as JSON, as JSON in ASCII."""
    if not isinstance(value, str):
        return (json.dumps(value), str(value))
    return (value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1])


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """The forms of every key and of every value that is no list or object."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield _forms(key)
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield _forms(value)


@lru_cache(maxsize=64)
def _tool_words(tools: str) -> tuple[tuple[str, ...], ...]:
    """The forms of all that tools (JSON) say, but for the words of JSON Schema itself."""
    leaves = dict.fromkeys(_leaves(json.loads(tools)))
    return tuple(forms for forms in leaves if forms[0] not in _SCHEMA_WORDS)
