"""A record of JSON, Parquet or CSV becomes a `Sample`.

Forms of records: Alpaca, ShareGPT, messages, prompt/completion, question/reasoning/answer.
White space around a question, a reasoning or an answer is not content and is dropped; nothing else is.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from finetuning.common.text import clean_line
from finetuning.readers.sample import (
    THINK_TAG,
    WIDE_TAG,
    BrokenRecordError,
    Sample,
    checked,
    split_thinking,
    strings_of,
)

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
    return sample, [*_left_unused(fields, sample), *oddities(sample)]


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


def oddities(sample: Sample) -> Iterator[str]:
    """What was read as it stands, though it may not have been meant so."""
    if any(WIDE_TAG.search(t) for t in (sample.question, sample.thinking, sample.answer)):
        yield "＜think＞ with full-width brackets is read as text; write <think>"
    earlier = [message for message in sample.history if message["role"] != "system"]
    if any(message["role"] == "system" for message in (*sample.history, *sample.tool_turns)):
        yield "a system message among the turns is read as one of them"
    if earlier and earlier[0]["role"] == "assistant":
        yield "the conversation begins with a turn of the assistant"
    if any(message["role"] == "user" and not message["content"] for message in earlier):
        yield "a turn of the user in the history is empty"


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
    if not THINK_TAG.search(text):
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
    # Where a part says which text is reasoning, a tag in another part is just text: `tokenization.py`
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
