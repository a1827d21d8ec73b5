"""Turns of a conversation, in whatever form, become messages as chat templates take them."""

import json
from typing import Any

from finetuning.common.text import clean_line
from finetuning.readers.fields import Fields, Notes
from finetuning.readers.flags import carries_no_loss
from finetuning.readers.names import is_record, meaning
from finetuning.readers.reasoning import has_marks, split_reasoning
from finetuning.readers.sample import THINK_TAG, BrokenRecordError
from finetuning.readers.values import NOTHING, is_absent, kind, parsed

_ROLES = {
    "system": "system", "developer": "system", "系统": "system", "user": "user", "human": "user",
    "用户": "user", "客户": "user", "学生": "user", "人类": "user", "提问者": "user",
    "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "bot": "assistant", "ai": "assistant", "chatgpt": "assistant",
    "助手": "assistant", "助理": "assistant", "机器人": "assistant", "客服": "assistant", "专家": "assistant",
    "模型": "assistant", "function_call": "call", "tool_call": "call", "tool": "tool", "observation": "tool",
    "function": "tool", "tool_response": "tool", "工具": "tool",
}  # fmt: skip
_ROLE_KEYS = ("role", "from", "speaker", "sender", "角色")
_TEXT_KEYS = ("content", "value", "text", "message", "utterance", "内容", "文本")
_MEDIA_PARTS = (
    "image",
    "image_url",
    "input_image",
    "audio",
    "input_audio",
    "video",
    "video_url",
    "file",
)


def message(role: str, content: str) -> dict:
    """A message as chat templates take it."""
    return {"role": role, "content": content}


def are_turns(value: Any) -> bool:
    """Whether a list holds the turns of one conversation rather than records."""
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(turn, dict) for turn in value)
    ):
        return False
    with_roles = all(any(key in turn for key in _ROLE_KEYS) for turn in value)
    return with_roles and not is_record(tuple(value[0]))  # a record may say where it is `from`


def messages_of(turns: Any, notes: Notes) -> list[dict]:
    """All messages of a conversation. Turns are objects with a role, or pairs of a question and an answer."""
    found: list[dict] = []
    for turn in turns:
        if (
            isinstance(turn, (list, tuple))
            and len(turn) == 2
            and all(isinstance(t, str) for t in turn)
        ):
            found += [
                _alone(turn[0], "a turn", notes),
                assistant({"content": turn[1]}, notes),
            ]
            continue
        if not isinstance(turn, dict):
            raise BrokenRecordError(f"a turn must be an object, not {kind(turn)}")
        fields = Fields(turn)
        name = fields.first_of(_ROLE_KEYS)
        if name is None and fields.has("question") and fields.has("answer"):
            found += _pair_of_turns(fields, notes)
        else:
            found.append(_turn(fields, name, notes))
        notes.add(fields, "turn: ")
    return found


def _alone(question: Any, name: str, notes: Notes) -> dict:
    """A question that stands by itself, as a message."""
    fields = Fields({name: question})
    made = message("user", fields.text(name))
    notes.add(fields)
    return made


def _pair_of_turns(fields: Fields, notes: Notes) -> list[dict]:
    """A question and its answer in one turn, as in {"human": …, "assistant": …}."""
    found = []
    if key := fields.first("system"):
        found.append(message("system", fields.text(key).strip()))
    question, answer = fields.first_text("question"), fields.first_text("answer")
    if question is None or answer is None:
        raise BrokenRecordError(f"empty turn of the {'user' if question is None else 'assistant'}")
    found.append(message("user", fields.text(question).strip()))
    content = fields.text(answer)
    found.append(_assistant(fields, (content, "", []), notes))
    return found


def _turn(fields: Fields, name: str | None, notes: Notes) -> dict:
    """One turn of any form as a message; `name` is the key of its role."""
    if name is None:
        keys = clean_line(", ".join(fields.names()), 100)
        raise BrokenRecordError(f"a turn without role; its keys are: {keys}")
    role = _role(fields.text(name))
    if role == "call":
        key = fields.first_of(_TEXT_KEYS)
        calls = tool_calls(parsed(fields.take(key) if key else None, "function_call"))
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if role == "assistant":
        return _assistant(fields, _parts(fields, notes), notes)
    carries_no_loss(fields)  # neither does a question or a tool's answer anyway
    made = message(role, _parts(fields, notes)[0])
    if isinstance(fields.peek("name"), str):
        made["name"] = fields.take("name")
    if not made["content"] and role != "tool":
        raise BrokenRecordError(f"empty turn of the {role}")
    return made


def _role(text: str) -> str:
    role = _ROLES.get(text.strip().lower())
    meant = None if role else meaning(text)
    if meant:
        role = {"question": "user", "answer": "assistant", "system": "system"}.get(meant.role)
    if role is None:
        raise BrokenRecordError(f"unknown role {clean_line(text, 40)!r}")
    return role


def assistant(turn: dict, notes: Notes) -> dict:
    """A turn of the assistant without its role."""
    fields = Fields(turn)
    made = _assistant(fields, _parts(fields, notes), notes)
    notes.add(fields, "turn: ")
    return made


def _assistant(fields: Fields, parts: tuple[str, str, list[dict]], notes: Notes) -> dict:
    """An assistant turn: text, reasoning (inline, beside, or a typed part) and tool calls."""
    text, reasoning, calls = parts
    # Where a part says which text is reasoning, a tag in another part is just text: `tokenization.py`
    # keeps it from becoming a real control token.
    thinking, answer = (reasoning, text.strip()) if reasoning else reasoned(text, fields)
    for key in ("tool_calls", "function_call"):
        if value := fields.take(key):
            calls += tool_calls(parsed(value, key))
    if not answer and not calls:
        raise BrokenRecordError("empty answer")
    made = message("assistant", answer)
    if thinking:
        made["reasoning_content"] = thinking
    if calls:
        made["tool_calls"] = calls
    if said := carries_no_loss(fields):
        made["loss"] = False
        fields.remark(f"a turn with {said} carries no loss")
    return made


def reasoned(text: str, fields: Fields) -> tuple[str, str]:
    """(thinking, answer) with the reasoning inline or in a field beside the text; twice only if equal."""
    key = fields.first_text("thinking")
    inline, answer, told = split_reasoning(text, labels=key is None)
    for odd in told:
        fields.remark(odd)
    if key is None or (inline and key in fields.layout.explaining):
        return inline, answer
    beside = reasoning_in(fields, key)
    if inline and beside and inline != beside:
        raise BrokenRecordError(f"reasoning is given twice: inline and as {key}")
    return inline or beside, answer


def reasoning_in(fields: Fields, key: str) -> str:
    """Take the reasoning that has a field of its own; some sets keep the marks in it."""
    text = fields.steps(key)
    if text in NOTHING and not fields.is_ruled("thinking"):
        fields.remark(f"“{text}” in {key} is read as no value")
        return ""
    if key in fields.layout.explaining and text:
        fields.remark(
            f"{key} is read as the reasoning; --columns thinking NAME names another column"
        )
    if not has_marks(text):
        return text
    tags = list(THINK_TAG.finditer(text))
    if len(tags) == 1 and not tags[0][1] and not text[: tags[0].start()].strip():
        return text[tags[0].end() :].strip()  # its closing went with the answer
    thinking, rest, _ = split_reasoning(text, labels=False)
    if tags and rest:
        raise BrokenRecordError(f"text after the reasoning in {key}")
    return thinking if thinking and not rest else text if not tags else thinking


def _parts(fields: Fields, notes: Notes) -> tuple[str, str, list[dict]]:
    """(text, reasoning, tool calls) of a turn whose content is text or a list of typed parts."""
    key = fields.first_of(_TEXT_KEYS)
    content = fields.peek(key) if key else None
    if not isinstance(content, list):
        return fields.text(key) if key else "", "", []
    fields.take(key)
    texts, reasonings, calls = [], [], []
    for part in content:
        form = part.get("type") if isinstance(part, dict) else kind(part)
        keys = ("value", str(form), "text", "content")
        fitting = Fields(part) if isinstance(part, dict) else Fields({})
        name = fitting.first_of(keys)
        fitting.take("type")
        if form == "text":
            texts.append(fitting.text(name) if name else "")
        elif form in ("reasoning", "thinking"):
            reasonings.append(fitting.steps(name) if name else "")
        elif form == "tool_call":
            calls += tool_calls(parsed(fitting.take(name) if name else None, "tool_call"))
        elif form in _MEDIA_PARTS:
            raise BrokenRecordError(
                f"a part of type {form!r} holds what a text model can't see or hear"
            )
        else:
            raise BrokenRecordError(f"a part of type {clean_line(str(form), 40)!r} can't be used")
        notes.add(fitting, "part of a turn: ")
    return "".join(texts), "\n".join(reasonings).strip(), calls


def tool_calls(calls: Any) -> list[dict]:
    """Tool calls in the form of the chat templates, from OpenAI's or ShareGPT's."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BrokenRecordError("a tool call must have a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parsed(arguments, "tool call arguments")
        arguments = {} if arguments is None else arguments
        found.append(
            {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return found


def earlier_turns(history: Any, notes: Notes) -> tuple[dict, ...]:
    """Alpaca's list of [question, answer] pairs, or turns with a role, as messages."""
    value = parsed(history, "history") or []
    if are_turns(value):
        return tuple(messages_of(value, notes))
    messages = []
    for pair in value if isinstance(value, list) else [None]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BrokenRecordError("history must be a list of [question, answer] pairs")
        messages.append(_alone(pair[0], "history", notes))
        messages.append(assistant({"content": pair[1]}, notes))
    return tuple(messages)


def tools_text(tools: Any) -> Any:
    """The tools on offer as they were written, and as a list."""
    listed = parsed(tools, "tools") if not is_absent(tools) else []
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise BrokenRecordError("tools must be a list of objects")
    if not listed:
        return "", []
    return (tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)), listed
